//! Lets QEMU write a bounded sample of the geometry matrix into a folder, with a manifest, for the tests of the npm
//! package. The guest bytes come from the model, beside each image, as a raw file.
//!
//! `cargo run -p qcow2-testkit --example matrix -- FOLDER`
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test support: a failed step is a failed test")]

use std::path::PathBuf;

use qcow2_testkit::matrix::{Case, sample};
use qcow2_testkit::{Fixture, Qemu};

fn main() {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("the folder to write to"));
    let Some(qemu) = Qemu::find() else { return };
    let cases: Vec<_> = sample()
        .into_iter()
        .map(|geometry| {
            let name = geometry.name();
            let at = folder.join(&name);
            std::fs::create_dir_all(&at).unwrap();
            let image = Case { geometry, seed: 42 }.build_in(&qemu, Fixture::at(&at));
            let dump = |disk: &qcow2_testkit::Disk, file: &str| {
                let path = at.join(file);
                std::fs::write(&path, disk.read(0, disk.size() as usize)).unwrap();
                path
            };
            let snapshots: Vec<_> = image
                .snapshots
                .iter()
                .map(|s| serde_json::json!({ "name": s.name, "guest": dump(&s.disk, &format!("{}.raw", s.name)) }))
                .collect();
            serde_json::json!({
                "name": name,
                "path": image.path,
                "guest": dump(&image.disk, "guest.raw"),
                "snapshots": snapshots,
            })
        })
        .collect();
    std::fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&cases).unwrap()).unwrap();
}

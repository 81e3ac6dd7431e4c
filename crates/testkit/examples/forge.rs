//! Writes the forged images into a folder, with a manifest, for the tests of the npm package.
//!
//! `cargo run -p qcow2-testkit --example forge -- FOLDER`
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test support: a failed step is a failed test")]

use std::path::PathBuf;

use qcow2_testkit::malformed::{self, Stage};

fn main() {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("the folder to write to"));
    std::fs::create_dir_all(&folder).unwrap();
    let cases: Vec<_> = malformed::all()
        .into_iter()
        .map(|case| {
            let file = format!("{}.qcow2", case.name);
            case.built.bytes.write_to(&folder.join(&file));
            let (stage, cluster, snapshot) = match &case.stage {
                Stage::Open => ("open", None, None),
                Stage::Read(cluster) => ("read", Some(*cluster), None),
                Stage::Snapshot(name) => ("snapshot", None, Some(*name)),
                Stage::Bitmaps => ("bitmaps", None, None),
            };
            let cluster_bits = case.built.layout.cluster_bits;
            serde_json::json!({
                "name": case.name,
                "file": file,
                "stage": stage,
                "code": case.code,
                "position": cluster.map(|c| c << cluster_bits),
                "snapshot": snapshot,
            })
        })
        .collect();
    std::fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&cases).unwrap()).unwrap();
}

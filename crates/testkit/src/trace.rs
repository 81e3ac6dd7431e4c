//! The recorded installation: the block requests of a real system, in order.

use std::io::{Read, Write};
use std::path::PathBuf;

use crate::ops::Op;

/// Size in bytes of the disk that the installation was recorded on.
pub const DISK: u64 = 4 << 30;

const NAME: &str = "debian-install.trace.gz";

/// Where the recording is: the folder that `QCOW2_TRACES` names, or `../shared/traces` beside the project.
fn path() -> PathBuf {
    let folder = std::env::var_os("QCOW2_TRACES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/traces")),
        PathBuf::from,
    );
    folder.join(NAME)
}

/// The requests, or `None` with a visible line where the recording is not there.
#[track_caller]
pub fn load() -> Option<Vec<Op>> {
    let path = path();
    let Ok(packed) = std::fs::read(&path) else {
        let place = std::panic::Location::caller();
        let line = format!("SKIPPED {}:{}: no recording at {}\n", place.file(), place.line(), path.display());
        // Not eprintln: the test harness captures that.
        let _ = std::io::stderr().write_all(line.as_bytes());
        return None;
    };
    let mut text = String::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text).unwrap();
    Some(text.lines().map(request).collect())
}

fn request(line: &str) -> Op {
    let mut words = line.split(' ');
    let kind = words.next().unwrap();
    let mut number =
        || words.next().and_then(|w| w.parse().ok()).unwrap_or_else(|| panic!("request `{line}`"));
    match kind {
        "w" => Op::Write { offset: number(), len: number() },
        "z" => Op::Zero { offset: number(), len: number(), unmap: true },
        "d" => Op::Discard { offset: number(), len: number() },
        "f" => Op::Flush,
        _ => panic!("request `{line}`"),
    }
}

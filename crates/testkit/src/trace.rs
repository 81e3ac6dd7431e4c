//! The recorded installation: the block requests of a real system, in order.

use std::io::Read;
use std::path::PathBuf;

use qcow2_engine::Result;

use crate::ops::{Op, SECTOR, Target};
use crate::skip::skipped;

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
        skipped(format_args!("no recording at {}", path.display()));
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

/// The byte that request number `n` fills its range with: what qemu-io's `write -P` can write as well.
pub fn pattern(n: usize) -> u8 {
    (n % 255) as u8 + 1
}

/// Replays the requests on a target, one at a time, and flushes at the end.
///
/// # Errors
/// The target's.
pub fn replay(target: &dyn Target, requests: &[Op]) -> Result<()> {
    let mut data = buffer(requests);
    for (n, op) in requests.iter().enumerate() {
        run(target, n, op, &mut data)?;
    }
    target.flush()
}

/// Memory for the longest write of `requests`.
pub fn buffer(requests: &[Op]) -> Vec<u8> {
    let longest = requests.iter().map(|op| if let Op::Write { len, .. } = op { *len } else { 0 }).max();
    vec![0; longest.unwrap_or(0) as usize]
}

/// Runs request number `n`, whose data is made in `buffer`.
///
/// # Errors
/// The target's.
pub fn run(target: &dyn Target, n: usize, op: &Op, buffer: &mut [u8]) -> Result<()> {
    match *op {
        Op::Write { offset, len } => {
            let data = &mut buffer[..len as usize];
            data.fill(pattern(n));
            target.write(offset, data)
        }
        Op::Zero { offset, len, unmap } => target.write_zeroes(offset, len, unmap),
        Op::Discard { offset, len } => target.discard(offset, len),
        _ => target.flush(),
    }
}

/// The same requests as commands of qemu-io.
pub fn qemu_io_commands(requests: &[Op]) -> String {
    let mut out = String::new();
    for (n, op) in requests.iter().enumerate() {
        out += &match op {
            Op::Write { offset, len } => format!("write -q -P {} {offset} {len}\n", pattern(n)),
            Op::Zero { offset, len, .. } => format!("write -q -z -u {offset} {len}\n"),
            Op::Discard { offset, len } => format!("discard -q {offset} {len}\n"),
            _ => "flush\n".to_owned(),
        };
    }
    out + "flush\n"
}

/// What the disk contains after a replay.
pub struct Expected {
    /// Per sector: the byte it is full of.
    bytes: Vec<u8>,
    /// Per sector: discarded since, so it may be zero as well.
    loose: Vec<bool>,
}

impl Expected {
    /// After all of `requests`.
    pub fn after(requests: &[Op]) -> Self {
        let sectors = (DISK / SECTOR) as usize;
        let mut expected = Self { bytes: vec![0; sectors], loose: vec![false; sectors] };
        for (n, op) in requests.iter().enumerate() {
            let (offset, len) = match *op {
                Op::Write { offset, len } | Op::Zero { offset, len, .. } | Op::Discard { offset, len } => {
                    (offset, len)
                }
                _ => continue,
            };
            let range = (offset / SECTOR) as usize..((offset + len) / SECTOR) as usize;
            let discarded = matches!(op, Op::Discard { .. });
            if !discarded {
                expected.bytes[range.clone()].fill(if matches!(op, Op::Write { .. }) {
                    pattern(n)
                } else {
                    0
                });
            }
            expected.loose[range].fill(discarded);
        }
        expected
    }

    /// Fails with the first sector that contains something else.
    pub fn verify(&self, target: &dyn Target) {
        const STEP: usize = 2048;
        let mut buf = vec![0; STEP * SECTOR as usize];
        for first in (0..self.bytes.len()).step_by(STEP) {
            target.read(first as u64 * SECTOR, &mut buf).unwrap_or_else(|e| panic!("sector {first}: {e:?}"));
            for (sector, part) in (first..).zip(buf.chunks_exact(SECTOR as usize)) {
                let byte = part[0];
                let fine = byte == self.bytes[sector] || (byte == 0 && self.loose[sector]);
                assert!(
                    fine && part.iter().all(|b| *b == byte),
                    "sector {sector}: {:?}..., expected {}",
                    &part[..8],
                    self.bytes[sector]
                );
            }
        }
    }
}

impl std::fmt::Debug for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Expected").field("sectors", &self.bytes.len()).finish_non_exhaustive()
    }
}

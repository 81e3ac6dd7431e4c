//! Raw disks in compressed files, as `disk.raw.gz`, `disk.img.xz` or `disk.raw.zst`: a layer that is read front to back, in one pass and
//! with the memory of one decoder.
//!
//! What is decompressed is the disk, byte for byte. Whoever reads anything in front of what was read last starts over at the file's start:
//! right, and slow. A convert reads in guest order ([`qcow2_core::GuestSource::is_sequential`]).
//!
//! Sources: RFC 1952 (gzip), "The .xz File Format" 1.2.1, RFC 8878 (zstd).
#![forbid(unsafe_code)]

mod codec;
mod input;
mod inspect;
mod layer;
mod size;

pub use codec::Codec;
pub use inspect::{Inspection, inspect};
pub use layer::{Compressed, OpenOptions};

//! The qcow2 format: bytes to typed values and back, without I/O and without threads.
//!
//! The reference is QEMU's `docs/interop/qcow2.txt`; section names in these docs are its headings. All numbers
//! on disk are big-endian. Nothing here trusts its input: every parser gives a value or a [`FormatError`], and
//! allocates only what a limit allows.

#![forbid(unsafe_code)]

pub mod bitmap;
pub mod compressed;
pub mod error;
pub mod geometry;
pub mod header;
pub mod l1;
pub mod l2;
pub mod limits;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;
pub mod units;
pub mod words;

mod bytes;

pub use compressed::CompressedDescriptor;
pub use error::{FormatError, FormatResult};
pub use geometry::Geometry;
pub use header::{CompressionType, CryptMethod, Header};
pub use l1::L1Entry;
pub use l2::{L2Entry, L2Mapping};
pub use limits::Limits;
pub use snapshot::SnapshotRecord;
pub use subcluster::{SubclusterBitmap, SubclusterKind};
pub use units::{GuestOffset, HostOffset};

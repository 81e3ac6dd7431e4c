//! What knows disks and no format: files and devices behind one seam ([`storage`]), sources of guest data ([`source`]) and
//! parts of them ([`splice`], [`salvage`]), comparing two, and the errors, jobs and workers that every format shares.
//!
//! Nothing here names a format: a crate for one stands on this one, beside the others.

pub mod blocks;
pub mod chain;
pub mod check;
pub mod compare;
pub mod convert;
pub mod disk;
pub mod error;
mod extents;
pub mod front_to_back;
pub mod inspect;
pub mod job;
pub mod layer;
pub mod memory;
pub mod new_image;
pub mod parent_name;
pub mod parts;
pub mod random;
pub mod raw;
pub mod salvage;
pub mod source;
pub mod space;
pub mod splice;
pub mod storage;
pub mod walk;
pub mod workers;
mod write_behind;

pub use chain::Chain;
pub use disk::{DetectZeroes, Discard, Disk, DiskOptions, Durability};
pub use error::{Error, ErrorKind, Result, check_limit};
pub use job::Job;
pub use layer::Layer;
pub use memory::{Mem, MemMut};
pub use new_image::NewImage;
pub use raw::Raw;
pub use source::{Extent, ExtentKind, GuestSource};
pub use storage::{ReadStorage, Storage, StorageExt};
pub use write_behind::WriteBehind;

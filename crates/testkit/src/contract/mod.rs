//! What the implementations of a seam must keep, one suite for all of a kind: whoever adds a format or a storage runs it.

mod child;
mod disk;
mod layer;
mod storage;
mod writer;

pub use child::ChildContract;
pub use disk::DiskContract;
pub use layer::{LayerContract, Open};
pub use storage::{StorageContract, check_read_only};
pub use writer::WriterContract;

//! Persistent dirty bitmaps: keeping them current while the image is written to, and managing them.
//!
//! An enabled bitmap is loaded before the first write and marked in use in the file; every guest change sets its bits;
//! closing stores it and clears the mark. A crash leaves the mark: the bitmap is then inconsistent and good for nothing
//! but to be removed, never silently stale. Changes of the set of bitmaps write a new directory and switch to it.

mod copy;
mod directory;
mod extension;
mod in_place;
mod manage;
mod relocate;
mod stored;
mod tracked;

pub use crate::tracker::Bits;
pub use copy::CopyableBitmaps;

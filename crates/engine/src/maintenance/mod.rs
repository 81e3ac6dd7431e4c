//! Changes of an image as a whole, with nothing else going on: snapshots, and what else rewrites its tables.
//!
//! A [`Session`] has the image to itself: guest writes wait, guest reads go on. The policy of a change, its order and
//! its names, comes from above as a [`Plan`]; every byte and refcount is handled here. Between two barriers nothing
//! may rely on what was written since the first: a crash leaves the old image or the new one, and leaks. Snapshots
//! change everything at once: refcounts and tables are written beside the old ones, and one write of the header, inside
//! a sector, switches to them.

mod beside;
mod empty;
mod execute;
mod in_place;
mod plan;
mod resize;
mod session;
mod shrink;
mod tree;
mod vm_state;

pub use plan::{NewSnapshot, Plan, Record, Step, Tree};
pub use resize::ResizeOptions;
pub(crate) use session::{SECTOR, Session};

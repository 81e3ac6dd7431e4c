//! Host clusters and their refcounts: what is free, what is reserved, what waits until nobody uses it any more, and where the
//! image's own structures are. Knows the file and its geometry, and nothing of what guests see.

mod allocator;
mod fork;
mod forked;
mod moves;
mod overlap;
mod places;
mod quarantine;
mod ranges;
mod refcounts;
mod runs;
mod spare;

pub(crate) use allocator::{Allocation, Allocator, Wish, chunk_clusters};
pub(crate) use overlap::MetadataMap;
pub(crate) use quarantine::Unlinked;
pub(crate) use refcounts::{Refcounts, header_fields};

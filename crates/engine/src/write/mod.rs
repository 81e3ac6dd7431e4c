//! Writing to a qcow2 image: publish late, flush little.
//!
//! **Order.** A request that needs host clusters registers its guest clusters ([`crate::writer`]), takes clusters whose
//! refcount is already 1 ([`crate::alloc`]), writes COW and data in one request, and only then links the L2 entry. Until a
//! flush the link lives in memory.
//!
//! **Locks**, in the order in which they may be taken: `Writer::gate` (shared by guest requests, exclusive for
//! maintenance), `Writer::flushing`, `Writer::tables`, `Qcow2::mapping`, `Writer::alloc`, `Writer::metadata`. The
//! registry waits only while none of them but the gate is held.
//!
//! **After a crash.** A reference in the file never points to a cluster whose refcount in the file is 0: clusters come
//! from durable reservations, or the flush that writes the link syncs the refcount before it. References go before
//! refcounts: a cluster that lost its reference keeps its refcount until that loss is durable (`alloc/quarantine.rs`). Where
//! a link replaces bytes that are not zeroes, the new bytes are durable before the link. So a crash leaves at worst
//! leaked clusters: reservations, and clusters between the two steps.

mod active;
mod batch;
mod bitmaps;
mod cluster;
mod compressed;
mod cow;
mod flush;
mod header;
mod link;
mod overlap;
mod parts;
mod preallocate;
mod relocate;
mod request;
mod table;
mod writer;
mod zeroes;

pub(crate) use active::Active;
pub(crate) use header::Places;
pub(crate) use request::{Payload, Top};
pub(crate) use zeroes::give_up;

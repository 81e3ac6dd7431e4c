//! What has the image to itself: snapshots, bitmaps, another size, compaction, backing files. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod backing;
mod bitmaps;
mod compact;
mod contents;
mod management;
mod management_concurrent;
mod management_crash;
mod management_faults;
mod management_full;
mod resize;
mod snapshot_fork;
mod snapshots;

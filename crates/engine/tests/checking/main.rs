//! Damaged images: what a check finds, what a repair does, what is changed in place. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod amend;
mod check;
mod damage;
mod damaged_tables;
mod repair;
mod repair_snapshots;
mod repairing;

//! Guest writes: models, power cuts, faults, what the door lets through. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod concurrency;
mod crash;
mod create;
mod detect_zeroes;
mod door;
mod door_rules;
mod durable;
mod faults;
mod full_disk;
mod installation;
mod interop_write;
mod keys;
mod layout;
mod races;
// What is kept of a target that exists is POSIX alone, and much of it Linux's.
#[cfg(target_os = "linux")]
mod targets;
mod watched;
mod write_basic;
mod write_model;

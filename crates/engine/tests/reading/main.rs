//! Reading what is there: layers, chains, storages, devices. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod compare;
mod devices;
#[cfg(unix)]
mod direct;
mod edges;
mod everything;
mod interop;
mod layers;
mod lazy;
mod locks;
mod measure;
mod model_read;
mod salvage;
mod storage;

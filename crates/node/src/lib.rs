//! The Node addon: converts arguments, owns the threads, never holds logic.
//!
//! One [`runtime::Runtime`] per environment (the main thread, each `worker_threads` worker). JavaScript numbers
//! its requests; a request runs on the runtime's own worker pool, a long job on other threads, which are bounded, too; what
//! they return is queued and delivered to JavaScript in batches, one call for everything that is done by then.
//! Files, layers and images live here under numbers: what crosses is numbers and plain data.
//!
//! An environment that ends (process exit, `worker.terminate()`) runs the cleanup hook first: jobs are cancelled,
//! all threads joined, so nothing touches a caller's buffer or the environment afterwards.

#![allow(
    unreachable_pub,
    reason = "what JavaScript calls is exported by the napi attribute, not by its path"
)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod amend;
pub mod backing;
pub mod bitmaps;
mod boundary;
mod bytes;
pub mod check;
pub mod clone;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod create;
mod crew;
mod delivery;
pub mod encryption;
pub mod failure;
mod formats;
mod guard;
pub mod info;
pub mod inspect;
pub mod job;
pub mod keys;
pub mod map;
pub mod nbd;
pub mod nbd_client;
pub mod open;
pub mod overlay;
pub mod ovf;
#[cfg(feature = "panics")]
pub mod panics;
mod pool;
pub mod read;
mod resource;
pub mod runtime;
pub mod shape;
pub mod snapshots;
pub mod source;
pub mod spool;
pub mod streamed;
pub mod streams;
mod text;
pub mod tls;
mod watch;
pub mod watched;
pub mod write;

//! The server and the client, against each other, by hand, and against broken peers. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[cfg(unix)]
mod bad_servers;
#[cfg(unix)]
mod client;
#[cfg(unix)]
mod protocol;
#[cfg(unix)]
mod reconnect;
#[cfg(unix)]
mod server;
#[cfg(unix)]
mod storage;
#[cfg(unix)]
mod tls;

//! The server and the client, against each other, by hand, and against broken peers. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod bad_servers;
mod client;
mod protocol;
mod reconnect;
mod server;
mod storage;
mod tls;

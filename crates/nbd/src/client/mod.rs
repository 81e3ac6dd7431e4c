//! A client: an export of any server as a [`qcow2_core::Storage`].
//!
//! What a server says is bounded before anything is allocated for it, and whatever it says or does not say ends its connection at most, in
//! bounded time: see [`Times`].

mod connect;
mod connection;
mod handshake;
mod link;
mod replies;
mod storage;
pub mod uri;

pub use connection::{Connection, MAX_IN_FLIGHT, Times, Way, list};
pub use handshake::{Listed, MAX_EXPORTS};
pub use storage::{NbdStorage, PROTOCOL};
pub use uri::{Location, Place, is_location};

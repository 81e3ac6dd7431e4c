//! Operations on backing chains: what is in which layer changes, what the disk reads as does not.
//!
//! Both write guest data first, make it durable, and only then change what refers to it: the top's tables (commit
//! empties it) or its header (rebase names another backing file). At every moment before, between and after, the disk
//! reads the same; a crash leaves leaked clusters at worst. An overlay under a running image ([`overlay`]) is made when its backing
//! file is complete and durable.

mod commit;
mod overlay;
mod rebase;

pub use crate::create::Backing;
pub use commit::{CommitOptions, commit};
pub use rebase::{RebaseOptions, check_backing, rebase, set_backing};

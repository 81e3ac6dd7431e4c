//! Operations on backing chains: what is in which layer changes, what the disk reads as does not.
//!
//! Both write guest data first, make it durable, and only then change what refers to it: the top's tables (commit
//! empties it) or its header (rebase names another backing file). At every moment before, between and after, the disk
//! reads the same; a crash leaves leaked clusters at worst.

mod commit;
mod rebase;

pub use commit::{CommitOptions, commit};
pub use rebase::{Backing, RebaseOptions, check_backing, rebase, set_backing};

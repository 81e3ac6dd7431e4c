//! What can only be read, where something to write to is asked for.

use std::io;

use super::{ReadStorage, Storage};
use crate::{Mem, forward_storage};

/// A storage of what only reads: a layer takes it as any file. Writes fail as on a file system that is mounted read-only.
#[derive(Debug)]
pub struct ReadOnly<R>(pub R);

#[deny(clippy::missing_trait_methods, reason = "passed on: a new method must be, too")]
impl<R: ReadStorage> ReadStorage for ReadOnly<R> {
    forward_storage!(0: read_at len is_empty read_batch run_in allocated_bytes identity traits io_limits path operation
        is_transient lock forget arriving as_fd);
}

impl<R: ReadStorage> Storage for ReadOnly<R> {
    fn write_at(&self, _: Mem<'_>, _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

//! Reads tables ahead of whoever judges them, in order: the disk is busy while the processor is.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::{MemMut, Result, Storage, StorageExt};

/// Tables that a reader may be ahead.
const DEPTH: usize = 4;

/// Fewer tables than this are read where they are needed.
const MIN_TABLES: usize = 16;

/// Where the tables are.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) storage: &'a dyn Storage,
    /// Length of the file.
    pub(super) file_length: u64,
    /// Bytes of a table.
    pub(super) table_length: usize,
}

impl Source<'_> {
    /// Reads the table at `offset`. The part behind the end of the file is zeroes; a table that lies there as a whole is
    /// given as no bytes at all.
    fn read(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<()> {
        if offset >= self.file_length {
            buffer.clear();
            return Ok(());
        }
        buffer.resize(self.table_length, 0);
        self.storage.read_padded_at(MemMut::from(&mut buffer[..]), offset)
    }
}

/// Reads the tables at `offsets` and hands them to `judge` in order, with their index. A read that fails is handed over as
/// its error.
pub(super) fn for_each_table<E>(
    source: Source<'_>,
    offsets: &[u64],
    readers: usize,
    mut judge: impl FnMut(usize, Result<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    if readers == 0 || offsets.len() < MIN_TABLES {
        let mut buffer = Vec::new();
        for (index, &offset) in offsets.iter().enumerate() {
            let read = source.read(offset, &mut buffer);
            judge(index, read.map(|()| buffer.as_slice()))?;
        }
        return Ok(());
    }
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..readers)
            .map(|lane| {
                let (full, tables) = sync_channel(DEPTH);
                let (give_back, empty) = sync_channel(DEPTH + 1);
                let offsets = offsets.iter().skip(lane).step_by(readers);
                scope.spawn(move || read(source, offsets, &full, &empty));
                (tables, give_back)
            })
            .collect();
        // Leaving drops the channels' ends, which ends the readers.
        for (index, (tables, give_back)) in (0..offsets.len()).zip(lanes.iter().cycle()) {
            let Ok((read, buffer)) = tables.recv() else { break };
            judge(index, read.map(|()| buffer.as_slice()))?;
            let _ = give_back.try_send(buffer);
        }
        Ok(())
    })
}

type Table = (Result<()>, Vec<u8>);

fn read<'a>(
    source: Source<'_>,
    offsets: impl Iterator<Item = &'a u64>,
    full: &SyncSender<Table>,
    empty: &Receiver<Vec<u8>>,
) {
    for &offset in offsets {
        let mut buffer = empty.try_recv().unwrap_or_default();
        let read = source.read(offset, &mut buffer);
        if full.send((read, buffer)).is_err() {
            return;
        }
    }
}

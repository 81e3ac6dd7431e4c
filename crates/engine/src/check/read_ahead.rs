//! Reads tables ahead of whoever judges them, in order: the disk is busy while the processor is.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::{MemMut, Result, Storage, StorageExt};

/// Tables that a reader may be ahead.
const DEPTH: usize = 4;

/// Fewer tables than this are read where they are needed.
const MIN_TABLES: usize = 16;

/// Reads `length` bytes at each of `offsets` and hands them to `judge` in order, with their index. What lies behind the
/// end of the file reads as zeroes. A read that fails is handed over as its error.
pub(super) fn for_each_table<E>(
    storage: &dyn Storage,
    offsets: &[u64],
    length: usize,
    readers: usize,
    mut judge: impl FnMut(usize, Result<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    if readers == 0 || offsets.len() < MIN_TABLES {
        let mut buffer = vec![0; length];
        for (index, &offset) in offsets.iter().enumerate() {
            let read = storage.read_padded_at(MemMut::from(&mut buffer[..]), offset);
            judge(index, read.map(|()| buffer.as_slice()))?;
        }
        return Ok(());
    }
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..readers)
            .map(|lane| {
                let (full, tables) = sync_channel(DEPTH);
                let (give_back, empty) = sync_channel(DEPTH + 1);
                scope.spawn(move || {
                    read(storage, offsets.iter().skip(lane).step_by(readers), length, &full, &empty)
                });
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
    storage: &dyn Storage,
    offsets: impl Iterator<Item = &'a u64>,
    length: usize,
    full: &SyncSender<Table>,
    empty: &Receiver<Vec<u8>>,
) {
    for &offset in offsets {
        let mut buffer = empty.try_recv().unwrap_or_else(|_| vec![0; length]);
        let read = storage.read_padded_at(MemMut::from(&mut buffer[..]), offset);
        if full.send((read, buffer)).is_err() {
            return;
        }
    }
}

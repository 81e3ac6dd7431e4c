//! Reads tables ahead of whoever judges them, in order: the disk is busy while the processor is. The readers also look
//! through what they read while it is in their caches, so that most tables never change threads.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::workers::help;
use crate::{MemMut, Storage, StorageExt};

type Result<T, E = crate::Error> = std::result::Result<T, E>;

/// Batches that a reader may be ahead.
const DEPTH: usize = 2;

/// Bytes of tables in a batch: few enough to be waiting in memory, and enough to be worth waking a thread.
const BATCH_BYTES: usize = 1 << 20;

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

    fn batch(&self) -> usize {
        (BATCH_BYTES / self.table_length.max(1)).max(1)
    }
}

/// What a reader makes of a table.
pub(super) enum Table<T> {
    /// All that matters of it.
    Summary(T),
    /// Its bytes.
    Bytes(Vec<u8>),
}

/// Reads the tables at `offsets` and hands them to `judge` in order, with their index: as `summarize` says, else as bytes.
/// A read that fails is handed over as its error.
pub(super) fn for_each_table<T: Send, E>(
    source: Source<'_>,
    offsets: &[u64],
    readers: usize,
    summarize: impl Fn(&[u8]) -> Option<T> + Sync,
    mut judge: impl FnMut(usize, Result<&Table<T>>) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = Vec::new();
    let mut judge_here = |first: usize, offsets: &[u64], judge: &mut _| -> Result<(), E> {
        for (index, &offset) in (first..).zip(offsets) {
            let table = take(source, offset, &mut buffer, &summarize);
            if let Some(bytes) = hand_over(index, table, judge)? {
                buffer = bytes;
            }
        }
        Ok(())
    };
    if readers == 0 || offsets.len() < MIN_TABLES {
        return judge_here(0, offsets, &mut judge);
    }
    thread::scope(|scope| {
        let batches = || offsets.chunks(source.batch());
        let lanes: Vec<_> = (0..readers)
            .map(|lane| {
                let (full, tables) = sync_channel(DEPTH);
                let (give_back, empty) = sync_channel(source.batch() * (DEPTH + 1));
                let mine = batches().skip(lane).step_by(readers);
                let summarize = &summarize;
                let work = move || read(source, mine, summarize, &full, &empty);
                help(scope, format!("qcow2-check-{lane}"), work).map(|_| (tables, give_back))
            })
            .collect();
        // Leaving drops the channels' ends, which ends the readers.
        let mut index = 0;
        for (offsets, lane) in batches().zip(lanes.iter().cycle()) {
            let Some((tables, give_back)) = lane else {
                // There is no such reader.
                judge_here(index, offsets, &mut judge)?;
                index += offsets.len();
                continue;
            };
            let Ok(batch) = tables.recv() else { break };
            for table in batch {
                if let Some(bytes) = hand_over(index, table, &mut judge)? {
                    let _ = give_back.try_send(bytes);
                }
                index += 1;
            }
        }
        Ok(())
    })
}

/// Lets a table be judged; gives its buffer back.
fn hand_over<T, E>(
    index: usize,
    table: Result<Table<T>>,
    judge: &mut impl FnMut(usize, Result<&Table<T>>) -> Result<(), E>,
) -> Result<Option<Vec<u8>>, E> {
    match table {
        Err(error) => judge(index, Err(error)).map(|()| None),
        Ok(table) => {
            judge(index, Ok(&table))?;
            Ok(match table {
                Table::Bytes(bytes) => Some(bytes),
                Table::Summary(_) => None,
            })
        }
    }
}

fn take<T>(
    source: Source<'_>,
    offset: u64,
    buffer: &mut Vec<u8>,
    summarize: &impl Fn(&[u8]) -> Option<T>,
) -> Result<Table<T>> {
    source.read(offset, buffer)?;
    Ok(match summarize(buffer) {
        Some(summary) => Table::Summary(summary),
        None => Table::Bytes(std::mem::take(buffer)),
    })
}

fn read<'a, T>(
    source: Source<'_>,
    batches: impl Iterator<Item = &'a [u64]>,
    summarize: &impl Fn(&[u8]) -> Option<T>,
    full: &SyncSender<Vec<Result<Table<T>>>>,
    empty: &Receiver<Vec<u8>>,
) {
    let mut buffer = Vec::new();
    for offsets in batches {
        let mut batch = Vec::with_capacity(offsets.len());
        for &offset in offsets {
            batch.push(take(source, offset, &mut buffer, summarize));
            if buffer.capacity() == 0 {
                buffer = empty.try_recv().unwrap_or_default();
            }
        }
        if full.send(batch).is_err() {
            return;
        }
    }
}

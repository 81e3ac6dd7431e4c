//! Moving what L2 tables refer to: data clusters, and compressed data.

use std::collections::HashMap;

use qcow2_format::{HostOffset, L2Mapping};

use super::in_place::{BATCH_SLICES, Edits};
use super::packing::Packing;
use super::table_edit::TableEdit;
use super::tables::{Table, most_remembered, tables};
use crate::maintenance::Session;
use crate::storage::Run;
use crate::{ErrorKind, Job, Mem, MemMut, Result, StorageExt};

/// Bytes copied between two syncs.
const BATCH_BYTES: u64 = 64 << 20;
/// Bytes copied in one request.
const COPY_BYTES: u64 = 2 << 20;

/// One pass over all L2 tables.
pub(super) struct Sweep<'s, 'a> {
    pub(super) session: &'s Session<'a>,
    /// What is at or behind this cluster moves below it.
    pub(super) bound: u64,
    /// No free cluster lies before this one.
    cursor: u64,
    /// New place of clusters that more entries refer to, and how many references are still to be seen.
    forward: HashMap<u64, (u64, u64)>,
    /// Most clusters and compressed clusters that are remembered.
    pub(super) most: u64,
    pub(super) packing: Packing,
    pub(super) edits: Edits,
    /// Copy that waits for more of its kind: first cluster, its new place, number.
    waiting: Option<(u64, u64, u64)>,
    pub(super) copied: u64,
    /// Clusters that were given references since the last sync, and how many.
    pub(super) taken: Vec<(u64, u64)>,
    pub(super) moved: u64,
    buffer: Vec<u8>,
}

impl<'s, 'a> Sweep<'s, 'a> {
    pub(super) fn new(session: &'s Session<'a>, bound: u64) -> Result<Self> {
        Ok(Self {
            session,
            bound,
            cursor: 1,
            forward: HashMap::new(),
            most: most_remembered(session.image),
            packing: Packing::new(session.image)?,
            edits: Edits::default(),
            waiting: None,
            copied: 0,
            taken: Vec::new(),
            moved: 0,
            buffer: Vec::new(),
        })
    }

    /// Clusters moved.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Visits every table; `progress` is what of the job is left to tell.
    pub(super) fn all(&mut self, job: &Job, progress: &mut u64) -> Result<()> {
        if self.session.image.header().has_data_file() {
            // Its clusters are where the guest's are.
            return Ok(());
        }
        let tables = tables(self.session.image)?;
        self.find_starts(&tables, job)?;
        let share = *progress / (tables.len() as u64).max(1);
        for table in tables {
            let swept = self.table(table, job);
            if let Err(error) = swept {
                // What began is completed by a cancellation, and taken back after a failure, which says more than one of this.
                let ended = match error.kind() {
                    ErrorKind::Aborted => self.commit(),
                    _ => self.take_back(),
                };
                let forgotten = ended.and_then(|()| self.forget_rest());
                return if error.kind() == ErrorKind::Aborted {
                    forgotten.and(Err(error))
                } else {
                    Err(error)
                };
            }
            job.advance(share);
            *progress -= share;
        }
        self.commit()?;
        self.forget_rest()
    }

    fn table(&mut self, table: Table, job: &Job) -> Result<()> {
        let mut edit = TableEdit::read(self.session.image, table)?;
        for first in edit.slices() {
            job.checkpoint()?;
            let slice = edit.slice(first, |_, mapping| self.relocate(mapping, table.weight))?;
            self.edits.slices.extend(slice);
            if self.copied >= BATCH_BYTES || self.edits.slices.len() >= BATCH_SLICES || self.edits.are_many()
            {
                self.commit()?;
            }
        }
        Ok(())
    }

    /// The entry that refers to the new place; `None` where nothing moves.
    fn relocate(&mut self, mapping: &L2Mapping, weight: u64) -> Result<Option<L2Mapping>> {
        let mut new = *mapping;
        let host = match &mut new {
            L2Mapping::Unallocated => return Ok(None),
            // Compressed data is in clear: behind a door it is not written, not even at another place.
            L2Mapping::Compressed(_) if !self.session.image.host_is_guest() => return Ok(None),
            L2Mapping::Compressed(descriptor) => {
                let moved = self.move_compressed(descriptor, weight)?;
                return Ok(moved.map(L2Mapping::Compressed));
            }
            L2Mapping::Data { host, .. }
            | L2Mapping::Zero { host: Some(host), .. }
            | L2Mapping::Subclusters { host: Some(host), .. } => host,
            L2Mapping::Zero { host: None, .. } | L2Mapping::Subclusters { host: None, .. } => {
                return Ok(None);
            }
        };
        let g = self.session.geometry();
        let cluster = g.cluster_index(host.0);
        if cluster < self.bound {
            return Ok(None);
        }
        let Some(to) = self.move_cluster(cluster, weight)? else { return Ok(None) };
        self.edits.unlinked.push((host.0, weight));
        *host = HostOffset(to * g.cluster_size());
        Ok(Some(new))
    }

    /// Where the cluster is now; `None` where it stays.
    fn move_cluster(&mut self, cluster: u64, weight: u64) -> Result<Option<u64>> {
        if let Some((to, left)) = self.forward.get_mut(&cluster) {
            let to = *to;
            *left = left.saturating_sub(weight);
            if *left == 0 {
                self.forward.remove(&cluster);
            }
            return Ok(Some(to));
        }
        let references = self.session.refcount(cluster)?;
        if references > weight && self.forward.len() as u64 >= self.most {
            return Ok(None);
        }
        let Some(to) = self.lowest(1)? else { return Ok(None) };
        self.session.set_refcount(to, references)?;
        self.taken.push((to, references));
        self.copy(cluster, to)?;
        self.moved += 1;
        if references > weight {
            self.forward.insert(cluster, (to, references - weight));
        }
        Ok(Some(to))
    }

    /// The lowest free clusters below the bound. They are taken by giving them a refcount.
    pub(super) fn lowest(&mut self, count: u64) -> Result<Option<u64>> {
        let (cursor, bound) = (self.cursor, self.bound);
        let found = self.session.writer.with_alloc(|alloc, _| alloc.lowest_free(count, cursor, bound))?;
        if count == 1 {
            self.cursor = found.unwrap_or(bound);
        }
        Ok(found)
    }

    /// Copies a cluster, with its neighbours where those follow.
    fn copy(&mut self, from: u64, to: u64) -> Result<()> {
        let size = self.session.geometry().cluster_size();
        self.copied += size;
        match &mut self.waiting {
            Some((first, place, count))
                if *first + *count == from && *place + *count == to && (*count + 1) * size <= COPY_BYTES =>
            {
                *count += 1;
                Ok(())
            }
            _ => {
                self.copy_waiting()?;
                self.waiting = Some((from, to, 1));
                Ok(())
            }
        }
    }

    /// Copies what waits: holes stay holes. Guest bytes, so that a door to them sees where they were and where they will be.
    fn copy_waiting(&mut self) -> Result<()> {
        let Some((from, to, count)) = self.waiting.take() else { return Ok(()) };
        let storage = self.session.image.guest_data()?.moving();
        let size = self.session.geometry().cluster_size();
        let (from, to, length) = (from * size, to * size, count * size);
        let file_end = storage.size()?;
        let mut done = 0;
        while done < length {
            let run = match from + done < file_end {
                true => storage.run(from + done..from + length)?,
                false => Run::new(u64::MAX, false),
            };
            let part = (run.end - (from + done)).min(length - done);
            if run.data {
                self.buffer.resize(part as usize, 0);
                storage.read_padded_at(MemMut::from(&mut self.buffer[..]), from + done)?;
                storage.write_all_at(Mem::from(&self.buffer[..]), to + done)?;
            } else {
                storage.zero(to + done, part, true)?;
            }
            done += part;
        }
        Ok(())
    }

    /// Makes the copies durable, then the entries that refer to them, then frees what these no longer refer to.
    fn commit(&mut self) -> Result<()> {
        self.copy_waiting()?;
        self.copied = 0;
        let edits = std::mem::take(&mut self.edits);
        if edits.slices.is_empty() {
            return Ok(());
        }
        self.session.barrier()?;
        self.taken.clear();
        self.session.publish(edits)
    }

    /// Gives up the places taken since the last sync: nothing refers to them.
    fn take_back(&mut self) -> Result<()> {
        self.waiting = None;
        self.edits = Edits::default();
        for (cluster, references) in std::mem::take(&mut self.taken) {
            let counted = self.session.refcount(cluster)?;
            self.session.set_refcount(cluster, counted.saturating_sub(references))?;
        }
        Ok(())
    }

    /// After a cancellation: references that were not seen stay with the old place, and are not counted at the new one.
    fn forget_rest(&mut self) -> Result<()> {
        if self.forward.is_empty() {
            return Ok(());
        }
        for (_, (to, left)) in std::mem::take(&mut self.forward) {
            let counted = self.session.refcount(to)?;
            self.session.set_refcount(to, counted.saturating_sub(left))?;
        }
        self.session.barrier()?;
        self.session.restore_copied()
    }
}

//! Executing a plan of snapshot steps.

use std::sync::Arc;

use qcow2_format::limits::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS};
use qcow2_format::snapshot::ParsedSnapshot;
use qcow2_format::{HostOffset, SnapshotRecord, words};

use super::plan::{NewSnapshot, Plan, Record, Step, Tree};
use super::session::Session;
use crate::image::{Image, read_header};
use crate::write::Places;
use crate::{Error, ErrorKind, Job, Result};

/// What the steps made so far.
#[derive(Default)]
struct Made {
    /// The snapshot table that the plan was made for.
    original: Arc<[SnapshotRecord]>,
    l1: Option<NewL1>,
    table: Option<NewTable>,
    /// Trees that were dropped, with their L1 tables.
    dropped: Vec<(Tree, Vec<u64>)>,
    /// The former active L1 table, some of whose L2 tables were copied.
    copied: Vec<u64>,
    forked: bool,
    /// Something was written that a later step may rely on only behind a barrier.
    unsettled: bool,
    /// The header names what was made, or may do so after a failure.
    switched: bool,
}

/// A new active L1 table.
struct NewL1 {
    offset: u64,
    entries: Vec<u64>,
    /// Disk size that comes with it.
    size: u64,
    /// What it shares everything with; `None` for the active disk's own with other flags.
    shares: Option<Tree>,
}

struct NewTable {
    offset: u64,
    bytes: u64,
    records: Vec<SnapshotRecord>,
    /// Indices of the former entries that it keeps.
    kept: Vec<usize>,
    /// Entries that take the former tables of the active disk.
    new: usize,
    /// Allocated in the fork.
    beside: bool,
}

impl Image {
    /// Executes `plan` while guest writes wait. After a failed step the image is the old one, or the new one if the
    /// switch was made. A plan that does nothing but delete a snapshot is done in place where there is no space.
    ///
    /// # Errors
    /// `InvalidArgument` for a plan that was made for another generation or whose steps do not fit together;
    /// `Limit` when a refcount or the table would overflow; else as [`Image::write_at`].
    pub fn execute(&self, plan: &Plan) -> Result<()> {
        self.execute_as(&Job::new(), plan)
    }

    /// As [`Image::execute`]. Cancelled before the switch, the image is the old one; behind it the plan is done.
    ///
    /// # Errors
    /// As [`Image::execute`], and `Aborted`.
    pub fn execute_as(&self, job: &Job, plan: &Plan) -> Result<()> {
        let session = Session::begin_as(self, job)?;
        if plan.generation != session.image.generation() {
            let message = "the snapshots changed since the plan was made: make it again";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if session.image.header().has_data_file() {
            let message = "an image with an external data file cannot have internal snapshots";
            return Err(session.image.error(ErrorKind::UnsupportedFeature, message));
        }
        let mut made = Made { original: session.image.snapshots(), ..Made::default() };
        let executed = plan.steps.iter().try_for_each(|step| session.execute(step, &mut made));
        let ended = session.end(&made);
        match (executed.and(ended), plan.removed()) {
            (Err(full), Some(index)) if full.is_no_space() && !made.switched => {
                session.remove_snapshot_in_place(index, full)
            }
            (done, _) => done,
        }
    }
}

impl Session<'_> {
    fn execute(&self, step: &Step, made: &mut Made) -> Result<()> {
        if made.switched && !matches!(step, Step::Barrier | Step::Free) {
            return Err(misfit("a step behind the switch"));
        }
        match step {
            Step::CheckReferences(tree) => self.check_references(&self.l1_of(*tree, made)?),
            Step::Fork if made.forked => Err(misfit("a second fork")),
            Step::Fork => {
                self.fork()?;
                made.forked = true;
                Ok(())
            }
            Step::Share(tree) => self.share_tree(*tree, made),
            Step::Drop(tree) => {
                made.change()?;
                let l1 = self.l1_of(*tree, made)?;
                self.drop_beside(&l1)?;
                made.dropped.push((*tree, l1));
                Ok(())
            }
            Step::RestoreCopied => self.restore_flags(made),
            Step::WriteTable(records) => self.write_snapshot_table(records, made),
            Step::Barrier => {
                if made.forked && !made.switched { self.settle_fork() } else { self.barrier() }?;
                made.unsettled = false;
                Ok(())
            }
            Step::Switch => self.switch(made),
            Step::Free => {
                settled(made)?;
                if !made.switched {
                    return Err(misfit("nothing was switched"));
                }
                made.dropped.iter().try_for_each(|(_, l1)| self.free_dropped(l1))?;
                self.free_dropped(&made.copied)
            }
        }
    }

    /// What a plan leaves behind that ended early, by an error or by its steps.
    fn end(&self, made: &Made) -> Result<()> {
        if made.switched {
            // Nobody may use what became free before that is durable.
            return if made.unsettled { self.barrier() } else { Ok(()) };
        }
        if made.forked {
            self.undo_fork();
        }
        match made.table.as_ref().filter(|table| !table.beside) {
            Some(table) => {
                self.abandon(table.offset, table.bytes);
                self.barrier()
            }
            None => Ok(()),
        }
    }

    fn l1_of(&self, tree: Tree, made: &Made) -> Result<Vec<u64>> {
        match tree {
            Tree::Active => Ok(self.image.l1()),
            Tree::Snapshot(index) => self.snapshot_l1(made.snapshot(index)?),
        }
    }

    fn share_tree(&self, tree: Tree, made: &mut Made) -> Result<()> {
        made.change()?;
        if made.l1.is_some() {
            return Err(misfit("a second L1 table"));
        }
        let now = self.image.virtual_size();
        let size = match tree {
            Tree::Active => now,
            Tree::Snapshot(index) => made.snapshot(index)?.disk_size.unwrap_or(now),
        };
        // Bitmaps of a disk of another size change with it: they are in use, durably, before.
        if size != now {
            self.image.refuse_empty_disk(size)?;
            self.writer.load_bitmaps(self.image, true)?;
        }
        let entries = self.share(&self.l1_of(tree, made)?)?;
        self.write_new_l1(entries, size, Some(tree), made)
    }

    fn restore_flags(&self, made: &mut Made) -> Result<()> {
        made.change()?;
        if made.l1.is_some() {
            return Err(misfit("a second L1 table"));
        }
        let former = self.image.l1();
        let entries = self.restore_beside(&former)?;
        if entries == former {
            return Ok(());
        }
        self.write_new_l1(entries, self.image.virtual_size(), None, made)?;
        made.copied = former;
        Ok(())
    }

    fn write_new_l1(
        &self,
        entries: Vec<u64>,
        size: u64,
        shares: Option<Tree>,
        made: &mut Made,
    ) -> Result<()> {
        if entries.len() as u64 * 8 > MAX_L1_BYTES {
            return Err(misfit("an L1 table beyond the format's limit"));
        }
        let offset = match entries.is_empty() {
            // A table without entries is nowhere.
            true => 0,
            false => self.write_table_beside(words::encode(&entries))?,
        };
        made.l1 = Some(NewL1 { offset, entries, size, shares });
        Ok(())
    }

    fn write_snapshot_table(&self, records: &[Record], made: &mut Made) -> Result<()> {
        if made.table.is_some() {
            return Err(misfit("a second snapshot table"));
        }
        let mut bytes = Vec::new();
        let mut kept = Vec::new();
        for record in records {
            let entry = match record {
                Record::Keep { index, rename } => {
                    let mut entry = made.snapshot(*index)?.clone();
                    if let Some(name) = rename {
                        entry.name.clone_from(name);
                    }
                    kept.push(*index);
                    entry
                }
                Record::New(new) => self.new_record(new),
            };
            let encoded = entry.encode(&mut bytes, self.image.virtual_size());
            encoded.map_err(|e| self.image.error(ErrorKind::Limit, e.to_string()).with_source(e))?;
        }
        let limit = MAX_SNAPSHOT_TABLE_BYTES.min(self.image.limits().max_metadata_bytes);
        if records.len() as u64 > MAX_SNAPSHOTS.into() || bytes.len() as u64 > limit {
            let message = format!("{} snapshots with {} bytes exceed the limit", records.len(), bytes.len());
            return Err(self.image.error(ErrorKind::Limit, message).with_field("nb_snapshots"));
        }
        let length = bytes.len() as u64;
        // As they will be read: entries of old images gain fields when they are written again.
        let parsed = parse_all(&bytes).ok_or_else(|| misfit("a table that does not parse"))?;
        let beside = made.forked;
        let offset = match (length, beside) {
            (0, _) => 0,
            (_, true) => self.write_table_beside(bytes)?,
            (_, false) => {
                let offset = self.allocate(length)?;
                self.write_table(offset, bytes)?;
                offset
            }
        };
        let new = records.len() - kept.len();
        made.table = Some(NewTable { offset, bytes: length, records: parsed, kept, new, beside });
        made.unsettled = true;
        Ok(())
    }

    /// An entry for the active disk's tables, which it has from the switch on.
    fn new_record(&self, new: &NewSnapshot) -> SnapshotRecord {
        SnapshotRecord {
            l1_table_offset: HostOffset(self.writer.l1_offset()),
            // At most 4 Mi entries: the format's limit.
            l1_size: self.image.mapping().l1().len() as u32,
            id: new.id.clone(),
            name: new.name.clone(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: new.vm_state_size,
            disk_size: Some(self.image.virtual_size()),
            icount: new.icount,
            extra_data_size: 24,
            unknown_extra_data: Vec::new(),
        }
    }

    /// One write of the header, inside a sector: the moment of the change.
    fn switch(&self, made: &mut Made) -> Result<()> {
        settled(made)?;
        made.fits()?;
        let header = read_header(&**self.image.storage())?;
        let mut places = Places {
            size: header.size,
            l1_entries: header.l1_size,
            l1_offset: header.l1_table_offset.0,
            refcount_table_offset: header.refcount_table_offset.0,
            refcount_table_clusters: header.refcount_table_clusters,
            snapshots: header.nb_snapshots,
            snapshots_offset: header.snapshots_offset.0,
        };
        if let Some((offset, clusters)) = self.writer.alloc().fork_table() {
            places.refcount_table_offset = offset;
            // The table has at most 8 MiB.
            places.refcount_table_clusters = clusters as u32;
        }
        let mut bitmaps = None;
        if let Some(l1) = &made.l1 {
            (places.size, places.l1_entries, places.l1_offset) =
                (l1.size, l1.entries.len() as u32, l1.offset);
            if l1.size != self.image.virtual_size() {
                bitmaps = Some(self.writer.bitmaps.resized(l1.size, self.image.limits().max_memory)?);
            }
            if matches!(l1.shares, Some(Tree::Snapshot(_))) {
                // Any byte of the disk may be another one from here on.
                self.disk.preserve(&(0..self.image.virtual_size()));
            }
        }
        if let Some(table) = &made.table {
            (places.snapshots, places.snapshots_offset) = (table.records.len() as u32, table.offset);
        }
        (made.switched, made.unsettled) = (true, true);
        self.writer.write_places(self.image, &places)?;
        if made.forked {
            let former = self.writer.with_alloc(|alloc, metadata| Ok(alloc.adopt_fork(metadata)))?;
            let mut mapping = self.image.changing();
            former.into_iter().for_each(|run| mapping.unlink(run));
        }
        if let Some(list) = bitmaps {
            self.writer.bitmaps.replace(list);
        }
        self.adopt_active(made);
        self.adopt_table(made, header.snapshots_offset.0);
        self.image.next_generation();
        Ok(())
    }

    /// The new L1 table is the active one. What only the former one was is freed behind the next barriers.
    fn adopt_active(&self, made: &Made) {
        let former_offset = self.writer.l1_offset();
        made.dropped.iter().for_each(|(_, l1)| self.writer.forget_l2_tables(self.image, l1));
        let Some(l1) = &made.l1 else {
            return self.writer.note_active(self.image, &self.image.l1(), former_offset);
        };
        if l1.size < self.image.virtual_size() {
            // First: who finds nothing mapped behind the new end sees that it is the end.
            self.image.set_virtual_size(l1.size);
        }
        let former = self.image.changing().replace_l1(l1.entries.clone());
        self.writer.forget_l2_tables(self.image, &former);
        self.writer.note_active(self.image, &l1.entries, l1.offset);
        self.image.set_virtual_size(l1.size);
        if matches!(l1.shares, Some(Tree::Snapshot(_))) {
            self.writer.bitmaps.mark(&(0..l1.size));
        }
        if made.table.as_ref().is_none_or(|table| table.new == 0) {
            self.unlink(former_offset, former.len() as u64 * 8);
        }
    }

    /// The new snapshot table is the image's. The former one and L1 tables of snapshots that are gone are freed behind
    /// the next barriers.
    fn adopt_table(&self, made: &mut Made, former_offset: u64) {
        let Some(table) = &mut made.table else { return };
        let records: Arc<[SnapshotRecord]> = std::mem::take(&mut table.records).into();
        self.writer.note_snapshots(self.image, &records, table.offset, table.bytes);
        self.image.set_snapshots(records);
        let former = made.original.iter().map(|record| record.encoded_length() as u64).sum();
        self.unlink(former_offset, former);
        for (index, record) in made.original.iter().enumerate() {
            if !table.kept.contains(&index) {
                self.unlink(record.l1_table_offset.0, u64::from(record.l1_size) * 8);
            }
        }
    }
}

impl Made {
    fn snapshot(&self, index: usize) -> Result<&SnapshotRecord> {
        self.original.get(index).ok_or_else(|| misfit("a snapshot that is not in the table"))
    }

    /// A step changes refcounts.
    fn change(&mut self) -> Result<()> {
        self.unsettled = true;
        if self.forked { Ok(()) } else { Err(misfit("refcounts that would change in the file")) }
    }

    /// Refuses steps whose counts and tables do not say the same.
    fn fits(&self) -> Result<()> {
        let dropped = |tree: Tree| self.dropped.iter().filter(|(dropped, _)| *dropped == tree).count();
        for index in 0..self.original.len() {
            let kept = match &self.table {
                Some(table) => table.kept.iter().filter(|kept| **kept == index).count(),
                None => 1,
            };
            if kept + dropped(Tree::Snapshot(index)) != 1 {
                return Err(misfit("a snapshot that is neither kept nor dropped, once"));
            }
        }
        // The tables that the active disk had are somebody's, or dropped.
        let shares = self.l1.as_ref().is_some_and(|l1| l1.shares.is_some());
        let new = self.table.as_ref().map_or(0, |table| table.new);
        let owners = new + dropped(Tree::Active);
        if owners == usize::from(shares) {
            Ok(())
        } else {
            Err(misfit("the active disk's former tables are not dropped or taken, once"))
        }
    }
}

/// A step that needs what no step before it made.
fn misfit(what: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("the plan's steps do not fit together: {what}"))
}

/// Refuses to rely on what is not durable.
fn settled(made: &Made) -> Result<()> {
    if made.unsettled { Err(misfit("a barrier is missing")) } else { Ok(()) }
}

fn parse_all(mut bytes: &[u8]) -> Option<Vec<SnapshotRecord>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let Ok(ParsedSnapshot::Record(record, length)) = SnapshotRecord::parse(bytes) else { return None };
        records.push(*record);
        bytes = bytes.get(length..)?;
    }
    Some(records)
}

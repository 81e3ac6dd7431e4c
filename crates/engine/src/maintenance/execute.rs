//! Executing a plan of snapshot steps.

use std::sync::Arc;

use qcow2_format::l1::COPIED;
use qcow2_format::limits::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS};
use qcow2_format::snapshot::ParsedSnapshot;
use qcow2_format::{HostOffset, SnapshotRecord};

use super::plan::{L1Source, NewSnapshot, Plan, Record, Step, Tree};
use super::session::Session;
use crate::image::Image;
use crate::{Error, ErrorKind, Result};

/// What the steps made so far.
struct Made {
    /// The snapshot table that the plan was made for.
    original: Arc<[SnapshotRecord]>,
    l1: Option<NewL1>,
    table: Option<NewTable>,
    former_table: Option<(u64, u64)>,
    former_active: Option<(u64, Vec<u64>)>,
    /// Something was written that a later step may rely on only behind a barrier.
    unsettled: bool,
}

struct NewL1 {
    offset: u64,
    entries: Vec<u64>,
    /// Disk size of what it is a copy of.
    size: u64,
    used: bool,
}

struct NewTable {
    offset: u64,
    bytes: u64,
    records: Vec<SnapshotRecord>,
}

impl Image {
    /// Executes `plan` while guest writes wait. A failed step leaves the image as the steps before it made it: the old
    /// one or the new one, with leaks at worst.
    ///
    /// # Errors
    /// `InvalidArgument` for a plan that was made for another generation or whose steps do not fit together;
    /// `Limit` when a refcount or the table would overflow; else as [`Image::write_at`].
    pub fn execute(&self, plan: &Plan) -> Result<()> {
        let session = Session::begin(self)?;
        if plan.generation != session.image.generation() {
            let message = "the snapshots changed since the plan was made: make it again";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if session.image.header().has_data_file() {
            let message = "an image with an external data file cannot have internal snapshots";
            return Err(session.image.error(ErrorKind::UnsupportedFeature, message));
        }
        let mut made = Made {
            original: session.image.snapshots(),
            l1: None,
            table: None,
            former_table: None,
            former_active: None,
            unsettled: false,
        };
        let executed = plan.steps.iter().try_for_each(|step| session.execute(step, &mut made));
        if executed.is_err() {
            session.clean_up(&made);
        }
        executed
    }
}

impl Session<'_> {
    fn execute(&self, step: &Step, made: &mut Made) -> Result<()> {
        match step {
            Step::CheckReferences(tree) => self.check_references(&self.l1_of(*tree, made)?),
            Step::ClearCopied(tree) => self.clear_copied(*tree, made),
            Step::CopyL1(source) => self.copy_l1(*source, made),
            Step::AddReferences(tree) => {
                made.unsettled = true;
                self.add_references(&self.l1_of(*tree, made)?)
            }
            Step::Barrier => {
                made.unsettled = false;
                self.barrier()
            }
            Step::WriteTable(records) => self.write_snapshot_table(records, made),
            Step::SetTable => self.set_table(made),
            Step::SetActiveL1 => self.set_active(made),
            Step::DropReferences(tree) => {
                settled(made)?;
                self.drop_references(&self.l1_of(*tree, made)?)
            }
            Step::FreeL1(tree) => {
                settled(made)?;
                let (offset, entries) = self.place_of(*tree, made)?;
                self.unlink(offset, entries * 8);
                Ok(())
            }
            Step::FreeTable => {
                settled(made)?;
                let (offset, bytes) = made.former_table.take().ok_or_else(|| misfit("no former table"))?;
                self.unlink(offset, bytes);
                Ok(())
            }
            Step::RestoreCopied => {
                settled(made)?;
                let l1 = self.rewrite_copied(&self.l1_of(Tree::Active, made)?, true)?;
                self.write_active_l1(l1)
            }
        }
    }

    /// What an error leaves allocated and unreferenced goes back.
    fn clean_up(&self, made: &Made) {
        if let Some(l1) = made.l1.as_ref().filter(|l1| !l1.used) {
            self.abandon(l1.offset, l1.entries.len() as u64 * 8);
        }
        if let Some(table) = &made.table {
            self.abandon(table.offset, table.bytes);
        }
        // Flags are only ever too few; a failure to set them again costs copies, not data. They follow the refcounts that
        // are durable: where those did not get into the file, no flag may.
        if self.barrier().is_err() {
            return;
        }
        let l1 = self.image.mapping.read().l1.clone();
        if let Ok(l1) = self.rewrite_copied(&l1, true) {
            let _ = self.write_active_l1(l1).and_then(|()| self.barrier());
        }
    }

    fn l1_of(&self, tree: Tree, made: &Made) -> Result<Vec<u64>> {
        match tree {
            Tree::Active => Ok(self.image.mapping.read().l1.clone()),
            Tree::FormerActive => {
                made.former_active.as_ref().map(|f| f.1.clone()).ok_or_else(|| misfit("no former active L1"))
            }
            Tree::Snapshot(index) => self.snapshot_l1(made.snapshot(index)?),
        }
    }

    /// Host offset and entries of a tree's L1 table.
    fn place_of(&self, tree: Tree, made: &Made) -> Result<(u64, u64)> {
        match tree {
            Tree::Active => Err(misfit("the active L1 table cannot be freed")),
            Tree::FormerActive => {
                let former = made.former_active.as_ref();
                former.map(|f| (f.0, f.1.len() as u64)).ok_or_else(|| misfit("no former active L1"))
            }
            Tree::Snapshot(index) => {
                let record = made.snapshot(index)?;
                Ok((record.l1_table_offset.0, record.l1_size.into()))
            }
        }
    }

    fn clear_copied(&self, tree: Tree, made: &mut Made) -> Result<()> {
        made.unsettled = true;
        let l1 = self.rewrite_copied(&self.l1_of(tree, made)?, false)?;
        if tree == Tree::Active { self.write_active_l1(l1) } else { Ok(()) }
    }

    /// Writes the active L1 table in place: only flags differ.
    pub(crate) fn write_active_l1(&self, l1: Vec<u64>) -> Result<()> {
        self.write(self.writer.l1_offset(), &encode_words(&l1))?;
        self.image.mapping.write().l1 = l1;
        Ok(())
    }

    fn copy_l1(&self, source: L1Source, made: &mut Made) -> Result<()> {
        let (tree, size) = match source {
            L1Source::Active => (Tree::Active, self.image.virtual_size()),
            L1Source::Snapshot(index) => {
                let size = made.snapshot(index)?.disk_size;
                (Tree::Snapshot(index), size.unwrap_or_else(|| self.image.virtual_size()))
            }
        };
        let entries: Vec<u64> = self.l1_of(tree, made)?.into_iter().map(|entry| entry & !COPIED).collect();
        let bytes = entries.len() as u64 * 8;
        if bytes > MAX_L1_BYTES {
            return Err(misfit("an L1 table beyond the format's limit"));
        }
        let offset = self.allocate(bytes)?;
        made.l1 = Some(NewL1 { offset, entries, size, used: false });
        made.unsettled = true;
        let entries = made.l1.as_ref().map(|l1| encode_words(&l1.entries)).unwrap_or_default();
        self.write_table(offset, entries)
    }

    fn write_snapshot_table(&self, records: &[Record], made: &mut Made) -> Result<()> {
        let mut bytes = Vec::new();
        let mut l1_used = false;
        for record in records {
            let entry = match record {
                Record::Keep { index, rename } => {
                    let mut entry = made.snapshot(*index)?.clone();
                    if let Some(name) = rename {
                        entry.name = name.clone().into_bytes();
                    }
                    entry
                }
                Record::New(new) => {
                    let l1 = made.l1.as_ref().ok_or_else(|| misfit("a new snapshot without an L1 table"))?;
                    l1_used = true;
                    new_record(new, l1)
                }
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
        let offset = if records.is_empty() { 0 } else { self.allocate(length)? };
        if let Some(l1) = made.l1.as_mut().filter(|_| l1_used) {
            l1.used = true;
        }
        // As they will be read: entries of old images gain fields when they are written again.
        let records = parse_all(&bytes).ok_or_else(|| misfit("a table that does not parse"))?;
        made.table = Some(NewTable { offset, bytes: length, records });
        made.unsettled = true;
        if length > 0 { self.write_table(offset, bytes) } else { Ok(()) }
    }

    fn set_table(&self, made: &mut Made) -> Result<()> {
        settled(made)?;
        let table = made.table.take().ok_or_else(|| misfit("no new snapshot table"))?;
        let header = crate::image::read_header(&**self.image.storage())?;
        let former = made.original.iter().map(|r| r.encoded_length() as u64).sum();
        made.former_table = Some((header.snapshots_offset.0, former));
        made.unsettled = true;
        let count = table.records.len() as u32;
        self.writer.write_snapshots_place(self.image, count, table.offset)?;
        let records: Arc<[SnapshotRecord]> = table.records.into();
        self.writer.note_snapshots(self.image, &records, table.offset, table.bytes);
        self.image.set_snapshots(records);
        Ok(())
    }

    fn set_active(&self, made: &mut Made) -> Result<()> {
        settled(made)?;
        let l1 = made.l1.as_mut().ok_or_else(|| misfit("no new L1 table"))?;
        l1.used = true;
        let (offset, entries, size) = (l1.offset, l1.entries.clone(), l1.size);
        made.unsettled = true;
        // Any byte of the disk may be another one from here on.
        self.disk.preserve(&(0..self.image.virtual_size()));
        let resized = size != self.image.virtual_size();
        if resized && self.writer.bitmaps.load(self.image, true)? {
            self.barrier()?;
        }
        self.writer.write_active(self.image, size, entries.len() as u32, offset)?;
        let former = self.writer.l1_offset();
        self.writer.note_active(self.image, &entries, offset);
        let former_entries = std::mem::replace(&mut self.image.mapping.write().l1, entries);
        made.former_active = Some((former, former_entries));
        self.image.set_virtual_size(size);
        self.image.next_generation();
        self.writer.bitmaps.resize(size, self.image.limits().max_memory)?;
        self.writer.bitmaps.mark(&(0..size));
        Ok(())
    }
}

impl Made {
    fn snapshot(&self, index: usize) -> Result<&SnapshotRecord> {
        self.original.get(index).ok_or_else(|| misfit("a snapshot that is not in the table"))
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

fn new_record(new: &NewSnapshot, l1: &NewL1) -> SnapshotRecord {
    SnapshotRecord {
        l1_table_offset: HostOffset(l1.offset),
        // At most 4 Mi entries: the copy was checked.
        l1_size: l1.entries.len() as u32,
        id: new.id.clone().into_bytes(),
        name: new.name.clone().into_bytes(),
        date_sec: new.date_sec,
        date_nsec: new.date_nsec,
        vm_clock_nsec: new.vm_clock_nsec,
        vm_state_size: new.vm_state_size,
        disk_size: Some(l1.size),
        icount: new.icount,
        extra_data_size: 24,
        unknown_extra_data: Vec::new(),
    }
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

pub(crate) fn encode_words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

//! Writing to grains at random.
//!
//! A grain gets a place behind the end of the file, and its bytes with zeroes around them. Its entry is set in memory then; in the file
//! it is written by a flush, when the bytes are durable: first in the copy of the table, then in the table. So an entry in the file never
//! leads to what was not written, and a power cut leaks at worst what no flush covered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use qcow2_core::disk::OldBytes;
use qcow2_core::layer::{PlanBuilder, SegmentKind};
use qcow2_core::{Error, ErrorKind, Mem, MemMut, Result, StorageExt};

use super::OpenOptions;
use super::grains::{Directory, Grains, read_directory};
use super::tables::{Table, TableCache};
use crate::fields::SECTOR;
use crate::geometry::{Encoding, Grain, ZERO_GRAIN};

/// Most bytes of a run that gets its place at once.
const MAX_RUN: u64 = 4 << 20;
/// Most bytes of zeroes that are written together with data.
const PAD: u64 = 64 << 10;
/// Tables that may wait for a flush.
const MAX_CHANGED: usize = 1024;
/// Sectors of a file that its entries can name: they have 32 bits.
const MAX_SECTORS: u64 = 1 << 32;

static ZEROES: [u8; PAD as usize] = [0; PAD as usize];

/// The state of writing to an extent with grains. Locks in the order in which they may be taken: `flushing`, `publishing`, `changed`;
/// `space` alone.
#[derive(Debug)]
pub(super) struct GrainWriter {
    pub(super) redundant: Option<RwLock<Directory>>,
    pub(super) space: Mutex<Space>,
    /// Tables whose entries in the file are older.
    changed: RwLock<BTreeMap<u64, Changed>>,
    /// Held where entries change, and where tables leave `changed`.
    publishing: Mutex<()>,
    pub(super) flushing: Mutex<()>,
    /// Something was written since the last flush.
    pub(super) touched: AtomicBool,
}

/// What new grains are made of.
#[derive(Debug)]
pub(super) struct Space {
    /// First byte behind all that is used.
    pub(super) next: u64,
    /// Grains behind each other's back: two requests made the same one, and this one is left over.
    spare: Vec<u64>,
}

#[derive(Debug)]
struct Changed {
    table: Arc<Table>,
    /// Numbers of the entries that wait.
    entries: Vec<u64>,
    /// The directory does not name it yet in the file.
    is_new: bool,
}

/// What a flush writes of one table.
struct Batch {
    index: u64,
    /// Number and value, in order.
    entries: Vec<(u64, u64)>,
    is_new: bool,
}

/// A run of bytes that are in one place, or nowhere.
enum Run {
    Stored { host: u64, length: u64 },
    New { length: u64 },
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Published {
    /// It was set.
    Done,
    /// The grain has this place already.
    Taken(u64),
    /// The grain became one of zeroes.
    Zeroed,
}

/// The caller's cache, and the number that the extent has there.
#[derive(Clone, Copy)]
pub(super) struct Tables<'a> {
    pub(super) cache: &'a TableCache,
    pub(super) extent: usize,
}

impl GrainWriter {
    /// The table, if its entries in the file are older.
    pub(super) fn changed(&self, index: u64) -> Option<Arc<Table>> {
        self.changed.read().get(&index).map(|changed| Arc::clone(&changed.table))
    }
}

impl Grains {
    /// Makes the extent one that is written to.
    ///
    /// # Errors
    /// `UnsupportedFeature` for one whose grains are not written; `Corrupt` for a copy of the directory that is not in the file; `Io`.
    pub(super) fn make_writable(&mut self, options: &OpenOptions) -> Result<()> {
        let geometry = self.geometry();
        let refused = if geometry.compressed {
            Some("a streamOptimized extent is written once: convert it")
        } else if geometry.entry_bytes() != 4 {
            Some("a seSparse extent is only read")
        } else if geometry.overhead == 0 {
            Some("a COWD extent is only read")
        } else {
            None
        };
        if let Some(why) = refused {
            return Err(self.error(ErrorKind::UnsupportedFeature, why.to_owned(), "extent"));
        }
        let redundant = geometry
            .redundant
            .map(|sector| read_directory(&*self.storage, "rgdOffset", geometry, sector, options))
            .transpose()?;
        let end = self.storage.size()?.max(geometry.overhead * SECTOR);
        self.writer = Some(GrainWriter {
            redundant: redundant.map(RwLock::new),
            space: Mutex::new(Space {
                next: end.next_multiple_of(geometry.grain_bytes()),
                spare: Vec::new(),
            }),
            changed: RwLock::default(),
            publishing: Mutex::default(),
            flushing: Mutex::default(),
            touched: AtomicBool::new(false),
        });
        Ok(())
    }

    pub(super) fn writer(&self) -> Result<&GrainWriter> {
        let message =
            || self.error(ErrorKind::ReadOnly, "the extent is open for reading only".to_owned(), "extent");
        self.writer.as_ref().ok_or_else(message)
    }

    /// Writes `buf` at the byte `at` of the extent. Around it, a new grain has what `old` reads of the extent, zeroes without it.
    pub(super) fn write(
        &self,
        tables: Tables<'_>,
        mut at: u64,
        mut buf: Mem<'_>,
        old: Option<OldBytes<'_>>,
    ) -> Result<()> {
        let writer = self.writer()?;
        while !buf.is_empty() {
            let run = self.run(tables, at, buf.len() as u64)?;
            let (Run::Stored { length, .. } | Run::New { length }) = run;
            let (part, rest) = buf.split_at(length as usize);
            let written = match run {
                Run::Stored { host, .. } => self.storage.write_all_at(part, host),
                Run::New { .. } => self.write_new(writer, tables, at, part, old),
            };
            // Behind the write: a flush that ended before it has not seen it.
            writer.touched.store(true, Ordering::Release);
            written?;
            at += length;
            buf = rest;
        }
        if writer.changed.read().len() > MAX_CHANGED { self.flush(tables) } else { Ok(()) }
    }

    /// Runs `then` on the places of what is stored of a range.
    pub(super) fn stored(
        &self,
        tables: Tables<'_>,
        mut at: u64,
        length: u64,
        then: impl Fn(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = at + length;
        while at < end {
            let run = self.run(tables, at, end - at)?;
            let (Run::Stored { length, .. } | Run::New { length }) = run;
            if let Run::Stored { host, .. } = run {
                let done = then(host, length);
                self.writer()?.touched.store(true, Ordering::Release);
                done?;
            }
            at += length;
        }
        Ok(())
    }

    /// The run at the start of a range.
    fn run(&self, tables: Tables<'_>, at: u64, length: u64) -> Result<Run> {
        let geometry = self.geometry();
        // Ends with a grain, so that a long request takes whole ones.
        let step = MAX_RUN.max(geometry.grain_bytes());
        let end = (at - at % step + step).min(at + length);
        let mut segments = Vec::new();
        self.plan(tables.cache, tables.extent, at..end, 0, &mut PlanBuilder::new(&mut segments))?;
        let Some(first) = segments.first() else {
            return Err(Error::new(ErrorKind::Internal, "a plan is empty"));
        };
        let is_new = |kind: &SegmentKind| matches!(kind, SegmentKind::Zero(_) | SegmentKind::Unallocated(_));
        match first.kind {
            SegmentKind::Data(place) if place.host < geometry.overhead * SECTOR => {
                let message = format!(
                    "byte {at:#x} of the extent: the grain at {:#x} lies in the metadata",
                    place.host
                );
                Err(self.error(ErrorKind::Corrupt, message, "grain table entry").with_offset(place.host))
            }
            SegmentKind::Data(place) => Ok(Run::Stored { host: place.host, length: first.length }),
            SegmentKind::Opaque(_) => {
                Err(Error::new(ErrorKind::Internal, "a compressed grain was written to"))
            }
            SegmentKind::Zero(_) | SegmentKind::Unallocated(_) => {
                let run = segments.iter().take_while(|segment| is_new(&segment.kind));
                Ok(Run::New { length: run.map(|segment| segment.length).sum() })
            }
        }
    }

    /// A place for `length` bytes, a multiple of the grain.
    pub(super) fn allocate(&self, writer: &GrainWriter, length: u64) -> Result<u64> {
        let grain = self.geometry().grain_bytes();
        let mut space = writer.space.lock();
        if length == grain
            && let Some(place) = space.spare.pop()
        {
            return Ok(place);
        }
        let place = space.next;
        if (place + length).div_ceil(SECTOR) > MAX_SECTORS {
            let message = format!("the extent is full: its entries reach {MAX_SECTORS} sectors of its file");
            return Err(self.error(ErrorKind::Limit, message, "grain table entry"));
        }
        space.next = place + length;
        Ok(place)
    }

    /// Gives back what nothing refers to.
    fn give_back(&self, writer: &GrainWriter, place: u64, length: u64) {
        let mut space = writer.space.lock();
        if space.next == place + length {
            space.next = place;
        } else if length == self.geometry().grain_bytes() {
            space.spare.push(place);
        }
    }

    /// Writes what has no place yet.
    fn write_new(
        &self,
        writer: &GrainWriter,
        tables: Tables<'_>,
        at: u64,
        part: Mem<'_>,
        old: Option<OldBytes<'_>>,
    ) -> Result<()> {
        let grain = self.geometry().grain_bytes();
        let head = at % grain;
        let length = (head + part.len() as u64).next_multiple_of(grain);
        let tail = length - head - part.len() as u64;
        let (first, last) = (at / grain, (at + part.len() as u64 - 1) / grain);
        // Before what is around is read: a grain of the parent's can become one of zeroes meanwhile.
        let parents = match old {
            Some(_) => [self.is_absent(tables, first)?, self.is_absent(tables, last)?],
            None => [false; 2],
        };
        let (front, back) = match old {
            Some(old) => (self.old(old, at - head, head)?, self.old(old, at + part.len() as u64, tail)?),
            None => (Vec::new(), Vec::new()),
        };
        let place = self.allocate(writer, length)?;
        let written = match old {
            Some(_) => {
                let mut bytes = [Mem::from(&front[..]), part, Mem::from(&back[..])];
                self.storage.write_all_vectored_at(&mut bytes, place)
            }
            None => self.write_padded(place, head, part, tail),
        };
        if let Err(error) = written {
            self.give_back(writer, place, length);
            return Err(error);
        }
        for number in first..=last {
            let start = (number - first) * grain;
            let from = start.max(head);
            let to = (start + grain).min(head + part.len() as u64);
            let parents = (number == first && parents[0]) || (number == last && parents[1]);
            let mut published = self.publish(writer, tables, number, Some(place + start), parents)?;
            if published == Published::Zeroed {
                // So is what is around the bytes.
                for (start, length) in [(start, from - start), (to, start + grain - to)] {
                    if length > 0 {
                        self.storage.zero(place + start, length, false)?;
                    }
                }
                published = self.publish(writer, tables, number, Some(place + start), false)?;
            }
            if let Published::Taken(other) = published {
                // Another request was quicker: its grain counts, with the bytes of this one.
                let bytes = part.split_at((from - head) as usize).1.split_at((to - from) as usize).0;
                self.storage.write_all_at(bytes, other + from - start)?;
                writer.space.lock().spare.push(place + start);
            }
        }
        Ok(())
    }

    /// The entry of a grain; 0 where it has none.
    fn entry_of(&self, tables: Tables<'_>, grain: u64) -> Result<u64> {
        let entries = self.geometry().table_entries;
        let table = self.table(tables.cache, tables.extent, grain / entries)?;
        Ok(table.map_or(0, |table| table.get(grain % entries)))
    }

    /// Whether the extent does not have a grain.
    fn is_absent(&self, tables: Tables<'_>, grain: u64) -> Result<bool> {
        Ok(self.entry_of(tables, grain)? == 0)
    }

    /// The bytes of the extent at `at` as they are; zeroes behind its end.
    fn old(&self, old: OldBytes<'_>, at: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        let inside = self.geometry().size().saturating_sub(at).min(length) as usize;
        if let Some(part) = bytes.get_mut(..inside).filter(|part| !part.is_empty()) {
            old(MemMut::from(part), at)?;
        }
        Ok(bytes)
    }

    /// Makes a range read as zeroes where a parent shows through what the extent does not have.
    pub(super) fn zero_over(
        &self,
        tables: Tables<'_>,
        mut at: u64,
        length: u64,
        unmap: bool,
        old: OldBytes<'_>,
    ) -> Result<()> {
        let writer = self.writer()?;
        let geometry = self.geometry();
        let grain = geometry.grain_bytes();
        let entries = matches!(geometry.encoding, Encoding::Sectors { zero_grains: true });
        let end = at + length;
        while at < end {
            // Grain by grain: each is stored, zero already, or the parent's.
            let step = (grain - at % grain).min(end - at);
            let done = match self.run(tables, at, step)? {
                Run::Stored { host, .. } => self.storage.zero(host, step, unmap),
                Run::New { .. } if self.is_zero(tables, at)? => Ok(()),
                Run::New { .. }
                    if entries
                        && (step == grain || at + step == geometry.size() && at.is_multiple_of(grain)) =>
                {
                    match self.publish(writer, tables, at / grain, None, false)? {
                        // Another request was quicker.
                        Published::Taken(host) => self.storage.zero(host, step, unmap),
                        Published::Done | Published::Zeroed => Ok(()),
                    }
                }
                Run::New { .. } => self.write_zero_bytes(writer, tables, at, step, old),
            };
            writer.touched.store(true, Ordering::Release);
            done?;
            at += step;
        }
        if writer.changed.read().len() > MAX_CHANGED { self.flush(tables) } else { Ok(()) }
    }

    /// Zeroes as data, in a part of one grain that has no place yet.
    fn write_zero_bytes(
        &self,
        writer: &GrainWriter,
        tables: Tables<'_>,
        at: u64,
        length: u64,
        old: OldBytes<'_>,
    ) -> Result<()> {
        let zeroes = vec![0; length as usize];
        self.write_new(writer, tables, at, Mem::from(&zeroes[..]), Some(old))
    }

    /// Whether the grain with the byte `at` is one of zeroes.
    fn is_zero(&self, tables: Tables<'_>, at: u64) -> Result<bool> {
        let entry = self.entry_of(tables, at / self.geometry().grain_bytes())?;
        Ok(self.grain(entry, at)? == Grain::Zero)
    }

    /// Writes data with zeroes around it.
    fn write_padded(&self, place: u64, head: u64, part: Mem<'_>, tail: u64) -> Result<()> {
        let from = place + head;
        let behind = from + part.len() as u64;
        if head > PAD {
            self.storage.zero(place, head, false)?;
        }
        if tail > PAD {
            self.storage.zero(behind, tail, false)?;
        }
        let pad = |length: u64| {
            Mem::from(ZEROES.get(..length as usize).filter(|_| length <= PAD).unwrap_or_default())
        };
        let front = pad(head);
        let start = from - front.len() as u64;
        self.storage.write_all_vectored_at(&mut [front, part, pad(tail)], start)
    }

    /// Sets the entry of a grain, which is empty or one of zeroes, in memory: to a place, or to one of zeroes. `absent`: only if it is
    /// empty.
    fn publish(
        &self,
        writer: &GrainWriter,
        tables: Tables<'_>,
        grain: u64,
        place: Option<u64>,
        absent: bool,
    ) -> Result<Published> {
        let geometry = self.geometry();
        let (index, number) = (grain / geometry.table_entries, grain % geometry.table_entries);
        let _alone = writer.publishing.lock();
        let (table, is_new) = match self.table(tables.cache, tables.extent, index)? {
            Some(table) => (table, false),
            None => (self.new_table(writer, index)?, true),
        };
        match self.grain(table.get(number), grain * geometry.grain_bytes())? {
            Grain::Data(host) => return Ok(Published::Taken(host)),
            Grain::Zero if absent => return Ok(Published::Zeroed),
            Grain::Zero | Grain::Unallocated => {}
        }
        let mut changed = writer.changed.write();
        let entry = changed.entry(index).or_insert_with(|| Changed { table, entries: Vec::new(), is_new });
        entry.table.set(number, place.map_or(ZERO_GRAIN, |place| place / SECTOR));
        entry.entries.push(number);
        Ok(Published::Done)
    }

    /// Room for a table and its copy, all zeroes.
    fn new_table(&self, writer: &GrainWriter, index: u64) -> Result<Arc<Table>> {
        let geometry = self.geometry();
        let bytes = geometry.table_bytes().next_multiple_of(SECTOR);
        let copies = 1 + u64::from(writer.redundant.is_some());
        let length = (bytes * copies).next_multiple_of(geometry.grain_bytes());
        let place = self.allocate(writer, length)?;
        self.storage.zero(place, length, false).inspect_err(|_| self.give_back(writer, place, length))?;
        let mut at = place;
        for directory in writer.redundant.iter().chain([&self.directory]) {
            directory.read().set(index, at / SECTOR);
            at += bytes;
        }
        Ok(Arc::new(Table::new(vec![0; geometry.table_entries as usize])))
    }

    /// Makes what was written durable, and then the entries that lead to it.
    pub(super) fn flush(&self, tables: Tables<'_>) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let _one = writer.flushing.lock();
        if !writer.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let batches = take(writer);
        let written = self.storage.flush().and_then(|()| {
            if batches.is_empty() {
                return Ok(());
            }
            if let Some(redundant) = &writer.redundant {
                self.write_entries(redundant, &batches)?;
            }
            self.write_entries(&self.directory, &batches)?;
            self.storage.flush()
        });
        match written {
            Ok(()) => settle(writer, tables, &batches),
            Err(_) => put_back(writer, batches),
        }
        written
    }

    /// Writes entries into the tables that a directory names, and the directory's own for new tables.
    fn write_entries(&self, directory: &RwLock<Directory>, batches: &[Batch]) -> Result<()> {
        let geometry = self.geometry();
        let directory = directory.read();
        for Batch { index, entries, is_new } in batches {
            let entry = directory.get(*index);
            // A copy that lacks the table stays without it.
            let Some(table) = geometry.table(entry).map_err(|e| self.storage.located(e))? else { continue };
            for run in entries.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
                let Some((first, _)) = run.first() else { continue };
                let bytes: Vec<u8> =
                    run.iter().flat_map(|(_, value)| (*value as u32).to_le_bytes()).collect();
                self.storage.write_all_at(Mem::from(&bytes[..]), table + first * 4)?;
            }
            if *is_new {
                let bytes = (entry as u32).to_le_bytes();
                self.storage.write_all_at(Mem::from(&bytes[..]), directory.sector * SECTOR + index * 4)?;
            }
        }
        Ok(())
    }
}

/// What waits now. The tables stay where they are found.
fn take(writer: &GrainWriter) -> Vec<Batch> {
    let _alone = writer.publishing.lock();
    let mut changed = writer.changed.write();
    let batch = |(index, changed): (&u64, &mut Changed)| {
        let mut numbers = std::mem::take(&mut changed.entries);
        numbers.sort_unstable();
        let entries = numbers.into_iter().map(|number| (number, changed.table.get(number))).collect();
        Batch { index: *index, entries, is_new: std::mem::take(&mut changed.is_new) }
    };
    changed.iter_mut().map(batch).collect()
}

/// Tables that are in the file as they are in memory can be forgotten.
fn settle(writer: &GrainWriter, tables: Tables<'_>, batches: &[Batch]) {
    let _alone = writer.publishing.lock();
    let mut changed = writer.changed.write();
    for Batch { index, .. } in batches {
        if changed.get(index).is_some_and(|changed| changed.entries.is_empty())
            && let Some(settled) = changed.remove(index)
        {
            // In place of an older one, which may just be read.
            tables.cache.put((tables.extent, *index), settled.table);
        }
    }
}

/// A flush failed: everything waits for the next one.
fn put_back(writer: &GrainWriter, batches: Vec<Batch>) {
    let _alone = writer.publishing.lock();
    let mut changed = writer.changed.write();
    for Batch { index, entries, is_new } in batches {
        if let Some(changed) = changed.get_mut(&index) {
            changed.entries.extend(entries.into_iter().map(|(number, _)| number));
            changed.is_new |= is_new;
        }
    }
    writer.touched.store(true, Ordering::Release);
}

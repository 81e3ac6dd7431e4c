//! L2 tables. A table of a large image is mostly one run of clusters that follow each other in the file, so the loop
//! looks for runs and judges each as a whole; everything else goes entry by entry. A table of nothing but a few runs is
//! seen as that by the thread that reads it, and its entries go no further.

use qcow2_format::limits::MAX_HOST_OFFSET;
use qcow2_format::{CompressedDescriptor, Geometry, Header, L2Entry, L2Mapping};

use super::read_ahead;
use super::target::Stop;
use super::walk::Walk;
use crate::{Error, ErrorKind};
use qcow2_core::check::{FindingCode, Repair};

/// Bytes of memory per entry that waits to be written.
const ENTRY_MEMORY: u64 = 64;

/// Entries whose words count up by the cluster size, all sound by themselves.
#[derive(Default)]
struct Run {
    first: u64,
    /// The word that would continue the run.
    next: u64,
    length: u64,
}

/// Runs of a table that stand for all of it.
const MAX_RUNS: usize = 64;

/// The first word of a run, and how many entries it has.
pub(super) type Runs = Vec<(u64, u64)>;

/// What an entry of a run must be like in this image.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    geometry: Geometry,
    external: bool,
    /// Where host offsets end that need no closer look.
    limit: u64,
}

impl Shape {
    pub(super) fn of(header: &Header, file_length: u64) -> Self {
        let external = header.has_data_file();
        Self {
            geometry: header.geometry,
            external,
            limit: if external { MAX_HOST_OFFSET / 2 } else { file_length },
        }
    }

    /// The runs of a table that has nothing else but entries without a host cluster, if they are few.
    pub(super) fn runs(self, bytes: &[u8]) -> Option<Runs> {
        match self.geometry.extended_l2() {
            true => self.runs_of(L2Entry::extended_entries(bytes)),
            false => self.runs_of(L2Entry::standard_entries(bytes)),
        }
    }

    #[inline]
    fn runs_of(self, entries: impl Iterator<Item = L2Entry>) -> Option<Runs> {
        let cluster_size = self.geometry.cluster_size();
        let mut runs = Runs::new();
        let (mut first, mut next, mut length) = (0, 0, 0);
        for entry in entries {
            if entry.word == next && length > 0 && entry.bitmap.is_valid() {
                length += 1;
                next += cluster_size;
            } else if !entry.is_bare() {
                if !self.begins_run(entry) || runs.len() == MAX_RUNS {
                    return None;
                }
                if length > 0 {
                    runs.push((first, length));
                }
                (first, next, length) = (entry.word, entry.word + cluster_size, 1);
            }
        }
        if length > 0 {
            runs.push((first, length));
        }
        Some(runs)
    }

    /// Whether nothing is wrong with the entry by itself, and it has a host cluster.
    fn begins_run(self, entry: L2Entry) -> bool {
        let offset = entry.offset_bits();
        !entry.is_compressed()
            && entry.reserved_bits() == 0
            && entry.bitmap.is_valid()
            && (offset != 0 || (self.external && entry.copied() && !entry.has_zero_flag(&self.geometry)))
            && self.geometry.in_cluster(offset) == 0
            && offset < self.limit
    }
}

/// One table while it is judged.
struct Table {
    /// Host offset.
    offset: u64,
    active: bool,
    judge_copied: bool,
    run: Run,
    /// Host offset behind the last standard cluster; 0 before the first. Starts anew with each table, as in QEMU.
    next_contiguous: u64,
}

impl Walk<'_, '_> {
    /// Visits the entries of the L2 table at `offset`.
    pub(super) fn l2_table(
        &mut self,
        offset: u64,
        read: &read_ahead::Table<Runs>,
        active: bool,
        judge_copied: bool,
    ) -> Result<(), Stop> {
        let mut table = Table { offset, active, judge_copied, run: Run::default(), next_contiguous: 0 };
        let bytes = match read {
            read_ahead::Table::Bytes(bytes) => bytes,
            read_ahead::Table::Summary(runs) => {
                for &(first, length) in runs {
                    table.run = Run { first, next: 0, length };
                    self.flush(&mut table)?;
                }
                return Ok(());
            }
        };
        match self.target.header.geometry.extended_l2() {
            true => self.entries(L2Entry::extended_entries(bytes), &mut table),
            false => self.entries(L2Entry::standard_entries(bytes), &mut table),
        }
    }

    #[inline]
    fn entries(&mut self, entries: impl Iterator<Item = L2Entry>, table: &mut Table) -> Result<(), Stop> {
        let cluster_size = self.target.header.geometry.cluster_size();
        for (index, entry) in entries.enumerate() {
            if entry.word == table.run.next && table.run.length > 0 && entry.bitmap.is_valid() {
                table.run.length += 1;
                table.run.next += cluster_size;
            } else if !entry.is_bare() {
                self.entry(index, entry, table)?;
            }
        }
        self.flush(table)
    }

    /// An entry that does not continue a run.
    fn entry(&mut self, index: usize, entry: L2Entry, table: &mut Table) -> Result<(), Stop> {
        self.flush(table)?;
        if entry.is_compressed() {
            return self.compressed(index, entry, table.active);
        }
        let word = entry.word;
        if entry.reserved_bits() != 0 {
            self.tally.corruption(FindingCode::L2Reserved, None, || {
                format!("found l2 entry with reserved bits set: {word:x}")
            });
        }
        let header = self.target.header;
        let zero_flag = entry.has_zero_flag(&header.geometry);
        if entry.offset_bits() == 0 && (zero_flag || !(header.has_data_file() && entry.copied())) {
            if entry.bitmap.has_data() {
                self.tally.corruption(FindingCode::SubclusterBitmap, None, || {
                    format!("Unallocated cluster has non-zero subcluster allocation map {:x}", entry.bitmap.0)
                });
            }
            return Ok(());
        }
        self.standard(index, entry, zero_flag, table)
    }

    fn compressed(&mut self, index: usize, entry: L2Entry, active: bool) -> Result<(), Stop> {
        let header = self.target.header;
        let word = entry.word;
        let descriptor = CompressedDescriptor::decode(word, &header.geometry);
        let offset = descriptor.offset.get();
        if entry.copied() {
            self.tally.corruption(FindingCode::CompressedInvalid, offset, || {
                format!("coffset={offset:#x}: copied flag must never be set for compressed clusters")
            });
        }
        let wrong = if header.has_data_file() {
            "data file"
        } else if entry.bitmap.0 != 0 {
            "non-zero subcluster allocation bitmap"
        } else {
            self.reference(offset, descriptor.max_length())?;
            if active {
                self.fragmentation.allocated += 1;
                self.fragmentation.compressed += 1;
                self.fragmentation.fragmented += 1;
            }
            return Ok(());
        };
        self.tally.corruption(FindingCode::CompressedInvalid, offset, || {
            format!("compressed cluster {index} with {wrong}, entry={word:#x}")
        });
        Ok(())
    }

    /// A standard cluster with a host offset: begins a run, unless something is wrong with it by itself.
    fn standard(
        &mut self,
        index: usize,
        entry: L2Entry,
        zero_flag: bool,
        table: &mut Table,
    ) -> Result<(), Stop> {
        let header = self.target.header;
        let geometry = &header.geometry;
        let offset = entry.offset_bits();
        if !entry.bitmap.is_valid() {
            self.tally.corruption(FindingCode::SubclusterBitmap, offset, || {
                format!("offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            });
        }
        let aligned = geometry.in_cluster(offset) == 0;
        if !aligned {
            let data = if geometry.extended_l2() { entry.bitmap.has_data() } else { !zero_flag };
            let what = if data { "Data" } else { "Preallocated" };
            let message =
                || format!("offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted.");
            // Version 2 has no zero clusters: there only an entry for nothing reads as zeroes.
            let possible = header.version > 2 || header.backing_file.is_none();
            if !data && self.target.repair == Some(Repair::All) && possible {
                return self.zero_instead(index, entry, table, message);
            }
            self.tally.corruption(FindingCode::ClusterUnaligned, offset, message);
        }
        table.run =
            Run { first: entry.word, next: entry.word.wrapping_add(geometry.cluster_size()), length: 1 };
        let limit = if header.has_data_file() { MAX_HOST_OFFSET / 2 } else { self.file_length };
        if aligned && entry.reserved_bits() == 0 && offset < limit {
            return Ok(());
        }
        // It stands alone: what follows it must be judged by itself.
        self.place(offset, 1, table);
        if !header.has_data_file() {
            self.reference(offset, geometry.cluster_size())?;
        }
        self.l2_copied(entry.word, 1, table)?;
        table.run.length = 0;
        Ok(())
    }

    /// Plans to replace an entry that reads as zeroes, but for its host offset, by one without host cluster.
    fn zero_instead(
        &mut self,
        index: usize,
        entry: L2Entry,
        table: &Table,
        message: impl FnOnce() -> String,
    ) -> Result<(), Stop> {
        let geometry = &self.target.header.geometry;
        let at = table.offset + index as u64 * geometry.l2_entry_size();
        let zero = if geometry.extended_l2() {
            L2Entry { word: 0, bitmap: entry.bitmap }
        } else if self.target.header.version > 2 {
            L2Mapping::Zero { host: None, copied: false }.encode(geometry)
        } else {
            L2Entry::default()
        };
        let first = self.entries.insert(at, zero).is_none();
        if entry.reserved_bits() != 0 {
            // Told before; they go with the entry.
            self.tally.corruptions -= 1;
            self.tally.hidden -= 1;
            self.tally.corruptions_fixed += u64::from(first);
        }
        if first {
            self.tally.fixed_corruption(FindingCode::ClusterUnaligned, entry.offset_bits(), message);
        }
        if self.entries.len() as u64 > self.target.options.limits.max_memory / ENTRY_MEMORY {
            let message = "the L2 entries to repair exceed the limit of memory";
            return Err(Stop::Error(Error::new(ErrorKind::Limit, message)));
        }
        Ok(())
    }

    /// Judges the run as a whole and ends it.
    fn flush(&mut self, table: &mut Table) -> Result<(), Stop> {
        let length = std::mem::take(&mut table.run.length);
        if length == 0 {
            return Ok(());
        }
        let header = self.target.header;
        let geometry = &header.geometry;
        let first = table.run.first;
        let offset = L2Entry::standard(first).offset_bits();
        self.place(offset, length, table);
        if !header.has_data_file() {
            // The part inside the file at once; whatever leads beyond it is told one by one.
            let inside = length.min(geometry.clusters_for(self.file_length - offset));
            self.count(geometry.cluster_index(offset), inside)?;
            for i in inside..length {
                self.reference(offset + (i << geometry.cluster_bits()), geometry.cluster_size())?;
            }
        }
        self.l2_copied(first, length, table)
    }

    /// Counts `length` clusters at `offset` as allocated.
    fn place(&mut self, offset: u64, length: u64, table: &mut Table) {
        if table.active {
            self.fragmentation.allocated += length;
            self.fragmentation.fragmented +=
                u64::from(table.next_contiguous != 0 && table.next_contiguous != offset);
            table.next_contiguous = offset + (length << self.target.header.geometry.cluster_bits());
        }
    }

    /// Judges the COPIED flags of `length` entries from the word `first` on, by the stored refcounts.
    fn l2_copied(&mut self, first: u64, length: u64, table: &Table) -> Result<(), Stop> {
        let header = self.target.header;
        let geometry = &header.geometry;
        let entry = L2Entry::standard(first);
        let (copied, cluster) = (entry.copied(), geometry.cluster_index(entry.offset_bits()));
        if !table.judge_copied || (!header.has_data_file() && self.stored.all(copied, cluster, length)) {
            return Ok(());
        }
        for i in 0..length {
            // Clusters of an external data file have no refcounts: exactly one reference, by definition.
            let refcount = if header.has_data_file() { Some(1) } else { self.stored.get(cluster + i)? };
            let Some(refcount) = refcount.filter(|r| (*r == 1) != copied) else { continue };
            let word = first + (i << geometry.cluster_bits());
            self.copied.corruption(FindingCode::L2Copied, L2Entry::standard(word).offset_bits(), || {
                format!("OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}")
            });
        }
        Ok(())
    }
}

//! Changes of a sound image that need new refcount structures: another refcount width, a new snapshot table, clusters
//! for what was zero clusters. Like a rebuild, all of it is durable before the header knows of it.

use std::collections::BTreeMap;

use qcow2_format::{CryptMethod, Header, HostOffset, L1Entry, L2Entry, L2Mapping};

use super::super::check;
use super::super::compare::{self, Fix};
use super::super::counts::ReferenceCounts;
use super::super::snapshots::{self, SnapshotTable};
use super::super::stored::StoredRefcounts;
use super::super::target::{CheckOptions, File, Stop, Target};
use super::super::visit::walk_all;
use super::super::walk::Walked;
use super::bytes;
use super::rebuild::{Builder, switch};
use super::refcounts;
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};
use qcow2_core::check::{FindingCode, Repair, Tally};

/// Only what is counted matters: the image is sound, but for leaks.
const COUNTED: Fix = Fix { leaks: true, errors: true };
/// Bytes of memory per entry that waits to be written.
const ENTRY_MEMORY: u64 = 128;

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Failed(error) | Stop::Error(error) => error,
        }
    }
}

/// Refuses an image whose references cannot be trusted. With `roomier`, refcounts that were too narrow for them are what
/// is remedied: a repair can count them then.
fn require_sound(
    storage: &dyn Storage,
    header: &Header,
    roomier: bool,
    options: &CheckOptions,
    job: &Job,
) -> Result<()> {
    let report = check(storage, header, options, job)?;
    let overflows = report.findings.iter().filter(|f| f.code == FindingCode::RefcountOverflow).count() as u64;
    let errors = report.corruptions + report.check_errors - if roomier { overflows } else { 0 };
    if errors == 0 && report.failure.is_none() {
        return Ok(());
    }
    let message = format!("the image has {errors} errors: repair it before it is amended");
    let error = storage.located(Error::new(ErrorKind::Corrupt, message));
    Err(match report.failure {
        Some(failure) => error.with_source(failure),
        None => error,
    })
}

/// Writes the refcount structures anew for the header `new`, with a new snapshot table if `rewrite_snapshots`, and
/// then `new` itself through `publish`, with the places of both.
///
/// # Errors
/// `Corrupt` for an image that is not sound, but for refcounts that overflowed and get room; `Limit` for a refcount that
/// the new width cannot hold. Nothing is changed
/// before `publish`.
pub(crate) fn restructure(
    storage: &dyn Storage,
    new: &Header,
    rewrite_snapshots: bool,
    options: &CheckOptions,
    job: &Job,
    publish: impl FnOnce(&Header) -> Result<()>,
) -> Result<()> {
    let header = crate::image::read_header(storage)?;
    let roomier = new.geometry.refcount_bits() > header.geometry.refcount_bits();
    require_sound(storage, &header, roomier, options, job)?;
    let target = Target { storage, header: &header, options, job, repair: Some(Repair::All) };
    let mut image = Sound::walk(&target)?;
    let mut new = new.clone();
    let mut builder = Builder::new(&target, &mut image.stored, &image.walked, COUNTED, new.geometry);
    if rewrite_snapshots {
        builder.snapshot_table(&image.snapshots, &mut new)?;
    }
    builder.structures(&mut new)?;
    publish(&new)?;
    free_leaks(storage, options, job)
}

/// What a sound image refers to.
struct Sound<'a> {
    snapshots: SnapshotTable,
    stored: StoredRefcounts<'a>,
    walked: Walked,
}

impl<'a> Sound<'a> {
    fn walk(target: &'a Target<'_>) -> Result<Self> {
        let (mut tally, mut copied) = (Tally::new(0), Tally::new(0));
        let snapshots = snapshots::read(target, &mut tally)?;
        let file = File::measure(target)?;
        let mut stored = StoredRefcounts::load(target, file.clusters)?;
        let walked = walk_all(target, &file, &snapshots, &mut stored, &mut tally, &mut copied)?;
        Ok(Self { snapshots, stored, walked })
    }
}

/// Lowers the refcounts of what nothing refers to any more.
fn free_leaks(storage: &dyn Storage, options: &CheckOptions, job: &Job) -> Result<()> {
    let header = crate::image::read_header(storage)?;
    let target = Target { storage, header: &header, options, job, repair: Some(Repair::Leaks) };
    let mut image = Sound::walk(&target)?;
    let mut tally = Tally::new(0);
    compare::compare(&target, &mut image.stored, &image.walked.counts, Fix::default(), &mut tally)?;
    if tally.leaks > 0 {
        refcounts::write(
            &target,
            &mut image.stored,
            &image.walked.counts,
            Fix { leaks: true, errors: false },
        )?;
    }
    Ok(())
}

/// Replaces every zero cluster, of the active disk and of all snapshots, by one that reads as zeroes without a flag:
/// nothing where there is no backing file, else a cluster of zeroes. The disks read the same at every moment.
///
/// With `plain`, an image that has compressed clusters is refused before anything is changed. `data` is through which guest bytes
/// are written where they are not stored as they are.
///
/// # Errors
/// As [`restructure`]; `InvalidArgument` for compressed clusters; `UnsupportedFeature` for zeroes to be written to an image that is
/// encrypted, without `data`.
pub(crate) fn expand_zeroes(
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    plain: bool,
    options: &CheckOptions,
    job: &Job,
) -> Result<()> {
    let header = crate::image::read_header(storage)?;
    require_sound(storage, &header, false, options, job)?;
    let target = Target { storage, header: &header, options, job, repair: Some(Repair::All) };
    let mut image = Sound::walk(&target)?;
    let tables = l2_tables(&target, &image.snapshots)?;
    let mut expansion = Expansion {
        target: &target,
        data,
        builder: Builder::new(&target, &mut image.stored, &image.walked, COUNTED, header.geometry),
        counts: &image.walked.counts,
        entries: BTreeMap::new(),
        new_clusters: false,
    };
    if plain {
        for &table in &tables {
            job.checkpoint()?;
            expansion.refuse_compressed(table)?;
        }
    }
    for table in tables {
        job.checkpoint()?;
        expansion.table(table)?;
    }
    let Expansion { mut builder, entries, new_clusters, .. } = expansion;
    if entries.is_empty() {
        return Ok(());
    }
    // The clusters of zeroes, then their refcounts, then what refers to them.
    storage.flush()?;
    if new_clusters {
        let mut new = header.clone();
        builder.structures(&mut new)?;
        switch(&target, &new)?;
    }
    for (at, entry) in entries {
        let mut bytes = [0; 8];
        entry.write(&mut bytes);
        bytes::write(storage, &bytes, at)?;
    }
    storage.flush()?;
    free_leaks(storage, options, job)
}

/// Host offsets of all L2 tables, each once.
fn l2_tables(target: &Target<'_>, snapshots: &SnapshotTable) -> Result<Vec<u64>> {
    let header = target.header;
    let mut offsets = Vec::new();
    let mut l1_tables = vec![(header.l1_table_offset.get(), u64::from(header.l1_size))];
    l1_tables.extend(snapshots.entries.iter().map(|s| (s.l1_offset, u64::from(s.l1_size))));
    for (at, entries) in l1_tables {
        // At most 32 MiB each: the walk was there before.
        let mut bytes = vec![0; entries as usize * 8];
        target.storage.read_padded_at(MemMut::from(&mut bytes[..]), at)?;
        offsets.extend(L1Entry::entries(&bytes).map(L1Entry::offset_bits).filter(|offset| *offset != 0));
        offsets.sort_unstable();
        offsets.dedup();
    }
    Ok(offsets)
}

struct Expansion<'a, 'b, 'c> {
    target: &'a Target<'a>,
    /// Through which guest bytes are written, where they are not stored as they are.
    data: Option<&'a dyn Storage>,
    builder: Builder<'a, 'b, 'c>,
    counts: &'b ReferenceCounts,
    /// New L2 entries by their host offset. What can be an image of version 2 has none of two words.
    entries: BTreeMap<u64, L2Entry>,
    new_clusters: bool,
}

impl Expansion<'_, '_, '_> {
    fn read(&self, table: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.target.header.geometry.cluster_len()];
        self.target.storage.read_padded_at(MemMut::from(&mut bytes[..]), table)?;
        Ok(bytes)
    }

    fn refuse_compressed(&self, table: u64) -> Result<()> {
        let bytes = self.read(table)?;
        if !L2Entry::standard_entries(&bytes).any(L2Entry::is_compressed) {
            return Ok(());
        }
        let message = "Cannot downgrade an image with zstd compression type and existing compressed clusters";
        let error = Error::new(ErrorKind::InvalidArgument, message).with_field("compression_type");
        Err(self.target.storage.located(error))
    }

    /// Makes a host cluster read as zeroes.
    fn zero(&self, host: u64) -> Result<()> {
        let Target { storage, header, .. } = *self.target;
        if self.data.is_none() && header.crypt_method != CryptMethod::None {
            let message = "zero clusters over a backing file become data, which cannot be written without a key: \
                           write over them, or rebase to no backing file, before the downgrade";
            let error = Error::new(ErrorKind::UnsupportedFeature, message).with_field("crypt_method");
            return Err(storage.located(error));
        }
        self.data.unwrap_or(storage).zero(host, header.geometry.cluster_size(), false)
    }

    fn table(&mut self, table: u64) -> Result<()> {
        let header = self.target.header;
        let geometry = &header.geometry;
        let bytes = self.read(table)?;
        let references = self.counts.get(geometry.cluster_index(table));
        for (index, entry) in L2Entry::standard_entries(&bytes).enumerate() {
            if entry.is_compressed() || !entry.has_zero_flag(geometry) {
                continue;
            }
            let host = entry.offset_bits();
            let new = if header.backing_file.is_none() {
                L2Entry::default()
            } else if host != 0 && self.counts.get(geometry.cluster_index(host)) == 1 {
                // Nothing else reads this cluster, and through this entry it reads as zeroes.
                self.zero(host)?;
                entry.without_zero_flag(geometry)
            } else {
                self.new_clusters = true;
                let cluster = self.builder.take_one(references)? << geometry.cluster_bits();
                self.zero(cluster)?;
                L2Mapping::Data { host: HostOffset(cluster), copied: references == 1 }.encode(geometry)
            };
            self.entries.insert(table + index as u64 * 8, new);
            let limit = self.target.options.limits.max_memory;
            if self.entries.len() as u64 > limit / ENTRY_MEMORY {
                let message = format!("the zero clusters to expand exceed the limit of {limit} bytes");
                return Err(Error::new(ErrorKind::Limit, message));
            }
        }
        Ok(())
    }
}

//! Looking at an image without changing it: its L2 tables, its clusters of zeroes, and what a compaction would do.

use std::collections::HashMap;
use std::ops::Range;

use qcow2_format::{
    CompressedDescriptor, HostOffset, L1Entry, L2Entry, L2Mapping, SubclusterBitmap, SubclusterKind, words,
};
use qcow2_transform::is_zero;

use super::data_file::{has_stale_data, stale_data};
use super::{CompactOptions, CompactResult, measure};
use crate::check::References;
use crate::image::Qcow2;
use crate::write::give_up;
use crate::{ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// Most host clusters that may be remembered, each in 64 bytes: a quarter of the memory that is allowed.
pub(super) fn most_remembered(image: &Qcow2) -> u64 {
    image.limits().max_memory / 4 / 64
}

/// One L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    /// Host offset.
    pub(super) offset: u64,
    /// Index of an L1 entry that refers to it.
    pub(super) l1_index: usize,
    /// L1 entries that refer to it: as often are the clusters counted that its entries refer to.
    pub(super) weight: u64,
}

/// The L2 tables of the active disk and of all snapshots, each once, by their place.
pub(super) fn tables(image: &Qcow2) -> Result<Vec<Table>> {
    let mut found = Vec::new();
    let mut add = |l1: &[u64]| -> Result<()> {
        for (l1_index, &entry) in l1.iter().enumerate() {
            let offset = L1Entry(entry).offset_bits();
            if offset != 0 {
                found.push(Table { offset, l1_index, weight: 1 });
            }
        }
        let bytes = (found.len() * size_of::<Table>()) as u64;
        let limit = image.limits().max_memory;
        if bytes > limit {
            let message =
                format!("{} references to L2 tables exceed the limit of {limit} bytes", found.len());
            return Err(image.error(ErrorKind::Limit, message));
        }
        Ok(())
    };
    add(&image.mapping.read().l1)?;
    for snapshot in image.snapshots().iter() {
        let mut bytes = vec![0u8; snapshot.l1_size as usize * 8];
        image.storage().read_exact_at(MemMut::from(&mut bytes[..]), snapshot.l1_table_offset.0)?;
        add(&words::decode(&bytes))?;
    }
    found.sort_unstable_by_key(|table| table.offset);
    found.dedup_by(|again, first| {
        let same = again.offset == first.offset;
        first.weight += if same { again.weight } else { 0 };
        same
    });
    Ok(found)
}

/// Reads the entries of an L2 table that is current in the file.
pub(super) fn read_words(image: &Qcow2, offset: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0u8; image.geometry().cluster_len()];
    image.storage().read_exact_at(MemMut::from(&mut bytes[..]), offset)?;
    Ok(words::decode(&bytes))
}

/// Entry `number` of a table's words.
pub(super) fn entry_at(image: &Qcow2, words: &[u64], number: usize) -> L2Entry {
    L2Entry::of_words(words, number, image.geometry())
}

/// Guest offset of an entry.
pub(super) fn guest_of(image: &Qcow2, l1_index: usize, number: usize) -> u64 {
    let g = image.geometry();
    (l1_index as u64).wrapping_mul(g.l2_coverage()).wrapping_add(number as u64 * g.cluster_size())
}

/// Finds clusters that hold nothing but zeroes.
pub(super) struct ZeroScan<'a> {
    image: &'a Qcow2,
    /// What the guest reads, at host offsets.
    data: &'a dyn Storage,
    /// Reading a deeper layer would show something else than zeroes.
    has_backing: bool,
    buffer: Vec<u8>,
    compressed: Vec<u8>,
    /// Length of the data's file, which does not change meanwhile.
    end: u64,
    /// The hole that was found last.
    hole: Range<u64>,
}

/// What becomes of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Emptied {
    pub(super) new: L2Mapping,
    /// The host clusters that lose a reference, or in an external data file their space.
    pub(super) freed: Option<Range<u64>>,
}

impl<'a> ZeroScan<'a> {
    /// `deeper`: there is a layer below. One that is named and not open counts, too.
    pub(super) fn new(image: &'a Qcow2, deeper: bool) -> Result<Self> {
        image.require_plain()?;
        let has_backing = deeper || image.header().backing_file.is_some();
        let data = &**image.data_storage()?;
        let buffer = vec![0; image.geometry().cluster_len()];
        let compressed = Vec::new();
        Ok(Self { image, data, has_backing, buffer, compressed, end: data.size()?, hole: 0..0 })
    }

    /// Whether unallocated clusters read as zeroes, as zero clusters do.
    pub(super) fn needs_no_flag(&self) -> bool {
        !self.has_backing && !self.image.header().data_file_raw()
    }

    /// What the entry can be instead; `None` where it holds data, or nothing to give up.
    pub(super) fn look(&mut self, mapping: &L2Mapping) -> Result<Option<Emptied>> {
        let g = *self.image.geometry();
        let version = self.image.header().version;
        let raw = self.image.header().data_file_raw();
        let one = |host: HostOffset| g.cluster_index(host.0)..g.cluster_index(host.0) + 1;
        Ok(match *mapping {
            L2Mapping::Zero { host: Some(host), .. } if !raw => {
                let new = L2Mapping::Zero { host: None, copied: false };
                Some(Emptied { new, freed: Some(one(host)) })
            }
            L2Mapping::Data { host, .. } => {
                // Without a zero flag, nothing but data hides a backing file.
                if (version < 3 && self.has_backing) || !self.holds_zeroes(host.0, g.cluster_size())? {
                    return Ok(None);
                }
                if raw && allocated(self.data, host.0, g.cluster_size())? == 0 {
                    return Ok(None);
                }
                let new = if raw { Some(*mapping) } else { give_up(&g, mapping, version, self.has_backing) };
                new.map(|new| Emptied { new, freed: Some(one(host)) })
            }
            L2Mapping::Compressed(descriptor) => {
                if (version < 3 && self.has_backing) || !self.inflates_to_zeroes(&descriptor)? {
                    return Ok(None);
                }
                let (first, last) = descriptor.host_clusters(&g);
                let new = give_up(&g, mapping, version, self.has_backing);
                new.map(|new| Emptied { new, freed: Some(first..last + 1) })
            }
            L2Mapping::Subclusters { host: Some(host), copied, bitmap } => {
                let kept = self.without_zeroes(host, bitmap)?;
                let keeps_host = kept.has_data() || raw;
                let new = match keeps_host {
                    true => L2Mapping::Subclusters { host: Some(host), copied, bitmap: kept },
                    false if kept.0 == 0 => L2Mapping::Unallocated,
                    false => L2Mapping::Subclusters { host: None, copied: false, bitmap: kept },
                };
                (new != *mapping).then_some(Emptied { new, freed: (!keeps_host).then(|| one(host)) })
            }
            _ => None,
        })
    }

    /// The bitmap with the zero flag for the data subclusters that hold zeroes.
    fn without_zeroes(&mut self, host: HostOffset, bitmap: SubclusterBitmap) -> Result<SubclusterBitmap> {
        let unit = self.image.geometry().subcluster_size();
        let mut kept = bitmap;
        if self.image.header().data_file_raw() {
            return Ok(kept);
        }
        for index in 0..32 {
            if bitmap.kind(index) == SubclusterKind::Data
                && self.holds_zeroes(host.0 + u64::from(index) * unit, unit)?
            {
                kept = kept.with_zero(index, index + 1);
            }
        }
        Ok(kept)
    }

    /// Whether compressed data is that of zeroes. Data that cannot be read is not: it is no matter of a compaction.
    fn inflates_to_zeroes(&mut self, descriptor: &CompressedDescriptor) -> Result<bool> {
        self.compressed.resize(descriptor.max_length() as usize, 0);
        self.image.storage().read_padded_at(MemMut::from(&mut self.compressed[..]), descriptor.offset.0)?;
        Ok(self.image.inflates(&self.compressed, &mut self.buffer) && is_zero(&self.buffer))
    }

    fn holds_zeroes(&mut self, offset: u64, length: u64) -> Result<bool> {
        let stop = (offset + length).min(self.end);
        if offset >= self.end || (self.hole.contains(&offset) && self.hole.end >= stop) {
            return Ok(true);
        }
        let run = self.data.run(offset..stop)?;
        if !run.data {
            self.hole = offset..run.end;
            if run.end >= stop {
                return Ok(true);
            }
        }
        let bytes = self.buffer.get_mut(..length as usize).unwrap_or_default();
        self.data.read_padded_at(MemMut::from(&mut *bytes), offset)?;
        Ok(is_zero(bytes))
    }
}

/// Bytes of the range that take space in the file.
pub(super) fn allocated(storage: &dyn Storage, start: u64, length: u64) -> Result<u64> {
    let end = storage.size()?.min(start.saturating_add(length));
    let (mut at, mut sum) = (start, 0);
    while at < end {
        let run = storage.run(at..end)?;
        let stop = run.end.min(end).max(at + 1);
        sum += if run.data { stop - at } else { 0 };
        at = stop;
    }
    Ok(sum)
}

/// What a compaction would do.
pub(super) fn estimate(
    image: &Qcow2,
    references: &References,
    options: CompactOptions,
    has_backing: bool,
    job: &Job,
) -> Result<CompactResult> {
    let g = *image.geometry();
    let storage = &**image.storage();
    let mut result = measure(image)?;
    let clusters = g.clusters_for(result.length_before);
    job.set_total(result.length_before.saturating_mul(if options.zeroes { 2 } else { 1 }));
    result.leaked_clusters = references.leaks;
    let (mut freed, mut used, mut highest) = (0, 0, 0);
    let mut free_from = None;
    for cluster in 0..=clusters {
        if cluster.is_multiple_of(1 << 14) {
            job.checkpoint()?;
            job.advance((g.cluster_size() << 14).min(result.length_before));
        }
        let in_use = cluster == clusters || references.get(cluster) > 0;
        match (in_use, free_from) {
            (false, None) => free_from = Some(cluster),
            (true, Some(first)) => {
                let start: u64 = first * g.cluster_size();
                freed += allocated(storage, start, (cluster - first) * g.cluster_size())?;
                free_from = None;
            }
            _ => {}
        }
        if in_use && cluster < clusters {
            (used, highest) = (used + 1, cluster);
        }
    }
    if has_stale_data(image) {
        let data = &**image.data_host()?;
        stale_data(image, job, &mut |range| {
            freed += allocated(data, range.start, range.end - range.start)?;
            Ok(())
        })?;
    }
    if options.zeroes {
        let zeroes = zero_clusters(image, references, has_backing, job)?;
        result.zero_clusters = zeroes.entries;
        freed += zeroes.space;
        used -= if image.header().has_data_file() { 0 } else { zeroes.hosts.min(used) };
    }
    let end = if options.rewrite { used } else { highest + 1 };
    result.length_after = (end * g.cluster_size()).min(result.length_before);
    if options.rewrite {
        result.moved_clusters = (end..=highest).map(|cluster| u64::from(references.get(cluster) > 0)).sum();
    }
    result.allocated_after = result.allocated_before.saturating_sub(freed);
    Ok(result)
}

/// What giving up clusters of zeroes would bring.
#[derive(Default)]
struct Zeroes {
    /// Entries that have zeroes.
    entries: u64,
    /// Host clusters that nothing would refer to.
    hosts: u64,
    /// Bytes that those take in the file.
    space: u64,
}

/// Looks for clusters that hold nothing but zeroes.
fn zero_clusters(image: &Qcow2, references: &References, has_backing: bool, job: &Job) -> Result<Zeroes> {
    let g = *image.geometry();
    let external = image.header().has_data_file();
    let mut scan = ZeroScan::new(image, has_backing)?;
    let mut zeroes = Zeroes::default();
    // References that host clusters would lose which have more of them.
    let mut lost: HashMap<u64, u64> = HashMap::new();
    let most = most_remembered(image);
    for table in tables(image)? {
        let words = read_words(image, table.offset)?;
        for number in 0..g.l2_entries() as usize {
            let mapping = image
                .decode_entry(entry_at(image, &words, number), guest_of(image, table.l1_index, number))?;
            let Some(Emptied { freed: Some(hosts), .. }) = scan.look(&mapping)? else { continue };
            job.checkpoint()?;
            zeroes.entries += 1;
            for host in hosts {
                let all = if external { 0 } else { references.get(host) };
                if all > table.weight {
                    // An estimate does without what cannot be remembered.
                    if lost.len() as u64 >= most && !lost.contains_key(&host) {
                        continue;
                    }
                    let lost = lost.entry(host).or_insert(0);
                    *lost += table.weight;
                    if *lost != all {
                        continue;
                    }
                }
                zeroes.hosts += 1;
                zeroes.space += allocated(&**image.data_host()?, host * g.cluster_size(), g.cluster_size())?;
            }
        }
    }
    Ok(zeroes)
}

//! Looking at an image without changing it: its clusters of zeroes, and what a compaction would do.

use std::collections::HashMap;
use std::ops::Range;

use qcow2_format::{CompressedDescriptor, HostOffset, L2Mapping, SubclusterBitmap, SubclusterKind};
use qcow2_transform::is_zero;

use super::data_file::{has_stale_data, stale_data};
use super::options::{CompactOptions, CompactResult, measure};
use super::space::{Freed, allocated};
use super::tables::{entry_at, guest_of, most_remembered, read_words, tables};
use crate::check::References;
use crate::door::GuestData;
use crate::image::Qcow2;
use crate::write::give_up;
use crate::{Job, MemMut, Result, Storage, StorageExt};

/// Finds clusters that hold nothing but zeroes.
pub(super) struct ZeroScan<'a> {
    image: &'a Qcow2,
    /// What the guest reads.
    data: &'a GuestData,
    /// The file that it is in.
    host: &'a dyn Storage,
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
        let (data, host) = (image.guest_data()?, &**image.data_host()?);
        let buffer = vec![0; image.geometry().cluster_len()];
        let compressed = Vec::new();
        Ok(Self { image, data, host, has_backing, buffer, compressed, end: host.size()?, hole: 0..0 })
    }

    /// Whether unallocated clusters read as zeroes, as zero clusters do.
    pub(super) fn needs_no_flag(&self) -> bool {
        !self.has_backing && !self.image.header().data_file_raw()
    }

    /// What the entry of the cluster at `guest` can be instead; `None` where it holds data, or nothing to give up.
    pub(super) fn look(&mut self, guest: u64, mapping: &L2Mapping) -> Result<Option<Emptied>> {
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
                if (version < 3 && self.has_backing) || !self.holds_zeroes(guest, host.0, g.cluster_size())? {
                    return Ok(None);
                }
                if raw && allocated(self.host, host.0, g.cluster_size())? == 0 {
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
                let kept = self.without_zeroes(guest, host, bitmap)?;
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
    fn without_zeroes(
        &mut self,
        guest: u64,
        host: HostOffset,
        bitmap: SubclusterBitmap,
    ) -> Result<SubclusterBitmap> {
        let unit = self.image.geometry().subcluster_size();
        let mut kept = bitmap;
        if self.image.header().data_file_raw() {
            return Ok(kept);
        }
        for index in 0..32 {
            let inside = u64::from(index) * unit;
            if bitmap.kind(index) == SubclusterKind::Data
                && self.holds_zeroes(guest + inside, host.0 + inside, unit)?
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

    fn holds_zeroes(&mut self, guest: u64, offset: u64, length: u64) -> Result<bool> {
        let stop = (offset + length).min(self.end);
        if offset >= self.end || (self.hole.contains(&offset) && self.hole.end >= stop) {
            return Ok(true);
        }
        let data = self.data.at(guest, offset);
        let run = data.run(offset..stop)?;
        if !run.data {
            self.hole = offset..run.end;
            if run.end >= stop {
                return Ok(true);
            }
        }
        let bytes = self.buffer.get_mut(..length as usize).unwrap_or_default();
        data.read_padded_at(MemMut::from(&mut *bytes), offset)?;
        Ok(is_zero(bytes))
    }
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
    let mut freed = Freed::of(storage);
    let (mut used, mut highest) = (0, 0);
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
                freed.add(start, (cluster - first) * g.cluster_size())?;
                free_from = None;
            }
            _ => {}
        }
        if in_use && cluster < clusters {
            (used, highest) = (used + 1, cluster);
        }
    }
    let mut freed_data = match image.header().has_data_file() {
        true => Some(Freed::of(&**image.data_host()?)),
        false => None,
    };
    if has_stale_data(image)
        && let Some(freed) = &mut freed_data
    {
        stale_data(image, job, &mut |range| freed.add(range.start, range.end - range.start))?;
    }
    if options.zeroes {
        let space = freed_data.as_mut().unwrap_or(&mut freed);
        let zeroes = zero_clusters(image, references, has_backing, space, job)?;
        result.zero_clusters = zeroes.entries;
        used -= if image.header().has_data_file() { 0 } else { zeroes.hosts.min(used) };
    }
    let end = if options.rewrite { used } else { highest + 1 };
    result.length_after = (end * g.cluster_size()).min(result.length_before);
    if options.rewrite {
        result.moved_clusters = (end..=highest).map(|cluster| u64::from(references.get(cluster) > 0)).sum();
    }
    for freed in [Some(freed), freed_data].into_iter().flatten() {
        result.allocated_after = result.allocated_after.saturating_sub(freed.bytes()?);
    }
    Ok(result)
}

/// What giving up clusters of zeroes would bring.
#[derive(Default)]
struct Zeroes {
    /// Entries that have zeroes.
    entries: u64,
    /// Host clusters that nothing would refer to.
    hosts: u64,
}

/// Looks for clusters that hold nothing but zeroes; `freed` is told their space.
fn zero_clusters(
    image: &Qcow2,
    references: &References,
    has_backing: bool,
    freed: &mut Freed<'_>,
    job: &Job,
) -> Result<Zeroes> {
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
            let guest = guest_of(image, table.l1_index, number);
            let mapping = image.decode_entry(entry_at(image, &words, number), guest)?;
            let Some(Emptied { freed: Some(hosts), .. }) = scan.look(guest, &mapping)? else { continue };
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
                freed.add(host * g.cluster_size(), g.cluster_size())?;
            }
        }
    }
    Ok(zeroes)
}

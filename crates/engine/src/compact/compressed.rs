//! Moving compressed data: it lies packed, several clusters' data in one host cluster and some of it in two.
//!
//! A descriptor says in sectors how long the data may be. So that a move does not lengthen it, it is cut where the next
//! data begins, if what is left inflates: a decoder that is done before the end never saw the rest.

use qcow2_format::geometry::COMPRESSED_SECTOR_SIZE;
use qcow2_format::{CompressedDescriptor, HostOffset, L2Mapping};

use super::sweep::Sweep;
use super::tables::{Table, entry_at, guest_of, read_words};
use crate::{ErrorKind, Job, Mem, MemMut, Result, StorageExt};

impl Sweep<'_, '_> {
    /// Learns where compressed data begins that will move.
    pub(super) fn find_starts(&mut self, tables: &[Table], job: &Job) -> Result<()> {
        let image = self.session.image;
        let g = self.session.geometry();
        for table in tables {
            job.checkpoint()?;
            let words = read_words(image, table.offset)?;
            for number in 0..g.l2_entries() as usize {
                let entry = entry_at(image, &words, number);
                if !entry.is_compressed() {
                    continue;
                }
                let mapping = image.decode_entry(entry, guest_of(image, table.l1_index, number))?;
                if let L2Mapping::Compressed(descriptor) = mapping
                    && descriptor.host_clusters(&g).1 >= self.bound
                {
                    self.packing.starts.push(descriptor.offset.0);
                }
            }
            if self.packing.starts.len() as u64 > self.most {
                // Without them, data is taken as long as its descriptor says.
                self.packing.starts = Vec::new();
                return Ok(());
            }
        }
        self.packing.starts.sort_unstable();
        self.packing.starts.dedup();
        Ok(())
    }

    /// The descriptor of the new place; `None` where the data stays.
    pub(super) fn move_compressed(
        &mut self,
        old: &CompressedDescriptor,
        weight: u64,
    ) -> Result<Option<CompressedDescriptor>> {
        let g = self.session.geometry();
        let (first, last) = old.host_clusters(&g);
        if last < self.bound {
            return Ok(None);
        }
        let known = self.packing.moved.get(&old.offset).copied();
        let new = match known {
            Some(new) if self.can_count(&new, weight)? => new,
            Some(_) => return Ok(None),
            None if self.packing.shared && self.packing.moved.len() as u64 >= self.most => return Ok(None),
            None => {
                let length = self.read_data(old)?;
                let Some(new) = self.place(length, weight)? else { return Ok(None) };
                let data = self.packing.data.get(..length as usize).unwrap_or_default();
                self.session.image.storage().write_all_at(Mem::from(data), new.offset.0)?;
                self.session.image.forget_inflated(&new);
                self.copied += length;
                if self.packing.shared {
                    self.packing.moved.insert(old.offset, new);
                }
                new
            }
        };
        let (to_first, to_last) = new.host_clusters(&g);
        for cluster in to_first..=to_last {
            let counted = self.session.refcount(cluster)?;
            self.moved += u64::from(counted == 0);
            self.session.set_refcount(cluster, counted + weight)?;
            self.taken.push((cluster, weight));
        }
        for cluster in first..=last {
            self.edits.unlinked.push((cluster * g.cluster_size(), weight));
        }
        Ok(Some(new))
    }

    /// Reads compressed data; returns its length.
    fn read_data(&mut self, old: &CompressedDescriptor) -> Result<u64> {
        let image = self.session.image;
        let packing = &mut self.packing;
        let most = old.max_length();
        packing.data.resize(most as usize, 0);
        image.storage().read_padded_at(MemMut::from(&mut packing.data[..]), old.offset.0)?;
        let next = packing.starts.partition_point(|start| *start <= old.offset.0);
        // Who compresses keeps what became no longer than the cluster.
        let cluster = packing.cluster.len() as u64;
        let cut = packing.starts.get(next).map_or(cluster, |next| cluster.min(next - old.offset.0));
        if cut >= most {
            return Ok(most);
        }
        let data = packing.data.get(..cut as usize).unwrap_or_default();
        let whole = image.inflates(data, &mut packing.cluster);
        Ok(if whole { cut } else { most })
    }

    /// Whether the clusters of a place can count `weight` more references.
    fn can_count(&self, place: &CompressedDescriptor, weight: u64) -> Result<bool> {
        let g = self.session.geometry();
        let (first, last) = place.host_clusters(&g);
        for cluster in first..=last {
            if self.session.refcount(cluster)?.saturating_add(weight) > g.refcount_max() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A place below the bound: behind the last one where that has room, else in clusters of its own.
    fn place(&mut self, length: u64, weight: u64) -> Result<Option<CompressedDescriptor>> {
        let g = self.session.geometry();
        let size = g.cluster_size();
        let describe = |at: u64| {
            let described = CompressedDescriptor::for_data(HostOffset(at), length, &g);
            described.map_err(|e| self.session.image.error(ErrorKind::Limit, e.to_string()).with_source(e))
        };
        if let Some((mut at, mut end)) = self.packing.next {
            if at % COMPRESSED_SECTOR_SIZE + length > 2 * size {
                // No descriptor counts that many sectors.
                at = at.next_multiple_of(COMPRESSED_SECTOR_SIZE);
            }
            while at + length > end && end / size < self.bound {
                let next = end / size;
                let free = self.session.writer.with_alloc(|alloc, _| alloc.lowest_free(1, next, next + 1))?;
                if free.is_none() {
                    break;
                }
                end += size;
            }
            let place = describe(at)?;
            if at + length <= end && self.can_count(&place, weight)? {
                self.packing.next = Some((at + length, end)).filter(|next| next.0 < next.1);
                return Ok(Some(place));
            }
        }
        let clusters = g.clusters_for(length);
        let Some(first) = self.lowest(clusters)? else { return Ok(None) };
        let (at, end) = (first * size, (first + clusters) * size);
        self.packing.next = Some((at + length, end)).filter(|next| next.0 < next.1);
        describe(at).map(Some)
    }
}

//! Compressed data: where each cluster lies, one directly behind the other, and the clusters that do not shrink, as they are.

use qcow2_core::front_to_back::{Latest, Lengths, Part, Planning, Pool, Runs, changed, read_padded};
use qcow2_format::{CompressedDescriptor, Geometry, HostOffset, L2Mapping, SubclusterBitmap};
use qcow2_transform::{CompressOptions, Compressor, is_zero};

use super::layout::internal;
use crate::invalid::{invalid, transform};
use crate::{ErrorKind, GuestSource, Job, MemMut, Result};

/// Clusters between two places that are kept.
const KEPT: usize = 1024;

/// What comes behind a cluster: offsets count from where the data begins.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    at: u64,
    /// Compressed clusters that touch the host cluster of `at`, unless that is at its beginning.
    users: u64,
}

/// A cluster in its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    /// Number of the guest cluster.
    pub(super) guest: u64,
    /// First byte, from where the data begins.
    at: u64,
    length: u64,
}

impl Placed {
    fn end(self) -> u64 {
        self.at + self.length
    }
}

/// The data of a compressed image.
pub(super) struct Packed {
    geometry: Geometry,
    options: CompressOptions,
    lengths: Lengths,
    /// Every so many clusters, what comes behind those before.
    kept: Vec<State>,
    end: u64,
    compressors: Pool<Compressor>,
    latest: Latest,
}

impl Packed {
    /// Compresses `data` once, to know.
    ///
    /// # Errors
    /// Those of [`Lengths::count`]; `InvalidArgument` for a level that the codec does not have.
    pub(super) fn count(
        geometry: Geometry,
        options: CompressOptions,
        data: Runs,
        planning: &Planning<'_>,
    ) -> Result<Self> {
        let size = geometry.cluster_len();
        let lengths = Lengths::count(planning, data, geometry.cluster_size(), || {
            let mut compressor = Compressor::new(&options).map_err(transform)?;
            let mut room = vec![0; size];
            Ok(Box::new(move |cluster: &[u8]| {
                if is_zero(cluster) {
                    return Ok(0);
                }
                let length = compressor.compress(cluster, &mut room).map_err(transform)?;
                Ok(length.unwrap_or(size) as u32)
            }))
        })?;
        let mut packed = Self {
            geometry,
            options,
            lengths,
            kept: Vec::new(),
            end: 0,
            compressors: Pool::default(),
            latest: Latest::default(),
        };
        let mut state = State::default();
        for lengths in packed.lengths.bytes.chunks(KEPT) {
            packed.kept.push(state);
            for length in lengths {
                state = place(&geometry, state, u64::from(*length)).1;
            }
        }
        packed.end = state.at;
        Ok(packed)
    }

    /// The clusters that are stored.
    pub(super) fn units(&self) -> &Runs {
        &self.lengths.units
    }

    /// Host clusters that they take.
    pub(super) fn host_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.end)
    }

    /// The clusters from one on, by how many come before it.
    fn from(&self, rank: u64) -> impl Iterator<Item = Placed> + '_ {
        let first = rank as usize / KEPT;
        let mut state = self.kept.get(first).copied().unwrap_or_default();
        let begin = (first * KEPT) as u64;
        let lengths = self.lengths.bytes.get(first * KEPT..).unwrap_or_default();
        let mut guests = Guests { runs: &self.lengths.units, part: None, rank: begin };
        lengths
            .iter()
            .map_while(move |length| {
                let length = u64::from(*length);
                let (at, next) = place(&self.geometry, state, length);
                state = next;
                Some(Placed { guest: guests.next()?, at, length })
            })
            .skip((rank - begin) as usize)
    }

    /// The clusters from the one on that ends behind this offset.
    fn ending_behind(&self, offset: u64) -> impl Iterator<Item = Placed> + '_ {
        let first = self.kept.partition_point(|state| state.at <= offset).saturating_sub(1);
        self.from((first * KEPT) as u64).skip_while(move |placed| placed.end() <= offset)
    }

    /// How a part of the disk is mapped, where the data begins in host cluster `data`: each cluster with its mapping.
    pub(super) fn mappings(
        &self,
        part: Part,
        data: u64,
    ) -> impl Iterator<Item = Result<(u64, L2Mapping)>> + '_ {
        let (g, begin) = (self.geometry, data << self.geometry.cluster_bits());
        self.from(part.rank).take(part.count as usize).map(move |placed| {
            let host = HostOffset(begin + placed.at);
            let mapping = match placed.length == g.cluster_size() {
                false => L2Mapping::Compressed(
                    CompressedDescriptor::for_data(host, placed.length, &g)
                        .map_err(|e| invalid(e, ErrorKind::Limit))?,
                ),
                true if g.extended_l2() => L2Mapping::Subclusters {
                    host: Some(host),
                    copied: true,
                    bitmap: SubclusterBitmap::ALL_DATA,
                },
                true => L2Mapping::Data { host, copied: true },
            };
            Ok((placed.guest, mapping))
        })
    }

    /// How often the host clusters from `first` on are used, up to `end`; both count from where the data begins.
    pub(super) fn refcounts(&self, first: u64, end: u64) -> Vec<u64> {
        let g = &self.geometry;
        let mut counts = vec![0; end.saturating_sub(first) as usize];
        for placed in self.ending_behind(first << g.cluster_bits()) {
            let (from, to) = (g.cluster_index(placed.at), g.cluster_index(placed.end() - 1));
            if from >= end {
                break;
            }
            for cluster in from.max(first)..(to + 1).min(end) {
                if let Some(count) = counts.get_mut((cluster - first) as usize) {
                    *count += 1;
                }
            }
        }
        counts
    }

    /// Fills `buf` from `offset` on, which counts from where the data begins, up to the end at most; returns how much that was.
    ///
    /// # Errors
    /// `Io` for a disk that is another one than that which was counted; what reading it gives; `Aborted`.
    pub(super) fn fill(
        &self,
        source: &dyn GuestSource,
        offset: u64,
        buf: &mut MemMut<'_>,
        job: &Job,
    ) -> Result<u64> {
        let end = self.host_clusters() << self.geometry.cluster_bits();
        let mut rest = buf.take_front(end.saturating_sub(offset).min(buf.len() as u64) as usize);
        let (length, mut at) = (rest.len() as u64, offset);
        for placed in self.ending_behind(offset) {
            job.checkpoint()?;
            let mut gap = rest.take_front(placed.at.saturating_sub(at).min(rest.len() as u64) as usize);
            gap.fill_zero();
            at += gap.len() as u64;
            if rest.is_empty() {
                return Ok(length);
            }
            let front = rest.take_front((placed.end() - at).min(rest.len() as u64) as usize);
            let inside = at - placed.at;
            at += front.len() as u64;
            self.fill_cluster(source, placed, inside, front)?;
        }
        // What is left of the last host cluster.
        rest.fill_zero();
        Ok(length)
    }

    /// Fills `front` with a cluster from its byte `inside` on.
    fn fill_cluster(
        &self,
        source: &dyn GuestSource,
        placed: Placed,
        inside: u64,
        mut front: MemMut<'_>,
    ) -> Result<()> {
        let guest = placed.guest << self.geometry.cluster_bits();
        if placed.length == self.geometry.cluster_size() {
            return read_padded(source, front, guest + inside);
        }
        let compressed = match self.latest.take(placed.guest) {
            Some(compressed) => compressed,
            None => self.compress(source, placed, guest)?,
        };
        front.copy_from(compressed.get(inside as usize..).ok_or_else(internal)?);
        if inside + (front.len() as u64) < placed.length {
            self.latest.keep(placed.guest, compressed);
        }
        Ok(())
    }

    fn compress(&self, source: &dyn GuestSource, placed: Placed, guest: u64) -> Result<Vec<u8>> {
        let size = self.geometry.cluster_len();
        let (mut cluster, mut room) = (vec![0; size], vec![0; size]);
        read_padded(source, MemMut::from(&mut cluster[..]), guest)?;
        let length = self.compressors.with(
            || Compressor::new(&self.options).map_err(transform),
            |compressor| compressor.compress(&cluster, &mut room).map_err(transform),
        )?;
        if length.map(|length| length as u64) != Some(placed.length) {
            return Err(changed(guest));
        }
        room.truncate(placed.length as usize);
        Ok(room)
    }
}

/// Where a cluster of so many bytes goes that comes behind others, and what comes behind it.
fn place(g: &Geometry, State { at, users }: State, length: u64) -> (u64, State) {
    let full = length == g.cluster_size();
    let inside = g.in_cluster(at);
    // A host cluster that nobody may use any more is left behind, as one is in front of what is not compressed.
    let behind = inside > 0 && (full || users >= g.refcount_max());
    let (at, users) = if behind { (g.cluster_start(at) + g.cluster_size(), 0) } else { (at, users) };
    let users = if g.in_cluster(at) == 0 { 0 } else { users };
    let end = at + length;
    let crosses = g.cluster_index(at) != g.cluster_index(end - 1);
    (at, State { at: end, users: if crosses { 1 } else { users + 1 } })
}

/// The numbers of a set, one after the other.
struct Guests<'a> {
    runs: &'a Runs,
    part: Option<Part>,
    rank: u64,
}

impl Guests<'_> {
    fn next(&mut self) -> Option<u64> {
        let part = match self.part.take() {
            Some(part) => part,
            None => self.runs.at(self.rank)?,
        };
        self.rank += 1;
        self.part = (part.count > 1).then(|| Part {
            first: part.first + 1,
            count: part.count - 1,
            rank: part.rank + 1,
        });
        Some(part.first)
    }
}

//! A new image front to back: everything has its place before the first byte is there.
//!
//! Layout: header, refcount table, refcount blocks, L1 table, L2 tables, then the data in guest order. Only what the source's map has is
//! stored; what of that is zero is stored as well, so that nothing is read before it is wanted. Tables are made from the plan when their
//! bytes are asked for, and kept nowhere.
//!
//! What a compressed cluster takes is known only when it was compressed, and the tables in front of it need that: qcow2 has nothing that
//! could come behind its data and still be found by the header. So it is compressed twice, once to count. Zeroes are left out then.

mod layout;
mod packed;
mod tables;

use qcow2_core::front_to_back::{FrontToBack, Part, Planning, Runs, read_padded};
use qcow2_format::{Geometry, HostOffset, L2Mapping, SubclusterBitmap};

use self::layout::{Layout, Region, internal};
use self::packed::Packed;
use self::tables::Tables;
use super::options::refuse;
use super::{CreateOptions, Preallocation};
use crate::{Error, ErrorKind, GuestSource, Job, MemMut, Result};

/// A new image whose bytes are had front to back.
pub struct Streamed {
    header: Vec<u8>,
    geometry: Geometry,
    layout: Layout,
    /// Indices in the L1 table that have an L2 table.
    tables: Runs,
    data: Data,
}

/// The guest clusters that are stored.
enum Data {
    /// As they are, each in a host cluster.
    Plain(Runs),
    Packed(Packed),
}

impl Data {
    fn units(&self) -> &Runs {
        match self {
            Self::Plain(units) => units,
            Self::Packed(packed) => packed.units(),
        }
    }

    fn host_clusters(&self) -> u64 {
        match self {
            Self::Plain(units) => units.total(),
            Self::Packed(packed) => packed.host_clusters(),
        }
    }
}

impl Streamed {
    /// Plans an image of `planning.source`, whose size is that of the image.
    ///
    /// # Errors
    /// `InvalidArgument` for what an image that is written once, front to back, does not have, and as [`CreateOptions::validate`];
    /// `Limit` for a plan that takes too much memory and for an image that is too large; `Aborted`; what reading the map of the source gives.
    pub fn plan(options: &CreateOptions, planning: &Planning<'_>) -> Result<Self> {
        let options = CreateOptions { size: planning.source.virtual_size(), ..options.clone() };
        check(&options)?;
        let mut header = options.header()?;
        let geometry = header.geometry;
        let Planning { source, max_memory, job, .. } = *planning;
        let units = Runs::of_data(source, geometry.cluster_size(), max_memory, job)?;
        let data = match planning.compression {
            Some(compression) => {
                Data::Packed(Packed::count(geometry, options.compress_options(compression), units, planning)?)
            }
            None => Data::Plain(units),
        };
        let tables = data.units().groups(geometry.l2_entries());
        let layout = Layout::new(&geometry, header.l1_size, tables.total(), data.host_clusters())?;
        check_compressed(&geometry, &layout, &data)?;
        layout.enter(&geometry, &mut header)?;
        let header = header.encode().map_err(|e| crate::invalid::invalid(e, ErrorKind::Internal))?;
        Ok(Self { header, geometry, layout, tables, data })
    }

    /// Bytes of the cluster that begins a host cluster which is no data.
    fn cluster(&self, region: Region, index: u64) -> Result<Vec<u8>> {
        let tables = Tables { geometry: &self.geometry, layout: &self.layout };
        match region {
            Region::Header => {
                let mut bytes = self.header.clone();
                bytes.resize(self.geometry.cluster_len(), 0);
                Ok(bytes)
            }
            Region::RefcountTable => Ok(tables.refcount_table(index)),
            Region::RefcountBlocks => match &self.data {
                Data::Plain(_) => tables.refcount_block(index, |_, _| Vec::new()),
                Data::Packed(packed) => {
                    tables.refcount_block(index, |first, end| packed.refcounts(first, end))
                }
            },
            Region::L1 => tables.l1(index, &self.tables),
            Region::L2 => {
                let table = self.tables.at(index).ok_or_else(internal)?;
                let first = table.first * self.geometry.l2_entries();
                let parts = self.data.units().within(first, first + self.geometry.l2_entries());
                match &self.data {
                    Data::Plain(_) => tables.l2(first, parts.flat_map(|part| self.mappings(part))),
                    Data::Packed(packed) => {
                        tables.l2(first, parts.flat_map(|part| packed.mappings(part, self.layout.data)))
                    }
                }
            }
            Region::Data => Err(internal()),
        }
    }

    /// How clusters are mapped that are stored as they are.
    fn mappings(&self, part: Part) -> impl Iterator<Item = Result<(u64, L2Mapping)>> + '_ {
        let extended = self.geometry.extended_l2();
        (0..part.count).map(move |i| {
            let host = HostOffset((self.layout.data + part.rank + i) << self.geometry.cluster_bits());
            let mapping = match extended {
                true => L2Mapping::Subclusters {
                    host: Some(host),
                    copied: true,
                    bitmap: SubclusterBitmap::ALL_DATA,
                },
                false => L2Mapping::Data { host, copied: true },
            };
            Ok((part.first + i, mapping))
        })
    }

    /// Fills the front of `buf` from `offset` on, up to where something else begins; returns how much that was.
    fn fill_front(
        &self,
        source: &dyn GuestSource,
        offset: u64,
        buf: &mut MemMut<'_>,
        job: &Job,
    ) -> Result<u64> {
        let g = &self.geometry;
        let (region, index) = self.layout.region(g.cluster_index(offset)).ok_or_else(|| {
            let message = format!("offset {offset} is behind the end of the stream, {}", self.length());
            Error::new(ErrorKind::InvalidArgument, message)
        })?;
        let inside = g.in_cluster(offset);
        if region == Region::Data {
            let units = match &self.data {
                Data::Packed(packed) => {
                    return packed.fill(source, (index << g.cluster_bits()) + inside, buf, job);
                }
                Data::Plain(units) => units,
            };
            let part = units.at(index).ok_or_else(internal)?;
            let left = (part.count << g.cluster_bits()) - inside;
            let front = buf.take_front(left.min(buf.len() as u64) as usize);
            let length = front.len() as u64;
            read_padded(source, front, (part.first << g.cluster_bits()) + inside)?;
            return Ok(length);
        }
        let bytes = self.cluster(region, index)?;
        let bytes = bytes.get(inside as usize..).unwrap_or_default();
        let mut front = buf.take_front(bytes.len());
        Ok(front.copy_from(bytes) as u64)
    }
}

impl FrontToBack for Streamed {
    fn length(&self) -> u64 {
        self.layout.end << self.geometry.cluster_bits()
    }

    fn fill(&self, source: &dyn GuestSource, mut offset: u64, mut buf: MemMut<'_>, job: &Job) -> Result<()> {
        while !buf.is_empty() {
            job.checkpoint()?;
            offset += self.fill_front(source, offset, &mut buf, job)?;
        }
        Ok(())
    }
}

/// Refuses what needs another file, or is not the same in each run.
fn check(options: &CreateOptions) -> Result<()> {
    if options.backing.is_some() {
        return refuse("backing_file", "a stream holds the whole disk: it has no backing file");
    }
    if options.data_file.is_some() {
        return refuse("data_file", "a stream is one file: it has no external data file");
    }
    if options.data_door.is_some() {
        return refuse(
            "encrypt",
            "a stream is the same in each run, and a key is not: convert to a file to encrypt",
        );
    }
    if options.preallocation != Preallocation::Off {
        return refuse("preallocation", "a stream has no room that is not used");
    }
    Ok(())
}

/// Descriptors of compressed clusters have fewer bits for offsets the larger the clusters are.
fn check_compressed(geometry: &Geometry, layout: &Layout, data: &Data) -> Result<()> {
    let limit = geometry.compressed_offset_limit() >> geometry.cluster_bits();
    if matches!(data, Data::Plain(_)) || layout.end <= limit {
        return Ok(());
    }
    let message = format!(
        "the image is too large: compressed clusters lie in front of byte {}",
        geometry.compressed_offset_limit()
    );
    Err(Error::new(ErrorKind::Limit, message))
}

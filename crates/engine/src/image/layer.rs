//! A qcow2 image as a layer of a chain.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::Layer;
use qcow2_core::layer::{AtHand, Holes, Pin, References, Segment, SegmentKind};
use qcow2_format::{CompressedDescriptor, CryptMethod};

use super::plan::descriptor;
use super::qcow2::Qcow2;
use crate::door::GuestData;
use crate::storage::ReadTransfer;
use crate::{ErrorKind, Job, MemMut, Result, Storage, StorageExt, encryption};

impl Layer for Qcow2 {
    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn unit(&self) -> Option<u64> {
        Some(self.geometry().cluster_size())
    }

    fn takes_backing(&self) -> bool {
        true
    }

    fn references(&self) -> References {
        self.references()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        self.storage()
    }

    fn files(&self) -> Vec<&Arc<dyn Storage>> {
        std::iter::once(self.storage()).chain(self.data_file()).collect()
    }

    fn file(&self, _: u32) -> Option<&Arc<dyn Storage>> {
        if !self.host_is_guest() {
            None
        } else if self.header().has_data_file() {
            self.data_file()
        } else {
            Some(self.storage())
        }
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        self.plan_read(range, segments)
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.require_plain()?;
        match segment.kind {
            SegmentKind::Data(place) => {
                self.data_at(segment.start, place.host)?.read_padded_at(buf, place.host)
            }
            SegmentKind::Opaque(token) => {
                let descriptor = descriptor(token, self.geometry());
                self.read_compressed(segment, descriptor, buf)
            }
            SegmentKind::Zero(_) | SegmentKind::Unallocated(_) => {
                Err(self.error(ErrorKind::Internal, "a segment without bytes was read"))
            }
        }
    }

    fn read_segments(&self, parts: Vec<(Segment, MemMut<'_>)>) -> Result<()> {
        self.require_plain()?;
        let GuestData::ByHost(data) = self.guest_data()? else {
            return parts.into_iter().try_for_each(|(segment, buf)| self.read_segment(&segment, buf));
        };
        let mut batch = Vec::with_capacity(parts.len());
        for (segment, buf) in parts {
            match segment.kind {
                SegmentKind::Data(place) => batch.push(ReadTransfer::new(buf, place.host)),
                _ => self.read_segment(&segment, buf)?,
            }
        }
        data.read_padded_batch(&mut batch)
    }

    fn keeps_bytes(&self) -> bool {
        self.inflated.is_used()
    }

    fn at_hand(&self, buf: &mut MemMut<'_>, offset: u64) -> AtHand {
        // While the mapping is held nothing else gets into the place of what it names.
        let Some(mapping) = self.mapping.try_read() else { return AtHand::Unknown };
        match self.peek(&mapping, offset..offset + buf.len() as u64) {
            Some(SegmentKind::Unallocated(_)) => AtHand::Below,
            Some(SegmentKind::Opaque(token)) => {
                let Some(cluster) = self.inflated.peek(&descriptor(token, self.geometry())) else {
                    return AtHand::Unknown;
                };
                let from = self.geometry().in_cluster(offset) as usize;
                buf.copy_from(cluster.get(from..).unwrap_or_default());
                AtHand::Filled
            }
            _ => AtHand::Unknown,
        }
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.reopen()?))
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header().crypt_method {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }

    fn unlock(&mut self, secret: &[u8], job: &Job) -> Result<()> {
        if let Some(door) = encryption::door_of(self.storage(), self.header(), secret, job)? {
            self.set_door(door);
        }
        Ok(())
    }

    fn absent_from(&self, at: u64) -> u64 {
        self.bytes_without_table(at)
    }

    fn holes(&self) -> Result<Holes> {
        let preallocated = self.host_is_guest() && self.is_metadata_preallocated()?;
        Ok(if preallocated { Holes::Preallocated } else { Holes::Ignored })
    }

    fn pin(&self) -> Option<Pin> {
        self.pin()
    }
}

impl Qcow2 {
    /// Fills `buf` from a compressed cluster, or a part of it.
    fn read_compressed(
        &self,
        segment: &Segment,
        descriptor: CompressedDescriptor,
        mut buf: MemMut<'_>,
    ) -> Result<()> {
        let inflate = self.inflate(descriptor);
        let whole = segment.length == self.geometry().cluster_size();
        match buf.exclusive() {
            Some(cluster) if whole => inflate.run(cluster),
            _ => {
                let cluster = self.inflated.get(&inflate)?;
                let from = self.geometry().in_cluster(segment.start) as usize;
                buf.copy_from(cluster.get(from..).unwrap_or_default());
                Ok(())
            }
        }
    }
}

//! A chain of layers, top first, read as one disk.
//!
//! Reading is plan, then execute: a layer turns a guest range into segments, then the bytes are read or inflated straight
//! into the caller's buffer. No lock is held across data I/O.

use std::sync::Arc;

use crate::extents;
use crate::layer::{AtHand, Below, Layer};
use crate::source::{Extent, GuestSource};
use crate::storage::{Arriving, Operation};
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// A unit for chunks where no layer has one, in bytes.
const DEFAULT_UNIT: u64 = 64 << 10;

/// The layers of a disk, top first; never empty.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Box<dyn Layer>>,
}

impl Chain {
    /// The disk that `layers` make, top first. What a layer does not have is read from the next one; what none has, and
    /// what lies behind the end of a shorter one, reads as zeroes.
    ///
    /// # Errors
    /// `InvalidArgument` without layers, or with one that has another below and takes none; `Chain` when one file appears
    /// twice; those of [`Layer::judge_below`].
    pub fn new(layers: Vec<Box<dyn Layer>>) -> Result<Self> {
        let Some((_, above)) = layers.split_last() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "a chain needs at least one layer"));
        };
        if let Some(layer) = above.iter().find(|layer| !layer.takes_backing()) {
            let message = format!("a {} layer cannot have a backing file", layer.format());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        for (index, layer) in above.iter().enumerate() {
            let Some(identity) = layer.storage().identity() else { continue };
            let mut rest = layers.iter().skip(index + 1);
            if let Some(again) = rest.find(|l| l.storage().identity().as_ref() == Some(&identity)) {
                let error = Error::new(ErrorKind::Chain, "the backing chain contains this file twice");
                return Err(again.storage().located(error));
            }
        }
        for (index, layer) in layers.iter().enumerate() {
            layer.judge_below(layers.get(index + 1).map(|below| &**below))?;
        }
        Ok(Self { layers })
    }

    /// The layers, top first.
    pub fn layers(&self) -> &[Box<dyn Layer>] {
        &self.layers
    }

    /// The top layer.
    pub fn top(&self) -> Option<&dyn Layer> {
        self.layers.first().map(|layer| &**layer)
    }

    /// Size of the disk in bytes: the top layer's.
    pub fn virtual_size(&self) -> u64 {
        self.top().map_or(0, Layer::virtual_size)
    }

    /// Fills `buf` with the guest bytes at `offset`.
    ///
    /// # Errors
    /// `InvalidArgument` beyond the end of the disk; `Corrupt`, `Io`, `UnsupportedFeature` (encryption) and
    /// `ReferenceDenied` (a file that is not open) from the layers. The buffer's contents are unspecified then.
    pub fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        // Keeps planned places from being used again while they are read. Only the top layer changes.
        let _pin = self.top().and_then(Layer::pin);
        let size = self.virtual_size();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > size) {
            let message = format!("{} bytes at {offset} reach beyond the disk of {size} bytes", buf.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let mut scratch = Vec::new();
        let mut below = Below { depth: 0, pending: vec![(0, offset, buf)] };
        while let Some((depth, offset, mut buf)) = below.pending.pop() {
            let Some(layer) = self.layers.get(depth) else {
                buf.fill_zero();
                continue;
            };
            // What lies behind the end of a shorter layer is in no deeper one either.
            let inside = layer.virtual_size().saturating_sub(offset).min(buf.len() as u64) as usize;
            let here = buf.take_front(inside);
            buf.fill_zero();
            below.depth = depth;
            scratch.clear();
            layer.read(here, offset, &mut scratch, &mut below)?;
        }
        Ok(())
    }
}

impl Chain {
    /// Fills `buf` with the guest bytes at `offset` if they are in memory as the guest sees them, which those of compressed clusters
    /// are for a while; waits for nothing, neither a file nor a lock. Returns whether it did: otherwise, and for all errors, there is
    /// [`Chain::read_at`].
    pub fn read_at_hand(&self, mut buf: MemMut<'_>, offset: u64) -> bool {
        if !self.layers.iter().any(|layer| layer.keeps_bytes()) {
            return false;
        }
        let Some(end) = offset.checked_add(buf.len() as u64) else { return false };
        for layer in &self.layers {
            let answer = layer.at_hand(&mut buf, offset);
            // What reaches behind the end of a layer is zeroes in part. Asked last: one that shrank meanwhile does not show what is
            // below it either.
            if end > layer.virtual_size() {
                return false;
            }
            match answer {
                AtHand::Filled => return true,
                AtHand::Below => {}
                AtHand::Unknown => return false,
            }
        }
        false
    }

    /// The files whose bytes are still coming.
    fn arriving(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        self.layers.iter().flat_map(|layer| layer.files()).filter(|file| file.arriving().is_some())
    }
}

impl GuestSource for Chain {
    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn cluster_size(&self) -> u64 {
        self.layers.iter().filter_map(|layer| layer.unit()).max().unwrap_or(DEFAULT_UNIT)
    }

    fn is_sequential(&self) -> bool {
        self.layers.iter().any(|layer| layer.is_sequential())
    }

    fn is_arriving(&self) -> bool {
        self.arriving().next().is_some()
    }

    fn settle(&self) -> Result<()> {
        self.layers.iter().try_for_each(|layer| layer.complete())?;
        self.arriving().try_for_each(|file| {
            let settled = file.arriving().map_or(Ok(()), Arriving::settle);
            settled.map_err(|error| file.failure(error, Operation::Read))
        })
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        extents::collect(&self.layers, start, length, most, job, out)
    }

    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
}

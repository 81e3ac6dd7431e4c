//! Which sectors of its blocks a differencing image has; all others are its parent's.
//!
//! A bitmap lies in front of the block's bytes. Bits are set in memory when the bytes of their sectors were written, and in the file by the
//! flush that made those durable: a bit in the file never shows what was not written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::RwLock;
use quick_cache::sync::Cache;

use crate::{Mem, MemMut, Result, Storage, StorageExt};

/// Bitmaps that are kept.
const KEPT: usize = 4096;
/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// A bit for each sector of a block, the highest of a byte first.
#[derive(Debug)]
pub(super) struct Bits(Box<[AtomicU8]>);

impl Bits {
    /// Whether a sector is there.
    pub(super) fn has(&self, sector: u64) -> bool {
        let byte = self.0.get((sector / 8) as usize).map_or(0, |byte| byte.load(Ordering::Acquire));
        byte & (0x80 >> (sector % 8)) != 0
    }

    fn set(&self, sectors: Range<u64>) {
        for sector in sectors {
            if let Some(byte) = self.0.get((sector / 8) as usize) {
                byte.fetch_or(0x80 >> (sector % 8), Ordering::AcqRel);
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|byte| byte.load(Ordering::Acquire)).collect()
    }
}

/// The bitmaps of an image.
#[derive(Debug)]
pub struct SectorBitmaps {
    /// Bytes of one.
    bytes: usize,
    kept: Cache<u32, Arc<Bits>>,
    /// Those with bits that the file does not have, and their places. Held shared while one is loaded: none is loaded while it changes.
    changed: RwLock<BTreeMap<u32, (u64, Arc<Bits>)>>,
}

/// One that waits for the flush that writes it, as it is then.
#[derive(Debug)]
pub(super) struct Waiting {
    index: u32,
    place: u64,
    bytes: Vec<u8>,
}

impl SectorBitmaps {
    /// Those of an image with blocks of `block` bytes, each at the start of its block's place.
    #[must_use]
    pub fn new(block: u64) -> Self {
        Self {
            bytes: (block / SECTOR).div_ceil(8) as usize,
            kept: Cache::new(KEPT),
            changed: RwLock::default(),
        }
    }

    fn load(&self, storage: &dyn Storage, index: u32, place: u64) -> Result<Arc<Bits>> {
        self.kept.get_or_insert_with(&index, || {
            let mut bytes = vec![0; self.bytes];
            storage.read_exact_at(MemMut::from(&mut bytes[..]), place)?;
            Ok(Arc::new(Bits(bytes.into_iter().map(AtomicU8::new).collect())))
        })
    }

    /// That of the block `index`, which is at `place`.
    pub(super) fn get(&self, storage: &dyn Storage, index: u32, place: u64) -> Result<Arc<Bits>> {
        let changed = self.changed.read();
        match changed.get(&index) {
            Some((_, bits)) => Ok(Arc::clone(bits)),
            None => self.load(storage, index, place),
        }
    }

    /// The bytes of these sectors of a block were written.
    pub(super) fn set(
        &self,
        storage: &dyn Storage,
        index: u32,
        place: u64,
        sectors: Range<u64>,
    ) -> Result<()> {
        if sectors.clone().all({
            let bits = self.get(storage, index, place)?;
            move |sector| bits.has(sector)
        }) {
            return Ok(());
        }
        let mut changed = self.changed.write();
        let bits = match changed.get(&index) {
            Some((_, bits)) => Arc::clone(bits),
            None => self.load(storage, index, place)?,
        };
        bits.set(sectors);
        changed.insert(index, (place, bits));
        Ok(())
    }

    /// How many wait for a flush.
    pub(super) fn waiting_count(&self) -> usize {
        self.changed.read().len()
    }

    /// Those that wait for a flush. Taken before it makes data durable.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        let changed = self.changed.read();
        let waiting = changed.iter().map(|(index, (place, bits))| Waiting {
            index: *index,
            place: *place,
            bytes: bits.bytes(),
        });
        waiting.collect()
    }

    /// Writes those whose data is durable.
    pub(super) fn write(storage: &dyn Storage, waiting: &[Waiting]) -> Result<()> {
        waiting.iter().try_for_each(|one| storage.write_all_at(Mem::from(&one.bytes[..]), one.place))
    }

    /// The file has these, durably; one that was changed again since is still to be written.
    pub(super) fn settled(&self, waiting: &[Waiting]) {
        let mut changed = self.changed.write();
        for one in waiting {
            if changed.get(&one.index).is_some_and(|(_, bits)| bits.bytes() == one.bytes)
                && let Some((_, bits)) = changed.remove(&one.index)
            {
                self.kept.insert(one.index, bits);
            }
        }
    }
}

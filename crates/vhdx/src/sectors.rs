//! Metadata that is read when it is needed: sectors of 4 KiB, as the log brings them. So many are cached; those that were changed stay in
//! memory until they are written.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;
use qcow2_core::{MemMut, Result, Storage, StorageExt};
use quick_cache::sync::{Cache, GuardResult};

use crate::structures::{LOG_SECTOR, put};

/// The bytes of one.
pub(crate) type Sector = Arc<[u8]>;

/// Sectors by their offsets in the file.
#[derive(Debug)]
pub(crate) struct Sectors {
    cache: Cache<u64, Sector>,
    /// Held for reading while a sector is looked up or read: so none is read while it changes.
    changed: RwLock<BTreeMap<u64, Sector>>,
}

/// Where the sector of a byte begins.
fn start_of(at: u64) -> u64 {
    at - at % LOG_SECTOR
}

/// The little-endian number at `at`, a byte of the file, in the sector that has it.
pub(crate) fn number(sector: &Sector, at: u64) -> u64 {
    let rest = sector.get((at % LOG_SECTOR) as usize..).unwrap_or_default();
    rest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Sectors {
    /// Caches about so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes / LOG_SECTOR).unwrap_or(usize::MAX).max(4);
        Self { cache: Cache::new(most), changed: RwLock::default() }
    }

    /// The sector that has the byte at `at`.
    pub(crate) fn get(&self, storage: &dyn Storage, at: u64) -> Result<Sector> {
        let start = start_of(at);
        let changed = self.changed.read();
        match changed.get(&start) {
            Some(sector) => Ok(Arc::clone(sector)),
            None => self.load(storage, start),
        }
    }

    /// One that is not changed. One thread reads it, others that want it wait.
    fn load(&self, storage: &dyn Storage, start: u64) -> Result<Sector> {
        let read = || -> Result<Sector> {
            let mut bytes = vec![0; LOG_SECTOR as usize];
            storage.read_padded_at(MemMut::from(&mut bytes[..]), start)?;
            Ok(bytes.into())
        };
        match self.cache.get_value_or_guard(&start, None) {
            GuardResult::Value(sector) => Ok(sector),
            GuardResult::Guard(guard) => {
                let sector = read()?;
                let _ = guard.insert(Arc::clone(&sector));
                Ok(sector)
            }
            GuardResult::Timeout => read(),
        }
    }

    /// Changes parts of sectors, all at once, in memory. `false`, and nothing is changed, where more than `most` would be changed then.
    pub(crate) fn change(&self, storage: &dyn Storage, parts: &[(u64, &[u8])], most: usize) -> Result<bool> {
        let mut changed = self.changed.write();
        let mut new: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (at, bytes) in parts {
            let start = start_of(*at);
            let sector = match (new.remove(&start), changed.get(&start)) {
                (Some(sector), _) => Ok(sector),
                (None, Some(sector)) => Ok(sector.to_vec()),
                (None, None) => self.load(storage, start).map(|sector| sector.to_vec()),
            };
            let mut sector = sector?;
            put(&mut sector, (at - start) as usize, bytes);
            new.insert(start, sector);
        }
        let more = new.keys().filter(|start| !changed.contains_key(start)).count();
        if changed.len() + more > most {
            return Ok(false);
        }
        changed.extend(new.into_iter().map(|(start, sector)| (start, sector.into())));
        Ok(true)
    }

    /// The changed ones, in the order of their places.
    pub(crate) fn changed(&self) -> Vec<(u64, Sector)> {
        self.changed.read().iter().map(|(start, sector)| (*start, Arc::clone(sector))).collect()
    }

    /// These were written; one that was changed again since is still to be.
    pub(crate) fn written(&self, sectors: &[(u64, Sector)]) {
        let mut changed = self.changed.write();
        for (start, sector) in sectors {
            if changed.get(start).is_some_and(|now| Arc::ptr_eq(now, sector)) {
                self.cache.insert(*start, Arc::clone(sector));
                changed.remove(start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use qcow2_core::Mem;
    use qcow2_core::storage::MemoryStorage;

    use super::*;

    #[test]
    fn what_changed_is_seen_and_kept_until_it_is_written() {
        let file = MemoryStorage::from_bytes(&[7; 9000]);
        let sectors = Sectors::new(0);
        let word = |at| number(&sectors.get(&file, at).unwrap(), at);
        assert_eq!((word(8), word(8192 + 800)), (0x0707_0707_0707_0707, 0x0707_0707_0707_0707));
        assert!(sectors.change(&file, &[(8, &[1; 8]), (16, &[2; 8]), (4096, &[3; 8])], 2).unwrap());
        assert_eq!(
            (word(8), word(16), word(4096)),
            (0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303)
        );
        assert!(!sectors.change(&file, &[(8192, &[1; 8]), (8, &[9; 8])], 2).unwrap());
        assert_eq!(word(8), 0x0101_0101_0101_0101);
        let before = sectors.changed();
        assert!(sectors.change(&file, &[(8, &[4; 8])], 2).unwrap());
        for (start, sector) in &before {
            file.write_all_at(Mem::from(&**sector), *start).unwrap();
        }
        sectors.written(&before);
        assert_eq!(sectors.changed().len(), 1);
        assert_eq!((word(8), word(16)), (0x0404_0404_0404_0404, 0x0202_0202_0202_0202));
    }
}

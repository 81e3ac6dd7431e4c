//! A block device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_engine::storage::{MemoryStorage, ReadStorage, Traits};
use qcow2_engine::{Mem, MemMut, Storage};

/// A device: of a length that nobody changes by writing, full of old bytes.
#[derive(Debug)]
pub struct Device(MemoryStorage, AtomicU64);

impl Device {
    /// A device of `length` bytes.
    pub fn new(length: usize) -> Arc<Self> {
        Arc::new(Self(MemoryStorage::from_bytes(&vec![0xee; length]), AtomicU64::new(length as u64)))
    }

    /// Its owner makes it longer, with old bytes there, too.
    pub fn extend(&self, length: u64) {
        let now = self.1.load(Ordering::SeqCst);
        let more = vec![0xee; (length - now) as usize];
        self.0.write_at(Mem::from(&more[..]), now).unwrap();
        self.1.store(length, Ordering::SeqCst);
    }

    /// What is on it.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    fn bound(&self, offset: u64, length: u64) -> io::Result<()> {
        if offset.checked_add(length).is_none_or(|end| end > self.1.load(Ordering::SeqCst)) {
            Err(io::Error::from_raw_os_error(28))
        } else {
            Ok(())
        }
    }
}

impl ReadStorage for Device {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.1.load(Ordering::SeqCst))
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn traits(&self) -> Traits {
        Traits { block_device: true, ..self.0.traits() }
    }
}

impl Storage for Device {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.bound(offset, buf.len() as u64)?;
        self.0.write_at(buf, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bound(len, 0)
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.bound(offset, length)?;
        self.0.write_zeroes(offset, length, unmap)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.bound(offset, length)
    }
}

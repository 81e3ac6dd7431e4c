//! A disk as whatever is written to as a disk.

use qcow2_core::disk::{Disk, Durability};

use crate::image::Image;
use crate::{Mem, Result};

impl Disk for Image {
    fn write_at(&self, buf: Mem<'_>, offset: u64, durability: Durability) -> Result<()> {
        self.write_at(buf, offset)?;
        self.made_durable(durability)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool, durability: Durability) -> Result<()> {
        self.write_zeroes(offset, length, unmap)?;
        self.made_durable(durability)
    }

    fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.discard(offset, length)?;
        self.made_durable(durability)
    }

    fn flush(&self) -> Result<()> {
        self.flush()
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.resize(size)
    }

    fn write_compressed_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.write_compressed_at(buf, offset)
    }
}

impl Image {
    fn made_durable(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::AtFlush => Ok(()),
            Durability::Now => self.flush(),
        }
    }
}

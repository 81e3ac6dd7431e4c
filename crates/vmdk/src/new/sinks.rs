//! Copying a disk into new extents, flat ones and such with grains.

use std::sync::Arc;

use qcow2_core::convert::{BlockTarget, ConvertOptions, RawSink, Rules, Sink, Worker};
use qcow2_core::new_image::Hosts;
use qcow2_core::space::lengthen;
use qcow2_core::{ErrorKind, Job, Mem, Result, Storage, StorageExt};

use super::layout::SparseLayout;
use super::{GRAIN, NewVmdk, SPLIT, SPLIT_FILE};
use crate::fields::{SECTOR, invalid};
use crate::sparse::Header;

/// Sectors of a file that its entries can name.
const MAX_SECTORS: u64 = 1 << 32;

/// Flat extents, and the descriptor when all is there.
pub(super) struct Completing {
    pub(super) data: RawSink,
    pub(super) new: Arc<NewVmdk>,
    pub(super) hosts: Hosts,
}

impl Sink for Completing {
    fn rules(&self) -> Rules {
        self.data.rules()
    }

    fn worker(&self) -> Result<Worker<'_>> {
        self.data.worker()
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        let Self { data, new, hosts } = *self;
        Box::new(data).finish(options, job)?;
        new.complete(&hosts, &[], options.durable)
    }
}

/// The places of grains in the files of a sparse disk. Each table is written when the last of its grains has a place.
pub(super) struct Grains {
    new: Arc<NewVmdk>,
    hosts: Hosts,
    files: Vec<File>,
    /// The file, and the table in it, that is being filled.
    current: (usize, u64),
    table: Vec<u32>,
}

struct File {
    storage: Arc<dyn Storage>,
    layout: SparseLayout,
    /// First sector that is free.
    next: u64,
}

impl Grains {
    pub(super) fn new(new: Arc<NewVmdk>, hosts: Hosts, files: Vec<(Arc<dyn Storage>, SparseLayout)>) -> Self {
        let entries = files.first().map_or(0, |(_, layout)| layout.geometry.table_entries);
        let files = files.into_iter().map(|(storage, layout)| {
            let next = layout.header.overhead;
            File { storage, layout, next }
        });
        Self { new, hosts, files: files.collect(), current: (0, 0), table: vec![0; entries as usize] }
    }

    /// Writes the table that was filled, and its copy.
    fn end_table(&mut self) -> Result<()> {
        let (number, index) = self.current;
        let Some(file) = self.files.get(number).filter(|_| self.table.iter().any(|entry| *entry != 0)) else {
            return Ok(());
        };
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        for sector in file.layout.tables(index) {
            file.storage.write_all_at(Mem::from(&bytes[..]), sector * SECTOR)?;
        }
        self.table.fill(0);
        Ok(())
    }
}

impl BlockTarget for Grains {
    fn block_size(&self) -> u64 {
        GRAIN
    }

    fn place(&mut self, block: u64) -> Result<u64> {
        let split = self.new.options.subformat.is_split();
        let (number, grain) =
            if split { (block / (SPLIT / GRAIN), block % (SPLIT / GRAIN)) } else { (0, block) };
        let entries = self.table.len().max(1) as u64;
        let current = (number as usize, grain / entries);
        if current != self.current {
            self.end_table()?;
            self.current = current;
        }
        let beyond = |value: u64| {
            let reason = "the file is too large for the entries of its tables, which have 32 bits";
            invalid(ErrorKind::Limit, "grain table entry", value, reason)
        };
        let file = self.files.get_mut(number as usize).ok_or_else(|| beyond(block))?;
        let sector = file.next;
        file.next += file.layout.header.grain;
        if file.next > MAX_SECTORS {
            return Err(file.storage.located(beyond(sector)));
        }
        if let Some(entry) = self.table.get_mut((grain % entries) as usize) {
            *entry = sector as u32;
        }
        Ok(number * SPLIT_FILE + sector * SECTOR)
    }

    fn finish(mut self: Box<Self>, durable: bool, job: &Job) -> Result<()> {
        self.end_table()?;
        for file in &self.files {
            job.checkpoint()?;
            // Zeroes at the end of the last grain were not written.
            lengthen(&*file.storage, file.next * SECTOR)?;
        }
        let headers: Vec<Header> = self.files.iter().map(|file| file.layout.header).collect();
        self.new.complete(&self.hosts, &headers, durable)
    }
}

//! New images.

use std::sync::Arc;

use super::layer::BlockLayer;
use super::layout::{Layout, Scheme};
use super::places::Places;
use crate::convert::{BlockSink, BlockTarget, Context, Sink};
use crate::disk::DiskOptions;
use crate::new_image::{Hosts, NewImage};
use crate::space::{Preallocation, empty, reserve, write_zero_bytes};
use crate::{Error, ErrorKind, Job, Layer, Mem, Result, Storage, StorageExt};

/// Bytes of the table that are written at once.
const PIECE: usize = 256 << 10;

/// What a new image of a format has beside its table and its blocks.
pub trait Blueprint: std::fmt::Debug + Send + Sync + 'static {
    /// What is special about the image.
    type Scheme: Scheme;

    /// That of the image when it is complete.
    fn scheme(&self) -> Self::Scheme;

    /// Whether every block has its place from the start.
    fn is_preallocated(&self) -> bool {
        false
    }

    /// Space that is taken: `Falloc` or `Full` of one whose blocks all have their places.
    fn preallocation(&self) -> Preallocation {
        Preallocation::Off
    }

    /// Bytes that are behind the last place.
    fn tail(&self) -> u64 {
        0
    }

    /// What is written over the first bytes of a device, so that it is no image before all is there.
    fn head(&self) -> u64;

    /// Writes the structures of an image whose table and data are there and whose last place ends at `end`. What makes the file an image
    /// comes last; `durable`: in this order also on stable storage.
    ///
    /// # Errors
    /// `Io`.
    fn publish(&self, storage: &dyn Storage, end: u64, durable: bool) -> Result<()>;
}

/// A new image of equal blocks.
#[derive(Debug)]
pub struct NewBlocks<B> {
    blueprint: B,
    layout: Layout,
    format: &'static str,
    has_backing: bool,
}

impl<B: Blueprint> NewBlocks<B> {
    /// By this blueprint.
    pub fn new(blueprint: B) -> Self {
        let scheme = blueprint.scheme();
        let has_backing = scheme.is_differencing();
        Self { layout: scheme.layout().clone(), format: scheme.format(), has_backing, blueprint }
    }

    /// The blueprint.
    pub fn blueprint(&self) -> &B {
        &self.blueprint
    }

    /// Behind the places of so many blocks that lie one behind the other.
    fn end_of(&self, blocks: u64) -> u64 {
        self.layout.next_place(self.layout.data).saturating_add(blocks.saturating_mul(self.step()))
    }

    /// From one place to the next.
    fn step(&self) -> u64 {
        self.layout.stride().next_multiple_of(self.layout.grain)
    }

    fn blocks(&self) -> u64 {
        self.layout.size.div_ceil(self.layout.block)
    }

    /// Makes the file no image, and long enough for what it has from the start.
    fn begin(&self, host: &dyn Storage, job: &Job) -> Result<()> {
        let blocks = if self.blueprint.is_preallocated() { self.blocks() } else { 0 };
        let end = self.end_of(blocks);
        if host.traits().block_device {
            let (room, least) = (host.size()?, end + self.blueprint.tail());
            if room < least {
                let message = format!("the target holds {room} bytes, an empty image has {least}");
                return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
            }
            host.zero(0, self.blueprint.head(), false)?;
            host.flush()?;
        } else {
            empty(host)?;
            host.resize(end)?;
        }
        let data = self.layout.data..end;
        match self.blueprint.preallocation() {
            Preallocation::Off | Preallocation::Metadata if host.traits().block_device => {
                host.zero(data.start, data.end - data.start, true)
            }
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => reserve(host, data, job),
            Preallocation::Full => write_zero_bytes(host, data.start, data.end - data.start, job),
        }
    }

    /// Writes the table of an empty image: all of it up to the data, so that none of it is left to chance.
    fn write_table(&self, host: &dyn Storage, job: &Job) -> Result<()> {
        let mut table = TableWriter::new(&self.layout);
        if self.blueprint.is_preallocated() {
            let scheme = self.blueprint.scheme();
            for block in 0..self.blocks() {
                job.checkpoint()?;
                scheme.fresh(host, self.end_of(block), false, true)?;
                table.put(host, block as u32, self.end_of(block))?;
            }
        }
        table.finish(host, job)
    }

    /// The disk, of a file whose table is there.
    fn layer(&self, host: &Arc<dyn Storage>) -> Result<BlockLayer<B::Scheme>> {
        BlockLayer::new(Arc::clone(host), self.blueprint.scheme(), None)
    }
}

impl<B: Blueprint> NewImage for NewBlocks<B> {
    fn format(&self) -> &'static str {
        self.format
    }

    fn size(&self) -> u64 {
        self.layout.size
    }

    fn has_backing(&self) -> bool {
        self.has_backing
    }

    fn unit(&self) -> u64 {
        self.layout.block
    }

    fn length(&self, data: u64) -> u64 {
        let blocks =
            if self.blueprint.is_preallocated() { self.blocks() } else { data.div_ceil(self.layout.block) };
        self.end_of(blocks).saturating_add(self.blueprint.tail())
    }

    fn preallocation(&self) -> Preallocation {
        self.blueprint.preallocation()
    }

    fn create(&self, hosts: &Hosts, job: &Job) -> Result<()> {
        let host = &*hosts.own;
        self.begin(host, job)?;
        self.write_table(host, job)?;
        let end = self.end_of(if self.blueprint.is_preallocated() { self.blocks() } else { 0 });
        self.blueprint.publish(host, end, true)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, _: usize) -> Result<Box<dyn Sink>> {
        let host = hosts.own;
        self.begin(&*host, context.job)?;
        let target = Target {
            table: TableWriter::new(&self.layout),
            scheme: self.blueprint.scheme(),
            next: self.end_of(0),
            host: Arc::clone(&host),
            new: self,
        };
        Ok(Box::new(BlockSink::new(context, host, Box::new(target))))
    }

    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>> {
        self.begin(&*hosts.own, job)?;
        self.write_table(&*hosts.own, job)?;
        let mut layer = self.layer(&hosts.own)?;
        layer.options = Some(DiskOptions::default());
        Ok(Box::new(layer))
    }

    fn publish(&self, hosts: &Hosts) -> Result<()> {
        let end = Places::survey(&self.layer(&hosts.own)?.shared, u32::MAX)?.end;
        self.blueprint.publish(&*hosts.own, end, true)
    }
}

/// The table, written front to back.
#[derive(Debug)]
struct TableWriter {
    layout: Layout,
    bytes: Vec<u8>,
    /// Where they go.
    at: u64,
}

impl TableWriter {
    fn new(layout: &Layout) -> Self {
        Self { bytes: Vec::new(), at: layout.table, layout: layout.clone() }
    }

    fn next_block(&self) -> u64 {
        (self.at - self.layout.table + self.bytes.len() as u64) / 4
    }

    /// Writes what there is, if that is enough.
    fn write(&mut self, host: &dyn Storage, least: usize) -> Result<()> {
        if self.bytes.len() < least.max(1) {
            return Ok(());
        }
        host.write_all_at(Mem::from(&self.bytes[..]), self.at)?;
        self.at += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }

    /// Blocks up to `block` are not there.
    fn skip_to(&mut self, host: &dyn Storage, block: u64) -> Result<()> {
        while self.next_block() < block {
            self.bytes.extend(self.layout.encode(self.layout.absent));
            self.write(host, PIECE)?;
        }
        Ok(())
    }

    fn put(&mut self, host: &dyn Storage, block: u32, place: u64) -> Result<()> {
        self.skip_to(host, block.into())?;
        let Some(entry) = self.layout.entry_of(place) else {
            let message = format!("the format has no entry for {place:#x}: the file is as long as it can be");
            return Err(host.located(Error::new(ErrorKind::Limit, message)));
        };
        self.bytes.extend(self.layout.encode(entry));
        self.write(host, PIECE)
    }

    fn finish(mut self, host: &dyn Storage, job: &Job) -> Result<()> {
        let entries = u64::from(self.layout.entries);
        while self.next_block() < entries {
            job.checkpoint()?;
            self.skip_to(host, entries.min(self.next_block() + PIECE as u64))?;
        }
        self.write(host, 1)
    }
}

/// A conversion's.
struct Target<B: Blueprint> {
    new: Arc<NewBlocks<B>>,
    scheme: B::Scheme,
    host: Arc<dyn Storage>,
    table: TableWriter,
    next: u64,
}

impl<B: Blueprint> BlockTarget for Target<B> {
    fn block_size(&self) -> u64 {
        self.new.layout.block
    }

    /// One whose blocks all have their places: each its own.
    fn place(&mut self, block: u64) -> Result<u64> {
        let number = u32::try_from(block).unwrap_or(u32::MAX);
        let place = if self.new.blueprint.is_preallocated() { self.new.end_of(block) } else { self.next };
        if !self.new.blueprint.is_preallocated() {
            self.table.put(&*self.host, number, place)?;
            self.next += self.new.step();
        }
        self.scheme.fresh(&*self.host, place, false, true)?;
        Ok(place + self.new.layout.lead)
    }

    fn finish(self: Box<Self>, durable: bool, job: &Job) -> Result<()> {
        let Self { new, host, table, next, .. } = *self;
        let end = if new.blueprint.is_preallocated() {
            new.write_table(&*host, job)?;
            new.end_of(new.blocks())
        } else {
            table.finish(&*host, job)?;
            next
        };
        if !host.traits().block_device {
            host.resize(end)?;
        }
        new.blueprint.publish(&*host, end, durable)
    }
}

//! New images.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use qcow2_core::blocks::{Blueprint, NewBlocks};
use qcow2_core::convert::{Context, ConvertOptions, RawSink, Rules, Sink, Worker};
use qcow2_core::front_to_back::{Flat, FrontToBack, Planning};
use qcow2_core::layer::References;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::{Preallocation, size_raw};
use qcow2_core::{DiskOptions, Error, ErrorKind, Job, Layer, Mem, Result, Storage, StorageExt, random};

use crate::fixed::Fixed;
use crate::layer::VpcScheme;
use crate::parent::{Parent, StoredName};
use crate::structures::{
    BLOCK_SIZE, DiskType, FOOTER_LENGTH, Footer, Geometry, HEADER_LENGTH, Header, MAX_SECTORS, SECTOR,
};

/// Seconds from 1970 to 2000, from which VHD counts.
const YEAR_2000: u64 = 946_684_800;

/// The kind of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subformat {
    /// Blocks have a place when they are written to.
    #[default]
    Dynamic,
    /// The file is the disk and a footer.
    Fixed,
}

/// How a new image is made.
#[derive(Debug, Clone, Default)]
pub struct NewOptions {
    /// Bytes of the disk, whole sectors; those of the parent where there is one.
    pub size: u64,
    /// Its kind.
    pub subformat: Subformat,
    /// The disk has exactly this size, as Hyper-V and Azure have it; without it, that of the next geometry, as Virtual PC and QEMU do.
    pub force_size: bool,
    /// What is allocated.
    pub preallocation: Preallocation,
    /// What the image does not have is read from it.
    pub parent: Option<Parent>,
    /// What a product wants besides.
    pub preset: Option<Preset>,
}

/// A product that takes images of certain sizes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Azure: whole MiB, from 20 MiB to 32 TiB; fixed.
    Azure,
    /// XenServer: whole blocks of 2 MiB; dynamic.
    XenServer,
}

impl Preset {
    /// The kind that it takes.
    #[must_use]
    pub fn subformat(self) -> Subformat {
        match self {
            Self::Azure => Subformat::Fixed,
            Self::XenServer => Subformat::Dynamic,
        }
    }

    /// The size of a disk with room for `size` bytes.
    fn size(self, size: u64) -> Result<u64> {
        let unit = match self {
            Self::Azure => 1 << 20,
            Self::XenServer => BLOCK_SIZE.into(),
        };
        let whole = size.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        if self == Self::Azure && !(20 << 20..=32 << 40).contains(&whole) {
            let message = format!("Azure takes disks of 20 MiB to 32 TiB, not of {size} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("size"));
        }
        Ok(whole)
    }
}

/// A new image.
///
/// # Errors
/// `Limit` above 2040 GiB; `InvalidArgument` for a size that is not whole sectors, and what a differencing disk does not have; `Io` without
/// random numbers.
pub fn new_vpc(options: NewOptions) -> Result<Arc<dyn NewImage>> {
    let NewOptions { size, subformat, preallocation, parent, preset, .. } = options;
    let size = preset.map_or(Ok(size), |preset| preset.size(size))?;
    // Products that have sizes of their own believe the size, and no geometry.
    let force_size = options.force_size || preset.is_some();
    let refuse =
        |kind, field: &'static str, message: String| Err(Error::new(kind, message).with_field(field));
    if !size.is_multiple_of(SECTOR) {
        let message = format!("the size of a disk is a multiple of {SECTOR} bytes, not {size}");
        return refuse(ErrorKind::InvalidArgument, "size", message);
    }
    if size > MAX_SECTORS * SECTOR && (preset, subformat) != (Some(Preset::Azure), Subformat::Fixed) {
        return refuse(ErrorKind::Limit, "size", format!("a VHD has at most 2040 GiB, not {size} bytes"));
    }
    if let Some(parent) = parent {
        if subformat == Subformat::Fixed {
            return refuse(ErrorKind::InvalidArgument, "subformat", "a fixed VHD has no parent".to_owned());
        }
        if preallocation != Preallocation::Off {
            let message = "what a differencing VHD takes is not known before it is written to".to_owned();
            return refuse(ErrorKind::InvalidArgument, "preallocation", message);
        }
        if size != parent.id.size {
            let message = format!("a differencing VHD has the size of its parent, {} bytes", parent.id.size);
            return refuse(ErrorKind::InvalidArgument, "size", message);
        }
        return Ok(Arc::new(NewBlocks::new(NewDynamic::differencing(&parent)?)));
    }
    let (geometry, creator) = match force_size {
        true => (Geometry::LARGEST, *b"qem2"),
        false => (Geometry::at_least(size / SECTOR), *b"qemu"),
    };
    let size = if geometry == Geometry::LARGEST { size } else { geometry.total() * SECTOR };
    match subformat {
        Subformat::Dynamic => {
            let footer = Footer::new(DiskType::Dynamic, size, geometry, creator, random::uuid()?, seconds());
            let entries = u32::try_from(size.div_ceil(BLOCK_SIZE.into())).unwrap_or(u32::MAX);
            let header = Header::new(entries);
            Ok(Arc::new(NewBlocks::new(NewDynamic { footer, header, preallocation, parent: None })))
        }
        Subformat::Fixed => {
            let footer = Footer::new(DiskType::Fixed, size, geometry, creator, random::uuid()?, seconds());
            Ok(Arc::new(NewFixed { footer, preallocation }))
        }
    }
}

/// The blueprint of a dynamic or differencing disk.
#[derive(Debug)]
struct NewDynamic {
    footer: Footer,
    header: Header,
    /// All blocks have their place, unless it is `Off`.
    preallocation: Preallocation,
    /// The parent's name.
    parent: Option<StoredName>,
}

impl NewDynamic {
    /// One with the parent's disk, whose geometry it has.
    fn differencing(parent: &Parent) -> Result<Self> {
        let (id, kind) = (parent.id, DiskType::Differencing);
        let footer = Footer::new(kind, id.size, id.geometry, *b"qem2", random::uuid()?, seconds());
        let name = StoredName::new(&parent.filename, (FOOTER_LENGTH + HEADER_LENGTH) as u64)?;
        let entries = u32::try_from(id.size.div_ceil(BLOCK_SIZE.into())).unwrap_or(u32::MAX);
        let header = Header::new(entries).with_parent(
            name.end(),
            id.uuid,
            parent.changed,
            &name.plain,
            &name.locators(),
        );
        Ok(Self { footer, header, preallocation: Preallocation::Off, parent: Some(name) })
    }
}

impl Blueprint for NewDynamic {
    type Scheme = VpcScheme;

    fn scheme(&self) -> VpcScheme {
        VpcScheme::new(&self.footer, self.header.clone(), References::default())
    }

    fn is_preallocated(&self) -> bool {
        self.preallocation != Preallocation::Off
    }

    fn preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        }
    }

    fn tail(&self) -> u64 {
        FOOTER_LENGTH as u64
    }

    fn head(&self) -> u64 {
        FOOTER_LENGTH as u64
    }

    fn publish(&self, storage: &dyn Storage, end: u64, durable: bool) -> Result<()> {
        let sync = || if durable { storage.flush() } else { Ok(()) };
        // The BAT is whole sectors of unused entries.
        let layout = self.header.layout(FOOTER_LENGTH as u64, self.footer.virtual_size());
        let table_end = layout.table + layout.table_bytes();
        let rest = vec![0xff; (layout.data - table_end) as usize];
        storage.write_all_at(Mem::from(&rest[..]), table_end)?;
        self.parent.iter().try_for_each(|name| name.write(storage))?;
        storage.write_all_at(Mem::from(&self.header.bytes()[..]), FOOTER_LENGTH as u64)?;
        storage.write_all_at(Mem::from(&self.footer.bytes()[..]), end)?;
        sync()?;
        storage.write_all_at(Mem::from(&self.footer.bytes()[..]), 0)?;
        sync()
    }
}

/// A fixed disk.
#[derive(Debug)]
struct NewFixed {
    footer: Footer,
    preallocation: Preallocation,
}

impl NewFixed {
    /// A device has to be exactly as long, as the footer is where it ends.
    fn begin(&self, host: &dyn Storage) -> Result<()> {
        let length = self.size() + FOOTER_LENGTH as u64;
        if !host.traits().block_device {
            return Ok(());
        }
        if host.size()? != length {
            let message =
                format!("the footer is where the device ends: it would have to have {length} bytes");
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message).with_field("size")));
        }
        host.zero(self.size(), FOOTER_LENGTH as u64, false)?;
        host.flush()
    }

    fn write_footer(&self, host: &dyn Storage, durable: bool) -> Result<()> {
        let sync = || if durable { host.flush() } else { Ok(()) };
        sync()?;
        host.write_all_at(Mem::from(&self.footer.bytes()[..]), self.size())?;
        sync()
    }
}

impl NewImage for NewFixed {
    fn format(&self) -> &'static str {
        "vpc"
    }

    fn size(&self) -> u64 {
        self.footer.virtual_size()
    }

    fn unit(&self) -> u64 {
        1
    }

    fn length(&self, data: u64) -> u64 {
        data.saturating_add(FOOTER_LENGTH as u64)
    }

    fn preallocation(&self) -> Preallocation {
        self.preallocation
    }

    fn create(&self, hosts: &Hosts, job: &Job) -> Result<()> {
        let host = &*hosts.own;
        self.begin(host)?;
        if !host.traits().block_device {
            size_raw(host, self.size(), self.preallocation, job)?;
        }
        self.write_footer(host, true)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, _: usize) -> Result<Box<dyn Sink>> {
        self.begin(&*hosts.own)?;
        let data = RawSink::new(context, Arc::clone(&hosts.own), self.preallocation, false)?;
        Ok(Box::new(FixedSink { data, image: self, host: hosts.own }))
    }

    /// With an identity and a time that are the same in each run.
    fn front_to_back(&self, planning: &Planning<'_>) -> Result<Box<dyn FrontToBack>> {
        let footer = self.footer.made_as(planning.uuid()?, 0);
        Ok(Box::new(Flat::new(self.size(), footer.bytes().to_vec())))
    }

    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>> {
        let host = &hosts.own;
        self.begin(&**host)?;
        match host.traits().block_device {
            true => host.zero(0, self.size(), true)?,
            false => size_raw(&**host, self.size(), self.preallocation, job)?,
        }
        let mut layer = Fixed::new(Arc::clone(host), &self.footer, self.size())?;
        layer.make_writable(DiskOptions::default())?;
        Ok(Box::new(layer))
    }

    fn publish(&self, hosts: &Hosts) -> Result<()> {
        self.write_footer(&*hosts.own, true)
    }
}

/// A raw disk, and the footer behind it when all is there.
struct FixedSink {
    data: RawSink,
    image: Arc<NewFixed>,
    host: Arc<dyn Storage>,
}

impl Sink for FixedSink {
    fn rules(&self) -> Rules {
        self.data.rules()
    }

    fn worker(&self) -> Result<Worker<'_>> {
        self.data.worker()
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        let Self { data, image, host } = *self;
        Box::new(data).finish(options, job)?;
        image.write_footer(&*host, options.durable)
    }
}

/// Seconds since 2000; 0 on a clock that is wrong.
fn seconds() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(now.saturating_sub(YEAR_2000)).unwrap_or(0)
}

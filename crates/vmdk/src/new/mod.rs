//! New images: their options, their files, and the order in which they are written.

mod front_to_back;
mod joined;
mod layout;
mod options;
mod sinks;
mod stream_sink;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_core::convert::{BlockSink, Context, RawSink, Sink};
use qcow2_core::disk::DiskOptions;
use qcow2_core::front_to_back::{FrontToBack, Planning};
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::{Preallocation, empty};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, Result, Storage, StorageExt, check_limit};

use self::front_to_back::Streamed;
use self::joined::Joined;
use self::layout::SparseLayout;
pub use self::options::{AdapterType, CreateOptions, Parent, Subformat};
use self::sinks::{Completing, Grains};
use self::stream_sink::StreamSink;
use crate::cid::random_cid;
use crate::descriptor::{Access, ExtentLine, ExtentType, NO_PARENT, NewDescriptor};
use crate::fields::{SECTOR, invalid};
use crate::sparse::Header;
use crate::{OpenOptions, Vmdk, stream};

/// Bytes of an extent of a split disk.
const SPLIT: u64 = 2 << 30;
/// Bytes that are reserved for the file of an extent of a split sparse disk, where all of them are seen as one.
const SPLIT_FILE: u64 = 8 << 30;
/// Bytes of a grain.
const GRAIN: u64 = 64 << 10;

/// A new image, before anything of it is written.
#[derive(Debug, Clone)]
pub struct NewVmdk {
    options: CreateOptions,
    descriptor: Vec<u8>,
    extents: Vec<ExtentLine>,
    /// The files of the extents, where they have some of their own.
    others: Vec<PathBuf>,
}

impl NewVmdk {
    /// An image whose own file is `path`; its others get their names from that.
    ///
    /// # Errors
    /// `InvalidArgument` with the option at fault, and for an image of several files without a path; `Limit` for a disk that the
    /// format cannot hold; `Io` where the system has no random bytes.
    pub fn new(options: CreateOptions, path: Option<&Path>) -> Result<Self> {
        options.check()?;
        let embedded = options.subformat.is_embedded();
        if !embedded && path.is_none() {
            let reason = "it has several files, and needs the name of the first one";
            return Err(invalid(ErrorKind::InvalidArgument, "subformat", options.subformat.name(), reason));
        }
        let name = path.and_then(Path::file_name).map_or_else(|| b"disk.vmdk".to_vec(), name_bytes);
        if name.iter().any(|byte| matches!(byte, b'"' | b'\n' | b'\r' | 0)) {
            let shown = String::from_utf8_lossy(&name).into_owned();
            let reason = "a descriptor cannot name such a file";
            return Err(invalid(ErrorKind::InvalidArgument, "file name", format_args!("'{shown}'"), reason));
        }
        let extents = lines(&options, &name);
        let descriptor = describe(&options, &extents, random_cid(8, 0)?);
        if embedded {
            check_limit("descriptor", descriptor.len() as u64, SparseLayout::DESCRIPTOR_BYTES)?;
        }
        let beside = |line: &ExtentLine| path.unwrap_or(Path::new("")).with_file_name(name_of(line));
        let others = if embedded { Vec::new() } else { extents.iter().map(beside).collect() };
        Ok(Self { options, descriptor, extents, others })
    }

    /// How it is made.
    pub fn options(&self) -> &CreateOptions {
        &self.options
    }

    /// The text of its descriptor.
    pub fn descriptor(&self) -> &[u8] {
        &self.descriptor
    }

    /// Its descriptor with another content identifier.
    fn described(&self, cid: u32) -> Vec<u8> {
        describe(&self.options, &self.extents, cid)
    }

    /// Sectors of the disk.
    pub(crate) fn sectors(&self) -> u64 {
        self.options.sectors()
    }

    /// Makes the files no image.
    fn begin(&self, hosts: &Hosts) -> Result<()> {
        if hosts.others.len() != self.others.len() {
            let message = "the files of a new image are not those that it has";
            return Err(Error::new(ErrorKind::Internal, message));
        }
        for file in std::iter::once(&hosts.own).chain(&hosts.others) {
            if file.traits().block_device {
                let message =
                    "a vmdk image is made in files, not on a device: the format has no size of its own there";
                return Err(file.located(Error::new(ErrorKind::InvalidArgument, message)));
            }
            empty(&**file)?;
        }
        Ok(())
    }

    /// The files with grains, and how each is laid out.
    fn sparse_files(&self, hosts: &Hosts) -> Result<Vec<(Arc<dyn Storage>, SparseLayout)>> {
        let files = if self.others.is_empty() { std::slice::from_ref(&hosts.own) } else { &hosts.others };
        let laid = files.iter().zip(&self.extents).map(|(file, line)| {
            let layout = SparseLayout::new(line.sectors, self.options.zeroed_grain)?;
            layout.write_tables(&**file)?;
            Ok((Arc::clone(file), layout))
        });
        laid.collect()
    }

    /// Writes the headers of extents in files of their own, the descriptor, and then the header of a file with grains, which makes it an
    /// image. `durable`: in this order also on stable storage.
    fn complete(&self, hosts: &Hosts, headers: &[Header], durable: bool) -> Result<()> {
        for (file, header) in hosts.others.iter().zip(headers) {
            file.write_all_at(Mem::from(&header.encode()[..]), 0)?;
        }
        if durable {
            hosts.others.iter().try_for_each(|file| file.flush())?;
        }
        let own = if self.options.subformat.is_embedded() { headers.first() } else { None };
        self.publish_in(&*hosts.own, own, durable)
    }

    pub(crate) fn publish_in(&self, own: &dyn Storage, header: Option<&Header>, durable: bool) -> Result<()> {
        let sync = || if durable { own.flush() } else { Ok(()) };
        let place = if header.is_some() { SECTOR } else { 0 };
        own.write_all_at(Mem::from(&self.descriptor[..]), place)?;
        sync()?;
        let Some(header) = header else { return Ok(()) };
        own.write_all_at(Mem::from(&header.encode()[..]), 0)?;
        sync()
    }

    /// All files of a flat disk as one.
    fn flat(&self, hosts: &Hosts) -> Arc<dyn Storage> {
        match &hosts.others[..] {
            [one] if !self.options.subformat.is_split() => Arc::clone(one),
            files => Arc::new(Joined::new(files.to_vec(), SPLIT)),
        }
    }
}

impl NewImage for NewVmdk {
    fn format(&self) -> &'static str {
        "vmdk"
    }

    fn size(&self) -> u64 {
        self.sectors() * SECTOR
    }

    fn other_files(&self) -> &[PathBuf] {
        &self.others
    }

    fn compresses(&self) -> bool {
        self.options.subformat == Subformat::StreamOptimized
    }

    fn has_backing(&self) -> bool {
        self.options.parent.is_some()
    }

    fn unit(&self) -> u64 {
        if self.options.subformat.is_flat() { 1 } else { GRAIN }
    }

    fn length(&self, data: u64) -> u64 {
        let tables = self.size() / 8192;
        match self.options.subformat {
            subformat if subformat.is_flat() => data.saturating_add(self.descriptor.len() as u64),
            // What does not shrink has a marker, and the rest of a sector.
            Subformat::StreamOptimized => data.saturating_add(data / 64).saturating_add(tables + GRAIN),
            _ => data.saturating_add(tables).saturating_add(2 * GRAIN * self.extents.len() as u64),
        }
    }

    fn preallocation(&self) -> Preallocation {
        Preallocation::Off
    }

    fn create(&self, hosts: &Hosts, _: &Job) -> Result<()> {
        self.begin(hosts)?;
        if self.options.subformat == Subformat::StreamOptimized {
            return stream::create_empty(self, &*hosts.own);
        }
        let headers: Vec<Header> = if self.options.subformat.is_flat() {
            self.flat(hosts).resize(self.size())?;
            Vec::new()
        } else {
            self.sparse_files(hosts)?.into_iter().map(|(_, layout)| layout.header).collect()
        };
        self.complete(hosts, &headers, true)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, workers: usize) -> Result<Box<dyn Sink>> {
        self.begin(&hosts)?;
        if self.options.subformat == Subformat::StreamOptimized {
            return Ok(Box::new(StreamSink::new(self, hosts.own, context, workers)?));
        }
        if self.options.subformat.is_flat() {
            let data = RawSink::new(context, self.flat(&hosts), Preallocation::Off, false)?;
            return Ok(Box::new(Completing { data, new: self, hosts }));
        }
        let files = self.sparse_files(&hosts)?;
        let storage: Arc<dyn Storage> = match &files[..] {
            [(one, _)] => Arc::clone(one),
            _ => Arc::new(Joined::new(hosts.others.clone(), SPLIT_FILE)),
        };
        let target = Box::new(Grains::new(self, hosts, files));
        Ok(Box::new(BlockSink::new(context, storage, target)))
    }

    fn front_to_back(&self, planning: &Planning<'_>) -> Result<Box<dyn FrontToBack>> {
        if self.options.subformat != Subformat::StreamOptimized || self.options.parent.is_some() {
            let reason = "only a streamOptimized image without a backing file is written front to back";
            return Err(invalid(
                ErrorKind::UnsupportedFeature,
                "subformat",
                self.options.subformat.name(),
                reason,
            ));
        }
        Ok(Box::new(Streamed::plan(self, planning)?))
    }

    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>> {
        if self.options.subformat == Subformat::StreamOptimized {
            let reason = "it is written once, front to back";
            return Err(invalid(ErrorKind::UnsupportedFeature, "subformat", "streamOptimized", reason));
        }
        self.create(hosts, job)?;
        let mut vmdk = Vmdk::open(Arc::clone(&hosts.own), &OpenOptions::default())?;
        for (index, file) in hosts.others.iter().enumerate() {
            vmdk.attach_extent(index, Arc::clone(file))?;
        }
        vmdk.make_writable(DiskOptions::default())?;
        Ok(Box::new(vmdk))
    }
}

fn describe(options: &CreateOptions, extents: &[ExtentLine], cid: u32) -> Vec<u8> {
    let adapter = options.adapter_type;
    let descriptor = NewDescriptor {
        cid,
        parent_cid: options.parent.as_ref().map_or(NO_PARENT, |parent| parent.cid),
        create_type: options.subformat.name(),
        parent: options.parent.as_ref().map(|parent| &parent.filename[..]),
        extents,
        hardware_version: options.hardware_version(),
        adapter_type: adapter.name(),
        tools_version: options.tools_version(),
        heads: adapter.heads(),
    };
    descriptor.encode()
}

#[cfg(unix)]
fn name_bytes(name: &std::ffi::OsStr) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    name.as_bytes().to_vec()
}

#[cfg(not(unix))]
fn name_bytes(name: &std::ffi::OsStr) -> Vec<u8> {
    name.to_string_lossy().into_owned().into_bytes()
}

#[cfg(unix)]
fn name_of(line: &ExtentLine) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(line.filename.as_deref().unwrap_or_default()).into()
}

#[cfg(not(unix))]
fn name_of(line: &ExtentLine) -> PathBuf {
    String::from_utf8_lossy(line.filename.as_deref().unwrap_or_default()).into_owned().into()
}

/// The extents of a new disk whose own file is `name`, as its descriptor lists them.
fn lines(options: &CreateOptions, name: &[u8]) -> Vec<ExtentLine> {
    let subformat = options.subformat;
    let kind = if subformat.is_flat() { ExtentType::Flat } else { ExtentType::Sparse };
    let line = |sectors, filename| ExtentLine {
        access: Access::ReadWrite,
        sectors,
        kind,
        filename: Some(filename),
        offset: 0,
    };
    let total = options.sectors();
    if subformat.is_embedded() {
        return vec![line(total, name.to_vec())];
    }
    let dot = name.iter().rposition(|byte| *byte == b'.').unwrap_or(name.len());
    let (stem, ending) = name.split_at(dot);
    let named = |middle: String| [stem, middle.as_bytes(), ending].concat();
    if !subformat.is_split() {
        let lines = (total > 0).then(|| line(total, named("-flat".to_owned())));
        return lines.into_iter().collect();
    }
    let letter = if subformat.is_flat() { 'f' } else { 's' };
    let most = SPLIT / SECTOR;
    let part =
        |number: u64| line(most.min(total - number * most), named(format!("-{letter}{:03}", number + 1)));
    (0..total.div_ceil(most)).map(part).collect()
}

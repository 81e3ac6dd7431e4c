//! New images: their options, their files, and the order in which they are written.

mod layout;
mod options;

use std::sync::Arc;

use qcow2_core::space::{Preallocation, empty, size_raw};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

pub use self::layout::SparseLayout;
pub use self::options::{AdapterType, CreateOptions, Parent, Subformat};
use crate::cid::random_cid;
use crate::descriptor::{Access, ExtentLine, ExtentType, NO_PARENT, NewDescriptor};
use crate::fields::{SECTOR, check_limit, invalid};

/// Bytes of an extent of a split disk.
const SPLIT: u64 = 2 << 30;

/// A new image, before anything of it is written. It has a file of its own, and one for each of [`NewVmdk::extent_names`].
#[derive(Debug, Clone)]
pub struct NewVmdk {
    options: CreateOptions,
    descriptor: Vec<u8>,
    extents: Vec<ExtentLine>,
}

impl NewVmdk {
    /// An image whose own file has the name `name`, without its folder.
    ///
    /// # Errors
    /// `InvalidArgument` with the option at fault; `Limit` for a disk that the format cannot hold; `Io` where the system has no
    /// random bytes.
    pub fn new(options: CreateOptions, name: &[u8]) -> Result<Self> {
        options.check()?;
        if name.iter().any(|byte| matches!(byte, b'"' | b'\n' | b'\r' | 0)) {
            let shown = String::from_utf8_lossy(name).into_owned();
            let reason = "a descriptor cannot name such a file";
            return Err(invalid(ErrorKind::InvalidArgument, "file name", format_args!("'{shown}'"), reason));
        }
        let extents = lines(&options, name);
        let adapter = options.adapter_type;
        let descriptor = NewDescriptor {
            cid: random_cid(8, 0)?,
            parent_cid: options.parent.as_ref().map_or(NO_PARENT, |parent| parent.cid),
            create_type: options.subformat.name(),
            parent: options.parent.as_ref().map(|parent| &parent.filename[..]),
            extents: &extents,
            hardware_version: options.hardware_version(),
            adapter_type: adapter.name(),
            tools_version: options.tools_version(),
            heads: adapter.heads(),
        };
        let descriptor = descriptor.encode();
        if options.subformat.is_embedded() {
            check_limit("descriptor", descriptor.len() as u64, SparseLayout::DESCRIPTOR_BYTES)?;
        }
        Ok(Self { options, descriptor, extents })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.options.sectors() * SECTOR
    }

    /// How it is made.
    pub fn options(&self) -> &CreateOptions {
        &self.options
    }

    /// The text of its descriptor.
    pub fn descriptor(&self) -> &[u8] {
        &self.descriptor
    }

    /// The names of the files that it has beside its own, in guest order.
    pub fn extent_names(&self) -> Vec<&[u8]> {
        if self.options.subformat.is_embedded() {
            return Vec::new();
        }
        self.extents.iter().filter_map(|line| line.filename.as_deref()).collect()
    }

    /// The bytes of the disk in each of these files.
    pub fn extent_sizes(&self) -> Vec<u64> {
        self.extents.iter().map(ExtentLine::size).collect()
    }

    /// Makes an empty disk. The file is no image before its first bytes, which come last. Returns when it is durable.
    ///
    /// # Errors
    /// `InvalidArgument` for other files than it has, and for a device; `Io`; `Aborted`.
    pub fn create(
        &self,
        own: &Arc<dyn Storage>,
        extents: &[Arc<dyn Storage>],
        preallocation: Preallocation,
        job: &Job,
    ) -> Result<()> {
        self.begin(own, extents)?;
        if self.options.subformat == Subformat::StreamOptimized {
            return crate::stream::create_empty(self, &**own);
        }
        if self.options.subformat.is_embedded() {
            let layout = SparseLayout::new(self.size() / SECTOR, self.options.zeroed_grain)?;
            layout.write_tables(&**own)?;
            return self.publish(&**own, Some(&layout.header), true);
        }
        for (file, line) in extents.iter().zip(&self.extents) {
            if line.kind.is_plain() {
                size_raw(&**file, line.size(), preallocation, job)?;
            } else {
                let layout = SparseLayout::new(line.sectors, self.options.zeroed_grain)?;
                layout.write_tables(&**file)?;
                file.write_all_at(Mem::from(&layout.header.encode()[..]), 0)?;
            }
            file.flush()?;
        }
        self.publish(&**own, None, true)
    }

    /// Makes the files no image.
    ///
    /// # Errors
    /// `InvalidArgument` for other files than it has, and for a device; `Io`.
    pub fn begin(&self, own: &Arc<dyn Storage>, extents: &[Arc<dyn Storage>]) -> Result<()> {
        let wanted = self.extent_names().len();
        if extents.len() != wanted {
            let message = format!("the image has {wanted} extents in other files, not {}", extents.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("extents"));
        }
        for file in std::iter::once(own).chain(extents) {
            if file.traits().block_device {
                let message = "a vmdk image is made in files, not on a device";
                return Err(file.located(Error::new(ErrorKind::InvalidArgument, message)));
            }
            empty(&**file)?;
        }
        Ok(())
    }

    /// Writes the descriptor, and then the header of a file with grains, which makes it an image. `durable`: in this order also on
    /// stable storage.
    ///
    /// # Errors
    /// `Io`.
    pub fn publish(&self, own: &dyn Storage, header: Option<&crate::sparse::Header>, durable: bool) -> Result<()> {
        let sync = || if durable { own.flush() } else { Ok(()) };
        let place = if header.is_some() { SECTOR } else { 0 };
        own.write_all_at(Mem::from(&self.descriptor[..]), place)?;
        sync()?;
        let Some(header) = header else { return Ok(()) };
        own.write_all_at(Mem::from(&header.encode()[..]), 0)?;
        sync()
    }
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
    let part = |number: u64| line(most.min(total - number * most), named(format!("-{letter}{:03}", number + 1)));
    (0..total.div_ceil(most)).map(part).collect()
}

//! The formats that layers are opened and new images made in, in one table. What each can do besides is `src/formats/table.ts`.

mod vhdx;
mod vmdk;

use std::any::Any;
use std::sync::Arc;

use qcow2_engine::files::NewDisk;
use qcow2_engine::inspect::{inspect, inspect_bytes};
use qcow2_engine::measure::MeasureTarget;
use qcow2_engine::{Error, ErrorKind, Layer, OpenOptions, Qcow2, Raw, Result, Storage};
use qcow2_luks::Luks;
use qcow2_qcow1::Qcow1;
use qcow2_vmdk::Vmdk;

use crate::inspect::Inspected;
use crate::shape::{Purpose, Shape};

/// The files that a layer is opened on.
pub(crate) struct Files {
    /// Its own.
    pub(crate) own: Arc<dyn Storage>,
    /// The one with its header, where that is another one: of LUKS.
    pub(crate) header: Option<Arc<dyn Storage>>,
}

/// Opens a layer on its files.
type Opener = fn(Files, &OpenOptions) -> Result<Box<dyn Layer>>;

/// One format.
pub(crate) struct Format {
    /// QEMU's name.
    name: &'static str,
    /// The file is the disk: it has no metadata of its own that nobody may change meanwhile.
    pub(crate) plain: bool,
    /// Opens a layer. What an option means that the format does not have is nothing.
    open: Opener,
    /// Says what an image claims that is judged as one of this format.
    inspect: fn(&Untrusted<'_>, &OpenOptions) -> Result<Inspected>,
    /// Makes a new disk of a shape.
    pub(crate) make: fn(&Shape, Purpose<'_>) -> Result<NewDisk>,
    /// Says what a measurement needs of a shape.
    pub(crate) measure: fn(&Shape, Purpose<'_>) -> Result<MeasureTarget>,
}

static FORMATS: [Format; 6] = [QCOW2, RAW, QCOW, LUKS, vhdx::VHDX, vmdk::VMDK];

const QCOW2: Format = Format {
    name: "qcow2",
    plain: false,
    open: |files, options| Ok(Box::new(Qcow2::open(files.own, options)?)),
    inspect: |image, OpenOptions { limits, .. }| {
        let found = match image {
            Untrusted::File(storage) => inspect(*storage, limits)?,
            Untrusted::Bytes(bytes) => inspect_bytes(bytes, None, limits),
        };
        Ok(Inspected::of_qcow2(&found))
    },
    make: |shape, Purpose { size, encryption, job, .. }| {
        let create = shape.encrypted(size, encryption, job)?;
        Ok(NewDisk::Qcow2 { create: Box::new(create), data_path: shape.data_path() })
    },
    measure: |shape, purpose| shape.qcow2_target(purpose.encryption).map(MeasureTarget::Qcow2),
};

const RAW: Format = Format {
    name: "raw",
    plain: true,
    open: |files, _| Ok(Box::new(Raw::new(files.own)?)),
    inspect: QCOW2.inspect,
    make: |shape, purpose| Ok(NewDisk::Raw { size: purpose.size, preallocation: shape.preallocation() }),
    measure: |_, _| Ok(MeasureTarget::Raw),
};

const QCOW: Format = Format {
    name: "qcow",
    plain: false,
    open: |files, options| Ok(Box::new(Qcow1::open(files.own, &qcow_options(options))?)),
    inspect: |image, options| {
        let options = qcow_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_qcow1::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_qcow1::inspect_bytes(bytes, None, &options),
        };
        Ok(Inspected::of_qcow(&found))
    },
    make: |_, _| Err(only_read("qcow")),
    measure: |_, _| Err(only_read("qcow")),
};

const LUKS: Format = Format {
    name: "luks",
    plain: false,
    open: |files, options| Ok(Box::new(Luks::open(files.own, &luks_options(options, files.header))?)),
    inspect: |image, options| {
        let options = luks_options(options, None);
        let found = match image {
            Untrusted::File(storage) => qcow2_luks::layer::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_luks::layer::inspect_bytes(bytes, None, &options),
        };
        Ok(Inspected::of_luks(&found))
    },
    make: |shape, purpose| {
        let encryption = purpose.needed_encryption()?;
        let image = encryption.new_luks(purpose.size, shape.preallocation(), purpose.job)?;
        Ok(NewDisk::Format(Arc::new(image)))
    },
    // Without the key that a new image makes.
    measure: |_, purpose| purpose.needed_encryption()?.header_length().map(MeasureTarget::Behind),
};

/// TypeScript makes no image in such a format: asking for one is a bug.
fn only_read(format: &str) -> Error {
    Error::new(ErrorKind::Internal, format!("{format} images are only read"))
}

fn luks_options(options: &OpenOptions, header: Option<Arc<dyn Storage>>) -> qcow2_luks::OpenOptions {
    qcow2_luks::OpenOptions { max_virtual_size: options.limits.max_virtual_size, header }
}

fn qcow_options(options: &OpenOptions) -> qcow2_qcow1::OpenOptions {
    qcow2_qcow1::OpenOptions {
        max_virtual_size: options.limits.max_virtual_size,
        max_metadata_bytes: options.limits.max_metadata_bytes,
        l2_cache_bytes: options.l2_cache_bytes,
    }
}

/// What is inspected: an image of which nothing is believed.
pub(crate) enum Untrusted<'a> {
    /// A whole file.
    File(&'a dyn Storage),
    /// Its first bytes.
    Bytes(&'a [u8]),
}

impl Format {
    /// The format with this name. The facade has checked it: another one is a bug.
    pub(crate) fn named(name: &str) -> napi::Result<&'static Self> {
        let found = FORMATS.iter().find(|format| format.name == name);
        found.ok_or_else(|| napi::Error::from_reason(format!("unknown format '{name}'")))
    }

    /// Opens a layer of it.
    ///
    /// # Errors
    /// As the format's own type.
    pub(crate) fn open(&self, files: Files, options: &OpenOptions) -> Result<Box<dyn Layer>> {
        (self.open)(files, options)
    }

    /// Says what an image claims that is judged as one of this format.
    ///
    /// # Errors
    /// `Io`. What is wrong with the image is a finding.
    pub(crate) fn inspect(&self, image: &Untrusted<'_>, options: &OpenOptions) -> Result<Inspected> {
        (self.inspect)(image, options)
    }
}

/// The LUKS file, if the layer is one.
pub(crate) fn luks(layer: &dyn Layer) -> Option<&Luks> {
    (layer as &dyn Any).downcast_ref()
}

/// The VMDK image, if the layer is one.
pub(crate) fn vmdk(layer: &dyn Layer) -> Option<&Vmdk> {
    (layer as &dyn Any).downcast_ref()
}

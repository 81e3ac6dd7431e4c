//! The formats that layers are opened and new images made in, in one table. What each can do besides is `src/formats/table.ts`.

mod vhdx;
mod vmdk;

use std::any::Any;
use std::sync::Arc;

use qcow2_engine::files::NewDisk;
use qcow2_engine::inspect::{inspect, inspect_bytes};
use qcow2_engine::measure::MeasureTarget;
use qcow2_engine::{Error, ErrorKind, Layer, NewImage, OpenOptions, Qcow2, Raw, Result, Storage, blocks};
use qcow2_luks::Luks;
use qcow2_parallels::NewParallels;
use qcow2_parallels::structures::DEFAULT_CLUSTER_SIZE;
use qcow2_qcow1::{NewQcow1, Qcow1};
use qcow2_vdi::NewVdi;
use qcow2_vmdk::Vmdk;
use qcow2_vpc::{NewOptions, Parent, ParentId, Preset, Subformat};

use crate::inspect::{Inspected, Seen};
use crate::shape::{Purpose, Shape, StoredParent};
use crate::text::Text;

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

static FORMATS: [Format; 9] = [QCOW2, RAW, QCOW, LUKS, VDI, VPC, PARALLELS, vhdx::VHDX, vmdk::VMDK];

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
    make: |shape, purpose| new_qcow(shape, purpose).map(NewDisk::Format),
    measure: |shape, purpose| new_qcow(shape, purpose).map(MeasureTarget::Format),
};

fn new_qcow(shape: &Shape, purpose: Purpose<'_>) -> Result<Arc<dyn NewImage>> {
    let backing = shape.backing_file.clone().map(Text::into_bytes);
    Ok(Arc::new(NewQcow1::new(purpose.size, backing)?))
}

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
        let seen = found.header.map(|_| Seen {
            virtual_size: found.virtual_size.unwrap_or_default(),
            encryption: Some("luks"),
            ..Seen::default()
        });
        Ok(Inspected::of_other(seen, None, &found.findings))
    },
    make: |shape, purpose| {
        let encryption = purpose.needed_encryption()?;
        let image = encryption.new_luks(purpose.size, shape.preallocation(), purpose.job)?;
        Ok(NewDisk::Format(Arc::new(image)))
    },
    // Without the key that a new image makes.
    measure: |_, purpose| purpose.needed_encryption()?.header_length().map(MeasureTarget::Behind),
};

const VDI: Format = Format {
    name: "vdi",
    plain: false,
    open: |files, options| Ok(Box::new(qcow2_vdi::open(files.own, &block_options(options))?)),
    inspect: |image, options| {
        let options = block_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_vdi::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_vdi::inspect_bytes(bytes, None, &options),
        };
        let seen = found.header.map(|header| Seen {
            virtual_size: header.virtual_size(),
            cluster_size: Some(header.block_size.into()),
            ..Seen::default()
        });
        Ok(Inspected::of_other(seen, None, &found.findings))
    },
    make: |shape, purpose| new_vdi(shape, shape.parent()?, purpose).map(NewDisk::Format),
    measure: |shape, purpose| new_vdi(shape, None, purpose).map(MeasureTarget::Format),
};

fn new_vdi(
    shape: &Shape,
    parent: Option<StoredParent<'_>>,
    purpose: Purpose<'_>,
) -> Result<Arc<dyn NewImage>> {
    let is_static = shape.flag("static").unwrap_or(false);
    if let Some((_, id)) = parent {
        let id = qcow2_vdi::ParentId::parse(id);
        let id = id.ok_or_else(|| unknown_parent("vdi"))?;
        return Ok(Arc::new(NewVdi::child(purpose.size, is_static, shape.preallocation(), id)?));
    }
    Ok(Arc::new(NewVdi::new(purpose.size, is_static, shape.preallocation())?))
}

const VPC: Format = Format {
    name: "vpc",
    plain: false,
    open: |files, options| qcow2_vpc::open(files.own, &block_options(options)),
    inspect: |image, options| {
        let options = block_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_vpc::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_vpc::inspect_bytes(bytes, None, &options),
        };
        let cluster_size = found.header.map(|header| header.block_size().into());
        let seen = found.footer.map(|footer| Seen {
            virtual_size: footer.virtual_size(),
            cluster_size,
            ..Seen::default()
        });
        Ok(Inspected::of_other(seen, found.backing_file.as_deref(), &found.findings))
    },
    make: |shape, purpose| new_vpc(shape, shape.parent()?, purpose).map(NewDisk::Format),
    measure: |shape, purpose| new_vpc(shape, None, purpose).map(MeasureTarget::Format),
};

fn new_vpc(
    shape: &Shape,
    parent: Option<StoredParent<'_>>,
    purpose: Purpose<'_>,
) -> Result<Arc<dyn NewImage>> {
    // TypeScript has checked it.
    let preset = match shape.word("preset") {
        Some("azure") => Some(Preset::Azure),
        Some("xenserver") => Some(Preset::XenServer),
        _ => None,
    };
    let subformat = match shape.word("subformat") {
        Some("fixed") => Subformat::Fixed,
        Some(_) => Subformat::Dynamic,
        None => preset.map_or_else(Subformat::default, Preset::subformat),
    };
    let parent = match parent {
        None => None,
        Some((filename, id)) => {
            let id = ParentId::parse(id).ok_or_else(|| unknown_parent("vpc"))?;
            let changed = shape.number("parentChanged").map(since_2000);
            // A file that was copied with its times can be older than it says itself.
            let changed = changed.unwrap_or_default().max(id.time_stamp);
            Some(Parent { filename, id, changed })
        }
    };
    qcow2_vpc::new_vpc(NewOptions {
        size: purpose.size,
        subformat,
        force_size: shape.flag("forceSize").unwrap_or(false),
        preallocation: shape.preallocation(),
        parent,
        preset,
    })
}

/// A time in seconds since 1970, as VHD counts.
fn since_2000(seconds: u64) -> u32 {
    u32::try_from(seconds.saturating_sub(946_684_800)).unwrap_or(0)
}

const PARALLELS: Format = Format {
    name: "parallels",
    plain: false,
    open: |files, options| qcow2_parallels::open_any(files.own, &block_options(options)),
    inspect: |image, options| {
        let options = block_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_parallels::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_parallels::inspect_bytes(bytes, None, &options),
        };
        let cluster_size = found.header.as_ref().map(|header| header.cluster_size());
        let size = found.bundle.map(|bundle| bundle.size);
        let seen = size.or(found.header.map(|header| header.virtual_size())).map(|virtual_size| Seen {
            virtual_size,
            cluster_size,
            ..Seen::default()
        });
        Ok(Inspected::of_other(seen, None, &found.findings))
    },
    make: |shape, purpose| new_parallels(shape, purpose).map(NewDisk::Format),
    measure: |shape, purpose| new_parallels(shape, purpose).map(MeasureTarget::Format),
};

fn new_parallels(shape: &Shape, purpose: Purpose<'_>) -> Result<Arc<dyn NewImage>> {
    let cluster_size = shape.cluster_size.map_or(DEFAULT_CLUSTER_SIZE, |size| size as u64);
    Ok(Arc::new(NewParallels::new(purpose.size, cluster_size)?))
}

/// Of a format of equal blocks.
fn block_options(OpenOptions { limits, l2_cache_bytes, .. }: &OpenOptions) -> blocks::OpenOptions {
    blocks::OpenOptions {
        max_virtual_size: limits.max_virtual_size,
        max_metadata_bytes: limits.max_metadata_bytes,
        cache_bytes: *l2_cache_bytes,
    }
}

/// What TypeScript got of a backing file is what its layer says.
fn unknown_parent(format: &str) -> Error {
    Error::new(ErrorKind::Internal, format!("what is known of the backing file is none of a {format} image"))
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

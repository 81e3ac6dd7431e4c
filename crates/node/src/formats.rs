//! The formats that layers are opened in, in one table. What each can do besides is `src/formats/table.ts`.

use std::any::Any;
use std::sync::Arc;

use qcow2_engine::inspect::{inspect, inspect_bytes};
use qcow2_engine::{Layer, LayerExt, MemMut, OpenOptions, Qcow2, Raw, Result, Storage, StorageExt};
use qcow2_qcow1::Qcow1;
use qcow2_qcow1::format::CryptMethod;

use crate::info::encryption_name;
use crate::inspect::Inspected;

/// Bytes of a file that tell its format.
const HEAD: usize = 8;

/// Opens a layer on a file.
type Opener = fn(Arc<dyn Storage>, &OpenOptions) -> Result<Box<dyn Layer>>;

/// One format.
pub(crate) struct Format {
    /// QEMU's name.
    name: &'static str,
    /// The file is the disk: it has no metadata of its own that nobody may change meanwhile.
    pub(crate) plain: bool,
    /// Opens a layer. What an option means that the format does not have is nothing.
    open: Opener,
    /// Whether these are the first bytes of its files. Never for one that any file can be.
    is: fn(&[u8]) -> bool,
    /// Says what the image claims.
    inspect: fn(&Untrusted<'_>, &OpenOptions) -> Result<Inspected>,
}

const QCOW_MAGIC: &[u8] = b"QFI\xfb";
const QCOW_VERSION_1: &[u8] = b"QFI\xfb\0\0\0\x01";

static FORMATS: [Format; 3] = [QCOW2, RAW, QCOW];

/// Version 1 is another format of the same magic; an unknown version is this one's to refuse.
const QCOW2: Format = Format {
    name: "qcow2",
    plain: false,
    open: |storage, options| Ok(Box::new(Qcow2::open(storage, options)?)),
    is: |head| head.starts_with(QCOW_MAGIC) && !head.starts_with(QCOW_VERSION_1),
    inspect: |image, OpenOptions { limits, .. }| {
        let found = match image {
            Untrusted::File(storage) => inspect(*storage, limits)?,
            Untrusted::Bytes(bytes) => inspect_bytes(bytes, None, limits),
        };
        Ok(Inspected::of_qcow2(&found))
    },
};

const RAW: Format = Format {
    name: "raw",
    plain: true,
    open: |storage, _| Ok(Box::new(Raw::new(storage)?)),
    is: |_| false,
    inspect: QCOW2.inspect,
};

const QCOW: Format = Format {
    name: "qcow",
    plain: false,
    open: |storage, options| Ok(Box::new(Qcow1::open(storage, &qcow_options(options))?)),
    is: |head| head.starts_with(QCOW_VERSION_1),
    inspect: |image, options| {
        let options = qcow_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_qcow1::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_qcow1::inspect_bytes(bytes, None, &options),
        };
        Ok(Inspected::of_qcow(&found))
    },
};

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

impl Untrusted<'_> {
    fn head(&self) -> Result<Vec<u8>> {
        let mut head = vec![0; HEAD];
        let got = match self {
            Self::File(storage) => storage.read_up_to_at(MemMut::from(&mut head[..]), 0)?,
            Self::Bytes(bytes) => {
                let bytes = bytes.get(..HEAD).unwrap_or(bytes);
                head = bytes.to_vec();
                bytes.len()
            }
        };
        head.truncate(got);
        Ok(head)
    }
}

impl Format {
    /// The format with this name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        FORMATS.iter().find(|format| format.name == name)
    }

    /// Opens a layer of it.
    ///
    /// # Errors
    /// As the format's own type.
    pub(crate) fn open(&self, storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Layer>> {
        (self.open)(storage, options)
    }
}

/// Says what an image claims. Bytes without the magic of a format are judged as the commonest one's.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub(crate) fn inspect_untrusted(image: &Untrusted<'_>, options: &OpenOptions) -> Result<Inspected> {
    let head = image.head()?;
    let known = FORMATS.iter().find(|format| (format.is)(&head));
    let format = known.map(|format| format.name.to_owned());
    let inspect = known.map_or(QCOW2.inspect, |format| format.inspect);
    Ok(Inspected { format, ..inspect(image, options)? })
}

/// How the guest data of a layer is encrypted, by QEMU's name.
pub(crate) fn encryption(layer: &dyn Layer) -> Option<&'static str> {
    if let Some(qcow2) = layer.as_qcow2() {
        return encryption_name(qcow2.header().crypt_method);
    }
    let qcow: &Qcow1 = (layer as &dyn Any).downcast_ref()?;
    (qcow.header().crypt_method == CryptMethod::Aes).then_some("aes")
}

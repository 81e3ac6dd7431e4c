//! The formats that layers are opened in, in one table. What each can do besides is `src/formats/table.ts`.

use std::sync::Arc;

use qcow2_engine::inspect::{inspect, inspect_bytes};
use qcow2_engine::{Layer, OpenOptions, Qcow2, Raw, Result, Storage};
use qcow2_qcow1::Qcow1;

use crate::inspect::Inspected;

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
    /// Says what an image claims that is judged as one of this format.
    inspect: fn(&Untrusted<'_>, &OpenOptions) -> Result<Inspected>,
}

static FORMATS: [Format; 3] = [QCOW2, RAW, QCOW];

const QCOW2: Format = Format {
    name: "qcow2",
    plain: false,
    open: |storage, options| Ok(Box::new(Qcow2::open(storage, options)?)),
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
    inspect: QCOW2.inspect,
};

const QCOW: Format = Format {
    name: "qcow",
    plain: false,
    open: |storage, options| Ok(Box::new(Qcow1::open(storage, &qcow_options(options))?)),
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
    pub(crate) fn open(&self, storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Layer>> {
        (self.open)(storage, options)
    }

    /// Says what an image claims that is judged as one of this format.
    ///
    /// # Errors
    /// `Io`. What is wrong with the image is a finding.
    pub(crate) fn inspect(&self, image: &Untrusted<'_>, options: &OpenOptions) -> Result<Inspected> {
        (self.inspect)(image, options)
    }
}

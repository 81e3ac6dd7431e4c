//! The shape of a new image, as JavaScript says it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use napi::bindgen_prelude::Either3;
use napi_derive::napi;
use qcow2_engine::create::{Backing, CreateOptions, DataFile, Preallocation};
use qcow2_engine::encryption::Encryption;
use qcow2_engine::files::NewDisk;
use qcow2_engine::format::CompressionType;
use qcow2_engine::measure::{MeasureTarget, Qcow2Target};
use qcow2_engine::{Error, ErrorKind, Job, Result};

use crate::encryption::EncryptOptions;
use crate::formats::Format;
use crate::text::Text;

/// Options of a new image. Names were checked in TypeScript; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct Shape {
    /// QEMU's name of one that new images are made in.
    pub format: String,
    /// 2 or 3.
    pub version: Option<u32>,
    /// Bytes.
    pub cluster_size: Option<f64>,
    /// Subclusters.
    pub extended_l2: Option<bool>,
    /// `zlib` or `zstd`.
    pub compression_type: Option<String>,
    /// `off`, `metadata`, `falloc` or `full`.
    pub preallocation: Option<String>,
    /// Bits.
    pub refcount_bits: Option<u32>,
    /// Postponed refcounts.
    pub lazy_refcounts: Option<bool>,
    /// Name as it is stored.
    pub backing_file: Option<Text>,
    /// Format as it is stored.
    pub backing_format: Option<Text>,
    /// Name as it is stored.
    pub data_file: Option<Text>,
    /// The file that this name means.
    pub data_path: Option<Text>,
    /// Readable on its own.
    pub data_file_raw: Option<bool>,
    /// The data file exists, and keeps its bytes.
    pub keep_data_file: Option<bool>,
    /// Encrypted.
    pub encrypt: Option<EncryptOptions>,
    /// What only some formats have, by its name in the API.
    pub options: Option<HashMap<String, Either3<bool, f64, String>>>,
}

/// The name of a backing file, and by what a format knows it again.
pub(crate) type StoredParent<'a> = (Vec<u8>, &'a str);

/// What a new image is made for.
#[derive(Clone, Copy)]
pub(crate) struct Purpose<'a> {
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// The image's file, where it is one with a name.
    pub(crate) path: Option<&'a Path>,
    /// How it is encrypted.
    pub(crate) encryption: Option<&'a Encryption>,
    /// Deriving a key takes long.
    pub(crate) job: &'a Job,
}

impl Shape {
    /// Takes what says how the disk is encrypted: its secret is JavaScript's memory.
    pub(crate) fn take_encryption(&mut self) -> napi::Result<Option<Encryption>> {
        self.encrypt.take().map(EncryptOptions::into_encryption).transpose()
    }

    /// A new disk.
    ///
    /// # Errors
    /// Those of its format.
    pub(crate) fn new_disk(&self, purpose: Purpose<'_>) -> Result<NewDisk> {
        (self.format()?.make)(self, purpose)
    }

    /// What a measurement needs of it.
    ///
    /// # Errors
    /// Those of its format.
    pub(crate) fn measure_target(&self, purpose: Purpose<'_>) -> Result<MeasureTarget> {
        (self.format()?.measure)(self, purpose)
    }

    fn format(&self) -> Result<&'static Format> {
        Format::named(&self.format).map_err(|e| Error::new(ErrorKind::Internal, e.reason.clone()))
    }

    /// An option of some formats that is a word.
    pub(crate) fn word(&self, name: &str) -> Option<&str> {
        match self.options.as_ref()?.get(name)? {
            Either3::C(word) => Some(word),
            _ => None,
        }
    }

    /// The backing file of an image that is made; where one is only measured, nobody has looked at it.
    ///
    /// # Errors
    /// `Internal` where nothing is known of it: TypeScript looks at it before.
    pub(crate) fn parent(&self) -> Result<Option<StoredParent<'_>>> {
        let Some(filename) = &self.backing_file else { return Ok(None) };
        let id = self.word("parentId");
        let id = id.ok_or_else(|| Error::new(ErrorKind::Internal, "nothing is known of the backing file"))?;
        Ok(Some((filename.clone().into_bytes(), id)))
    }

    /// An option of some formats that is a number.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        match self.options.as_ref()?.get(name)? {
            Either3::B(number) => Some(*number as u64),
            _ => None,
        }
    }

    /// An option of some formats that is set or not.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        match self.options.as_ref()?.get(name)? {
            Either3::A(flag) => Some(*flag),
            _ => None,
        }
    }

    /// The engine's options for a qcow2 image of `size` bytes, with the key that the encryption makes: that takes as long as a guess of
    /// the secret shall take.
    ///
    /// # Errors
    /// Those of [`CreateOptions::validate`] and [`Encryption::door`].
    pub(crate) fn encrypted(
        &self,
        size: u64,
        encryption: Option<&Encryption>,
        job: &Job,
    ) -> Result<CreateOptions> {
        let options = self.qcow2_options(size);
        let Some(encryption) = encryption else { return Ok(options) };
        // What contradicts itself is refused first.
        options.validate()?;
        Ok(CreateOptions { data_door: Some(encryption.door(job)?), ..options })
    }

    /// Where the external data file goes, if there is to be one.
    pub(crate) fn data_path(&self) -> Option<PathBuf> {
        self.data_path.clone().and_then(|path| path.into_path().ok())
    }

    /// What to allocate.
    pub(crate) fn preallocation(&self) -> Preallocation {
        to_preallocation(self.preallocation.as_deref())
    }

    /// The engine's options for a qcow2 image of `size` bytes.
    fn qcow2_options(&self, size: u64) -> CreateOptions {
        let defaults = CreateOptions::default();
        CreateOptions {
            size,
            version: self.version.unwrap_or(defaults.version),
            cluster_size: self.cluster_size.map_or(defaults.cluster_size, |size| size as u64),
            extended_l2: self.extended_l2.unwrap_or(defaults.extended_l2),
            refcount_bits: self.refcount_bits.unwrap_or(defaults.refcount_bits),
            lazy_refcounts: self.lazy_refcounts.unwrap_or(defaults.lazy_refcounts),
            compression_type: match self.compression_type.as_deref() {
                Some("zstd") => CompressionType::Zstd,
                _ => CompressionType::Zlib,
            },
            preallocation: self.preallocation(),
            backing: self.backing_file.as_ref().map(|filename| Backing {
                filename: filename.clone().into_bytes(),
                format: self.backing_format.clone().map(Text::into_bytes),
            }),
            keep_data_file: self.keep_data_file.unwrap_or(defaults.keep_data_file),
            data_file: self.data_file.as_ref().map(|filename| DataFile {
                filename: filename.clone().into_bytes(),
                raw: self.data_file_raw.unwrap_or(false),
            }),
            data_door: None,
        }
    }

    /// What decides the size of a qcow2 image.
    ///
    /// # Errors
    /// As `CreateOptions::validate`.
    pub(crate) fn qcow2_target(&self, encryption: Option<&Encryption>) -> Result<Qcow2Target> {
        let options = self.qcow2_options(0);
        options.validate()?;
        let crypto_header = encryption.map_or(Ok(0), Encryption::header_length)?;
        Ok(Qcow2Target { crypto_header, ..Qcow2Target::from_options(&options)? })
    }
}

impl<'a> Purpose<'a> {
    /// How an image is encrypted that is not made otherwise; TypeScript has checked it.
    ///
    /// # Errors
    /// `InvalidArgument` where nothing is said.
    pub(crate) fn needed_encryption(&self) -> Result<&'a Encryption> {
        self.encryption.ok_or_else(|| {
            let message = "the image needs the option encrypt";
            Error::new(ErrorKind::InvalidArgument, message).with_field("encrypt")
        })
    }
}

/// A preallocation mode by its name; TypeScript has checked it.
pub(crate) fn to_preallocation(name: Option<&str>) -> Preallocation {
    match name {
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        _ => Preallocation::Off,
    }
}

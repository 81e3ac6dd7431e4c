//! The shape of a new image, as JavaScript says it.

use std::path::PathBuf;

use napi_derive::napi;
use qcow2_engine::create::{Backing, CreateOptions, DataFile, Preallocation};
use qcow2_engine::encryption::Encryption;
use qcow2_engine::files::NewDisk;
use qcow2_engine::format::CompressionType;
use qcow2_engine::measure::{MeasureTarget, Qcow2Target};
use qcow2_engine::{Error, ErrorKind, Job, Result};

use crate::encryption::EncryptOptions;
use crate::text::Text;

/// Options of a new image. Names were checked in TypeScript; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct Shape {
    /// `qcow2`, `raw` or `luks`.
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
}

impl Shape {
    /// Takes what says how the disk is encrypted: its secret is JavaScript's memory.
    pub(crate) fn take_encryption(&mut self) -> napi::Result<Option<Encryption>> {
        self.encrypt.take().map(EncryptOptions::into_encryption).transpose()
    }

    /// A new disk of `size` bytes. Makes its key, see [`Shape::encrypted`].
    ///
    /// # Errors
    /// As [`Shape::encrypted`].
    pub(crate) fn new_disk(&self, size: u64, encryption: Option<&Encryption>, job: &Job) -> Result<NewDisk> {
        if self.is_raw() {
            return Ok(NewDisk::Raw { size, preallocation: self.preallocation() });
        }
        if self.is_luks() {
            let luks = required(encryption)?.new_luks(job)?;
            return Ok(NewDisk::Luks { size, luks, preallocation: self.preallocation() });
        }
        let create = self.encrypted(size, encryption, job)?;
        Ok(NewDisk::Qcow2 { create: Box::new(create), data_path: self.data_path() })
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
        let options = self.options(size);
        let Some(encryption) = encryption else { return Ok(options) };
        // What contradicts itself is refused first.
        options.validate()?;
        Ok(CreateOptions { data_door: Some(encryption.door(job)?), ..options })
    }

    /// Where the external data file goes, if there is to be one.
    fn data_path(&self) -> Option<PathBuf> {
        self.data_path.clone().and_then(|path| path.into_path().ok())
    }

    /// Whether a raw image is wanted.
    pub(crate) fn is_raw(&self) -> bool {
        self.format == "raw"
    }

    /// Whether a LUKS file is wanted.
    fn is_luks(&self) -> bool {
        self.format == "luks"
    }

    /// What to allocate.
    pub(crate) fn preallocation(&self) -> Preallocation {
        to_preallocation(self.preallocation.as_deref())
    }

    /// The engine's options for a qcow2 image of `size` bytes.
    fn options(&self, size: u64) -> CreateOptions {
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

    /// What a measurement needs of it.
    ///
    /// # Errors
    /// As `CreateOptions::validate`.
    pub(crate) fn measure_target(&self, encryption: Option<&Encryption>) -> Result<MeasureTarget> {
        if self.is_raw() {
            return Ok(MeasureTarget::Raw);
        }
        if self.is_luks() {
            return Ok(MeasureTarget::Luks(required(encryption)?.header_length()?));
        }
        let options = self.options(0);
        options.validate()?;
        let crypto_header = encryption.map_or(Ok(0), Encryption::header_length)?;
        Ok(MeasureTarget::Qcow2(Qcow2Target { crypto_header, ..Qcow2Target::from_options(&options)? }))
    }
}

/// What a format does not go without; TypeScript has checked it.
fn required(encryption: Option<&Encryption>) -> Result<&Encryption> {
    encryption.ok_or_else(|| {
        let message = "a luks image needs the option encrypt";
        Error::new(ErrorKind::InvalidArgument, message).with_field("encrypt")
    })
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

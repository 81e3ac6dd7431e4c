//! Encryption of guest data: from a secret to the door that it opens.
//!
//! LUKS: the header lies where the extension says, its places are relative to its start, and sectors are counted in the file that holds the
//! guest data. Legacy AES: there is no header, and sectors are those of the guest. Spec: "Full disk encryption header pointer",
//! `crypt_method`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use qcow2_core::space::Preallocation;
use qcow2_format::{CryptMethod, Header, HostOffset};
use qcow2_luks::{
    Cipher, CipherSpec, Cost, FormatOptions, Formatted, Hash, Iv, Limits, Luks1Header, Mode, NewLuks,
    legacy_aes, luks1,
};
use zeroize::Zeroizing;

use crate::door::DataDoor;
use crate::storage::{Access, FileStorage, SectorCodec, Sectors};
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// Most bytes of a secret in a file: `cryptsetup`'s limit.
const MAX_SECRET: u64 = 8 << 20;

/// What opens an encrypted image. It is overwritten when it is dropped, and never shown.
#[derive(Clone)]
pub struct Secret(Source);

#[derive(Clone)]
enum Source {
    Bytes(Zeroizing<Vec<u8>>),
    File(PathBuf),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Source::Bytes(Zeroizing::new(bytes)))
    }

    /// All bytes of a file, which is read when it is needed.
    pub fn in_file(path: PathBuf) -> Self {
        Self(Source::File(path))
    }

    /// The secret.
    ///
    /// # Errors
    /// Those of reading the file; `Limit` for one that is longer than 8 MiB.
    pub fn read(&self) -> Result<Zeroizing<Vec<u8>>> {
        let path = match &self.0 {
            Source::Bytes(bytes) => return Ok(bytes.clone()),
            Source::File(path) => path,
        };
        let file = FileStorage::open(path, Access::ReadOnly)?;
        let length = file.size()?;
        if length > MAX_SECRET {
            let message = format!("a secret of {length} bytes is longer than the limit of {MAX_SECRET}");
            return Err(Error::new(ErrorKind::Limit, message).with_field("secret").with_path(path));
        }
        let mut bytes = Zeroizing::new(vec![0; length as usize]);
        file.read_exact_at(MemMut::from(&mut bytes[..]), 0)?;
        Ok(bytes)
    }
}

/// How a new image is encrypted, by QEMU's names. What is absent has QEMU's default.
#[derive(Debug, Clone)]
pub struct Encryption {
    /// What opens the image.
    pub secret: Secret,
    /// Legacy AES instead of LUKS. It is weak, and nothing of the rest can be chosen.
    pub legacy_aes: bool,
    /// `aes-256`.
    pub cipher_alg: Option<String>,
    /// `xts`.
    pub cipher_mode: Option<String>,
    /// `plain64`.
    pub ivgen_alg: Option<String>,
    /// Hash of `essiv`: `sha256`.
    pub ivgen_hash_alg: Option<String>,
    /// `sha256`.
    pub hash_alg: Option<String>,
    /// Milliseconds that a guess of the secret takes: 2000.
    pub iter_time_ms: Option<u32>,
    /// Take a combination that is known to be weak.
    pub allow_weak: bool,
}

impl Encryption {
    /// LUKS as QEMU makes it where nothing is said.
    pub fn luks(secret: Secret) -> Self {
        Self {
            secret,
            legacy_aes: false,
            cipher_alg: None,
            cipher_mode: None,
            ivgen_alg: None,
            ivgen_hash_alg: None,
            hash_alg: None,
            iter_time_ms: None,
            allow_weak: false,
        }
    }

    /// A new key behind a door, with the encryption header of the image that it is for. Takes as long as a guess takes.
    ///
    /// # Errors
    /// `InvalidArgument` or `UnsupportedFeature` for names that do not go together; `Aborted`; those of [`Secret::read`].
    pub fn door(&self, job: &Job) -> Result<Arc<dyn DataDoor>> {
        if self.legacy_aes {
            return self.aes_door();
        }
        let formatted = self.format(job)?;
        Ok(Arc::new(LuksDoor { codec: Arc::new(formatted.cipher), header: Some(formatted.bytes) }))
    }

    /// A LUKS file for a disk of `size` bytes, with a new key. Takes as long as a guess takes.
    ///
    /// # Errors
    /// As [`Encryption::door`]; `Limit`.
    pub fn new_luks(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<NewLuks> {
        NewLuks::new(self.format(job)?, size, preallocation)
    }

    fn format(&self, job: &Job) -> Result<Formatted> {
        let secret = self.secret.read()?;
        let mut options = FormatOptions::new(&secret);
        options.spec = self.spec()?;
        options.hash = self.hash_alg.as_deref().map_or(Ok(options.hash), |name| hash("hash-alg", name))?;
        options.allow_weak = self.allow_weak;
        if let Some(time) = self.iter_time_ms {
            options.cost = Cost::Time(Duration::from_millis(time.into()));
        }
        luks1::format(&options, job)
    }

    fn aes_door(&self) -> Result<Arc<dyn DataDoor>> {
        if !self.allow_weak {
            let message = "legacy AES is weak, its key is the secret itself: take luks, or allow weak encryption (allowWeak)";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("encrypt.format"));
        }
        let names =
            [&self.cipher_alg, &self.cipher_mode, &self.ivgen_alg, &self.ivgen_hash_alg, &self.hash_alg];
        if names.iter().any(|name| name.is_some()) || self.iter_time_ms.is_some() {
            let message = "ciphers, hashes and iteration times are those of luks: legacy AES has one of each";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("encrypt.format"));
        }
        Ok(Arc::new(AesDoor { codec: Arc::new(legacy_aes(&self.secret.read()?)?) }))
    }

    /// Bytes of the encryption header. The secret does not matter.
    ///
    /// # Errors
    /// As [`Encryption::door`], for names.
    pub fn header_length(&self) -> Result<u64> {
        if self.legacy_aes {
            return Ok(0);
        }
        Ok(FormatOptions { spec: self.spec()?, ..FormatOptions::new(&[]) }.length())
    }

    fn spec(&self) -> Result<CipherSpec> {
        let defaults = CipherSpec::default();
        let cipher = named(self.cipher_alg.as_deref(), "cipher-alg", Cipher::from_name)?;
        let mode =
            named(self.cipher_mode.as_deref(), "cipher-mode", Mode::from_name)?.unwrap_or(defaults.mode);
        // The hash of essiv is the key's, where none is named.
        let of_essiv =
            self.ivgen_hash_alg.as_deref().map_or(Ok(Hash::Sha256), |name| hash("ivgen-hash-alg", name))?;
        let iv = match (self.ivgen_alg.as_deref(), mode) {
            (_, Mode::Ecb) => Iv::None,
            (Some("plain"), _) => Iv::Plain,
            (Some("plain64"), _) => Iv::Plain64,
            (Some("essiv"), _) => Iv::Essiv(of_essiv),
            (Some(other), _) => return Err(unknown("ivgen-alg", other)),
            (None, Mode::Cbc) => Iv::Essiv(of_essiv),
            (None, _) => defaults.iv,
        };
        Ok(CipherSpec { cipher: cipher.unwrap_or(defaults.cipher), mode, iv })
    }
}

fn named<T>(name: Option<&str>, field: &'static str, of_name: fn(&str) -> Option<T>) -> Result<Option<T>> {
    name.map(|name| of_name(name).ok_or_else(|| unknown(field, name))).transpose()
}

fn hash(field: &'static str, name: &str) -> Result<Hash> {
    Hash::from_name(name).ok_or_else(|| unknown(field, name))
}

fn unknown(field: &'static str, name: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("'{name}' is not known")).with_field(field)
}

/// The door to the guest data of the image in `storage`; `None` where that is not encrypted.
///
/// # Errors
/// As [`Layer::unlock`](crate::Layer::unlock).
pub(crate) fn door_of(
    storage: &Arc<dyn Storage>,
    header: &Header,
    secret: &[u8],
    job: &Job,
) -> Result<Option<Arc<dyn DataDoor>>> {
    if header.crypt_method == CryptMethod::Aes {
        return Ok(Some(Arc::new(AesDoor { codec: Arc::new(legacy_aes(secret)?) })));
    }
    let Some(area) = LuksArea::of(&**storage, header) else { return Ok(None) };
    let open = || luks1::unlock(&area.header()?, secret, &area.reader(), job, &Limits::default());
    let codec = Arc::new(open().map_err(|e| area.located(e))?.cipher);
    Ok(Some(Arc::new(LuksDoor { codec, header: None })))
}

/// The part of an image's file that has its LUKS header and key material. The image's own header says where, and is not believed
/// further than that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LuksArea<'a> {
    storage: &'a dyn Storage,
    start: HostOffset,
    length: u64,
}

impl<'a> LuksArea<'a> {
    /// That of the image in `storage`, if it is encrypted with LUKS: then its header has a place of it.
    pub(crate) fn of(storage: &'a dyn Storage, header: &Header) -> Option<Self> {
        let (start, length) = header.crypto_header().filter(|_| header.crypt_method == CryptMethod::Luks)?;
        Some(Self { storage, start, length })
    }

    /// Where `length` bytes at an offset from the LUKS header's start lie in the file.
    ///
    /// # Errors
    /// `Corrupt` for what is not inside: see [`Self::located`].
    pub(crate) fn place(&self, offset: u64, length: u64) -> Result<u64> {
        let end = offset.checked_add(length).filter(|end| *end <= self.length);
        end.and(self.start.get().checked_add(offset)).ok_or_else(|| {
            let message = format!("{length} bytes at {offset} are behind the end of the encryption header");
            Error::new(ErrorKind::Corrupt, message).with_field("encryption header").with_offset(offset)
        })
    }

    /// An error whose offset counts from the LUKS header's start, unless it is of reading the file, as one of the file.
    pub(crate) fn located(&self, error: Error) -> Error {
        let own = error.path().is_none() && error.kind() != ErrorKind::Io;
        self.storage.located(if own { error.offset_from(self.start.get()) } else { error })
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let place = self.place(offset, bytes.len() as u64)?;
        self.storage.read_exact_at(MemMut::from(bytes), place)
    }

    /// Reads bytes at offsets from the LUKS header's start.
    pub(crate) fn reader(&self) -> impl Fn(u64, &mut [u8]) -> Result<()> {
        |offset, bytes| self.read(offset, bytes)
    }

    /// The LUKS header as it is in the file now.
    ///
    /// # Errors
    /// As [`Luks1Header::parse`], and those of reading: see [`Self::located`].
    pub(crate) fn header(&self) -> Result<Luks1Header> {
        let mut header = [0; luks1::HEADER_BYTES];
        self.read(0, &mut header)?;
        Luks1Header::parse(&header).map_err(|e| match e.field() {
            // The image has a field of that name, which is not meant.
            Some("magic") => Error::new(e.kind(), e.message()).with_field("encryption header").with_offset(0),
            _ => e.with_offset(0),
        })
    }
}

/// Guest data behind the cipher of a LUKS header.
#[derive(Debug)]
struct LuksDoor {
    codec: Arc<dyn SectorCodec>,
    /// The header of a new image.
    header: Option<Vec<u8>>,
}

impl DataDoor for LuksDoor {
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(host, Arc::clone(&self.codec)))
    }

    fn crypto_header(&self) -> Option<&[u8]> {
        self.header.as_deref()
    }
}

/// Guest data behind legacy AES.
#[derive(Debug)]
struct AesDoor {
    codec: Arc<dyn SectorCodec>,
}

impl DataDoor for AesDoor {
    /// The guest's sectors are the file's in an external data file.
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(host, Arc::clone(&self.codec)))
    }

    fn by_guest(&self) -> Option<&Arc<dyn SectorCodec>> {
        Some(&self.codec)
    }
}

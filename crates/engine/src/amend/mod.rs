//! Changing the options of an existing image: version, refcount width, lazy refcounts, the external data file's name
//! and mode. Works on the file alone, which nobody else may have open.
//!
//! All is judged before anything is written. Each change is complete and durable before the next: a crash leaves the
//! image with some of the changes, each whole, and leaked clusters at worst. Everything unknown in the header is kept.

pub(crate) mod publish;
mod version;

use qcow2_format::header::extension::Extension;
use qcow2_format::header::feature::{Autoclear, Compatible, Incompatible};
use qcow2_format::{Geometry, Header};

use self::version::refused;
use crate::check::{self, CheckOptions, Repair, restructure};
use crate::image::read_header;
use crate::invalid::invalid;
use crate::{Error, ErrorKind, Job, Result, Storage, StorageExt};

/// What to change; `None` keeps what is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// 2 or 3.
    pub version: Option<u32>,
    /// Width of refcounts in bits: 1, 2, 4 … 64.
    pub refcount_bits: Option<u32>,
    /// Whether other programs may postpone refcount updates. This library never does.
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file, for an image that has one; empty for none.
    pub data_file: Option<Vec<u8>>,
    /// Whether the external data file is a raw image on its own: can only be given up.
    pub data_file_raw: Option<bool>,
    /// The backing file and its format cannot be amended: they are only compared with what is. See rebase.
    pub backing_file: Option<Vec<u8>>,
    /// See `backing_file`.
    pub backing_format: Option<Vec<u8>>,
}

/// Changes the image in `storage` as `options` say.
///
/// # Errors
/// `ReadOnly`; `InvalidArgument` for a change that the format or the image does not allow; `Corrupt` for an image that
/// is marked corrupt or, where tables are rewritten, not sound; `Limit` for refcounts that do not fit; `UnsupportedFeature` for what
/// needs guest data to be encrypted; `Io`.
pub fn amend(storage: &dyn Storage, options: &AmendOptions, limits: &CheckOptions, job: &Job) -> Result<()> {
    amend_through(storage, None, options, limits, job)
}

/// As [`amend`], where guest bytes are not stored as they are: they are written through `data`, see
/// [`crate::Qcow2::data_storage`].
///
/// # Errors
/// As [`amend`].
pub fn amend_through(
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    options: &AmendOptions,
    limits: &CheckOptions,
    job: &Job,
) -> Result<()> {
    if !storage.traits().writable {
        let message = "the file is open for reading only: it cannot be amended";
        return Err(storage.located(Error::new(ErrorKind::ReadOnly, message)));
    }
    let mut header = read_header(storage)?;
    let plan = Plan::new(options, &header).map_err(|e| storage.located(e))?;
    if header.incompatible.contains(Incompatible::CORRUPT) {
        let message = "the image is marked corrupt: repair it before it is amended";
        return Err(storage.located(Error::new(ErrorKind::Corrupt, message)));
    }
    if header.incompatible.contains(Incompatible::DIRTY) {
        check::repair(storage, Repair::All, limits, job)?;
        header = read_header(storage)?;
        if header.incompatible.contains(Incompatible::DIRTY) {
            let message = "the image was not closed cleanly and could not be repaired";
            return Err(storage.located(Error::new(ErrorKind::Corrupt, message)));
        }
    }
    if plan.version > header.version {
        version::upgrade(storage, limits, job)?;
    }
    if plan.refcount_bits != header.geometry.refcount_bits() {
        change_width(storage, plan.refcount_bits, limits, job)?;
    }
    plan.fields(storage)?;
    if plan.version < header.version {
        version::downgrade(storage, data, limits, job)?;
    }
    Ok(())
}

/// What is to be, with everything that was not named as it is.
struct Plan<'a> {
    options: &'a AmendOptions,
    version: u32,
    refcount_bits: u32,
    lazy_refcounts: bool,
}

impl<'a> Plan<'a> {
    fn new(options: &'a AmendOptions, header: &Header) -> Result<Self> {
        let plan = Self {
            options,
            version: options.version.unwrap_or(header.version),
            refcount_bits: options.refcount_bits.unwrap_or(header.geometry.refcount_bits()),
            lazy_refcounts: options
                .lazy_refcounts
                .unwrap_or(header.compatible.contains(Compatible::LAZY_REFCOUNTS)),
        };
        plan.validate(header)?;
        Ok(plan)
    }

    fn validate(&self, header: &Header) -> Result<()> {
        let Self { options, version, refcount_bits, .. } = *self;
        if !(2..=3).contains(&version) {
            return Err(refused("version", format!("there is no version {version}: it is 2 or 3")));
        }
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            let message = "Refcount width must be a power of two and may not exceed 64 bits";
            return Err(refused("refcount_bits", message));
        }
        if version < 3 && refcount_bits != 16 && options.refcount_bits.is_none() {
            return Err(refused("refcount_bits", "compat=0.10 requires refcount_bits=16"));
        }
        if version < 3 && refcount_bits != 16 {
            let message = "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                           (use compat=1.1 or greater)";
            return Err(refused("refcount_bits", message));
        }
        if version < 3 && options.lazy_refcounts == Some(true) {
            let message = "Lazy refcounts only supported with compatibility level 1.1 and above \
                           (use compat=1.1 or greater)";
            return Err(refused("lazy_refcounts", message));
        }
        if options.data_file.is_some() && !header.has_data_file() {
            let message = "data-file can only be set for images that use an external data file";
            return Err(refused("data_file", message));
        }
        if options.data_file_raw == Some(true) && !header.data_file_raw() {
            return Err(refused("data_file_raw", "data-file-raw cannot be set on existing images"));
        }
        let differs = |wanted: &Option<Vec<u8>>, is: Option<&[u8]>| {
            wanted.as_ref().is_some_and(|wanted| wanted.as_slice() != is.unwrap_or_default())
        };
        if differs(&options.backing_file, header.backing_file.as_deref())
            || differs(&options.backing_format, header.backing_format())
        {
            return Err(refused("backing_file", "Cannot amend the backing file"));
        }
        if version < header.version { version::check_downgrade(header) } else { Ok(()) }
    }

    /// Changes what takes a header field alone.
    fn fields(&self, storage: &dyn Storage) -> Result<()> {
        let old = read_header(storage)?;
        let mut new = old.clone();
        if new.version >= 3 {
            new.autoclear &= Autoclear::SUPPORTED;
            new.compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        }
        if self.options.data_file_raw == Some(false) {
            new.autoclear.remove(Autoclear::DATA_FILE_RAW);
        }
        if let Some(name) = &self.options.data_file {
            new.extensions.retain(|e| !matches!(e, Extension::DataFile(_)));
            if !name.is_empty() {
                let behind_format =
                    new.extensions.iter().position(|e| !matches!(e, Extension::BackingFormat(_)));
                let at = behind_format.unwrap_or(new.extensions.len());
                new.extensions.insert(at, Extension::DataFile(name.clone()));
            }
        }
        publish::header(storage, &old, &new)
    }
}

/// Writes the refcounts in another width.
fn change_width(storage: &dyn Storage, bits: u32, limits: &CheckOptions, job: &Job) -> Result<()> {
    let old = read_header(storage)?;
    let mut new = old.clone();
    let g = old.geometry;
    new.geometry = Geometry::new(g.cluster_bits(), bits.trailing_zeros(), g.extended_l2())
        .map_err(|e| invalid(e, ErrorKind::InvalidArgument))?;
    restructure(storage, &new, false, limits, job, |new| publish::header(storage, &old, new))
}

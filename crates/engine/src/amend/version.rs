//! From version 2 to 3 and back.

use qcow2_format::header::extension::Extension;
use qcow2_format::header::feature::{Autoclear, Compatible, Incompatible};
use qcow2_format::snapshot::V3_EXTRA_DATA;
use qcow2_format::{CryptMethod, Header};

use super::publish;
use crate::check::{CheckOptions, expand_zeroes, restructure};
use crate::image::{load_snapshots, read_header};
use crate::{Error, ErrorKind, Job, Result, Storage, StorageExt};

/// Makes a version 3 image of a version 2 image. Its snapshots get the fields that version 3 requires.
pub(super) fn upgrade(storage: &dyn Storage, limits: &CheckOptions, job: &Job) -> Result<()> {
    let old = read_header(storage)?;
    let mut new = old.clone();
    new.version = 3;
    let names = Extension::known_feature_names();
    let at = new.extensions.iter().position(|e| !matches!(e, Extension::BackingFormat(_)));
    new.extensions.insert(at.unwrap_or(new.extensions.len()), names);
    if new.encode().is_err() {
        // A small cluster has no room for names, which nothing depends on.
        new.extensions.retain(|e| !matches!(e, Extension::FeatureNames(_)));
    }
    let snapshots = load_snapshots(storage, &old, &limits.limits)?.whole()?;
    if snapshots.iter().any(|s| (s.extra_data_size as usize) < V3_EXTRA_DATA) {
        restructure(storage, &new, true, limits, job, |new| publish::header(storage, &old, new))
    } else {
        publish::header(storage, &old, &new)
    }
}

/// What can be told from the header alone.
pub(super) fn check_downgrade(header: &Header) -> Result<()> {
    let unknown = header.incompatible - (Incompatible::DIRTY | Incompatible::COMPRESSION_TYPE);
    if header.has_data_file() {
        return Err(refused("version", "Cannot downgrade an image with a data file"));
    }
    if !(unknown - Incompatible::CORRUPT).is_empty() {
        let bits = unknown.bits();
        let message = format!("Cannot downgrade an image with incompatible features {bits:#x} set");
        return Err(refused("incompatible_features", message));
    }
    if header.crypt_method == CryptMethod::Luks {
        return Err(refused("crypt_method", "Cannot downgrade an image with LUKS encryption"));
    }
    if header.bitmaps().is_some() && header.autoclear.contains(Autoclear::BITMAPS) {
        let message =
            "Cannot downgrade an image with persistent bitmaps: version 2 has none, remove them first";
        return Err(refused("bitmaps", message));
    }
    if !header.unknown_fields.iter().all(|byte| *byte == 0) {
        return Err(refused("header_length", "Cannot downgrade an image with unknown header fields"));
    }
    Ok(())
}

/// Makes a version 2 image of a version 3 image: zero clusters become data or nothing, feature bits go.
pub(super) fn downgrade(
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    limits: &CheckOptions,
    job: &Job,
) -> Result<()> {
    let header = read_header(storage)?;
    // Readers of version 2 need not know the fields that say so.
    let fits =
        |disk: Option<u64>, state: u64| disk.is_none_or(|d| d == header.size) && state <= u32::MAX.into();
    let snapshots = load_snapshots(storage, &header, &limits.limits)?.whole()?;
    if !snapshots.iter().all(|s| fits(s.disk_size, s.vm_state_size)) {
        let message = "Internal snapshots prevent downgrade of image";
        return Err(storage.located(refused("version", message)));
    }
    let zstd = header.incompatible.contains(Incompatible::COMPRESSION_TYPE);
    expand_zeroes(storage, data, zstd, limits, job)?;
    let old = read_header(storage)?;
    let mut new = old.clone();
    new.version = 2;
    new.incompatible = Incompatible::empty();
    new.compatible = Compatible::empty();
    new.autoclear = Autoclear::empty();
    new.compression_type = qcow2_format::CompressionType::Zlib;
    new.unknown_fields.clear();
    new.extensions.retain(|e| !matches!(e, Extension::FeatureNames(_) | Extension::Bitmaps(_)));
    publish::header(storage, &old, &new)
}

pub(super) fn refused(field: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message).with_field(field)
}

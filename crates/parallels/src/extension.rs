//! The format extension: a cluster with features beside the disk, dirty bitmaps above all. None of them is kept up to date here, so
//! an image that is changed loses its extension first, where the format allows that.
//!
//! Source: `docs/interop/parallels.rst` of QEMU, "Format Extension".

use qcow2_core::blocks::Fields;
use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt, check_limit};

use crate::structures::{Header, SECTOR};

/// What the cluster begins with.
const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// Bytes in front of the features: the magic, and a checksum of the rest.
const HEAD: u64 = 24;
/// Bytes in front of the data of a feature.
const FEATURE_HEAD: usize = 24;
/// A dirty bitmap.
const DIRTY_BITMAP: u64 = 0x2038_5fae_252c_b34a;
/// Who cannot keep the feature does not change the image.
const NECESSARY: u64 = 1;
/// Who does not know the feature leaves it as it is.
const TRANSIT: u64 = 2;
/// Most features that are looked at.
const MAX_FEATURES: u64 = 1024;

/// Refuses an image whose extension must not be dropped: one with a feature that whoever changes the image has to keep, and one that is
/// damaged, of which nobody can say that.
///
/// # Errors
/// `UnsupportedFeature`; `Corrupt`; `Limit`; `Io`.
pub(crate) fn check_droppable(storage: &dyn Storage, header: &Header) -> Result<()> {
    let start = header.ext_off.saturating_mul(SECTOR);
    let located = |error: Error| storage.located(error.with_field("ext_off").with_offset(start));
    let damaged = |what: &str| {
        let message = format!("the format extension is damaged ({what}): the image is read only, convert it");
        Err(located(Error::new(ErrorKind::Corrupt, message)))
    };
    if read_words(storage, start)?[0] != MAGIC {
        return damaged("it does not begin with its magic");
    }
    let end = start.saturating_add(header.cluster_size());
    let mut at = start.saturating_add(HEAD);
    for count in 0.. {
        check_limit("format extension features", count, MAX_FEATURES).map_err(located)?;
        if end.saturating_sub(at) < FEATURE_HEAD as u64 {
            return damaged("its features do not end");
        }
        let [magic, flags, size] = read_words(storage, at)?;
        if magic == 0 {
            return Ok(());
        }
        if flags & NECESSARY != 0 || (magic != DIRTY_BITMAP && flags & TRANSIT != 0) {
            let message = format!(
                "the format extension has a feature, {magic:#x}, that whoever writes to the image has to keep: convert it"
            );
            return Err(located(Error::new(ErrorKind::UnsupportedFeature, message)));
        }
        // The size has 32 bits; the data is filled up to 8 bytes.
        let data = (size & u64::from(u32::MAX)).next_multiple_of(8);
        at = at.saturating_add(FEATURE_HEAD as u64 + data);
    }
    Ok(())
}

/// The three words at `at`; zeroes behind the end of the file.
fn read_words(storage: &dyn Storage, at: u64) -> Result<[u64; 3]> {
    let mut bytes = [0; FEATURE_HEAD];
    storage.read_padded_at(MemMut::from(&mut bytes[..]), at)?;
    let fields = Fields::little_endian(&bytes);
    Ok([0, 8, 16].map(|at| fields.u64(at)))
}

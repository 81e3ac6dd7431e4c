//! What the first bytes of an untrusted image say. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_format::header::PREAMBLE_LENGTH;
use qcow2_format::header::feature::{FeatureSet, Incompatible, names_of};
use qcow2_format::header::field;
use qcow2_format::{CryptMethod, FormatError, Header, Limits};
use qcow2_luks::{Luks1Header, luks1};

pub use qcow2_core::inspect::{Finding, FindingCode};

use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// It has the qcow2 magic.
    pub is_qcow2: bool,
    /// The header, as far as it could be read: unknown incompatible features are left out of it.
    pub header: Option<Header>,
    /// The backing file's name where the header could not be read as a whole.
    pub backing_file: Option<Vec<u8>>,
    /// Bits of unknown incompatible features.
    pub unknown_incompatible: u64,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its first cluster, and its LUKS header.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &Limits) -> Result<Inspection> {
    let mut start = [0u8; PREAMBLE_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut start[..]), 0)?;
    let start = start.get(..got).unwrap_or_default();
    let Ok(preamble) = Header::preamble(start) else { return Ok(inspect_bytes(start, None, limits)) };
    // At most 2 MiB: the preamble is validated.
    let mut cluster = vec![0u8; preamble.cluster_size as usize];
    let got = storage.read_up_to_at(MemMut::from(&mut cluster[..]), 0)?;
    cluster.truncate(got);
    let size = storage.size()?;
    let mut found = inspect_bytes(&cluster, Some(size), limits);
    if let Some((offset, length)) = found.luks() {
        let mut luks = [0u8; luks1::HEADER_BYTES];
        let got =
            if offset < size { storage.read_up_to_at(MemMut::from(&mut luks[..]), offset)? } else { 0 };
        found.judge_luks(luks.get(..got).unwrap_or_default(), offset, length);
    }
    Ok(found)
}

/// Inspects the first bytes of an image: its first cluster, or as much of it as there is. Without `file_size`, where tables
/// end is not judged, and a LUKS header if it is among the bytes.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &Limits) -> Inspection {
    let mut found = Inspection { is_qcow2: bytes.starts_with(b"QFI\xfb"), ..Inspection::default() };
    let mut known = bytes.to_vec();
    if let Some(bits) = unknown_features(bytes) {
        found.unknown_incompatible = bits;
        if let Ok(all) = field::INCOMPATIBLE_FEATURES.read(bytes) {
            field::INCOMPATIBLE_FEATURES.write(&mut known, all & Incompatible::SUPPORTED);
        }
    }
    match Header::parse(&known) {
        Ok(header) => {
            found.judge(&header, file_size, limits);
            found.header = Some(header);
            if let (None, Some((offset, length))) = (file_size, found.luks())
                && let Some(luks) = usize::try_from(offset).ok().and_then(|at| bytes.get(at..))
                && luks.len() >= luks1::HEADER_BYTES
            {
                found.judge_luks(luks, offset, length);
            }
        }
        Err(error) => {
            let code = match error {
                FormatError::Limit { .. } => FindingCode::Limit,
                _ => FindingCode::HeaderInvalid,
            };
            found.backing_file = backing_name(bytes);
            if let Some(name) = found.backing_file.clone() {
                found.findings.push(Finding::reference(FindingCode::BackingFile, "backing file", &name));
            }
            if found.unknown_incompatible != 0 {
                found.add_unknown_features(&[]);
            }
            found.add(code, error.to_string());
        }
    }
    found
}

fn unknown_features(bytes: &[u8]) -> Option<u64> {
    let version = field::VERSION.read(bytes).ok()?;
    let unknown = field::INCOMPATIBLE_FEATURES.read(bytes).ok()?.unsupported();
    (version == 3 && unknown != 0).then_some(unknown)
}

/// The backing file's name by its two fields alone, for a header that is refused.
fn backing_name(bytes: &[u8]) -> Option<Vec<u8>> {
    let offset = field::BACKING_FILE_OFFSET.read(bytes).ok()?;
    let length = field::BACKING_FILE_SIZE.read(bytes).ok()?;
    let start = usize::try_from(offset).ok().filter(|&start| start > 0)?;
    let end = start.checked_add(length.min(1023) as usize)?;
    bytes.get(start..end).filter(|name| !name.is_empty()).map(<[u8]>::to_vec)
}

impl Inspection {
    fn add(&mut self, code: FindingCode, message: impl Into<String>) {
        self.findings.push(Finding::new(code, message));
    }

    fn add_unknown_features(&mut self, table: &[qcow2_format::header::feature::FeatureName]) {
        let names = names_of(FeatureSet::Incompatible, self.unknown_incompatible, table).join(", ");
        self.add(FindingCode::UnknownFeature, format!("unknown incompatible features: {names}"));
    }

    fn judge(&mut self, header: &Header, file_size: Option<u64>, limits: &Limits) {
        if let Some(name) = &header.backing_file {
            self.findings.push(Finding::reference(FindingCode::BackingFile, "backing file", name));
        }
        match (header.data_file(), header.has_data_file()) {
            (Some(name), _) => {
                self.findings.push(Finding::reference(FindingCode::DataFile, "external data file", name));
            }
            (None, true) => self
                .add(FindingCode::DataFile, "the guest data is in an external data file that is not named"),
            (None, false) => {}
        }
        if self.unknown_incompatible != 0 {
            self.add_unknown_features(header.feature_names());
        }
        if header.incompatible.contains(Incompatible::CORRUPT) {
            self.add(FindingCode::CorruptBit, "the image is marked corrupt");
        }
        if header.incompatible.contains(Incompatible::DIRTY) {
            self.add(FindingCode::DirtyBit, "the image was not closed cleanly: refcounts may be out of date");
        }
        self.judge_limits(header, limits);
        self.findings.extend(Finding::size(header.size, file_size, limits.max_virtual_size));
        self.judge_tables(header, file_size);
    }

    fn judge_limits(&mut self, header: &Header, limits: &Limits) {
        let cluster_size = header.geometry.cluster_size();
        let bitmaps = header.bitmaps();
        let claims = [
            ("size", header.size, limits.max_virtual_size),
            ("L1 table size", u64::from(header.l1_size) * 8, limits.max_metadata_bytes),
            (
                "refcount table size",
                u64::from(header.refcount_table_clusters) * cluster_size,
                limits.max_metadata_bytes,
            ),
            ("nb_snapshots", header.nb_snapshots.into(), limits.max_snapshots.into()),
            ("nb_bitmaps", bitmaps.map_or(0, |b| b.count.into()), limits.max_bitmaps.into()),
            ("bitmap_directory_size", bitmaps.map_or(0, |b| b.directory_size), limits.max_metadata_bytes),
        ];
        let above = |(field, value, limit)| Finding::limit(field, value, limit);
        self.findings.extend(claims.into_iter().filter_map(above));
    }

    fn judge_tables(&mut self, header: &Header, file_size: Option<u64>) {
        let cluster_size = header.geometry.cluster_size();
        let snapshots = u64::from(header.nb_snapshots) * qcow2_format::snapshot::FIXED_LENGTH as u64;
        let bitmaps = header.bitmaps().map_or((0, 0), |b| (b.directory_offset.0, b.directory_size));
        let encryption = header.crypto_header().map_or((0, 0), |(offset, length)| (offset.0, length));
        let tables = [
            ("encryption header", encryption.0, encryption.1),
            ("L1 table", header.l1_table_offset.0, u64::from(header.l1_size) * 8),
            (
                "refcount table",
                header.refcount_table_offset.0,
                u64::from(header.refcount_table_clusters) * cluster_size,
            ),
            ("snapshot table", header.snapshots_offset.0, snapshots),
            ("bitmap directory", bitmaps.0, bitmaps.1),
        ];
        let outside = |(name, offset, length)| Finding::table(name, offset, length, cluster_size, file_size);
        self.findings.extend(tables.into_iter().filter_map(outside));
    }
}

impl Inspection {
    /// Start and length of the LUKS header and its key material, of an image that has one.
    fn luks(&self) -> Option<(u64, u64)> {
        let header = self.header.as_ref().filter(|header| header.crypt_method == CryptMethod::Luks)?;
        header.crypto_header().map(|(offset, length)| (offset.0, length))
    }

    /// Judges the LUKS header that `bytes` begin with, which is at `offset` of the file and has `length` bytes with its key material: what
    /// keeps a secret from opening the image, or would cost too much.
    fn judge_luks(&mut self, bytes: &[u8], offset: u64, length: u64) {
        let limits = qcow2_luks::Limits::default();
        let mut add = |error: &Error| {
            let code = FindingCode::of(error.kind());
            let at = offset.saturating_add(error.offset().unwrap_or_default());
            self.findings
                .push(Finding::new(code, format!("encryption header, {at:#x}: {}", error.message())));
        };
        let header = match Luks1Header::parse(bytes) {
            Ok(header) => header,
            Err(error) => return add(&error),
        };
        if let Err(error) = header.check_digest(&limits) {
            add(&error);
        }
        for (slot, this) in header.slots.iter().enumerate().filter(|(_, slot)| slot.is_active()) {
            let end = this.key_offset + header.material_bytes(this);
            let outside = || {
                let message = format!(
                    "key slot {slot} is damaged: its key material ends at {end:#x}, behind the end of the \
                     encryption header at {length:#x}"
                );
                Error::new(ErrorKind::Corrupt, message).with_offset(Luks1Header::slot_at(slot))
            };
            let judged = header.check_place(slot, &limits);
            if let Err(error) = judged.and_then(|()| if end > length { Err(outside()) } else { Ok(()) }) {
                add(&error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(found: &Inspection) -> Vec<&'static str> {
        found.findings.iter().map(|f| f.code.as_str()).collect()
    }

    /// The smallest sound header: version 3, 64 KiB clusters, an empty disk.
    fn sound() -> Vec<u8> {
        let mut h = vec![0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &0x30000u64.to_be_bytes());
        put(48, &0x10000u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        h
    }

    #[test]
    fn a_sound_header_has_no_findings() {
        let found = inspect_bytes(&sound(), None, &Limits::default());
        assert_eq!(codes(&found), Vec::<&str>::new());
        assert_eq!(found.header.map(|h| h.size), Some(1 << 20));
    }

    #[test]
    fn tables_are_held_against_the_file() {
        assert_eq!(codes(&inspect_bytes(&sound(), Some(0x30008), &Limits::default())), Vec::<&str>::new());
        assert_eq!(
            codes(&inspect_bytes(&sound(), Some(0x30007), &Limits::default())),
            ["TABLE_OUT_OF_BOUNDS"]
        );
        let mut overlapping = sound();
        overlapping[40..48].copy_from_slice(&0u64.to_be_bytes());
        assert_eq!(codes(&inspect_bytes(&overlapping, None, &Limits::default())), ["TABLE_OUT_OF_BOUNDS"]);
    }

    #[test]
    fn unknown_features_do_not_hide_the_rest() {
        let mut bytes = sound();
        bytes[72..80].copy_from_slice(&(1u64 << 63 | 0b11).to_be_bytes());
        let found = inspect_bytes(&bytes, None, &Limits::default());
        assert_eq!(codes(&found), ["UNKNOWN_FEATURE", "CORRUPT_BIT", "DIRTY_BIT"]);
        assert_eq!(found.unknown_incompatible, 1 << 63);
    }

    #[test]
    fn a_refused_header_still_shows_its_backing_file() {
        let mut bytes = sound();
        bytes[8..16].copy_from_slice(&200u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&11u32.to_be_bytes());
        bytes[200..211].copy_from_slice(b"/etc/passwd");
        // A refcount width of 128 bits.
        bytes[96..100].copy_from_slice(&7u32.to_be_bytes());
        let found = inspect_bytes(&bytes, None, &Limits::default());
        assert_eq!(codes(&found), ["BACKING_FILE", "HEADER_INVALID"]);
        assert_eq!(found.backing_file.as_deref(), Some(&b"/etc/passwd"[..]));
    }

    #[test]
    fn every_prefix_gives_a_report() {
        let bytes = sound();
        for length in 0..bytes.len() {
            let found = inspect_bytes(&bytes[..length], None, &Limits::default());
            assert_eq!(found.is_qcow2, length >= 4, "{length}");
            assert_eq!(found.findings.is_empty(), found.header.is_some(), "{length}");
        }
    }

    #[test]
    fn a_disk_that_is_out_of_proportion_is_a_finding() {
        let claim = |size: u64| {
            let mut bytes = sound();
            bytes[24..32].copy_from_slice(&size.to_be_bytes());
            // As many L1 entries as 2 MiB clusters and such a disk need.
            bytes[20..24].copy_from_slice(&21u32.to_be_bytes());
            bytes[36..40].copy_from_slice(&(1u32 << 15).to_be_bytes());
            for at in [40, 48] {
                bytes[at..at + 8].copy_from_slice(&((at as u64) << 21).to_be_bytes());
            }
            bytes
        };
        let (tib, limits) = (1u64 << 40, Limits::default());
        let found = |size, file| codes(&inspect_bytes(&claim(size), file, &limits));
        assert_eq!(found(16 * tib, None), Vec::<&str>::new());
        assert_eq!(found(500 * tib, None), ["VIRTUAL_SIZE"]);
        assert_eq!(found(500 * tib, Some(1 << 30)), ["VIRTUAL_SIZE"]);
        assert_eq!(found(500 * tib, Some(tib)), Vec::<&str>::new());
        let tight = Limits { max_virtual_size: tib, ..limits };
        assert_eq!(codes(&inspect_bytes(&claim(500 * tib), None, &tight)), ["LIMIT"]);
    }

    #[test]
    fn limits_are_findings() {
        let tight = Limits { max_virtual_size: 4096, max_metadata_bytes: 7, ..Limits::default() };
        assert_eq!(codes(&inspect_bytes(&sound(), None, &tight)), ["LIMIT", "LIMIT", "LIMIT"]);
    }
}

//! What the first bytes of an untrusted image say. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{MemMut, Result, Storage, StorageExt};

use crate::OpenOptions;
use crate::layer::text_of;
use crate::structures::{HEADER_LENGTH, Header};

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The header, where it keeps to the format.
    pub header: Option<Header>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its header.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    let mut bytes = [0; HEADER_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), 0)?;
    Ok(inspect_bytes(bytes.get(..got).unwrap_or_default(), Some(storage.size()?), limits))
}

/// Inspects the first bytes of an image. Without `file_size`, where tables end is not judged.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    let header = match Header::parse(bytes) {
        Ok(header) => header,
        Err(error) => {
            return Inspection { header: None, findings: vec![Finding::error(&error)] };
        }
    };
    let (layout, mut findings) = (header.layout(), Vec::new());
    if header.is_differencing() {
        let message =
            format!("the image is read with its parent, whose UUID is {}", text_of(&header.uuid_link));
        findings.push(Finding::new(FindingCode::BackingFile, message));
    }
    findings.extend(Finding::limit("size", layout.size, limits.max_virtual_size));
    findings.extend(Finding::limit("block map size", layout.table_bytes(), limits.max_metadata_bytes));
    findings.extend(Finding::size(layout.size, file_size, limits.max_virtual_size));
    let table =
        Finding::table("block map", layout.table, layout.table_bytes(), HEADER_LENGTH as u64, file_size);
    findings.extend(table);
    Inspection { header: Some(header), findings }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::structures::ImageType;
    use qcow2_core::storage::MemoryStorage;

    fn sound() -> Vec<u8> {
        let mut bytes = Header::new(3 << 20, ImageType::Dynamic, [[1; 16]; 2]).unwrap().to_bytes().to_vec();
        bytes.resize(1024, 0xff);
        bytes
    }

    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = sound();
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes
    }

    #[test]
    fn what_speaks_against_an_image_is_found() {
        let usual = OpenOptions::default();
        let tight = OpenOptions { max_virtual_size: 4096, max_metadata_bytes: 3, ..OpenOptions::default() };
        for (bytes, limits, expected) in [
            (sound(), &usual, &[][..]),
            (sound(), &tight, &["LIMIT", "LIMIT"]),
            (with(0x4c, &[4]), &usual, &["BACKING_FILE"]),
            (with(0x4c, &[9]), &usual, &["UNKNOWN_FEATURE"]),
            (with(0x154, &[0]), &usual, &["TABLE_OUT_OF_BOUNDS"][..0]),
            (with(0x40, &[0]), &usual, &["HEADER_INVALID"]),
            (sound()[..514].to_vec(), &usual, &["TABLE_OUT_OF_BOUNDS"]),
            (sound()[..511].to_vec(), &usual, &["HEADER_INVALID"]),
        ] {
            let found = inspect(&MemoryStorage::from_bytes(&bytes), limits).unwrap();
            let codes: Vec<_> = found.findings.iter().map(|finding| finding.code.as_str()).collect();
            assert_eq!(codes, expected);
        }
        // 64 TiB, as a file of 1 KiB says.
        let mut large = Header::new(64 << 40, ImageType::Dynamic, [[1; 16]; 2]).unwrap();
        large.blocks_in_image = 1 << 26;
        let found = inspect_bytes(&large.to_bytes(), None, &usual);
        assert_eq!(found.findings[0].code, FindingCode::VirtualSize);
    }
}

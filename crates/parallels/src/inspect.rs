//! What the first bytes of an untrusted image say. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{MemMut, Result, Storage, StorageExt};

use crate::OpenOptions;
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
    let (layout, mut findings) = (header.layout(file_size.unwrap_or(u64::MAX >> 1)), Vec::new());
    if header.is_in_use() {
        findings.push(Finding::new(FindingCode::DirtyBit, "the image is in use, or was not closed"));
    }
    if file_size.is_some_and(|length| !header.has_data_start(length)) {
        let message = format!("data_off of {} sectors lies in the BAT, or outside the file", header.data_off);
        findings.push(Finding::new(FindingCode::TableOutOfBounds, message));
    }
    findings.extend(Finding::limit("size", layout.size, limits.max_virtual_size));
    findings.extend(Finding::limit("BAT size", layout.table_bytes(), limits.max_metadata_bytes));
    findings.extend(Finding::size(layout.size, file_size, limits.max_virtual_size));
    findings.extend(Finding::table(
        "BAT",
        layout.table,
        layout.table_bytes(),
        HEADER_LENGTH as u64,
        file_size,
    ));
    Inspection { header: Some(header), findings }
}

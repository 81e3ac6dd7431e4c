//! What the first bytes of an untrusted image say. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{MemMut, Result, Storage, StorageExt};

use crate::OpenOptions;
use crate::descriptor::{Descriptor, MAX_LENGTH};
use crate::structures::{HEADER_LENGTH, Header};

/// Names of files that are told one by one.
const LISTED: usize = 20;

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The header, where it keeps to the format.
    pub header: Option<Header>,
    /// Of a bundle, what its descriptor says.
    pub bundle: Option<Descriptor>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its header.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    let length = storage.size()?;
    let mut bytes = vec![0; length.min(MAX_LENGTH + 1) as usize];
    let head = bytes.len().min(1024);
    let (front, rest) = bytes.split_at_mut(head);
    storage.read_exact_at(MemMut::from(&mut *front), 0)?;
    if Descriptor::is_one(front) {
        storage.read_exact_at(MemMut::from(rest), head as u64)?;
    } else {
        bytes.truncate(head);
    }
    Ok(inspect_bytes(&bytes, Some(length), limits))
}

/// Inspects the first bytes of an image. Without `file_size`, where tables end is not judged.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    if Descriptor::is_one(bytes.get(..bytes.len().min(1024)).unwrap_or_default()) {
        return inspect_descriptor(bytes, limits);
    }
    let header = match Header::parse(bytes) {
        Ok(header) => header,
        Err(error) => {
            return Inspection { findings: vec![Finding::error(&error)], ..Inspection::default() };
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
    Inspection { header: Some(header), findings, ..Inspection::default() }
}

/// The files are all that a bundle is: each is a finding.
fn inspect_descriptor(text: &[u8], limits: &OpenOptions) -> Inspection {
    let bundle = match Descriptor::parse(text) {
        Ok(bundle) => bundle,
        Err(error) => {
            return Inspection { findings: vec![Finding::error(&error)], ..Inspection::default() };
        }
    };
    let mut names = bundle.storages.iter().flat_map(|part| &part.images).map(|image| image.name.as_bytes());
    let mut findings: Vec<Finding> = names
        .by_ref()
        .take(LISTED)
        .map(|name| Finding::reference(FindingCode::DataFile, "extent", name))
        .collect();
    let more = names.count();
    if more > 0 {
        findings.push(Finding::new(FindingCode::DataFile, format!("the image names {more} more extents")));
    }
    findings.extend(Finding::limit("size", bundle.size, limits.max_virtual_size));
    Inspection { bundle: Some(bundle), findings, ..Inspection::default() }
}

//! What the first bytes of an untrusted file say. Nothing is unlocked, and no secret is asked for.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{Error, ErrorKind, Result, Storage, StorageExt};

use super::{Header, OpenOptions, reader};

/// What a file says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The header, where it keeps to the format.
    pub header: Option<Header>,
    /// Bytes of the disk, where the header and the file's length say it.
    pub virtual_size: Option<u64>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the file in `storage`: reads its header.
///
/// # Errors
/// `Io`. What is wrong with the file is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    judge(Header::read(&reader(storage)), Some(storage.size()?), limits)
}

/// Inspects the first bytes of a file. Without `file_size`, a disk that ends with its file has no size.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    let read = |offset: u64, to: &mut [u8]| {
        let rest = usize::try_from(offset).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
        let Some(from) = rest.get(..to.len()) else {
            let message = "the LUKS header goes on behind the bytes that there are";
            return Err(Error::new(ErrorKind::InvalidHeader, message));
        };
        to.copy_from_slice(from);
        Ok(())
    };
    judge(Header::read(&read), file_size, limits).unwrap_or_default()
}

fn judge(header: Result<Header>, file_size: Option<u64>, limits: &OpenOptions) -> Result<Inspection> {
    let mut found = Inspection::default();
    let header = match header {
        Ok(header) => header,
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(error) => {
            found.findings.push(Finding::error(&error));
            return Ok(found);
        }
    };
    let size = match file_size {
        Some(length) => header.virtual_size(length).map(Some),
        None => Ok(header.payload_size()),
    };
    match size {
        Ok(size) => {
            found.findings.extend(Finding::limit("size", size.unwrap_or_default(), limits.max_virtual_size));
            found.virtual_size = size;
        }
        Err(error) => found.findings.push(Finding::new(FindingCode::TableOutOfBounds, error.message())),
    }
    found.header = Some(header);
    Ok(found)
}

//! What an untrusted image says. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Error, ErrorKind, Result, Storage, StorageExt};

use crate::OpenOptions;
use crate::file::{Front, Tables};
use crate::structures::{Header, Metadata};

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The header that counts, where it keeps to the format.
    pub header: Option<Header>,
    /// The metadata, where they do.
    pub metadata: Option<Metadata>,
    /// The name of the parent, where there is one.
    pub backing_file: Option<Vec<u8>>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its headers, log and metadata.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    let size = storage.size()?;
    judge(storage, Some(size), limits)
}

/// Inspects the first bytes of an image.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], limits: &OpenOptions) -> Inspection {
    judge(&MemoryStorage::from_bytes(bytes), None, limits).unwrap_or_default()
}

impl Inspection {
    /// Adds what an error says of the image.
    fn add(&mut self, error: Error) -> Result<()> {
        let code = match error.kind() {
            ErrorKind::Io => return Err(error),
            ErrorKind::Corrupt if error.field() == Some("BAT") => FindingCode::TableOutOfBounds,
            kind => FindingCode::of(kind),
        };
        self.findings.push(Finding::new(code, error.message()));
        Ok(())
    }
}

fn judge(storage: &dyn Storage, file_size: Option<u64>, limits: &OpenOptions) -> Result<Inspection> {
    let mut found = Inspection::default();
    // What the limits forbid is a finding beside the others.
    let wide = OpenOptions { max_virtual_size: u64::MAX, ..limits.clone() };
    let front = match Front::read(storage, &wide) {
        Ok(front) => front,
        Err(error) => return found.add(error).map(|()| found),
    };
    found.header = Some(front.header);
    let read = |data: &dyn Storage, size| Tables::read(data, &front.header, size, &wide);
    let tables = match &front.log {
        Some(log) => {
            let message = "the image was not closed cleanly: its log has to be brought in";
            found.findings.push(Finding::new(FindingCode::DirtyBit, message));
            log.over(storage).and_then(|data| read(&data, file_size.map(|_| data.size()).transpose()?))
        }
        None => read(storage, file_size),
    };
    match tables {
        Ok(tables) => {
            let size = tables.metadata.virtual_size;
            if let Some(parent) = &tables.metadata.parent {
                let name = parent.name().unwrap_or_default().into_bytes();
                found.findings.push(Finding::reference(FindingCode::BackingFile, "parent", &name));
                found.backing_file = Some(name);
            }
            found.findings.extend(Finding::limit("size", size, limits.max_virtual_size));
            found.findings.extend(Finding::size(size, file_size, limits.max_virtual_size));
            found.metadata = Some(tables.metadata);
        }
        Err(error) => found.add(error)?,
    }
    Ok(found)
}

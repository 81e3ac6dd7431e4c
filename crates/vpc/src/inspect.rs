//! What an untrusted image says. Opens nothing else, follows nothing, and reports instead of failing.

use std::sync::Arc;

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{ErrorKind, Result, Storage, StorageExt};

use crate::OpenOptions;
use crate::footers::{Footers, read_footers};
use crate::layer::read_header;
use crate::parent;
use crate::structures::{DiskType, FOOTER_LENGTH, Footer, HEADER_LENGTH, Header};

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The footer that counts, where there is one.
    pub footer: Option<Footer>,
    /// The header of a dynamic or differencing disk, where it keeps to the format.
    pub header: Option<Header>,
    /// The name of the parent, where there is one and it could be read.
    pub backing_file: Option<Vec<u8>>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its footers, its header and the name of its parent.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    judge(storage, &read_footers(storage)?, Some(storage.size()?), limits)
}

/// Inspects the first bytes of an image. Without `file_size`, where tables end is not judged, nor what the end of the file says: that
/// of a fixed disk has nothing else.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    let footers = Footers {
        front: Footer::parse(bytes.get(..FOOTER_LENGTH).unwrap_or(bytes)),
        back: Footer::parse(&[]),
        back_offset: 0,
    };
    judge(&*storage, &footers, file_size, limits).unwrap_or_default()
}

fn judge(
    storage: &dyn Storage,
    footers: &Footers,
    file_size: Option<u64>,
    limits: &OpenOptions,
) -> Result<Inspection> {
    let mut found = Inspection::default();
    let footer = match footers.chosen() {
        Ok(footer) => footer.clone(),
        Err(error) => {
            found.add(&error);
            return Ok(found);
        }
    };
    let size = footer.virtual_size();
    found.findings.extend(Finding::limit("size", size, limits.max_virtual_size));
    if footer.disk_type() != DiskType::Fixed {
        match read_header(storage, footer.data_offset()) {
            Ok(header) => found.judge_header(storage, &footer, header, file_size, limits)?,
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => found.add(&error),
        }
        found.findings.extend(Finding::size(size, file_size, limits.max_virtual_size));
    }
    found.footer = Some(footer);
    Ok(found)
}

impl Inspection {
    fn add(&mut self, error: &qcow2_core::Error) {
        self.findings.push(Finding::error(error));
    }

    fn judge_header(
        &mut self,
        storage: &dyn Storage,
        footer: &Footer,
        header: Header,
        file_size: Option<u64>,
        limits: &OpenOptions,
    ) -> Result<()> {
        if footer.disk_type() == DiskType::Differencing {
            self.backing_file = parent::references(storage, &header)?.backing.map(|backing| backing.filename);
            let finding = match &self.backing_file {
                Some(name) => Finding::reference(FindingCode::BackingFile, "backing file", name),
                None => Finding::new(
                    FindingCode::BackingFile,
                    "the image is read with its parent, and names no file",
                ),
            };
            self.findings.push(finding);
        }
        let layout = header.layout(footer.data_offset(), footer.virtual_size());
        if let Err(error) = layout.check() {
            self.add(&error);
        }
        let bytes = layout.table_bytes();
        self.findings.extend(Finding::limit("BAT size", bytes, limits.max_metadata_bytes));
        let behind = footer.data_offset().saturating_add(HEADER_LENGTH as u64);
        // A table in front of the header is as good.
        let first = if layout.table < footer.data_offset() { FOOTER_LENGTH as u64 } else { behind };
        self.findings.extend(Finding::table("BAT", layout.table, bytes, first, file_size));
        self.header = Some(header);
        Ok(())
    }
}

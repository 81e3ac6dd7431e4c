//! What an untrusted image says of itself. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{Error, MemMut, Result, Storage, StorageExt};

use crate::descriptor::{Descriptor, MARK, MAX_BYTES};
use crate::fields::SECTOR;
use crate::sparse::{FOOTER_BYTES, HEADER_BYTES, Header, MAGIC, footer};
use crate::{OpenOptions, cowd, sesparse};

/// Extents that are named one by one.
const LISTED: usize = 16;

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Bytes of the disk, where that could be read.
    pub virtual_size: Option<u64>,
    /// Bytes of a grain, of an image with grains in its own file.
    pub grain: Option<u64>,
    /// The descriptor, where it keeps to the format.
    pub descriptor: Option<Descriptor>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its headers and its descriptor.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    let size = storage.size()?;
    let part = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        let got =
            if offset < size { storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)? } else { 0 };
        bytes.truncate(got);
        Ok(bytes)
    };
    judge(Some(size), limits, &part)
}

/// Inspects the first bytes of an image. Without `file_size`, where tables end is not judged.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    let part = |offset: u64, length: usize| {
        let rest = usize::try_from(offset).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
        Ok(rest.get(..length).unwrap_or(rest).to_vec())
    };
    judge(file_size, limits, &part).unwrap_or_default()
}

type Part<'a> = &'a dyn Fn(u64, usize) -> Result<Vec<u8>>;

fn judge(file_size: Option<u64>, limits: &OpenOptions, part: Part<'_>) -> Result<Inspection> {
    let mut found = Inspection::default();
    let head = part(0, HEADER_BYTES)?;
    if !head.starts_with(&MAGIC) {
        if head.starts_with(&cowd::MAGIC) || head.starts_with(&sesparse::MAGIC) {
            let message = "the file is an extent of a disk: the descriptor that names it is the image";
            found.findings.push(Finding::new(FindingCode::HeaderInvalid, message));
            return Ok(found);
        }
        let text = part(0, MAX_BYTES as usize + 1)?;
        let length = file_size.unwrap_or(text.len() as u64);
        if let Some(long) = Finding::limit("descriptor", length, MAX_BYTES)
            && head.starts_with(MARK)
        {
            found.findings.push(long);
            return Ok(found);
        }
        found.describe(&text, false);
        found.virtual_size = found.descriptor.as_ref().map(Descriptor::size);
    } else if let Some(header) = found.hosted(&head, file_size, part)? {
        found.embedded(&header, limits, file_size, part)?;
    }
    if let Some(size) = found.virtual_size {
        found.findings.extend(Finding::limit("size", size, limits.max_virtual_size));
        found.findings.extend(Finding::size(size, file_size, limits.max_virtual_size));
    }
    Ok(found)
}

impl Inspection {
    fn refuse(&mut self, error: &Error) {
        self.findings.push(Finding::error(error));
    }

    /// The header that counts.
    fn hosted(&mut self, head: &[u8], file_size: Option<u64>, part: Part<'_>) -> Result<Option<Header>> {
        let read = match (Header::parse(head), file_size) {
            (Ok(header), Some(size)) if header.is_at_end() => {
                let end = size.div_ceil(SECTOR) * SECTOR;
                footer(&part(end.saturating_sub(FOOTER_BYTES as u64), FOOTER_BYTES)?)
            }
            (read, _) => read,
        };
        Ok(read.inspect_err(|error| self.refuse(error)).ok())
    }

    fn embedded(
        &mut self,
        header: &Header,
        limits: &OpenOptions,
        file_size: Option<u64>,
        part: Part<'_>,
    ) -> Result<()> {
        let length = header.descriptor_size.saturating_mul(SECTOR);
        self.findings.extend(Finding::limit("descriptorSize", length, MAX_BYTES + 1));
        if length <= MAX_BYTES + 1 && header.descriptor_offset != 0 {
            let text = part(header.descriptor_offset.saturating_mul(SECTOR), length as usize)?;
            self.describe(&text, !header.is_wrapper());
        }
        if header.is_wrapper() {
            self.virtual_size = self.descriptor.as_ref().map(Descriptor::size);
            return Ok(());
        }
        // Of the first bytes alone, the directory's place is not known.
        let known = if header.is_at_end() { Header { directory: 0, ..*header } } else { *header };
        match known.geometry() {
            Ok(geometry) => {
                self.virtual_size = Some(geometry.size());
                self.grain = Some(geometry.grain_bytes());
                let bytes = geometry.directory_bytes();
                self.findings.extend(Finding::limit(
                    "grain directory size",
                    bytes,
                    limits.max_metadata_bytes,
                ));
                if !header.is_at_end() {
                    let (at, start) = (geometry.directory.saturating_mul(SECTOR), HEADER_BYTES as u64);
                    self.findings.extend(Finding::table("grain directory", at, bytes, start, file_size));
                }
            }
            Err(error) => self.refuse(&error),
        }
        Ok(())
    }

    /// Reads a descriptor, whose last line may be cut off; in an image that is one file, the extent that it lists is that file.
    fn describe(&mut self, text: &[u8], own: bool) {
        let whole = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let end = whole.iter().rposition(|byte| *byte == b'\n').map_or(whole.len(), |at| at + 1);
        let descriptor = match Descriptor::parse(whole.get(..end).unwrap_or(whole)) {
            Ok(descriptor) => descriptor,
            Err(error) => return self.refuse(&error),
        };
        if let Some(parent) = &descriptor.parent {
            self.findings.push(Finding::reference(FindingCode::BackingFile, "backing file", parent));
        }
        let mut names =
            descriptor.extents.iter().filter(|_| !own).filter_map(|extent| extent.filename.as_deref());
        for name in names.by_ref().take(LISTED) {
            self.findings.push(Finding::reference(FindingCode::DataFile, "extent", name));
        }
        let more = names.count();
        if more > 0 {
            let message = format!("the image names {more} more extents");
            self.findings.push(Finding::new(FindingCode::DataFile, message));
        }
        self.descriptor = Some(descriptor);
    }
}

//! What the first bytes of an untrusted image say. Opens nothing else, follows nothing, and reports instead of failing.

use qcow2_core::inspect::{Finding, FindingCode};
use qcow2_core::{ErrorKind, MemMut, Result, Storage, StorageExt};

use crate::OpenOptions;
use crate::format::{HEADER_LENGTH, Header, MAX_BACKING_FILE_NAME};

/// What an image says about itself.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The header, where it keeps to the format.
    pub header: Option<Header>,
    /// The name of the backing file, where there is one and it could be read.
    pub backing_file: Option<Vec<u8>>,
    /// Everything that speaks against opening the image as it is.
    pub findings: Vec<Finding>,
}

/// Inspects the image in `storage`: reads its header, and the name of its backing file.
///
/// # Errors
/// `Io`. What is wrong with the image is a finding.
pub fn inspect(storage: &dyn Storage, limits: &OpenOptions) -> Result<Inspection> {
    let bytes = read(storage, 0, HEADER_LENGTH)?;
    let size = storage.size()?;
    judge(&bytes, Some(size), limits, |offset, length| read(storage, offset, length))
}

/// Inspects the first bytes of an image. Without `file_size`, where tables end is not judged.
#[must_use]
pub fn inspect_bytes(bytes: &[u8], file_size: Option<u64>, limits: &OpenOptions) -> Inspection {
    let part = |offset: u64, length: usize| {
        let rest = usize::try_from(offset).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
        Ok(rest.get(..length).unwrap_or(rest).to_vec())
    };
    judge(bytes, file_size, limits, part).unwrap_or_default()
}

/// `length` bytes at `offset`, fewer where the file ends before.
fn read(storage: &dyn Storage, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = if offset < storage.size()? {
        storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?
    } else {
        0
    };
    bytes.truncate(got);
    Ok(bytes)
}

fn judge(
    bytes: &[u8],
    file_size: Option<u64>,
    limits: &OpenOptions,
    part: impl Fn(u64, usize) -> Result<Vec<u8>>,
) -> Result<Inspection> {
    let mut found = Inspection::default();
    match Header::parse(bytes) {
        Ok(header) => {
            found.name(header.backing_file_offset, header.backing_file_size, part)?;
            let (size, l1) = (header.virtual_size(), header.l1_entries() * 8);
            found.findings.extend(Finding::limit("size", size, limits.max_virtual_size));
            found.findings.extend(Finding::limit("L1 table size", l1, limits.max_metadata_bytes));
            found.findings.extend(Finding::size(size, file_size, limits.max_virtual_size));
            let table =
                Finding::table("L1 table", header.l1_table_offset, l1, HEADER_LENGTH as u64, file_size);
            found.findings.extend(table);
            found.header = Some(header);
        }
        Err(error) => {
            if let Some((offset, length)) = backing_fields(bytes) {
                found.name(offset, length, part)?;
            }
            let code = match error.kind() {
                ErrorKind::Limit => FindingCode::Limit,
                _ => FindingCode::HeaderInvalid,
            };
            found.findings.push(Finding::new(code, error.message()));
        }
    }
    Ok(found)
}

/// Where the name of the backing file is, for a header that is refused.
fn backing_fields(bytes: &[u8]) -> Option<(u64, u32)> {
    let offset = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
    let length = u32::from_be_bytes(bytes.get(16..20)?.try_into().ok()?);
    Some((offset, length.min(MAX_BACKING_FILE_NAME)))
}

impl Inspection {
    fn name(&mut self, offset: u64, length: u32, part: impl Fn(u64, usize) -> Result<Vec<u8>>) -> Result<()> {
        if offset == 0 || length == 0 {
            return Ok(());
        }
        let name = part(offset, length as usize)?;
        if name.len() < length as usize {
            let message =
                format!("the image names a backing file at {offset:#x}, behind the bytes that there are");
            self.findings.push(Finding::new(FindingCode::BackingFile, message));
            return Ok(());
        }
        self.findings.push(Finding::reference(FindingCode::BackingFile, "backing file", &name));
        self.backing_file = Some(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::storage::MemoryStorage;

    /// An empty disk of 1 MiB with 4 KiB clusters.
    fn sound() -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
        bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        bytes[32..34].copy_from_slice(&[12, 9]);
        bytes[40..48].copy_from_slice(&512u64.to_be_bytes());
        bytes
    }

    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = sound();
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes
    }

    fn codes(bytes: &[u8], limits: &OpenOptions) -> Vec<&'static str> {
        let found = inspect(&MemoryStorage::from_bytes(bytes), limits).unwrap();
        let of_bytes = inspect_bytes(bytes, Some(bytes.len() as u64), limits);
        assert_eq!(found.findings, of_bytes.findings);
        assert_eq!(found.header, of_bytes.header);
        found.findings.iter().map(|finding| finding.code.as_str()).collect()
    }

    #[test]
    fn what_speaks_against_an_image_is_found() {
        let usual = OpenOptions::default();
        let tight = OpenOptions { max_virtual_size: 4096, max_metadata_bytes: 3, ..OpenOptions::default() };
        let name = [&1000u64.to_be_bytes()[..], &4u32.to_be_bytes()].concat();
        let outside = [&1022u64.to_be_bytes()[..], &4u32.to_be_bytes()].concat();
        let nowhere = [&u64::MAX.to_be_bytes()[..], &4u32.to_be_bytes()].concat();
        for (bytes, limits, expected) in [
            (sound(), &usual, &[][..]),
            (sound(), &tight, &["LIMIT", "LIMIT"]),
            (with(8, &name), &usual, &["BACKING_FILE"]),
            (with(8, &outside), &usual, &["BACKING_FILE"]),
            (with(8, &nowhere), &usual, &["BACKING_FILE"]),
            (with(40, &40u64.to_be_bytes()), &usual, &["TABLE_OUT_OF_BOUNDS"]),
            (with(40, &1023u64.to_be_bytes()), &usual, &["TABLE_OUT_OF_BOUNDS"]),
            (with(40, &u64::MAX.to_be_bytes()), &usual, &["TABLE_OUT_OF_BOUNDS"]),
            (with(32, &[8]), &usual, &["HEADER_INVALID"]),
            (with(24, &(1u64 << 62).to_be_bytes()), &usual, &["LIMIT"]),
            (sound()[..47].to_vec(), &usual, &["HEADER_INVALID"]),
        ] {
            assert_eq!(codes(&bytes, limits), expected);
        }
        let mut refused = with(8, &name);
        refused[32] = 8;
        refused[1000..1004].copy_from_slice(b"base");
        assert_eq!(codes(&refused, &usual), ["BACKING_FILE", "HEADER_INVALID"]);
        assert_eq!(inspect_bytes(&refused, None, &usual).backing_file.as_deref(), Some(&b"base"[..]));
        // As large as clusters of 64 KiB make it.
        let mut large = with(24, &(1u64 << 50).to_be_bytes());
        large[32..34].copy_from_slice(&[16, 13]);
        large.resize(32 << 20, 0);
        assert_eq!(codes(&large, &usual), ["VIRTUAL_SIZE"]);
    }

    #[test]
    fn every_prefix_gives_a_report() {
        let bytes = with(8, &[0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 4]);
        for length in 0..bytes.len() {
            let found = inspect_bytes(&bytes[..length], None, &OpenOptions::default());
            assert_eq!(found.header.is_some(), length >= HEADER_LENGTH, "{length}");
            assert_eq!(found.backing_file.is_some(), length >= 104, "{length}");
        }
    }
}

//! What an inspection of an untrusted image can find, whatever its format.

use crate::{Error, ErrorKind};

/// Why an image is not safe to open as it is. Stable, unlike the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FindingCode {
    /// It names a backing file.
    BackingFile,
    /// It names, or needs, an external data file.
    DataFile,
    /// Incompatible features without a known meaning.
    UnknownFeature,
    /// It is marked corrupt.
    CorruptBit,
    /// It was not closed cleanly.
    DirtyBit,
    /// No image of a known format, or a header that breaks its format.
    HeaderInvalid,
    /// A table overlaps the header or lies outside the file.
    TableOutOfBounds,
    /// A size or count exceeds a limit.
    Limit,
    /// The disk is far larger than its file suggests: reading all of it takes long, and a copy may not fit anywhere.
    VirtualSize,
}

impl FindingCode {
    /// What an error of reading a header says of it.
    #[must_use]
    pub fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Limit => Self::Limit,
            ErrorKind::UnsupportedFeature => Self::UnknownFeature,
            _ => Self::HeaderInvalid,
        }
    }

    /// The code as JavaScript sees it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BackingFile => "BACKING_FILE",
            Self::DataFile => "DATA_FILE",
            Self::UnknownFeature => "UNKNOWN_FEATURE",
            Self::CorruptBit => "CORRUPT_BIT",
            Self::DirtyBit => "DIRTY_BIT",
            Self::HeaderInvalid => "HEADER_INVALID",
            Self::TableOutOfBounds => "TABLE_OUT_OF_BOUNDS",
            Self::Limit => "LIMIT",
            Self::VirtualSize => "VIRTUAL_SIZE",
        }
    }
}

/// One reason for care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub code: FindingCode,
    /// A sentence that names field and value.
    pub message: String,
}

/// Disks up to this size are not remarkable: 16 TiB, the largest file of ext4.
const LARGEST_LIKELY: u64 = 16 << 40;
/// Nor are larger ones whose file has a thousandth of their size.
const MOST_SPARSE: u64 = 1000;

impl Finding {
    /// A finding.
    pub fn new(code: FindingCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What reading a header met.
    #[must_use]
    pub fn error(error: &Error) -> Self {
        Self::new(FindingCode::of(error.kind()), error.message())
    }

    /// The image names another file.
    #[must_use]
    pub fn reference(code: FindingCode, what: &str, name: &[u8]) -> Self {
        Self::new(code, format!("the image names the {what} '{}'", String::from_utf8_lossy(name)))
    }

    /// A value above its limit.
    #[must_use]
    pub fn limit(field: &str, value: u64, limit: u64) -> Option<Self> {
        let message = || format!("{field} of {value} exceeds the limit of {limit}");
        (value > limit).then(|| Self::new(FindingCode::Limit, message()))
    }

    /// A disk that is out of proportion to its file, within the caller's `limit`. Sparse disks are normal: only one that no
    /// common file system could hold as a file is worth a word.
    #[must_use]
    pub fn size(size: u64, file_size: Option<u64>, limit: u64) -> Option<Self> {
        let likely =
            file_size.map_or(LARGEST_LIKELY, |file| LARGEST_LIKELY.max(file.saturating_mul(MOST_SPARSE)));
        if size <= likely || size > limit {
            return None;
        }
        let file = file_size.map_or(String::new(), |file| format!(" in a file of {file} bytes"));
        Some(Self::new(FindingCode::VirtualSize, format!("the image claims a disk of {size} bytes{file}")))
    }

    /// A table that overlaps the header, whose last byte is in front of `header_end`, or that lies outside the file.
    #[must_use]
    pub fn table(
        name: &str,
        offset: u64,
        length: u64,
        header_end: u64,
        file_size: Option<u64>,
    ) -> Option<Self> {
        let reason = if length == 0 {
            return None;
        } else if offset < header_end {
            "overlaps the header"
        } else if file_size.is_some_and(|size| offset.checked_add(length).is_none_or(|end| end > size)) {
            "lies outside the file"
        } else {
            return None;
        };
        let message = format!("the {name} at {offset:#x} with {length} bytes {reason}");
        Some(Self::new(FindingCode::TableOutOfBounds, message))
    }
}

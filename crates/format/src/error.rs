//! What can be wrong with bytes that claim to be qcow2.

use thiserror::Error;

/// Result of a parser of this crate.
pub type FormatResult<T> = Result<T, FormatError>;

/// A reason to refuse bytes. `field` names follow the specification.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The magic is not `QFI\xfb`.
    #[error("not a qcow2 image: the file does not start with the qcow2 magic")]
    NotQcow2,
    /// Fewer bytes than the structure needs.
    #[error("{field} is truncated: {needed} bytes needed, {available} available")]
    Truncated {
        /// Structure or field.
        field: &'static str,
        /// Bytes it takes.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// A version other than 2 and 3.
    #[error("unsupported qcow2 version {0}")]
    UnsupportedVersion(u32),
    /// A field whose value the specification forbids.
    #[error("invalid {field} {value:#x}: {reason}")]
    Invalid {
        /// Field name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// Incompatible features that this library does not implement, by name.
    #[error("Unsupported qcow2 feature(s): {}", .names.join(", "))]
    UnsupportedFeatures {
        /// The mask of unknown bits.
        bits: u64,
        /// Names from the image's feature name table, then "Unknown incompatible feature: MASK".
        names: Vec<String>,
    },
    /// A size or count above a safety limit.
    #[error("{field} of {value} exceeds the limit of {limit}")]
    Limit {
        /// What is too large.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
}

impl FormatError {
    pub(crate) fn invalid(field: &'static str, value: u64, reason: &'static str) -> Self {
        Self::Invalid { field, value, reason }
    }

    /// The field at fault, by its name in the specification.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::NotQcow2 => Some("magic"),
            Self::UnsupportedVersion(_) => Some("version"),
            Self::UnsupportedFeatures { .. } => Some("incompatible_features"),
            Self::Truncated { field, .. } | Self::Invalid { field, .. } | Self::Limit { field, .. } => {
                Some(field)
            }
        }
    }
}

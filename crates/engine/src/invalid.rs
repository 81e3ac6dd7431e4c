//! Bytes that break the format, as errors of the engine.

use qcow2_format::FormatError;

use crate::{Error, ErrorKind};

/// The error for bytes that break the format. `kind` is `InvalidHeader` for the header and `Corrupt` for what lies behind
/// it; unknown features and exceeded limits keep a kind of their own.
pub(crate) fn invalid(error: FormatError, kind: ErrorKind) -> Error {
    let kind = match error {
        FormatError::UnsupportedVersion(_) | FormatError::UnsupportedFeatures { .. } => {
            ErrorKind::UnsupportedFeature
        }
        FormatError::Limit { .. } => ErrorKind::Limit,
        _ => kind,
    };
    let invalid = Error::new(kind, error.to_string());
    let invalid = match error.field() {
        Some(field) => invalid.with_field(field),
        None => invalid,
    };
    invalid.with_source(error)
}

/// An error of a codec.
pub(crate) fn transform(error: qcow2_transform::Error) -> Error {
    let kind = match error {
        qcow2_transform::Error::InvalidLevel { .. } => ErrorKind::InvalidArgument,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string()).with_source(error)
}

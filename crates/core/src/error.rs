//! The engine's error: a stable kind (its code is API), a message, and where it happened.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of every engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Refuses a value above its limit.
///
/// # Errors
/// `Limit`, naming the field and both numbers.
pub fn check_limit(field: &'static str, value: u64, limit: u64) -> Result<()> {
    if value <= limit {
        return Ok(());
    }
    let message = format!("{field} of {value} exceeds the limit of {limit}");
    Err(Error::new(ErrorKind::Limit, message).with_field(field))
}

/// What went wrong, by who can do something about it. Codes are API, messages are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Not a qcow2 image, or a header that contradicts itself.
    InvalidHeader,
    /// A feature, version, format or option that this library does not know or does not support.
    UnsupportedFeature,
    /// Metadata behind the header is damaged.
    Corrupt,
    /// The image names another file and the caller did not allow to open it.
    ReferenceDenied,
    /// A size or count exceeds a safety limit.
    Limit,
    /// Another process holds a conflicting lock on the image.
    Locked,
    /// A write to an image or file that is open for reading only.
    ReadOnly,
    /// The secret is missing or does not open the image.
    BadSecret,
    /// No snapshot has this id or name.
    NoSnapshot,
    /// No persistent bitmap has this name.
    NoBitmap,
    /// The operation would lose data and was not explicitly acknowledged.
    DataLoss,
    /// The backing chain contains itself, is too deep, or a member is missing.
    Chain,
    /// The handle is closed.
    Closed,
    /// Cancelled by the caller.
    Aborted,
    /// An argument is out of range or contradicts another.
    InvalidArgument,
    /// The operating system reported an error: `errno` says which.
    Io,
    /// A bug in this library.
    Internal,
}

impl ErrorKind {
    /// The stable code that crosses to JavaScript.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidHeader => "ERR_QCOW2_INVALID_HEADER",
            Self::UnsupportedFeature => "ERR_QCOW2_UNSUPPORTED_FEATURE",
            Self::Corrupt => "ERR_QCOW2_CORRUPT",
            Self::ReferenceDenied => "ERR_QCOW2_REFERENCE_DENIED",
            Self::Limit => "ERR_QCOW2_LIMIT",
            Self::Locked => "ERR_QCOW2_LOCKED",
            Self::ReadOnly => "ERR_QCOW2_READ_ONLY",
            Self::BadSecret => "ERR_QCOW2_BAD_SECRET",
            Self::NoSnapshot => "ERR_QCOW2_NO_SNAPSHOT",
            Self::NoBitmap => "ERR_QCOW2_NO_BITMAP",
            Self::DataLoss => "ERR_QCOW2_DATA_LOSS",
            Self::Chain => "ERR_QCOW2_CHAIN",
            Self::Closed => "ERR_QCOW2_CLOSED",
            Self::Aborted => "ERR_QCOW2_ABORTED",
            Self::InvalidArgument => "ERR_QCOW2_INVALID_ARGUMENT",
            Self::Io => "ERR_QCOW2_IO",
            Self::Internal => "ERR_QCOW2_INTERNAL",
        }
    }
}

/// An engine error. Small on the stack: everything lives behind one box.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    field: Option<&'static str>,
    errno: Option<i32>,
    syscall: Option<&'static str>,
    transient: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. The message names the value and the reason, not the file: that is `with_path`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            field: None,
            errno: None,
            syscall: None,
            transient: false,
            source: None,
        }))
    }

    /// An operating-system error met in `syscall` (its name as in the manual: `pread`, `fallocate`).
    pub fn io(error: io::Error, syscall: &'static str) -> Self {
        if error.get_ref().is_some_and(|inner| inner.is::<GivenUp>()) {
            return Self::aborted();
        }
        // What a storage says of itself with all that belongs to it.
        let error = match error.downcast::<Self>() {
            Ok(own) => return own,
            Err(error) => error,
        };
        let mut e = Self::new(ErrorKind::Io, error.to_string());
        e.0.errno = crate::storage::number(&error);
        e.0.syscall = Some(syscall);
        e.0.source = Some(Box::new(error));
        e
    }

    /// The system starts no thread.
    pub fn no_thread(error: io::Error) -> Self {
        let message = format!("no thread can be started, a limit on threads or memory is reached: {error}");
        let mut e = Self::io(error, "pthread_create");
        e.0.message = message;
        e
    }

    /// Says more than the system's words do.
    #[must_use]
    pub fn because(mut self, why: &str) -> Self {
        self.0.message = format!("{}: {why}", self.0.message);
        self
    }

    /// The caller cancelled the job.
    pub fn aborted() -> Self {
        Self::new(ErrorKind::Aborted, "the operation was aborted")
    }

    /// The file this happened in. The innermost file wins: an outer layer does not overwrite it.
    #[must_use]
    pub fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// The byte offset in that file.
    #[must_use]
    pub fn with_offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// With an offset that counted from `base` in that file.
    #[must_use]
    pub fn offset_from(mut self, base: u64) -> Self {
        self.0.offset = self.0.offset.map(|offset| offset.saturating_add(base));
        self
    }

    /// The field, by its name in the specification.
    #[must_use]
    pub fn with_field(mut self, field: &'static str) -> Self {
        self.0.field.get_or_insert(field);
        self
    }

    /// Whether the same request may succeed when it is made again.
    #[must_use]
    pub fn transient(mut self, transient: bool) -> Self {
        self.0.transient = transient;
        self
    }

    /// The error that caused this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Whether the file system has no room (`ENOSPC`) or the quota is used up (`EDQUOT`).
    pub fn is_no_space(&self) -> bool {
        let source = self.0.source.as_ref().and_then(|e| e.downcast_ref::<io::Error>());
        source.is_some_and(|e| matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    /// Whether there was no room: on the file system, or below a limit. Nothing was changed then, and all goes on.
    pub fn is_no_room(&self) -> bool {
        self.is_no_space() || self.kind() == ErrorKind::Limit
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
    /// The message without place.
    pub fn message(&self) -> &str {
        &self.0.message
    }
    /// The file, where one is known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
    /// The byte offset in the file, where one is known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
    /// The field of the format, where one is known.
    pub fn field(&self) -> Option<&'static str> {
        self.0.field
    }
    /// The system's error number for `ErrorKind::Io`; on Windows that which Node has for it.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }
    /// Whether the same request may succeed when it is made again, as the storage that met the error judges.
    pub fn is_transient(&self) -> bool {
        self.0.transient
    }
    /// What failed for `ErrorKind::Io`: the system call, or what else the storage calls it.
    pub fn syscall(&self) -> Option<&'static str> {
        self.0.syscall
    }
}

/// What a storage fails with because its caller gave it up: of the engine's errors it is [`ErrorKind::Aborted`].
#[derive(Debug, Clone, Copy)]
pub struct GivenUp;

impl fmt::Display for GivenUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the operation was aborted")
    }
}

impl std::error::Error for GivenUp {}

impl From<GivenUp> for io::Error {
    fn from(given_up: GivenUp) -> Self {
        Self::new(io::ErrorKind::ConnectionAborted, given_up)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(syscall) = self.0.syscall {
            write!(f, "{syscall}: ")?;
        }
        f.write_str(&self.0.message)?;
        match (self.0.field, self.0.offset) {
            (Some(field), Some(offset)) => write!(f, " (field {field}, offset {offset:#x})"),
            (Some(field), None) => write!(f, " (field {field})"),
            (None, Some(offset)) => write!(f, " (offset {offset:#x})"),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e.as_ref() as &(dyn std::error::Error + 'static))
    }
}

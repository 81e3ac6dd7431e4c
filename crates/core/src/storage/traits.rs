//! What a storage says of itself.

use std::fmt;
use std::sync::Arc;

/// What a storage object is, and what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// Offsets and lengths must be multiples of this (1 where there is no such rule). See [`super::DirectStorage`].
    pub alignment: u32,
    /// Addresses of buffers must be multiples of this (1 where there is no such rule).
    pub memory_alignment: u32,
    /// A block device: only its owner changes its length, and a new target on it is not zero.
    pub block_device: bool,
    /// Open for writing.
    pub writable: bool,
    /// A request waits for a device or for another machine, not for a core: many are worth a thread each.
    pub waits: bool,
}

impl Default for Traits {
    /// A file that takes any request, for reading.
    fn default() -> Self {
        Self { alignment: 1, memory_alignment: 1, block_device: false, writable: false, waits: false }
    }
}

/// What requests on a file should look like, in bytes; absent where there is no rule or nothing is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoLimits {
    /// Multiple that offsets and lengths must be of.
    pub request_alignment: u32,
    /// Multiple that addresses of buffers must be of.
    pub memory_alignment: u32,
    /// Bytes of a page of memory.
    pub page_size: u32,
    /// What the device does with these.
    pub device: DeviceLimits,
}

/// What a block device says of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceLimits {
    /// Most bytes of one transfer.
    pub max_transfer: Option<u32>,
    /// Most pieces of memory of one transfer.
    pub max_segments: Option<u32>,
    /// Multiple that frees space when it is discarded.
    pub discard_alignment: Option<u32>,
    /// Multiple that the device zeroes by itself.
    pub zeroes_alignment: Option<u32>,
}

/// Tells storages apart: what is equal has the same bytes. Its text means something to nobody but who made it, and crosses to
/// JavaScript and back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(Arc<str>);

impl Identity {
    /// Of a file of the system, by its device and inode. JavaScript makes the same text of a file that it may not open.
    pub fn of_file(device: u64, inode: impl fmt::Display) -> Self {
        Self::new("file", &format!("{device}:{inode}"))
    }

    /// Of something else: `name` tells it apart among all of its `kind` (a URL, an object of JavaScript's).
    pub fn new(kind: &str, name: &str) -> Self {
        Self(format!("{kind}:{name}").into())
    }

    /// Its kind.
    pub fn kind(&self) -> &str {
        self.0.split_once(':').map_or("", |(kind, _)| kind)
    }

    /// What [`Identity`]'s text was made from.
    pub fn from_text(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An operation on a storage, as its errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing one buffer.
    Write,
    /// Writing several buffers.
    WriteVectored,
    /// Asking for the length or the space in use.
    Length,
    /// Changing the length.
    SetLength,
    /// Making writes durable.
    Sync,
    /// Closing.
    Close,
    /// Zeroing, freeing or reserving a range.
    Space,
    /// Looking for holes.
    Run,
}

impl Operation {
    /// The system call, by its name in the manual.
    pub fn system_call(self) -> &'static str {
        match self {
            Self::Read => "pread",
            Self::Write => "pwrite",
            Self::WriteVectored => "pwritev",
            Self::Length => "fstat",
            Self::SetLength => "ftruncate",
            Self::Sync => "fdatasync",
            Self::Close => "close",
            Self::Space => "fallocate",
            Self::Run => "lseek",
        }
    }
}

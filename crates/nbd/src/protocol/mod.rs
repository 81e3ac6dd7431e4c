//! The structures of the protocol, by the names of its specification. Everything is big-endian. No I/O.

pub mod answers;
mod fields;
pub mod handshake;
pub mod transmission;

pub use fields::Malformed;

/// Longest name of an export or a context, and longest description, in bytes.
pub const MAX_NAME: usize = 4096;

/// Longest payload of a request, and longest read, in bytes: as QEMU has it.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// What an export can do (transmission flags).
pub mod export_flags {
    /// The other flags mean something: always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Takes FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Takes FUA.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Takes TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Takes WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Takes DF, which forbids to fragment a read.
    pub const SEND_DF: u16 = 1 << 7;
    /// What one connection flushes is durable for all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Takes CACHE.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Takes FAST_ZERO.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// How a command is to be executed.
pub mod command_flags {
    /// Durable when it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk for the whole read.
    pub const DF: u16 = 1 << 2;
    /// One descriptor for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes are to be faster than writing them, or an error.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: as many bytes as the length says follow the request. Always with WRITE.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// What a range is, for `base:allocation`.
pub mod allocation {
    /// Takes no space.
    pub const HOLE: u64 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u64 = 1 << 1;
}

/// The range was written to, for `qemu:dirty-bitmap:NAME`.
pub const DIRTY: u64 = 1;

/// The errors that a reply can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// EPERM: the export is read-only.
    Perm = 1,
    /// EIO.
    Io = 5,
    /// ENOMEM.
    NoMem = 12,
    /// EINVAL: the request makes no sense.
    Inval = 22,
    /// ENOSPC: no room, or a write beyond the end.
    NoSpc = 28,
    /// EOVERFLOW: the range cannot be read in one chunk.
    Overflow = 75,
    /// ENOTSUP: not in this way.
    NotSup = 95,
    /// ESHUTDOWN: the server is ending.
    Shutdown = 108,
}

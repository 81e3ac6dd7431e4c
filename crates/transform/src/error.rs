//! What can go wrong with the bytes of one cluster. Where the cluster is, only the caller knows.

/// Result of every transform.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A transform's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The compressed bytes are not a valid stream, or hold less than a cluster.
    #[error("corrupt {codec} data: {reason}")]
    Corrupt {
        /// Name of the compression type.
        codec: &'static str,
        /// What is wrong with the stream.
        reason: &'static str,
    },
    /// The stream is sound, and ends before the cluster is full.
    #[error("{codec} stream ends after {actual} of {expected} bytes")]
    Short {
        /// Name of the compression type.
        codec: &'static str,
        /// Bytes that the stream held.
        actual: usize,
        /// Bytes of a cluster.
        expected: usize,
    },
    /// The compression level does not exist.
    #[error("{codec} has no compression level {level}: levels are 1 to {max}")]
    InvalidLevel {
        /// Name of the compression type.
        codec: &'static str,
        /// The level asked for.
        level: u32,
        /// The highest level.
        max: u32,
    },
    /// The compression type of the header is not one of the specification's.
    #[error("unknown compression type {0}")]
    UnknownCodec(u8),
    /// The compressor itself failed: no memory, or a bug in it.
    #[error("{codec} compressor failed: {reason}")]
    Compressor {
        /// Name of the compression type.
        codec: &'static str,
        /// The library's own message.
        reason: &'static str,
    },
}

//! The compression types of the header behind one face: one context per worker thread, whatever the type.

use crate::zlib::{self, Window};
use crate::{Error, Result, zstd};

/// The header's compression type: what every compressed cluster of the image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// Type 0: raw deflate.
    #[default]
    Zlib,
    /// Type 1: zstd.
    Zstd,
}

impl Codec {
    /// The codec of a header's `compression_type` byte.
    ///
    /// # Errors
    /// [`Error::UnknownCodec`].
    pub fn from_compression_type(value: u8) -> Result<Self> {
        match value {
            0 => Ok(Self::Zlib),
            1 => Ok(Self::Zstd),
            _ => Err(Error::UnknownCodec(value)),
        }
    }

    /// The header's `compression_type` byte.
    #[must_use]
    pub fn compression_type(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }

    /// The name that QEMU uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// Level used where none is asked for.
    #[must_use]
    pub fn default_level(self) -> u32 {
        match self {
            Self::Zlib => zlib::DEFAULT_LEVEL,
            Self::Zstd => zstd::DEFAULT_LEVEL,
        }
    }

    /// Highest level; the lowest is 1.
    #[must_use]
    pub fn max_level(self) -> u32 {
        match self {
            Self::Zlib => zlib::MAX_LEVEL,
            Self::Zstd => zstd::MAX_LEVEL,
        }
    }
}

/// How to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompressOptions {
    /// Compression type.
    pub codec: Codec,
    /// Level, or the codec's default.
    pub level: Option<u32>,
    /// Window of a zlib stream; zstd has no such choice.
    pub window: Window,
}

/// Compresses clusters: the context of one worker thread.
pub struct Compressor(Deflater);

enum Deflater {
    Zlib(zlib::Deflater),
    Zstd(zstd::Deflater),
}

impl Compressor {
    /// A context with these options.
    ///
    /// # Errors
    /// [`Error::InvalidLevel`], or [`Error::Compressor`] where there is no memory for it.
    pub fn new(options: &CompressOptions) -> Result<Self> {
        let level = options.level.unwrap_or_else(|| options.codec.default_level());
        Ok(Self(match options.codec {
            Codec::Zlib => Deflater::Zlib(zlib::Deflater::new(level, options.window)?),
            Codec::Zstd => Deflater::Zstd(zstd::Deflater::new(level)?),
        }))
    }

    /// Compresses `cluster` into the front of `output` and returns how many bytes that took, or `None` when the
    /// result is not smaller than the cluster: it is then stored as it is. An `output` of one byte less than the
    /// cluster is all that is ever used.
    ///
    /// # Errors
    /// [`Error::Compressor`] when the compressor fails.
    pub fn compress(&mut self, cluster: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
        match &mut self.0 {
            Deflater::Zlib(deflater) => deflater.deflate(cluster, output),
            Deflater::Zstd(deflater) => deflater.deflate(cluster, output),
        }
    }
}

/// Decompresses clusters: the context of one worker thread.
pub struct Decompressor(Inflater);

enum Inflater {
    Zlib(zlib::Inflater),
    Zstd(zstd::Inflater),
}

impl Decompressor {
    /// A context for one compression type.
    ///
    /// # Errors
    /// [`Error::Compressor`] where there is no memory for it.
    pub fn new(codec: Codec) -> Result<Self> {
        Ok(Self(match codec {
            Codec::Zlib => Inflater::Zlib(zlib::Inflater::new()),
            Codec::Zstd => Inflater::Zstd(zstd::Inflater::new()?),
        }))
    }

    /// Decompresses into the whole of `cluster`. `input` may be longer than the compressed bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Short`]; `cluster` is unspecified then.
    pub fn decompress(&mut self, input: &[u8], cluster: &mut [u8]) -> Result<()> {
        match &mut self.0 {
            Inflater::Zlib(inflater) => inflater.inflate(input, cluster),
            Inflater::Zstd(inflater) => inflater.inflate(input, cluster),
        }
    }
}

/// The front of `output` that a compressed form of `input` may use: one byte less than the cluster, so that what
/// fits has shrunk.
pub(crate) fn shrunk<'a>(input: &[u8], output: &'a mut [u8]) -> &'a mut [u8] {
    let limit = output.len().min(input.len().saturating_sub(1));
    output.get_mut(..limit).unwrap_or_default()
}

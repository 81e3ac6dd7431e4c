//! Compression type 0: raw deflate (RFC 1951), without zlib's header and checksum.
//!
//! libdeflate does the work: it is one-shot, as a cluster is. Two cases need a streaming inflate or deflate,
//! for which zlib-rs is at hand: a stream that is longer than the cluster (QEMU takes the full buffer as
//! success, so must we), and a writer that keeps to QEMU's own window for readers that stream with it.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use libdeflater::CompressionLvl;

use crate::{Error, Result};

const NAME: &str = "zlib";

/// Highest compression level. Levels above 9 exist for the full window only.
pub const MAX_LEVEL: u32 = 12;

/// Level used where none is asked for: the fastest that is no larger than zlib's level 6 with a 4 KiB window,
/// which is what QEMU writes (`benches/codecs.rs` measures it).
pub const DEFAULT_LEVEL: u32 = 2;

/// Highest level of zlib itself, which writes the 4 KiB window.
const MAX_ZLIB_LEVEL: u32 = 9;

/// QEMU's window: 2^12 bytes.
const QEMU_WINDOW_BITS: u8 = 12;

/// How far back a stream may refer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Window {
    /// Deflate's 32 KiB, which the specification allows and every one-shot reader accepts, QEMU's among them.
    #[default]
    Full,
    /// The 4 KiB that QEMU writes, for readers that stream with a window of that size. Larger and slower.
    Qemu4KiB,
}

/// Inflates clusters.
pub struct Inflater {
    fast: libdeflater::Decompressor,
    /// Made on first need: few images have a cluster that needs it.
    stream: Option<Decompress>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self::new()
    }
}

impl Inflater {
    /// A context for one thread.
    #[must_use]
    pub fn new() -> Self {
        Self { fast: libdeflater::Decompressor::new(), stream: None }
    }

    /// Inflates `input` into the whole of `output`, one cluster. Bytes behind the end of the stream are ignored,
    /// since the descriptor of a compressed cluster counts sectors; so is the rest of a stream that is longer or lacks
    /// its end marker. QEMU does the same, except where what follows a full cluster inside a stream is damaged.
    ///
    /// # Errors
    /// [`Error::Corrupt`], or [`Error::Short`] for a stream that ends before the cluster is full. `output` is
    /// unspecified then.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        match self.fast.deflate_decompress(input, output) {
            Ok(actual) if actual == output.len() => Ok(()),
            Ok(actual) => Err(Error::Short { codec: NAME, actual, expected: output.len() }),
            // libdeflate reports a stream that is longer than the output in either way, and says nothing of
            // how far it came: only a streaming inflate can tell.
            Err(_) => self.inflate_prefix(input, output),
        }
    }

    fn inflate_prefix(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let stream = self.stream.get_or_insert_with(|| Decompress::new(false));
        stream.reset(false);
        let status = stream.decompress(input, output, FlushDecompress::Finish);
        let full = stream.total_out() == output.len() as u64;
        match status {
            _ if full => Ok(()),
            Ok(Status::StreamEnd) => {
                let actual = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
                Err(Error::Short { codec: NAME, actual, expected: output.len() })
            }
            Ok(_) => Err(Error::Corrupt { codec: NAME, reason: "the input ends inside the stream" }),
            Err(_) => Err(Error::Corrupt { codec: NAME, reason: "not a deflate stream" }),
        }
    }
}

/// Deflates clusters.
pub struct Deflater(Backend);

enum Backend {
    Full(libdeflater::Compressor),
    Qemu4KiB(Box<Compress>),
}

impl Deflater {
    /// A context for one thread. `level` is 1 to [`MAX_LEVEL`]; the 4 KiB window knows no level above 9 and takes
    /// 9 for them.
    ///
    /// # Errors
    /// [`Error::InvalidLevel`].
    pub fn new(level: u32, window: Window) -> Result<Self> {
        let invalid = Error::InvalidLevel { codec: NAME, level, max: MAX_LEVEL };
        if level == 0 || level > MAX_LEVEL {
            return Err(invalid);
        }
        Ok(Self(match window {
            Window::Full => {
                let level = i32::try_from(level).map_err(|_| invalid)?;
                let level = CompressionLvl::new(level).map_err(|_| invalid)?;
                Backend::Full(libdeflater::Compressor::new(level))
            }
            Window::Qemu4KiB => {
                let level = Compression::new(level.min(MAX_ZLIB_LEVEL));
                Backend::Qemu4KiB(Box::new(Compress::new_with_window_bits(level, false, QEMU_WINDOW_BITS)))
            }
        }))
    }

    /// Deflates `input`, one cluster, into the front of `output` and returns the length of the stream, or `None`
    /// when it is not smaller than the cluster or does not fit in `output`: the cluster is then stored as it is.
    ///
    /// # Errors
    /// [`Error::Compressor`] when the compressor fails.
    pub fn deflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
        let output = crate::codec::shrunk(input, output);
        match &mut self.0 {
            Backend::Full(fast) => Ok(fast.deflate_compress(input, output).ok()),
            Backend::Qemu4KiB(stream) => {
                stream.reset();
                match stream.compress(input, output, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => Ok(usize::try_from(stream.total_out()).ok()),
                    Ok(_) => Ok(None),
                    Err(_) => Err(Error::Compressor { codec: NAME, reason: "deflate refused its state" }),
                }
            }
        }
    }
}

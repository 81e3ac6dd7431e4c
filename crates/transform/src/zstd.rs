//! Compression type 1: zstd (RFC 8878).
//!
//! A cluster may consist of several frames, skippable ones among them. Each is decoded in one shot straight into
//! the cluster: a streaming decoder would first allocate the window that the frame's header asks for, up to
//! 128 MiB at the word of an untrusted image.

use zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd_safe::{CCtx, CParameter, DCtx};

use crate::{Error, Result};

const NAME: &str = "zstd";

/// Highest compression level.
pub const MAX_LEVEL: u32 = 22;

/// Level used where none is asked for: zstd's own default, and QEMU's.
pub const DEFAULT_LEVEL: u32 = 3;

/// Decodes clusters.
pub struct Inflater(DCtx<'static>);

impl Inflater {
    /// A context for one thread.
    ///
    /// # Errors
    /// [`Error::Compressor`] where there is no memory for it.
    pub fn new() -> Result<Self> {
        DCtx::try_create()
            .map(Self)
            .ok_or(Error::Compressor { codec: NAME, reason: "no memory for a context" })
    }

    /// Decodes the frames of `input` into the whole of `output`, one cluster. Bytes behind the frame that fills
    /// the cluster are ignored, since the descriptor of a compressed cluster counts sectors. A frame that holds
    /// more than is left of the cluster is an error, as it is to QEMU.
    ///
    /// # Errors
    /// [`Error::Corrupt`], or [`Error::Short`] for frames that end before the cluster is full. `output` is
    /// unspecified then.
    pub fn inflate(&mut self, mut input: &[u8], output: &mut [u8]) -> Result<()> {
        let expected = output.len();
        let mut rest = output;
        while !rest.is_empty() {
            if input.is_empty() {
                let actual = expected - rest.len();
                return Err(Error::Short { codec: NAME, actual, expected });
            }
            let length = zstd_safe::find_frame_compressed_size(input).map_err(corrupt)?;
            let Some((frame, behind)) = input.split_at_checked(length).filter(|_| length > 0) else {
                return Err(Error::Corrupt { codec: NAME, reason: "a frame leads beyond the input" });
            };
            let filled = self.0.decompress(rest, frame).map_err(corrupt)?;
            rest = rest.get_mut(filled..).unwrap_or_default();
            input = behind;
        }
        Ok(())
    }
}

fn corrupt(code: usize) -> Error {
    Error::Corrupt { codec: NAME, reason: zstd_safe::get_error_name(code) }
}

/// Encodes clusters.
pub struct Deflater(CCtx<'static>);

impl Deflater {
    /// A context for one thread. `level` is 1 to [`MAX_LEVEL`].
    ///
    /// # Errors
    /// [`Error::InvalidLevel`], or [`Error::Compressor`] where there is no memory for it.
    pub fn new(level: u32) -> Result<Self> {
        let invalid = Error::InvalidLevel { codec: NAME, level, max: MAX_LEVEL };
        if level == 0 || level > MAX_LEVEL {
            return Err(invalid);
        }
        let mut context =
            CCtx::try_create().ok_or(Error::Compressor { codec: NAME, reason: "no memory for a context" })?;
        let level = i32::try_from(level).map_err(|_| invalid)?;
        context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
        Ok(Self(context))
    }

    /// Encodes `input`, one cluster, as one frame at the front of `output` and returns its length, or `None` when
    /// it is not smaller than the cluster or does not fit in `output`: the cluster is then stored as it is.
    ///
    /// # Errors
    /// [`Error::Compressor`] when the compressor fails.
    pub fn deflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
        match self.0.compress2(crate::codec::shrunk(input, output), input) {
            Ok(length) => Ok(Some(length)),
            Err(code) if zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall) => {
                Ok(None)
            }
            Err(code) => Err(failed(code)),
        }
    }
}

fn failed(code: usize) -> Error {
    Error::Compressor { codec: NAME, reason: zstd_safe::get_error_name(code) }
}

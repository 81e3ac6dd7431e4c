//! zlib streams (RFC 1950): deflate with a header and a checksum, as the compressed grains of other formats are.

use libdeflater::{CompressionLvl, DecompressionError};

use crate::zlib::MAX_LEVEL;
use crate::{Error, Result};

const NAME: &str = "zlib";

/// Inflates streams: the context of one worker thread.
pub struct StreamInflater(libdeflater::Decompressor);

impl Default for StreamInflater {
    fn default() -> Self {
        Self(libdeflater::Decompressor::new())
    }
}

impl StreamInflater {
    /// Inflates the stream at the start of `input` into the front of `output`, and returns how many bytes that were. What
    /// follows the stream is ignored.
    ///
    /// # Errors
    /// [`Error::Corrupt`], also for a stream that is longer than `output`, which is unspecified then.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<usize> {
        self.0.zlib_decompress(input, output).map_err(|error| {
            let reason = match error {
                DecompressionError::BadData => "not a zlib stream, or one that its checksum does not fit",
                DecompressionError::InsufficientSpace => "the stream holds more than its unit",
            };
            Error::Corrupt { codec: NAME, reason }
        })
    }
}

/// Deflates into streams: the context of one worker thread.
pub struct StreamDeflater(libdeflater::Compressor);

impl StreamDeflater {
    /// With a level of 1 to [`MAX_LEVEL`].
    ///
    /// # Errors
    /// [`Error::InvalidLevel`].
    pub fn new(level: u32) -> Result<Self> {
        let invalid = Error::InvalidLevel { codec: NAME, level, max: MAX_LEVEL };
        let known = i32::try_from(level).ok().filter(|_| (1..=MAX_LEVEL).contains(&level));
        let level = known.and_then(|level| CompressionLvl::new(level).ok()).ok_or(invalid)?;
        Ok(Self(libdeflater::Compressor::new(level)))
    }

    /// Most bytes that a stream of `length` bytes can have.
    pub fn bound(&mut self, length: usize) -> usize {
        self.0.zlib_compress_bound(length)
    }

    /// Deflates `input` into the front of `output`, which has room for [`StreamDeflater::bound`] bytes, and returns the length of the
    /// stream. It can be longer than the input.
    ///
    /// # Errors
    /// [`Error::Compressor`] for an `output` that is too small.
    pub fn deflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<usize> {
        let reason = "no room for the stream";
        self.0.zlib_compress(input, output).map_err(|_| Error::Compressor { codec: NAME, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_goes_there_and_back() {
        for level in [1, 6, MAX_LEVEL] {
            let mut deflater = StreamDeflater::new(level).unwrap();
            let noise = (0..70_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
            for input in [vec![], vec![7; 70_000], noise] {
                let mut stream = vec![0; deflater.bound(input.len())];
                let length = deflater.deflate(&input, &mut stream).unwrap();
                let mut output = vec![1; input.len() + 5];
                // What follows is ignored, and the output may be longer.
                assert_eq!(StreamInflater::default().inflate(&stream, &mut output), Ok(input.len()));
                assert!(output[..input.len()] == input);
                stream.truncate(length);
                assert_eq!(StreamInflater::default().inflate(&stream, &mut output), Ok(input.len()));
                if let Some(byte) = stream.last_mut() {
                    *byte ^= 1;
                }
                StreamInflater::default().inflate(&stream, &mut output).unwrap_err();
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut deflater = StreamDeflater::new(1).unwrap();
        let mut stream = vec![0; 1000];
        let length = deflater.deflate(&[5; 600], &mut stream).unwrap();
        assert!(StreamInflater::default().inflate(&stream[..length], &mut [0; 599]).is_err());
        assert!(deflater.deflate(&[5; 600], &mut [0; 4]).is_err());
        assert!(StreamDeflater::new(0).is_err() && StreamDeflater::new(MAX_LEVEL + 1).is_err());
    }
}

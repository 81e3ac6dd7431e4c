//! The compressions, and their decoders.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use qcow2_core::{Error, ErrorKind, Result, Storage, StorageExt};
use zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use crate::input::{Input, Seen};

/// A compression of whole files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// RFC 1952: one member or several.
    Gzip,
    /// One stream or several.
    Xz,
    /// RFC 8878: one frame or several.
    Zstd,
}

/// KiB that the decoder of xz takes beside its dictionary.
const XZ_OVERHEAD: u64 = 128;
/// Smallest and largest window of zstd, as powers of two.
const WINDOWS: std::ops::RangeInclusive<u32> = 10..=31;

impl Codec {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gzip, Self::Xz, Self::Zstd];

    /// What its own tool is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// The one with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// What a file begins with. Of gzip with the only method that there is.
    pub(crate) const fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => b"\x1f\x8b\x08",
            Self::Xz => b"\xfd7zXZ\0",
            Self::Zstd => b"\x28\xb5\x2f\xfd",
        }
    }

    /// A decoder of the file from its start, whose window takes `max_window` bytes at most.
    pub(crate) fn decoder(self, storage: &Arc<dyn Storage>, max_window: u64) -> Result<Decoder> {
        let input = Input::new(Arc::clone(storage), 0);
        let seen = input.seen();
        let stream: Box<dyn Read + Send> = match self {
            Self::Gzip => Box::new(Members { now: Some(GzDecoder::new(input)) }),
            Self::Xz => {
                let most = (max_window / 1024).saturating_add(XZ_OVERHEAD);
                Box::new(XzReader::new_mem_limit(input, true, u32::try_from(most).unwrap_or(u32::MAX - 1)))
            }
            Self::Zstd => Box::new(Frames::new(input, max_window)?),
        };
        Ok(Decoder { codec: self, storage: Arc::clone(storage), stream, seen, max_window })
    }
}

/// What a compressed file holds, front to back.
pub(crate) struct Decoder {
    codec: Codec,
    storage: Arc<dyn Storage>,
    stream: Box<dyn Read + Send>,
    seen: Arc<Seen>,
    max_window: u64,
}

impl Decoder {
    /// Fills `buf`, as far as there is data; at the end the checksums were right. After an error nothing more can be had.
    ///
    /// # Errors
    /// `Corrupt`, `Limit` for a window that is too large, `UnsupportedFeature`, `Io`.
    pub(crate) fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        while got < buf.len() {
            match self.stream.read(buf.get_mut(got..).unwrap_or_default()) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failure(&error)),
            }
        }
        Ok(got)
    }

    /// First byte of the file that was not decoded.
    pub(crate) fn position(&self) -> u64 {
        self.seen.position()
    }

    fn failure(&self, error: &io::Error) -> Error {
        if let Some(error) = self.seen.take_error() {
            return error;
        }
        let (name, at) = (self.codec.name(), self.position());
        let error = match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::new(ErrorKind::Corrupt, format!("the {name} data is cut short: the file ends at {at}"))
            }
            io::ErrorKind::OutOfMemory => {
                let limit = self.max_window;
                let message = format!("the {name} data needs a window above the limit of {limit} bytes");
                Error::new(ErrorKind::Limit, message).with_field("maxMetadataBytes")
            }
            io::ErrorKind::Unsupported => {
                Error::new(ErrorKind::UnsupportedFeature, format!("the {name} data cannot be read: {error}"))
            }
            _ => Error::new(
                ErrorKind::Corrupt,
                format!("the {name} data is damaged in front of {at}: {error}"),
            ),
        };
        self.storage.located(error.with_offset(at))
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("codec", &self.codec).field("position", &self.position()).finish()
    }
}

const fn invalid(message: &'static str) -> (io::ErrorKind, &'static str) {
    (io::ErrorKind::InvalidData, message)
}

fn failed((kind, message): (io::ErrorKind, &'static str)) -> io::Error {
    io::Error::new(kind, message)
}

/// The members of a gzip file. Each ends with a checksum, which its decoder holds against the data.
struct Members {
    /// None at the end.
    now: Option<GzDecoder<Input>>,
}

impl Read for Members {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.now {
            let got = member.read(buf)?;
            if got > 0 || buf.is_empty() {
                return Ok(got);
            }
            let Some(mut input) = self.now.take().map(GzDecoder::into_inner) else { break };
            if another(&mut input)? {
                self.now = Some(GzDecoder::new(input));
            }
        }
        Ok(0)
    }
}

/// Whether another member follows. Zeroes behind the last one fill up a tape, or a device.
fn another(input: &mut Input) -> io::Result<bool> {
    let mut padded = false;
    loop {
        let rest = input.fill_buf()?;
        match rest.first() {
            None => return Ok(false),
            Some(0) => {
                let zeroes = rest.iter().take_while(|byte| **byte == 0).count();
                input.consume(zeroes);
                padded = true;
            }
            Some(_) if padded => return Err(failed(invalid("what follows the last member is no padding"))),
            Some(_) => return Ok(true),
        }
    }
}

/// The frames of a zstd file. Each can end with a checksum, which its decoder holds against the data.
struct Frames {
    context: DCtx<'static>,
    input: Input,
    /// Between two frames.
    complete: bool,
}

impl Frames {
    fn new(input: Input, max_window: u64) -> Result<Self> {
        let memory = || Error::new(ErrorKind::Internal, "no memory for a zstd decoder");
        let mut context = DCtx::try_create().ok_or_else(memory)?;
        let window = max_window.checked_ilog2().unwrap_or(0).clamp(*WINDOWS.start(), *WINDOWS.end());
        context.set_parameter(DParameter::WindowLogMax(window)).map_err(|_| memory())?;
        Ok(Self { context, input, complete: true })
    }
}

impl Read for Frames {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let part = self.input.fill_buf()?;
            let at_end = part.is_empty();
            if at_end && self.complete {
                return Ok(0);
            }
            let (mut from, mut to) = (InBuffer::around(part), OutBuffer::around(&mut *buf));
            let hint = self.context.decompress_stream(&mut to, &mut from).map_err(|code| {
                let large = ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge;
                let reason = zstd_safe::get_error_name(code);
                let is_large = zstd_safe::is_error_kind(code, large);
                failed(if is_large { (io::ErrorKind::OutOfMemory, reason) } else { invalid(reason) })
            })?;
            let (taken, made) = (from.pos(), to.pos());
            self.input.consume(taken);
            self.complete = hint == 0;
            match made {
                0 if at_end => {
                    return Err(failed((io::ErrorKind::UnexpectedEof, "the last frame is cut short")));
                }
                0 if taken == 0 => return Err(failed(invalid("the decoder makes no progress"))),
                0 => {}
                made => return Ok(made),
            }
        }
    }
}

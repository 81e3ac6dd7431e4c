//! New images.

use qcow2_core::space::{Preallocation, empty, reserve, write_zero_bytes};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

use crate::structures::{FREE, HEADER_LENGTH, Header, ImageType, Uuid};

/// Entries of the block map that are written at once.
const PIECE: u32 = 16 << 10;

/// A new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVdi {
    header: Header,
    preallocation: Preallocation,
}

fn uuid() -> Result<Uuid> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| {
        match e.raw_os_error().map(std::io::Error::from_raw_os_error) {
            Some(io) => Error::io(io, "getrandom"),
            None => Error::new(ErrorKind::Io, format!("no random numbers: {e}")),
        }
    })?;
    // RFC 9562, version 4; the number with the version lies in the other byte order.
    let [_, _, _, _, _, _, _, version, variant, ..] = &mut bytes;
    *version = (*version & 0x0f) | 0x40;
    *variant = (*variant & 0x3f) | 0x80;
    Ok(bytes)
}

impl NewVdi {
    /// An image with a disk of `size` bytes. It is static where `is_static` says so, and with every `preallocation`: then all blocks have
    /// their place.
    ///
    /// # Errors
    /// `Limit` for a disk that is too large; `InvalidArgument` for one that is not whole sectors; `Io` without random numbers.
    pub fn new(size: u64, is_static: bool, preallocation: Preallocation) -> Result<Self> {
        if !size.is_multiple_of(512) {
            let message = format!("the size of a disk is a multiple of 512 bytes, not {size}");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("size"));
        }
        let is_static = is_static || preallocation != Preallocation::Off;
        let image_type = if is_static { ImageType::Static } else { ImageType::Dynamic };
        Ok(Self { header: Header::new(size, image_type, [uuid()?, uuid()?])?, preallocation })
    }

    /// The header that it gets.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        let layout = self.header.layout();
        layout.data + u64::from(self.header.blocks_allocated) * layout.stride()
    }

    /// Makes the image in `storage`, which loses what it held. It is none before its header is written, which comes last.
    ///
    /// # Errors
    /// `Io`; `Aborted`.
    pub fn create(&self, storage: &dyn Storage, job: &Job) -> Result<()> {
        empty(storage)?;
        if storage.traits().block_device {
            storage.write_all_at(Mem::from(&[0; HEADER_LENGTH][..]), 0)?;
        }
        let length = self.file_length();
        storage.resize(length)?;
        let data = self.header.offset_data.into();
        match self.preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => reserve(storage, data..length, job)?,
            Preallocation::Full => write_zero_bytes(storage, data, length - data, job)?,
        }
        self.write_block_map(storage, job, |block| {
            if self.header.image_type == ImageType::Static { block } else { FREE }
        })?;
        storage.write_all_at(Mem::from(&self.header.to_bytes()[..]), 0)
    }

    /// Writes the block map, and zeroes up to the data.
    fn write_block_map(&self, storage: &dyn Storage, job: &Job, entry: impl Fn(u32) -> u32) -> Result<()> {
        let (blocks, mut at) = (self.header.blocks_in_image, u64::from(self.header.offset_bmap));
        for first in (0..blocks).step_by(PIECE as usize) {
            job.checkpoint()?;
            let piece = first..blocks.min(first.saturating_add(PIECE));
            let bytes: Vec<u8> = piece.flat_map(|block| entry(block).to_le_bytes()).collect();
            storage.write_all_at(Mem::from(&bytes[..]), at)?;
            at += bytes.len() as u64;
        }
        let rest = vec![0; (u64::from(self.header.offset_data) - at) as usize];
        storage.write_all_at(Mem::from(&rest[..]), at)
    }
}

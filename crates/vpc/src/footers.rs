//! The footer at the end of a file, and its copy at the start of one with blocks.

use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

use crate::structures::{DiskType, FOOTER_LENGTH, Footer, OLD_FOOTER_LENGTH};

/// What a file has at its two ends.
#[derive(Debug)]
pub struct Footers {
    /// At the start.
    pub front: Result<Footer>,
    /// At the end.
    pub back: Result<Footer>,
    /// Where the one at the end begins.
    pub back_offset: u64,
}

/// Reads both.
///
/// # Errors
/// `Io`. What is no footer is no error here.
pub fn read_footers(storage: &dyn Storage) -> Result<Footers> {
    let length = storage.size()?;
    let read = |offset: u64| {
        let mut bytes = [0; FOOTER_LENGTH];
        let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?;
        Ok(Footer::parse(bytes.get(..got).unwrap_or_default()))
    };
    let front = read(0)?;
    let mut back_offset = length.saturating_sub(FOOTER_LENGTH as u64);
    let mut back = read(back_offset)?;
    // Before 2004 the last byte was missing.
    let old_offset = length.saturating_sub(OLD_FOOTER_LENGTH as u64);
    if back.is_err()
        && let Ok(old) = read(old_offset)?
    {
        (back, back_offset) = (Ok(old), old_offset);
    }
    Ok(Footers { front, back, back_offset })
}

impl Footers {
    /// The one that counts. A guest can write any bytes to the start of a fixed disk, so the end of the file is believed where it says that
    /// it is one of exactly this length; else the start is, as QEMU does, where it is sound; else the end.
    ///
    /// # Errors
    /// As [`Footer::parse`]; `Corrupt` for a fixed disk without a footer at its end.
    pub fn chosen(&self) -> Result<&Footer> {
        match (&self.front, &self.back) {
            (_, Ok(back)) if back.disk_type() == DiskType::Fixed && self.is_whole(back) => Ok(back),
            (Ok(front), _) if front.disk_type() != DiskType::Fixed => Ok(front),
            (_, Ok(back)) => Ok(back),
            (Ok(_), Err(_)) => {
                let message = "the footer of a fixed disk is missing at the end of the file, which was cut off or extended";
                Err(Error::new(ErrorKind::Corrupt, message).with_field("footer"))
            }
            (Err(front), Err(back)) => {
                let error = if front.kind() == ErrorKind::InvalidHeader { back } else { front };
                Err(copy_of(error))
            }
        }
    }

    /// Whether it is the footer of a fixed disk that ends in front of it.
    fn is_whole(&self, back: &Footer) -> bool {
        back.current_size() == self.back_offset || back.virtual_size() == self.back_offset
    }
}

/// The same error once more.
pub(crate) fn copy_of(error: &Error) -> Error {
    let again = Error::new(error.kind(), error.message());
    match error.field() {
        Some(field) => again.with_field(field),
        None => again,
    }
}

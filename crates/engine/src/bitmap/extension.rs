//! The bitmaps extension in the header: found, added and removed in place.
//!
//! A torn write must never leave a chain of extensions that does not parse. So a new extension is written behind the end
//! marker, where nothing looks, and becomes part of the chain by the one aligned word of eight bytes that overwrites the
//! marker.

use qcow2_format::header::extension::{BITMAPS, BitmapsExtension};

use crate::maintenance::Session;
use crate::{ErrorKind, Result};

/// Offset of `backing_file_offset`, followed by `backing_file_size`.
const BACKING_FILE_OFFSET: u64 = 8;
/// Bytes of an extension's type and length.
const HEAD: u64 = 8;
/// Bytes of the extension's data.
const DATA: u64 = 24;

/// The chain of extensions.
struct Chain {
    /// Offset of the bitmaps extension's data.
    bitmaps: Option<u64>,
    /// Offset of the end marker (or of the end of the space).
    end: u64,
}

impl Session<'_> {
    /// Offset of the bitmaps extension's data in the file.
    pub(crate) fn find_extension(&self) -> Result<Option<u64>> {
        Ok(self.chain(&self.first_cluster()?)?.bitmaps)
    }

    fn first_cluster(&self) -> Result<Vec<u8>> {
        let mut cluster = vec![0u8; self.geometry().cluster_len()];
        self.read(0, &mut cluster)?;
        Ok(cluster)
    }

    fn chain(&self, cluster: &[u8]) -> Result<Chain> {
        let field = |at: u64, width: u64| -> Result<u64> {
            let bytes = cluster.get(at as usize..(at + width) as usize);
            let bytes = bytes
                .ok_or_else(|| self.image.error(ErrorKind::Corrupt, "the header extensions have no end"))?;
            Ok(bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b)))
        };
        let mut chain = Chain { bitmaps: None, end: field(100, 4)? };
        let space = match field(BACKING_FILE_OFFSET, 8)? {
            0 => cluster.len() as u64,
            offset => offset,
        };
        // The chain was validated when the image was opened.
        while chain.end + HEAD <= space {
            let kind = field(chain.end, 4)?;
            if kind == 0 {
                break;
            }
            if kind == u64::from(BITMAPS) {
                chain.bitmaps = Some(chain.end + HEAD);
            }
            chain.end += HEAD + field(chain.end + 4, 4)?.next_multiple_of(8);
        }
        Ok(chain)
    }

    /// Adds the extension at the end of the chain. Durable, but for its last word, with the next barrier.
    pub(super) fn append_extension(&self, extension: &BitmapsExtension) -> Result<()> {
        let cluster = self.first_cluster()?;
        let end = self.chain(&cluster)?.end;
        let behind = end + HEAD + DATA + HEAD;
        self.make_room(&cluster, behind)?;
        let mut bytes = extension.encode().to_vec();
        bytes.extend_from_slice(&[0; HEAD as usize]);
        self.write(end + HEAD, &bytes)?;
        self.barrier()?;
        let mut head = BITMAPS.to_be_bytes().to_vec();
        head.extend_from_slice(&(DATA as u32).to_be_bytes());
        self.write(end, &head)
    }

    /// Moves the backing file name where it does not begin before `behind`.
    fn make_room(&self, cluster: &[u8], behind: u64) -> Result<()> {
        let full = |bytes: u64| {
            let message =
                format!("the header has no room for the bitmaps extension: {bytes} bytes do not fit");
            self.image.error(ErrorKind::Limit, message)
        };
        let size = cluster.len() as u64;
        let Some(name) = self.image.header().backing_file.as_deref() else {
            return if behind <= size { Ok(()) } else { Err(full(behind)) };
        };
        let at = BACKING_FILE_OFFSET as usize;
        let offset = cluster.get(at..at + 8).unwrap_or_default();
        let offset = offset.iter().fold(0, |n, &b| n << 8 | u64::from(b));
        if offset >= behind {
            return Ok(());
        }
        let target = behind.max(offset + name.len() as u64).next_multiple_of(8);
        if target + name.len() as u64 > size {
            return Err(full(target + name.len() as u64));
        }
        self.write(target, name)?;
        self.barrier()?;
        self.write(BACKING_FILE_OFFSET, &target.to_be_bytes())?;
        self.barrier()
    }

    /// Takes the extension out of the chain where it is the last one; elsewhere it stays, and its autoclear bit says
    /// that it means nothing.
    pub(super) fn remove_extension(&self) -> Result<()> {
        let chain = self.chain(&self.first_cluster()?)?;
        match chain.bitmaps {
            Some(data) if data + DATA == chain.end => {
                self.write(data - HEAD, &[0; HEAD as usize])?;
                self.barrier()
            }
            _ => Ok(()),
        }
    }
}

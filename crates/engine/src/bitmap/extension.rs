//! The bitmaps extension in the header: found, added and removed in place.
//!
//! A torn write must never leave a chain of extensions that does not parse. So a new extension is written behind the end
//! marker, where nothing looks, and becomes part of the chain by the one aligned word of eight bytes that overwrites the
//! marker.

use qcow2_format::header::extension::{BitmapsExtension, HEAD_LENGTH, Places};
use qcow2_format::header::field::{BACKING_FILE_OFFSET, Patch};

use crate::maintenance::Session;
use crate::patch::encode_patch;
use crate::{ErrorKind, Result};

/// Bytes of an extension's type and length.
const HEAD: u64 = HEAD_LENGTH as u64;
/// Bytes of the extension's data.
const DATA: u64 = BitmapsExtension::LENGTH as u64;

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

    /// Where the extensions are; they were validated when the image was opened.
    fn chain(&self, cluster: &[u8]) -> Result<Places> {
        Places::find(cluster)
            .map_err(|_| self.image.error(ErrorKind::Corrupt, "the header extensions have no end"))
    }

    /// Adds the extension at the end of the chain. Durable, but for its last word, with the next barrier.
    pub(super) fn append_extension(&self, extension: &BitmapsExtension) -> Result<()> {
        let cluster = self.first_cluster()?;
        let end = self.chain(&cluster)?.end;
        let behind = end + HEAD + DATA + HEAD;
        self.make_room(&cluster, behind)?;
        let mut bytes = extension.encode().to_vec();
        bytes.extend_from_slice(&[0; HEAD_LENGTH]);
        self.write(end + HEAD, &bytes)?;
        self.barrier()?;
        self.write(end, &BitmapsExtension::head())
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
        let offset = BACKING_FILE_OFFSET.read(cluster).unwrap_or(0);
        if offset >= behind {
            return Ok(());
        }
        let target = behind.max(offset + name.len() as u64).next_multiple_of(8);
        if target + name.len() as u64 > size {
            return Err(full(target + name.len() as u64));
        }
        self.write(target, name)?;
        self.barrier()?;
        let patch = Patch::new().set(BACKING_FILE_OFFSET, target);
        let (at, bytes) = encode_patch(&patch, &self.image.header().steady())?;
        self.write(at, &bytes)?;
        self.barrier()
    }

    /// Takes the extension out of the chain where it is the last one; elsewhere it stays, and its autoclear bit says
    /// that it means nothing.
    pub(super) fn remove_extension(&self) -> Result<()> {
        let chain = self.chain(&self.first_cluster()?)?;
        match chain.bitmaps {
            Some(data) if data + DATA == chain.end => {
                self.write(data - HEAD, &[0; HEAD_LENGTH])?;
                self.barrier()
            }
            _ => Ok(()),
        }
    }
}

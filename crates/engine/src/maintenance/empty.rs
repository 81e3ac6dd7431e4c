//! Emptying an image: everything of its disk is read from the backing file afterwards.

use qcow2_format::words;

use super::session::Session;
use crate::image::Image;
use crate::{Result, StorageExt};

impl Image {
    /// Gives up everything that the top layer's active disk has; its snapshots keep what is theirs. The caller knows that
    /// the backing file has the same contents, durably: a crash between two writes then changes nothing that is read.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn empty(&self) -> Result<()> {
        let session = Session::begin(self)?;
        let l1 = session.image.l1();
        if l1.iter().all(|entry| *entry == 0) {
            return Ok(());
        }
        let zeroes = vec![0u8; l1.len() * 8];
        session.write_changed(session.writer.l1_offset(), &words::encode(&l1), &zeroes)?;
        session.image.changing().replace_l1(vec![0; l1.len()]);
        // References go before refcounts: the loss must be durable before anything is used again.
        session.barrier()?;
        session.drop_references(&l1)?;
        session.barrier()?;
        let external = session.image.header().has_data_file() && !session.image.header().data_file_raw();
        match session.image.data_file().filter(|_| external) {
            Some(data) => {
                // A device goes on behind the disk.
                let length = data.size()?.min(session.image.virtual_size());
                session.end_reads()?;
                data.free(0, length)
            }
            None => Ok(()),
        }
    }
}

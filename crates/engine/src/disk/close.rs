//! Closing a disk.

use crate::image::Image;
use crate::maintenance::Session;
use crate::{ErrorKind, Result, StorageExt};

impl Image {
    /// Flushes, gives reservations back and cuts the file to what it uses. Later writes fail with `Closed`. Closing an
    /// image that refuses writes changes nothing: what was written since its last flush may be lost, as the error said
    /// that led there.
    ///
    /// # Errors
    /// As [`Image::flush`], and what the system reports when the files are closed.
    pub fn close(&self) -> Result<()> {
        self.clones.end();
        self.seal().inspect_err(|_| self.rescue_bitmaps())?;
        // Some file systems tell only now that a write failed.
        self.layers().iter().flat_map(|layer| layer.files()).try_for_each(|file| file.report_close())
    }

    /// Closes the image but for its clones: what they read does not change any more.
    pub(crate) fn seal(&self) -> Result<()> {
        match (self.top_qcow2(), self.top_writable()) {
            (Some(image), _) => {
                let Some(writer) = image.open_writer() else { return Ok(()) };
                if writer.check().is_err() {
                    return Ok(());
                }
                {
                    let _alone = writer.gate.write();
                    // The first request may have been under way.
                    if writer.begun.get().is_none() {
                        writer.close();
                        return Ok(());
                    }
                }
                let session = match Session::begin(self) {
                    // Somebody else closed it meanwhile.
                    Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
                    begun => begun?,
                };
                self.store_bitmaps(&session)?;
                writer.give_back(image)?;
                writer.mark_clean(image)?;
                writer.close();
                Ok(())
            }
            (_, Some(layer)) => layer.close(),
            _ => Ok(()),
        }
    }
}

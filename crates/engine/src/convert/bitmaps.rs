//! The bitmaps of a source in the image that was made of it.

use std::sync::Arc;

use crate::bitmap::CopyableBitmaps;
use crate::image::{Image, OpenOptions, Qcow2};
use crate::writer::WriteOptions;
use crate::{DataDoor, Result, Storage};

impl CopyableBitmaps<'_> {
    /// Adds the bitmaps to the complete image in `target`, whose disk has the same size and whose guest data is behind
    /// `data_door`; one at a time is in memory.
    ///
    /// # Errors
    /// `UnsupportedFeature` for a version 2 target; `InvalidArgument` for a disk of another size; `Io`.
    pub fn copy_to(
        &self,
        target: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
        data_door: Option<Arc<dyn DataDoor>>,
    ) -> Result<()> {
        if self.names.is_empty() {
            return Ok(());
        }
        let options = OpenOptions { data_door, ..self.source.open_options().for_another() };
        let mut qcow2 = Qcow2::open(target, &options)?;
        if let Some(data_file) = data_file {
            qcow2.set_data_file(data_file);
        }
        qcow2.enable_writing(WriteOptions::default())?;
        let target = Image::new(vec![Box::new(qcow2)])?;
        self.add_to(&target)?;
        target.close()
    }
}

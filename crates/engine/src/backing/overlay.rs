//! External snapshot of a disk that is in use: a new image on top takes the writes, what is there becomes its backing file.

use std::sync::Arc;

use crate::{Image, Layer, Result};

impl Image {
    /// The disk with the layer that `make` gives on top, open for writing; all layers of this image are below it, and no longer
    /// written to. When `make` is called, all that was written is durable; the former top is closed behind it. The caller
    /// lets no request of this image run meanwhile, nor afterwards, but for clones under way: they go on.
    ///
    /// # Errors
    /// `ReadOnly`, what flushing gives, and those of `make`: this image goes on then. What closing the former top or
    /// opening the layers below gives: this image takes no more writes then.
    pub fn put_overlay(&self, make: impl FnOnce() -> Result<Box<dyn Layer>>) -> Result<Self> {
        // An image that refuses writes would be closed as it is.
        self.flush()?;
        let mut layers = vec![make()?];
        self.seal()?;
        for layer in self.layers() {
            layers.push(layer.reopen()?);
        }
        let mut image = Self::new(layers)?;
        image.clones = Arc::clone(&self.clones);
        Ok(image)
    }
}

//! External snapshot of a disk that is in use: a new image on top takes the writes, what is there becomes its backing file.

use std::sync::Arc;

use crate::image::{Layer, OpenOptions, Qcow2, Raw};
use crate::{Image, Result, WriteOptions};

/// How layers are opened again.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReopenOptions {
    /// Most bytes of L2 tables to cache, for each layer.
    pub l2_cache_bytes: Option<u64>,
    /// How the top is written to.
    pub write: WriteOptions,
}

impl Image {
    /// The disk with the layer that `make` gives on top, open for writing; all layers of this image are below it, and no longer
    /// written to. When `make` is called, all that was written is durable; the former top is closed behind it. The caller
    /// lets no request of this image run meanwhile, nor afterwards, but for clones under way: they go on.
    ///
    /// # Errors
    /// `ReadOnly`, what flushing gives, and those of `make`: this image goes on then. What closing the former top or
    /// opening the layers below gives: this image takes no more writes then.
    pub fn put_overlay(&self, options: &ReopenOptions, make: impl FnOnce() -> Result<Layer>) -> Result<Self> {
        // An image that refuses writes would be closed as it is.
        self.flush()?;
        let mut layers = vec![make()?];
        self.seal()?;
        for layer in self.layers() {
            layers.push(reopen(layer, options)?);
        }
        let mut image = Self::new(layers)?;
        image.clones = Arc::clone(&self.clones);
        Ok(image)
    }
}

/// A layer anew, on the same file, for reading.
fn reopen(layer: &Layer, options: &ReopenOptions) -> Result<Layer> {
    let storage = Arc::clone(layer.storage());
    let Some(old) = layer.as_qcow2() else { return Ok(Layer::Raw(Raw::new(storage)?)) };
    let options = OpenOptions {
        limits: *old.limits(),
        l2_cache_bytes: options.l2_cache_bytes,
        ..OpenOptions::default()
    };
    let mut new = Qcow2::open(storage, &options)?;
    if let Some(data) = old.data_file() {
        new.set_data_file(Arc::clone(data));
    }
    Ok(Layer::Qcow2(Box::new(new)))
}

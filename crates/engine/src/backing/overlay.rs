//! External snapshot of a disk that is in use: a new image on top takes the writes, what is there becomes its backing file.

use std::sync::Arc;

use crate::image::{Layer, OpenOptions, Qcow2, Raw};
use crate::{Error, Image, Result, WriteOptions};

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
    /// written to. When `make` is called, the top is closed: complete and durable. The caller lets no request of this image
    /// run meanwhile, nor afterwards, but for clones under way: they go on.
    ///
    /// After an error of `make` the disk goes on as it was: it is the image that is given back then, with the error.
    ///
    /// # Errors
    /// `ReadOnly`; what flushing gives, before anything is changed; what opening the top for writing again gives, if that fails:
    /// then this image is closed.
    pub fn put_overlay(
        &self,
        options: &ReopenOptions,
        make: impl FnOnce() -> Result<Layer>,
    ) -> Result<(Self, Option<Error>)> {
        // An image that refuses writes would be closed as it is.
        self.flush()?;
        self.seal()?;
        let made = make().and_then(|overlay| {
            let mut layers = vec![overlay];
            layers.extend(self.reopened(options)?);
            Self::new(layers)
        });
        let (mut image, error) = match made {
            Ok(image) => (image, None),
            Err(error) => {
                let mut layers = self.reopened(options)?;
                if let Some(top) = layers.first_mut() {
                    top.enable_writing(options.write)?;
                }
                (Self::new(layers)?, Some(error))
            }
        };
        image.clones = Arc::clone(&self.clones);
        Ok((image, error))
    }

    /// The layers anew, on the same files, for reading.
    fn reopened(&self, options: &ReopenOptions) -> Result<Vec<Layer>> {
        self.layers().iter().map(|layer| reopen(layer, options)).collect()
    }
}

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

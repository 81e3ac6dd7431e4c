//! An overlay in a file, under a running image.

use std::path::Path;
use std::sync::Arc;

use super::{Lock, NewDisk, Target};
use crate::create::{CreateOptions, create};
use crate::storage::{Access, CacheMode, FileStorage};
use crate::{Image, Job, Layer, LayerExt, OpenOptions, Qcow2, Result, WriteOptions};

/// How to make an overlay.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// Its file, which does not exist.
    pub target: Target,
    /// Its options, with the name of its backing file; its size is the image's.
    pub create: CreateOptions,
    /// How its file is cached.
    pub cache: CacheMode,
    /// How the files of the image are claimed.
    pub lock: Lock,
    /// Most bytes of L2 tables to cache, where the image below does not say.
    pub l2_cache_bytes: Option<u64>,
    /// How it is written to.
    pub write: WriteOptions,
}

impl Overlay {
    /// Makes the overlay on top of `below`, which nobody uses meanwhile: the disk that goes on with it.
    ///
    /// # Errors
    /// Those of creating; of [`Image::put_overlay`], with what those say of `below`.
    pub fn put_on(&self, below: &Image, job: &Arc<Job>) -> Result<Image> {
        job.checkpoint()?;
        let options = CreateOptions { size: below.virtual_size(), ..self.create.clone() };
        let disk = NewDisk::Qcow2 { create: Box::new(options.clone()), data_path: None };
        let files = disk.start(&self.target, None, job)?;
        create(files.storage(), None, &options, job)?;
        let path = files.disk().path().to_owned();
        let mut named = false;
        let put = below.put_overlay(|| {
            files.commit(true)?;
            named = true;
            self.open(&path, below)
        });
        if put.is_ok() {
            // Others may read the former top now. One that stays claimed for writing is only kept more to itself.
            let _claimed = self.claim_for_reading(below);
        } else if named {
            // Nobody goes on with it. The error that led here is the one to report.
            let _removed = std::fs::remove_file(&path);
        }
        put
    }

    fn open(&self, path: &Path, below: &Image) -> Result<Box<dyn Layer>> {
        let storage = FileStorage::open_cached(path, Access::ReadWrite, self.cache)?.into_storage();
        self.lock.for_writing(true).claim(&*storage, true)?;
        let cache = OpenOptions { l2_cache_bytes: self.l2_cache_bytes, ..OpenOptions::default() };
        let options = below.top_qcow2().map_or(cache, |top| top.open_options().for_another());
        // Who made the door was asked whether it may be weak.
        let options = OpenOptions { data_door: self.create.data_door.clone(), allow_weak: true, ..options };
        let mut layer = Qcow2::open(storage, &options)?;
        layer.enable_writing(self.write)?;
        Ok(Box::new(layer))
    }

    /// Claims the files of the former top only for reading.
    fn claim_for_reading(&self, below: &Image) -> Result<()> {
        let Some(top) = below.layers().first() else { return Ok(()) };
        let lock = self.lock.for_writing(false);
        let image = top.as_qcow2().is_some() || top.encryption().is_some();
        lock.claim(&**top.storage(), image)?;
        match top.as_qcow2().and_then(Qcow2::data_file) {
            Some(data) => lock.claim(&**data, true),
            None => Ok(()),
        }
    }
}

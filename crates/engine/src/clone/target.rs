//! What a clone is written to.

use std::sync::Arc;

use qcow2_transform::zero;

use crate::convert::{Compression, DEFAULT_SPARSE_SIZE};
use crate::create::{CreateOptions, Preallocation, create_raw, create_withheld, publish};
use crate::image::{Image, OpenOptions, Qcow2};
use crate::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt, WriteOptions};

/// Where to clone to. What the target held is lost.
#[derive(Debug, Clone)]
pub enum CloneTarget {
    /// A raw disk. What is zero becomes a hole.
    Raw {
        /// File or device; a device must be large enough.
        storage: Arc<dyn Storage>,
        /// Space to take for a file.
        preallocation: Preallocation,
    },
    /// A new qcow2 image without a backing file.
    Qcow2 {
        /// File or device.
        storage: Arc<dyn Storage>,
        /// The external data file that `create` names.
        data_file: Option<Arc<dyn Storage>>,
        /// Options of the image; its size is the disk's.
        create: Box<CreateOptions>,
        /// Compress the clusters that shrink.
        compression: Option<Compression>,
    },
}

impl CloneTarget {
    /// Makes the target, which reads as zeroes then.
    pub(super) fn prepare(self, size: u64, job: &Job) -> Result<Sink> {
        match self {
            Self::Raw { storage, preallocation } => {
                if !storage.traits().block_device {
                    create_raw(&*storage, size, preallocation, job)?;
                    return Ok(Sink::Raw(storage));
                }
                let room = storage.size()?;
                if room < size {
                    let message = format!("the target holds {room} bytes, the disk has {size}");
                    return Err(storage.located(Error::new(ErrorKind::InvalidArgument, message)));
                }
                storage.zero(0, size, true)?;
                Ok(Sink::Raw(storage))
            }
            Self::Qcow2 { storage, data_file, mut create, compression } => {
                check(&create, compression)?;
                create.size = size;
                Self::make_qcow2(storage, data_file, &create, compression, job)
            }
        }
    }

    fn make_qcow2(
        storage: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
        options: &CreateOptions,
        compression: Option<Compression>,
        job: &Job,
    ) -> Result<Sink> {
        let header = create_withheld(Arc::clone(&storage), data_file.clone(), options, job)?;
        let open = OpenOptions { data_door: options.data_door.clone(), ..OpenOptions::default() };
        let mut qcow2 = Qcow2::open_with(storage, header, &open)?;
        if let Some(data_file) = data_file {
            qcow2.set_data_file(data_file);
        }
        let g = *qcow2.geometry();
        let write = WriteOptions {
            compression_level: compression.and_then(|c| c.level),
            compression_window: compression.map(|c| c.window).unwrap_or_default(),
            ..WriteOptions::default()
        };
        qcow2.enable_writing(write)?;
        let unit = if compression.is_some() { g.cluster_size() } else { g.subcluster_size() };
        Ok(Sink::Qcow2 {
            image: Box::new(Image::new(vec![Box::new(qcow2)])?),
            cluster: g.cluster_size(),
            unit: unit as usize,
            compressed: compression.is_some(),
        })
    }
}

fn check(create: &CreateOptions, compression: Option<Compression>) -> Result<()> {
    let refuse =
        |field, message: &str| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
    if create.backing.is_some() {
        return refuse("backing_file", "a clone holds the whole disk: it has no backing file");
    }
    if create.keep_data_file {
        return refuse(
            "keep_data_file",
            "a clone writes the whole disk: the data file cannot keep what it holds",
        );
    }
    if compression.is_some() && create.data_file.is_some() {
        return refuse("compress", "an external data file cannot hold compressed clusters");
    }
    if compression.is_some() && create.data_door.is_some() {
        return refuse("compress", "an encrypted target cannot hold compressed clusters");
    }
    if compression.is_some() && create.preallocation != Preallocation::Off {
        return refuse("preallocation", "compressed clusters cannot be preallocated");
    }
    Ok(())
}

/// A target that is ready: it reads as zeroes, and chunks can come in any order.
#[derive(Debug)]
pub(super) enum Sink {
    Raw(Arc<dyn Storage>),
    Qcow2 {
        image: Box<Image>,
        /// Bytes of a cluster.
        cluster: u64,
        /// Bytes of what is zero or data as a whole: a cluster or subcluster.
        unit: usize,
        compressed: bool,
    },
}

impl Sink {
    /// Bytes of a cluster, 1 where there are none.
    pub(super) fn cluster_size(&self) -> u64 {
        match self {
            Self::Raw(_) => 1,
            Self::Qcow2 { cluster, .. } => *cluster,
        }
    }

    /// Writes what is not zero; returns how many bytes that were.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<u64> {
        let unit = match self {
            Self::Raw(_) => DEFAULT_SPARSE_SIZE as usize,
            Self::Qcow2 { unit, .. } => *unit,
        };
        let mut written = 0;
        for run in zero::runs(bytes, unit).filter(|run| !run.zero) {
            let data = Mem::from(bytes.get(run.start..run.start + run.length).unwrap_or_default());
            let at = offset + run.start as u64;
            match self {
                Self::Raw(storage) => storage.write_all_at(data, at)?,
                Self::Qcow2 { image, compressed: true, .. } => image.write_compressed_at(data, at)?,
                Self::Qcow2 { image, .. } => image.write_at(data, at)?,
            }
            written += run.length as u64;
        }
        Ok(written)
    }

    /// Makes the target complete and durable.
    pub(super) fn finish(&self) -> Result<()> {
        match self {
            Self::Raw(storage) => storage.flush(),
            Self::Qcow2 { image, .. } => {
                image.close()?;
                // Until now, the file was no image.
                image.layers().iter().try_for_each(|layer| publish(&**layer.storage()))
            }
        }
    }
}

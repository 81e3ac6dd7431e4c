//! What a clone is written to.

use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_core::new_image::Hosts;
use qcow2_transform::zero;

use crate::convert::{Compression, DEFAULT_SPARSE_SIZE, check_compressed};
use crate::create::{CreateOptions, NewTarget, create_raw, create_withheld, publish};
use crate::image::{Image, OpenOptions, Qcow2};
use crate::{DiskOptions, Error, ErrorKind, Job, Layer, Mem, Raw, Result, Storage, StorageExt, WriteOptions};

/// Where to clone to.
#[derive(Debug, Clone)]
pub struct CloneTarget {
    /// What is made. A raw disk's zeroes become holes; a device must be large enough; a qcow2 image has no backing file.
    pub disk: NewTarget,
    /// Compress the clusters that shrink: of a qcow2 image.
    pub compression: Option<Compression>,
}

impl From<NewTarget> for CloneTarget {
    /// Without compression.
    fn from(disk: NewTarget) -> Self {
        Self { disk, compression: None }
    }
}

impl CloneTarget {
    /// Makes the target, which reads as zeroes then.
    pub(super) fn prepare(self, size: u64, job: &Job) -> Result<Sink> {
        match self.disk {
            NewTarget::Raw { .. } if self.compression.is_some() => {
                let message = "a raw target cannot be compressed";
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("compress"))
            }
            NewTarget::Raw { storage, preallocation, keep } => {
                if !keep && !storage.traits().block_device {
                    create_raw(&*storage, size, preallocation, job)?;
                    return Sink::raw(storage);
                }
                let room = storage.size()?;
                if room < size {
                    let message = format!("the target holds {room} bytes, the disk has {size}");
                    return Err(storage.located(Error::new(ErrorKind::InvalidArgument, message)));
                }
                storage.zero(0, size, true)?;
                Sink::raw(storage)
            }
            NewTarget::Format { image, .. } if self.compression.is_some() => {
                let message = format!("a {} copy cannot be compressed", image.format());
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("compress"))
            }
            NewTarget::Format { image, .. } if image.has_backing() => {
                let message = "a clone holds the whole disk: it has no backing file";
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("backing_file"))
            }
            NewTarget::Format { image, hosts } => {
                let disk = image.disk(&hosts, job)?;
                let unit = disk.unit();
                let sink = Sink::of(disk)?;
                Ok(Sink {
                    cluster: unit.unwrap_or(sink.cluster),
                    withheld: Withheld::Format(image, hosts),
                    ..sink
                })
            }
            NewTarget::Qcow2 { storage, data_file, mut create } => {
                check(&create, self.compression)?;
                create.size = size;
                Self::make_qcow2(storage, data_file, &create, self.compression, job)
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
        let open = OpenOptions {
            data_door: options.data_door.clone(),
            // Who made the door was asked.
            allow_weak: true,
            ..OpenOptions::default()
        };
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
        Ok(Sink {
            image: Image::new(vec![Box::new(qcow2)])?,
            cluster: g.cluster_size(),
            unit: unit as usize,
            compressed: compression.is_some(),
            withheld: Withheld::Qcow2,
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
    if compression.is_some() { check_compressed(create) } else { Ok(()) }
}

/// A target that is ready: a disk that reads as zeroes, and takes chunks in any order.
#[derive(Debug)]
pub(super) struct Sink {
    image: Image,
    /// Bytes of a cluster, 1 where there are none.
    cluster: u64,
    /// Bytes of what is zero or data as a whole: a cluster or subcluster.
    unit: usize,
    compressed: bool,
    withheld: Withheld,
}

/// What makes the file an image, at the end.
#[derive(Debug)]
enum Withheld {
    Nothing,
    /// The image's own header.
    Qcow2,
    /// What its format leaves to the end.
    Format(Arc<dyn NewImage>, Hosts),
}

impl Sink {
    fn raw(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut raw = Raw::new(storage)?;
        raw.make_writable(DiskOptions::default())?;
        Self::of(Box::new(raw))
    }

    /// Of a disk that reads as zeroes and is written to.
    fn of(disk: Box<dyn Layer>) -> Result<Self> {
        Ok(Self {
            image: Image::new(vec![disk])?,
            cluster: 1,
            unit: DEFAULT_SPARSE_SIZE as usize,
            compressed: false,
            withheld: Withheld::Nothing,
        })
    }

    /// Bytes of a cluster, 1 where there are none.
    pub(super) fn cluster_size(&self) -> u64 {
        self.cluster
    }

    /// Writes what is not zero; returns how many bytes that were.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<u64> {
        let mut written = 0;
        for run in zero::runs(bytes, self.unit).filter(|run| !run.zero) {
            let data = Mem::from(bytes.get(run.start..run.start + run.length).unwrap_or_default());
            let at = offset + run.start as u64;
            match self.compressed {
                true => self.image.write_compressed_at(data, at)?,
                false => self.image.write_at(data, at)?,
            }
            written += run.length as u64;
        }
        Ok(written)
    }

    /// Makes the target complete and durable.
    pub(super) fn finish(&self) -> Result<()> {
        self.image.close()?;
        match &self.withheld {
            Withheld::Nothing => Ok(()),
            Withheld::Qcow2 => self.image.layers().iter().try_for_each(|layer| publish(&**layer.storage())),
            Withheld::Format(image, hosts) => image.publish(hosts),
        }
    }
}

//! The seam of making: a new image of a format, of which everything is decided but its bytes.
//!
//! Who implements it writes to files that are its own: what they held is lost, and nobody has opened them under their names yet. An image
//! that is left unfinished on a device, which has its name from the start, must be none.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::convert::{Context, Sink};
use crate::front_to_back::{FrontToBack, Planning};
use crate::space::Preallocation;
use crate::{Error, ErrorKind, Job, Layer, Result, Storage};

/// The files of a new image: its own, and those of [`NewImage::other_files`] behind it.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// The image's own file, or a device.
    pub own: Arc<dyn Storage>,
    /// The others, in the order in which they were named.
    pub others: Vec<Arc<dyn Storage>>,
}

impl From<Arc<dyn Storage>> for Hosts {
    /// A single file.
    fn from(own: Arc<dyn Storage>) -> Self {
        Self { own, others: Vec::new() }
    }
}

/// A new image. It is made empty ([`NewImage::create`]), by copying a disk front to back ([`NewImage::sink`]), or as a disk that is
/// written to in any order before it is an image ([`NewImage::disk`]).
pub trait NewImage: fmt::Debug + Send + Sync {
    /// QEMU's name of the format.
    fn format(&self) -> &'static str;

    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Paths of the files that it has beside its own.
    fn other_files(&self) -> &[PathBuf] {
        &[]
    }

    /// Whether the disk's clusters can be written compressed.
    fn compresses(&self) -> bool {
        false
    }

    /// Whether it names a backing file, which holds what is not copied.
    fn has_backing(&self) -> bool {
        false
    }

    /// Bytes at which guest data takes space in the files; 1 where it takes as much as it has.
    fn unit(&self) -> u64;

    /// Length in bytes of all its files with `data` bytes of guest data in them, whole units; those of the disk at most.
    fn length(&self, data: u64) -> u64;

    /// What an empty one takes of the file system.
    fn preallocation(&self) -> Preallocation;

    /// Whether what reads as zeroes takes no space when a disk is copied into it.
    fn is_sparse(&self) -> bool {
        true
    }

    /// Makes the image, on which nothing was written. Returns when it is durable.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that is too small, which is left alone; `Io`; `Aborted`.
    fn create(&self, hosts: &Hosts, job: &Job) -> Result<()>;

    /// How a disk of [`NewImage::size`] bytes is copied into it.
    ///
    /// # Errors
    /// As [`NewImage::create`].
    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, workers: usize) -> Result<Box<dyn Sink>>;

    /// The image of a disk of [`NewImage::size`] bytes as a stream.
    ///
    /// # Errors
    /// `UnsupportedFeature` for one that is not written front to back; what planning it gives.
    fn front_to_back(&self, planning: &Planning<'_>) -> Result<Box<dyn FrontToBack>> {
        let _ = planning;
        let message =
            format!("a {} image of this kind is not written front to back: convert to a file", self.format());
        Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("to"))
    }

    /// Makes a disk that reads as zeroes and is written to. It is complete with [`NewImage::publish`].
    ///
    /// # Errors
    /// As [`NewImage::create`].
    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>>;

    /// Completes what [`NewImage::disk`] made, which is flushed: an image from here on. Returns when it is durable.
    ///
    /// # Errors
    /// `Io`.
    fn publish(&self, hosts: &Hosts) -> Result<()> {
        let _ = hosts;
        Ok(())
    }
}

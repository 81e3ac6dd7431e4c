//! What JavaScript holds by number: files, layers, images.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use qcow2_engine::storage::Spool;
use qcow2_engine::{Error, ErrorKind, GuestSource, Image, Layer, MemMut, Result, Storage};

use crate::clone::Begun;
use crate::guard::guarded;
use crate::nbd::Serving;
use crate::source::Asking;
use crate::streamed::Streamed;
use crate::tls::Encrypting;

/// An open image. Requests share it; it closes when the last of them is done and JavaScript has released it.
pub(crate) struct Handle {
    /// Shared by requests, exclusive to put an overlay on top.
    image: RwLock<Arc<Image>>,
    /// A request panicked: the image's state cannot be trusted any more.
    poisoned: AtomicBool,
    /// See [`Handle::waits`].
    waits: AtomicBool,
}

impl Handle {
    /// A handle on `image`.
    pub(crate) fn new(image: Image) -> Self {
        let waits = AtomicBool::new(waits(&image));
        Self { image: RwLock::new(Arc::new(image)), poisoned: AtomicBool::new(false), waits }
    }

    /// Whether requests wait for a device or for another machine, rather than for a core.
    pub(crate) fn waits(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }

    /// Whether its bytes are still coming.
    pub(crate) fn arrives(&self) -> bool {
        self.image.try_read().is_some_and(|image| image.is_arriving())
    }

    /// Runs one request; a panic poisons the handle. Requests of one handle do not run inside each other.
    pub(crate) fn run<T>(&self, work: impl FnOnce(&Image) -> Result<T>) -> Result<T> {
        let image = self.image.read();
        self.guarded(|| work(&image))
    }

    /// Fills a buffer if its bytes are in memory; never waits. Returns whether it did.
    pub(crate) fn read_at_hand(&self, buffer: MemMut<'_>, position: u64) -> bool {
        let Some(image) = self.image.try_read() else { return false };
        self.guarded(|| Ok(image.read_at_hand(buffer, position))).unwrap_or(false)
    }

    /// Size of the disk now, in bytes; `None` while an overlay is put on top: this never waits.
    pub(crate) fn current_size(&self) -> Option<u64> {
        self.image.try_read().map(|image| image.virtual_size())
    }

    /// As `run`, for long work that only reads: it keeps no overlay from being put on top, and goes on with what was there.
    pub(crate) fn run_apart<T>(&self, work: impl FnOnce(&Image) -> Result<T>) -> Result<T> {
        let image = Arc::clone(&self.image.read());
        self.guarded(|| work(&image))
    }

    /// Goes on with the image that `next` makes of this one, once all requests under way are done; later ones wait.
    pub(crate) fn replace(&self, next: impl FnOnce(&Image) -> Result<Image>) -> Result<()> {
        let mut image = self.image.write();
        *image = Arc::new(self.guarded(|| next(&image))?);
        self.waits.store(waits(&image), Ordering::Relaxed);
        Ok(())
    }

    /// The image, for a job that uses several at once. A panic of it ends the job and poisons nothing: for what only reads.
    pub(crate) fn image(&self) -> Result<Arc<Image>> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(poisoned());
        }
        Ok(Arc::clone(&self.image.read()))
    }

    fn guarded<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(poisoned());
        }
        let result = guarded(work);
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Internal) {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    /// Makes durable what was written, and gives back what was reserved. After a panic the file is left as it is.
    fn close(&self) -> Result<()> {
        let image = self.image.read();
        if self.poisoned.load(Ordering::Acquire) { Ok(()) } else { guarded(|| image.close()) }
    }
}

/// Whether any file of the chain is one that is waited for.
fn waits(image: &Image) -> bool {
    image.layers().iter().any(|layer| layer.files().iter().any(|file| file.traits().waits))
}

fn poisoned() -> Error {
    let message = "an earlier request met a bug in this library: close the image and open it again";
    Error::new(ErrorKind::Internal, message)
}

/// One thing that JavaScript holds.
pub(crate) enum Resource {
    /// A file that is open and not yet a layer.
    Storage(Arc<dyn Storage>),
    /// A layer that is open and not yet part of an image.
    Layer(Box<dyn Layer>),
    /// An open image.
    Image(Arc<Handle>),
    /// A clone whose point in time has passed.
    Clone(Box<Begun>),
    /// A server of an image.
    Server(Box<Serving>),
    /// Connections to encrypt.
    Encrypting(Arc<Encrypting>),
    /// Questions to an object.
    Source(Arc<Asking>),
    /// A new image that is read front to back.
    Streamed(Arc<Streamed>),
    /// A stream that comes in.
    Spool(Arc<Spool>),
}

impl Resource {
    /// Closes an image, and ends a server; everything else just goes.
    pub(crate) fn close(self) -> Result<()> {
        match self {
            Self::Image(handle) => handle.close(),
            Self::Server(serving) => {
                serving.close();
                Ok(())
            }
            Self::Encrypting(encrypting) => {
                encrypting.end();
                Ok(())
            }
            Self::Source(asking) => {
                asking.end();
                Ok(())
            }
            Self::Storage(_) | Self::Layer(_) | Self::Clone(_) | Self::Streamed(_) | Self::Spool(_) => Ok(()),
        }
    }
}

/// The resources of one environment. Numbers are never used twice.
#[derive(Default)]
pub(crate) struct Resources {
    last: u32,
    held: HashMap<u32, Resource>,
}

impl Resources {
    /// Holds a resource; returns its number.
    pub(crate) fn hold(&mut self, resource: Resource) -> u32 {
        self.last = self.last.wrapping_add(1);
        self.held.insert(self.last, resource);
        self.last
    }

    /// Gives a resource up.
    pub(crate) fn release(&mut self, number: u32) -> Option<Resource> {
        self.held.remove(&number)
    }

    /// Gives everything up, the newest first: a clone or a server before its image, an image before what it was made of.
    pub(crate) fn take(&mut self) -> Vec<Resource> {
        let mut held: Vec<_> = self.held.drain().collect();
        held.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        held.into_iter().map(|(_, resource)| resource).collect()
    }

    /// The file of that number.
    pub(crate) fn storage(&self, number: u32) -> Option<&Arc<dyn Storage>> {
        match self.held.get(&number) {
            Some(Resource::Storage(storage)) => Some(storage),
            _ => None,
        }
    }

    /// The layer of that number.
    pub(crate) fn layer_mut(&mut self, number: u32) -> Option<&mut dyn Layer> {
        match self.held.get_mut(&number) {
            Some(Resource::Layer(layer)) => Some(&mut **layer),
            _ => None,
        }
    }

    /// The connections to encrypt of that number.
    pub(crate) fn encrypting(&self, number: u32) -> Option<&Arc<Encrypting>> {
        match self.held.get(&number) {
            Some(Resource::Encrypting(encrypting)) => Some(encrypting),
            _ => None,
        }
    }

    /// The questions to an object of that number.
    pub(crate) fn source(&self, number: u32) -> Option<&Arc<Asking>> {
        match self.held.get(&number) {
            Some(Resource::Source(asking)) => Some(asking),
            _ => None,
        }
    }

    /// The stream of that number.
    pub(crate) fn spool(&self, number: u32) -> Option<&Arc<Spool>> {
        match self.held.get(&number) {
            Some(Resource::Spool(spool)) => Some(spool),
            _ => None,
        }
    }

    /// Gives up all who wait for an object.
    pub(crate) fn cancel_sources(&self) {
        for resource in self.held.values() {
            if let Resource::Source(asking) = resource {
                asking.cancel();
            }
        }
    }

    /// The server of that number.
    pub(crate) fn server(&self, number: u32) -> Option<&Serving> {
        match self.held.get(&number) {
            Some(Resource::Server(serving)) => Some(serving),
            _ => None,
        }
    }

    /// The stream of that number.
    pub(crate) fn streamed(&self, number: u32) -> Option<&Arc<Streamed>> {
        match self.held.get(&number) {
            Some(Resource::Streamed(streamed)) => Some(streamed),
            _ => None,
        }
    }

    /// The image of that number.
    pub(crate) fn image(&self, number: u32) -> Option<&Arc<Handle>> {
        match self.held.get(&number) {
            Some(Resource::Image(handle)) => Some(handle),
            _ => None,
        }
    }
}

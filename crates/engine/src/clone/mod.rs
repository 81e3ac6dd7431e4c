//! Live clone: a copy of the disk as it was at one moment, made while guests go on writing to it.
//!
//! **The point in time** ([`Image::begin_clone`]). The gate of guest requests is taken alone: those in flight are
//! done, those that come later find the clone registered ([`Clones`]). It is held no longer than that takes.
//!
//! **Copy before write.** The disk is cut into chunks, one bit each ([`copying`]). Whoever is first claims a chunk and
//! copies it: a background worker in guest order ([`LiveClone::run`]), or a request that is about to change it
//! ([`Image::preserve`]), which waits for chunks that others are copying. So what is read of an unclaimed chunk is what
//! it was at the point in time, also when the scan that found it ran earlier. Requests that change nothing (reads,
//! flushes) and those to chunks that are copied cost what they always cost.
//!
//! **Locks.** Requests copy while they hold the gate and nothing else; `copying`'s own lock is never held across I/O. The
//! target's locks are those of another image: there is no way back from it to this one.
//!
//! **Failure.** An error of the copy, on either side, ends the clone and never a guest's request. So do a cancelled job
//! and closing the image. The target is no image until [`LiveClone::run`] returned: then it is complete and durable.
//! After a crash there is no clone; the source is what its own writes made of it.
//!
//! **Memory:** a bit for a chunk (of 64 KiB, or a cluster of the target if that is larger), 32 MiB at most: chunks of
//! larger disks are larger. And a buffer for each worker and each request that copies.

mod copying;
mod scan;
mod target;

use std::num::NonZeroUsize;
use std::sync::Arc;

use parking_lot::Mutex;

pub use self::copying::CloneResult;
use self::copying::Copying;
use self::scan::Scan;
pub use self::target::CloneTarget;
use crate::image::{Clones, Image, LiveCopy};
use crate::{Error, ErrorKind, Job, Result, workers};

/// A clone whose point in time has passed. Dropped before it is complete, it ends.
#[derive(Debug)]
pub struct LiveClone {
    clones: Arc<Clones>,
    copying: Arc<Copying>,
}

impl Image {
    /// Makes `target` ready and takes the point in time: what requests wrote that are done by now is in the clone, what
    /// later ones write is not. The disk is copied as a whole, with what its backing files have. From now on, requests
    /// that change a chunk which is not yet copied copy it first, so [`LiveClone::run`] should follow soon.
    ///
    /// # Errors
    /// `InvalidArgument` for options that contradict each other, and when the size of the disk changed meanwhile;
    /// `Closed`; `Aborted`; `Io` and `Limit` of making the target. The caller removes the target then.
    pub fn begin_clone(&self, target: CloneTarget, job: &Job) -> Result<LiveClone> {
        job.checkpoint()?;
        let size = self.virtual_size();
        let sink = target.prepare(size, job)?;
        let copying = Arc::new(Copying::new(size, sink));
        self.at_rest(|| {
            if self.virtual_size() != size {
                let message = "the size of the disk changed while the clone's target was made: clone again";
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
            self.clones.add(Arc::clone(&copying) as Arc<_>);
            Ok(())
        })?;
        Ok(LiveClone { clones: Arc::clone(&self.clones), copying })
    }

    /// Runs `act` while no request is in flight that changes the disk.
    fn at_rest<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.top_qcow2() {
            Some(image) => match image.open_writer() {
                Some(writer) => {
                    let _alone = writer.gate.write();
                    // A poisoned image is still read, so it can be cloned; one that is closed is not.
                    writer
                        .check()
                        .or_else(|e| if e.kind() == ErrorKind::Closed { Err(e) } else { Ok(()) })?;
                    act()
                }
                None => act(),
            },
            _ => {
                let _alone = self.clones.layer_gate.write();
                act()
            }
        }
    }
}

impl LiveClone {
    /// Copies the rest of `image`, which the clone was begun on, and completes the target. Returns when it is durable.
    /// `concurrency` is the number of threads: the cores, at most 8, without it.
    ///
    /// # Errors
    /// `Aborted`; `Closed` if the image was closed meanwhile; what reading the disk or writing the target met, also
    /// where a guest's request met it. The target is then worth nothing.
    pub fn run(self, image: &Image, concurrency: Option<NonZeroUsize>, job: &Job) -> Result<CloneResult> {
        if !Arc::ptr_eq(&self.clones, &image.clones) {
            return Err(Error::new(ErrorKind::InvalidArgument, "the clone was begun on another image"));
        }
        let copying = &*self.copying;
        job.set_total(copying.size());
        let scan = Mutex::new(copying.scan(0..copying.size()));
        let workers = workers::count(concurrency);
        if workers::run_all(workers, "qcow2-clone", || worker(copying, image, &scan, job)) {
            copying.fail(Error::new(ErrorKind::Internal, "a clone worker panicked"));
        }
        copying.wait_idle();
        self.clones.remove(&*self.copying);
        copying.finish()
    }

    /// Size in bytes of the disk at the point in time.
    pub fn virtual_size(&self) -> u64 {
        self.copying.size()
    }
}

impl Drop for LiveClone {
    fn drop(&mut self) {
        self.copying.fail(Error::aborted());
        self.clones.remove(&*self.copying);
    }
}

/// Copies until the disk or the luck runs out.
fn worker(copying: &Copying, image: &Image, scan: &Mutex<Scan>, job: &Job) {
    let mut buffer = Vec::new();
    let mut step = || -> Result<bool> {
        job.checkpoint()?;
        if copying.is_over() {
            return Ok(false);
        }
        let Some(piece) = scan.lock().next(image, job)? else { return Ok(false) };
        copying.copy_piece(image, &piece, &mut buffer)?;
        job.advance(piece.data.end - piece.from);
        Ok(true)
    };
    loop {
        match step() {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return copying.fail(error),
        }
    }
}

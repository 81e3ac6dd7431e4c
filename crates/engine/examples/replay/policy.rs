//! When metadata is written and made durable, and how long a device takes for that.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use qcow2_core::forward_storage;
use qcow2_engine::storage::{CacheMode, ReadStorage};
use qcow2_engine::{Image, Mem, Storage};
use qcow2_testkit::ops::{Op, Target};

const CLUSTER: u64 = 64 << 10;

/// A device whose syncs take `delay` longer, for engines of before: with syncs of its own, or without some.
#[derive(Debug)]
pub(crate) struct Device {
    inner: Arc<dyn Storage>,
    delay: Duration,
    /// Each write is durable when it returns, as on a file that was opened with `O_DSYNC`: nobody has to ask for it.
    each_write: bool,
    ignored: AtomicBool,
}

impl Device {
    pub(crate) fn new(inner: Arc<dyn Storage>, delay: Duration, each_write: bool) -> Self {
        Self { inner, delay, each_write, ignored: AtomicBool::new(each_write) }
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync_data()?;
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        Ok(())
    }
}

impl ReadStorage for Device {
    forward_storage!(inner: read_at run_in len is_empty allocated_bytes identity traits io_limits path operation is_transient lock forget arriving as_fd read_each);
}

impl Storage for Device {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let written = self.inner.write_at(buf, offset)?;
        if self.each_write {
            self.sync()?;
        }
        Ok(written)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let written = self.inner.write_vectored_at(bufs, offset)?;
        if self.each_write {
            self.sync()?;
        }
        Ok(written)
    }
    fn sync_data(&self) -> io::Result<()> {
        if self.ignored.load(Ordering::Relaxed) { Ok(()) } else { self.sync() }
    }
    forward_storage!(inner: set_len begin_sync write_zeroes discard allocate allocate_ahead clone_range check_close write_each);
}

/// QEMU 0.10.5's policy: what an allocation changes in the tables is written at once, before the next request. With `none` it
/// is made durable, too; with `writethrough` each single write is, data and tables; with `writeback` none is.
pub(crate) struct Old {
    image: Image,
    device: Arc<Device>,
    mode: CacheMode,
    mapped: HashSet<u64>,
}

impl Old {
    /// `mapped`: the disk has had these requests before.
    pub(crate) fn new(image: Image, device: Arc<Device>, mode: CacheMode, mapped: &[Op]) -> Self {
        let mut old = Self { image, device, mode, mapped: HashSet::new() };
        for op in mapped {
            old.changes_mapping(op);
        }
        old
    }

    /// Whether the request gives clusters a place, or takes it from them.
    fn changes_mapping(&mut self, op: &Op) -> bool {
        match *op {
            Op::Write { offset, len } => (offset / CLUSTER..(offset + len).div_ceil(CLUSTER))
                .fold(false, |new, n| self.mapped.insert(n) | new),
            Op::Discard { offset, len } | Op::Zero { offset, len, .. } => (offset.div_ceil(CLUSTER)
                ..(offset + len) / CLUSTER)
                .fold(false, |had, n| self.mapped.remove(&n) | had),
            _ => false,
        }
    }

    /// Runs `run` on the disk with requests one at a time.
    pub(crate) fn replay(
        &mut self,
        requests: &[Op],
        mut run: impl FnMut(&dyn Target, usize, &Op) -> qcow2_engine::Result<()>,
    ) -> qcow2_engine::Result<()> {
        for (n, op) in requests.iter().enumerate() {
            run(&self.image, n, op)?;
            if self.changes_mapping(op) {
                self.device.ignored.store(self.mode != CacheMode::None, Ordering::Relaxed);
                let written = self.image.flush();
                self.device.ignored.store(self.mode == CacheMode::Writethrough, Ordering::Relaxed);
                written?;
            }
        }
        self.image.flush()?;
        self.image.close()
    }
}

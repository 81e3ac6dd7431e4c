//! How long the units of a disk are when they are compressed: where each of them lies is known only then. So what is compressed is read
//! and compressed twice, once to count and once to emit; nothing of it is kept in between.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{Part, Planning, Runs, read_padded};
use crate::workers::{self, run_all};
use crate::{Error, ErrorKind, MemMut, Result};

/// Bytes that a worker takes at once.
const BATCH: u64 = 1 << 20;

/// Compresses one unit, and says how many bytes it takes then; 0 for one that is left out.
pub type Counter<'a> = Box<dyn FnMut(&[u8]) -> Result<u32> + 'a>;

/// What is stored, and how long each unit of it is.
#[derive(Debug, Default)]
pub struct Lengths {
    /// The units.
    pub units: Runs,
    /// Bytes of each, in their order; never 0.
    pub bytes: Vec<u32>,
}

/// The units that have nobody to count them yet.
struct Rest {
    units: Runs,
    rank: u64,
    counted: Vec<u32>,
    error: Option<Error>,
}

impl Rest {
    /// The next units, one behind the other.
    fn take(&mut self, most: u64) -> Option<Part> {
        let part = self.units.at(self.rank)?;
        let count = part.count.min(most);
        self.rank += count;
        Some(Part { count, ..part })
    }
}

impl Lengths {
    /// Counts all of `units`, of `unit` bytes each, with as many workers as there shall be; `make` gives each of them its counter. What
    /// is done of the disk is the job's progress.
    ///
    /// # Errors
    /// `Limit` when the lengths take more than the memory that there may be; those of the counters; what reading the disk gives; `Aborted`.
    pub fn count<'a>(
        planning: &Planning<'_>,
        units: Runs,
        unit: u64,
        make: impl Fn() -> Result<Counter<'a>> + Sync,
    ) -> Result<Self> {
        let needed = units.memory().saturating_add(units.total().saturating_mul(size_of::<u32>() as u64));
        if needed > planning.max_memory {
            let message = format!(
                "the lengths of {} compressed units do not fit into {} bytes: a larger max_memory, or larger clusters, help",
                units.total(),
                planning.max_memory
            );
            return Err(Error::new(ErrorKind::Limit, message).with_field("max_memory"));
        }
        let size = planning.source.virtual_size();
        planning.job.set_total(size);
        let counted = vec![0; units.total() as usize];
        let rest = Mutex::new(Rest { units, rank: 0, counted, error: None });
        let stop = AtomicBool::new(false);
        let panicked = run_all(workers::count(planning.concurrency), "qcow2-stream", || {
            let worked = make().and_then(|counter| work(planning, &rest, &stop, unit, counter));
            if let Err(error) = worked {
                stop.store(true, Ordering::Release);
                rest.lock().error.get_or_insert(error);
            }
        });
        let Rest { units, counted, error, .. } = rest.into_inner();
        if let Some(error) = error {
            return Err(error);
        }
        if panicked {
            return Err(Error::new(ErrorKind::Internal, "a worker of a stream panicked"));
        }
        let done = planning.job.progress().0;
        planning.job.advance(size.saturating_sub(done));
        Self::of(&units, counted, planning.max_memory)
    }

    /// Leaves out what takes nothing.
    fn of(units: &Runs, mut counted: Vec<u32>, max_memory: u64) -> Result<Self> {
        let mut kept = Runs::default();
        for part in units.iter() {
            let lengths =
                counted.get(part.rank as usize..(part.rank + part.count) as usize).unwrap_or_default();
            for (number, length) in (part.first..).zip(lengths) {
                if *length > 0 {
                    kept.make_room(max_memory)?;
                    kept.add(number, 1);
                }
            }
        }
        counted.retain(|length| *length > 0);
        Ok(Self { units: kept, bytes: counted })
    }
}

/// Counts until nothing is left.
fn work(
    planning: &Planning<'_>,
    rest: &Mutex<Rest>,
    stop: &AtomicBool,
    unit: u64,
    mut counter: Counter<'_>,
) -> Result<()> {
    let most = (BATCH / unit).max(1);
    let sequential = planning.source.is_sequential();
    let mut buffer = vec![0; (most * unit) as usize];
    while !stop.load(Ordering::Acquire) {
        planning.job.checkpoint()?;
        let mut taking = rest.lock();
        let Some(part) = taking.take(most) else { break };
        let length = (part.count * unit) as usize;
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        if sequential {
            // In the order in which it is taken.
            read_padded(planning.source, MemMut::from(&mut *bytes), part.first * unit)?;
            drop(taking);
        } else {
            drop(taking);
            read_padded(planning.source, MemMut::from(&mut *bytes), part.first * unit)?;
        }
        let lengths = bytes.chunks(unit as usize).map(&mut counter).collect::<Result<Vec<_>>>()?;
        let mut taking = rest.lock();
        let places = taking.counted.get_mut(part.rank as usize..(part.rank + part.count) as usize);
        places.unwrap_or_default().copy_from_slice(&lengths);
        drop(taking);
        let disk = planning.source.virtual_size().saturating_sub(part.first * unit);
        planning.job.advance(disk.min(length as u64));
    }
    Ok(())
}

/// Contexts for compressing, which are worth keeping.
pub struct Pool<T> {
    idle: Mutex<Vec<T>>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { idle: Mutex::default() }
    }
}

impl<T> Pool<T> {
    /// Lends one of them, or a new one.
    ///
    /// # Errors
    /// Those of `make` and of `work`.
    pub fn with<R>(
        &self,
        make: impl FnOnce() -> Result<T>,
        work: impl FnOnce(&mut T) -> Result<R>,
    ) -> Result<R> {
        let idle = self.idle.lock().pop();
        let mut one = idle.map_or_else(make, Ok)?;
        let result = work(&mut one);
        self.idle.lock().push(one);
        result
    }
}

/// The unit that a request ended in, for the one that goes on there: a disk that is read front to back has no way to it any more.
#[derive(Default)]
pub struct Latest {
    unit: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Latest {
    /// Takes the unit of that number, if it is the one.
    pub fn take(&self, number: u64) -> Option<Vec<u8>> {
        self.unit.lock().take_if(|(kept, _)| *kept == number).map(|(_, bytes)| bytes)
    }

    /// Keeps a unit, and no other one.
    pub fn keep(&self, number: u64, bytes: Vec<u8>) {
        *self.unit.lock() = Some((number, bytes));
    }
}

/// What was counted is not there any more.
#[must_use]
pub fn changed(offset: u64) -> Error {
    let message = "the disk changed while a compressed stream was made of it: it has to stay as it is until the stream has ended";
    Error::new(ErrorKind::Io, message).with_offset(offset)
}

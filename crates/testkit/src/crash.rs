//! Power cuts: what a disk may contain after one, and the files that one may leave.
//!
//! A [`Session`] runs guest operations on a target over recording files and keeps the [`History`] of every sector.
//! [`Session::states`] then rebuilds the files for cuts between any two changes: everything that a sync covered is
//! there, of everything else an arbitrary part, torn at sectors. [`History::judge`] says whether the disk that is read
//! from such files keeps the promise: what was flushed is there, and no sector holds what was never written to it.

mod states;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use qcow2_engine::{ErrorKind, Result};

use crate::ops::{Found, Op, SECTOR, Target, Value, identify, stamped};
use crate::recorder::{Entry, Journal, RecordingStorage};
use crate::{Rng, Sparse};

pub use states::{Shape, State};

/// A value of something, the journal's position when it began to appear, and the moment when its operation was complete.
#[derive(Debug, Clone, Copy)]
struct Span<T> {
    value: T,
    start: usize,
    done: u64,
}

const PENDING: u64 = u64::MAX;

/// Every value that each sector had or may have had.
#[derive(Debug, Clone, Default)]
pub struct History {
    sectors: HashMap<u64, Vec<Span<Value>>>,
    sizes: Vec<Span<u64>>,
    /// Moment of the begin, and the journal's position at the end, of every completed flush.
    flushes: Vec<(u64, usize)>,
    /// Counts moments: many fit between two changes of a file.
    clock: u64,
}

/// The possible values of a thing, oldest first; the first one is guaranteed unless a later one is there.
fn possible<T: Copy>(spans: &[Span<T>], promised: u64, cut: usize) -> impl Iterator<Item = T> + '_ {
    let from = spans.iter().rposition(|s| s.done <= promised);
    spans[from.unwrap_or(0)..]
        .iter()
        .enumerate()
        .filter(move |(i, s)| (*i == 0 && from.is_some()) || s.start < cut)
        .map(|(_, s)| s.value)
}

impl History {
    /// The history of a disk of `size` bytes that now contains what `read` gives, all of it durable.
    pub fn of(target: &dyn Target) -> Self {
        let size = target.size();
        let mut history = Self { sizes: vec![Span { value: size, start: 0, done: 0 }], ..Self::default() };
        let found = sectors(target, 0, size).unwrap_or_else(|e| panic!("reading the start: {e:?}"));
        for (sector, found) in found {
            match found {
                Found::Value(Value::Zero) => {}
                Found::Value(value) => {
                    history.sectors.entry(sector).or_default().push(Span { value, start: 0, done: 0 })
                }
                other => panic!("sector {sector} contains {other:?} at the start"),
            }
        }
        history
    }

    fn begin(&mut self, sector: u64, value: Value, at: usize) {
        let spans = match value {
            // Zeroes where nothing ever was.
            Value::Zero => match self.sectors.get_mut(&sector) {
                Some(spans) => spans,
                None => return,
            },
            _ => self
                .sectors
                .entry(sector)
                .or_insert_with(|| vec![Span { value: Value::Zero, start: 0, done: 0 }]),
        };
        spans.push(Span { value, start: at, done: PENDING });
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn end(&mut self, sector: u64, at: u64) {
        if let Some(span) = self.sectors.get_mut(&sector).and_then(|s| s.last_mut()) {
            span.done = span.done.min(at);
        }
    }

    /// The operation on this sector that began last was refused.
    fn never(&mut self, sector: u64, at: usize) {
        if let Some(spans) = self.sectors.get_mut(&sector) {
            spans.pop_if(|span| span.start == at && span.done == PENDING);
        }
    }

    /// The operation on this sector left it as it was.
    fn undo(&mut self, sector: u64, value: Value, at: usize, done: u64) {
        self.begin(sector, value, at);
        self.end(sector, done);
    }

    /// The moment up to which a power cut at `cut` must keep what was complete.
    fn promised(&self, cut: usize) -> u64 {
        self.flushes.iter().filter(|(_, end)| *end <= cut).map(|(start, _)| *start).max().unwrap_or(0)
    }

    /// The values that a sector may have after a power cut at `cut`.
    pub fn allowed(&self, sector: u64, cut: usize) -> Vec<Value> {
        match self.sectors.get(&sector) {
            Some(spans) => possible(spans, self.promised(cut), cut).collect(),
            None => vec![Value::Zero],
        }
    }

    /// The values that a sector may have now: one, unless operations failed. `None` for one that was never written.
    fn live(&self, sector: u64) -> Option<Vec<Value>> {
        self.sectors.get(&sector).map(|spans| possible(spans, PENDING - 1, usize::MAX).collect())
    }

    /// Forgets what no cut from now on can bring back.
    fn prune(&mut self, now: usize) {
        let promised = self.promised(now);
        self.sectors.retain(|_, spans| {
            let keep = spans.iter().rposition(|s| s.done <= promised).unwrap_or(0);
            spans.drain(..keep);
            spans.len() > 1 || spans.iter().any(|s| s.value != Value::Zero || s.done > promised)
        });
    }

    /// Compares what is read from a state, cut at `cut`, with what may be there.
    ///
    /// # Errors
    /// What is wrong: the sector, what was found, and what is allowed.
    pub fn judge(&self, target: &dyn Target, cut: usize, scope: &Scope) -> std::result::Result<(), String> {
        let promised = self.promised(cut);
        let size = target.size();
        let sizes: Vec<u64> = possible(&self.sizes, promised, cut).collect();
        if !sizes.contains(&size) {
            return Err(format!("the disk has {size} bytes, allowed are {sizes:?}"));
        }
        let mut error = None;
        scope.for_each(self, size, |from, len| {
            error.is_some() || {
                error = self.judge_range(target, from, len, promised, cut).err();
                false
            }
        });
        error.map_or(Ok(()), Err)
    }

    fn judge_range(
        &self,
        target: &dyn Target,
        from: u64,
        len: u64,
        promised: u64,
        cut: usize,
    ) -> std::result::Result<(), String> {
        let mut bytes = vec![0; len as usize];
        target.read(from, &mut bytes).map_err(|e| format!("reading {len} bytes at {from:#x}: {e:?}"))?;
        for (sector, part) in (from / SECTOR..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let found = identify(sector, part);
            let fine = match (found, self.sectors.get(&sector)) {
                (Found::Value(value), Some(spans)) => possible(spans, promised, cut).any(|v| v == value),
                (Found::Value(value), None) => value == Value::Zero,
                _ => false,
            };
            if !fine {
                let allowed = self.allowed(sector, cut);
                return Err(format!(
                    "sector {sector} ({:#x}): found {found:?}, allowed are {allowed:?}",
                    sector * SECTOR
                ));
            }
        }
        Ok(())
    }
}

/// Which sectors are judged.
#[derive(Debug, Clone)]
pub enum Scope {
    /// The whole disk.
    Whole,
    /// Those that had more than one value lately, and this many more ranges of a seed.
    Recent(u64, u64),
}

impl Scope {
    /// Calls `f` with ranges of whole sectors until it says true.
    fn for_each(&self, history: &History, size: u64, mut f: impl FnMut(u64, u64) -> bool) {
        const STEP: u64 = 1 << 20;
        match self {
            Self::Whole => {
                for from in (0..size).step_by(STEP as usize) {
                    if f(from, STEP.min(size - from)) {
                        return;
                    }
                }
            }
            Self::Recent(seed, more) => {
                let mut recent: Vec<u64> =
                    history.sectors.iter().filter(|(_, s)| s.len() > 1).map(|(n, _)| *n).collect();
                let mut rng = Rng::new(*seed);
                recent.extend((0..*more).map(|_| rng.below(size / SECTOR)));
                recent.sort_unstable();
                recent.dedup();
                for run in recent.chunk_by(|a, b| a + 1 == *b) {
                    let from = run[0] * SECTOR;
                    if from < size && f(from, (run.len() as u64 * SECTOR).min(size - from)) {
                        return;
                    }
                }
            }
        }
    }
}

/// Every whole sector of a range, identified.
fn sectors(target: &dyn Target, offset: u64, len: u64) -> Result<Vec<(u64, Found)>> {
    let (first, end) = (offset / SECTOR, (offset + len).div_ceil(SECTOR));
    let mut out = Vec::with_capacity((end - first) as usize);
    let mut bytes = vec![0; 1 << 20];
    for from in (first..end).step_by(2048) {
        let bytes = &mut bytes[..((end - from).min(2048) * SECTOR) as usize];
        target.read(from * SECTOR, bytes)?;
        out.extend((from..).zip(bytes.chunks_exact(SECTOR as usize)).map(|(n, b)| (n, identify(n, b))));
    }
    Ok(out)
}

/// When a completed operation is promised to survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// After the next flush.
    Flush,
    /// At once.
    Each,
}

/// A target over recording files, with its history.
pub struct Session {
    journal: Arc<Journal>,
    history: Mutex<History>,
    durability: Durability,
    /// Files as they were at the journal's position `first`, and what was done to them since.
    base: Vec<Sparse>,
    first: usize,
    entries: Vec<Entry>,
    /// Cuts before this position were looked at.
    seen: usize,
    /// An operation failed.
    failed: AtomicBool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("files", &self.base.len())
            .field("position", &self.journal.position())
            .finish()
    }
}

impl Session {
    /// A session on these files. Gives also the recording storages, one per file, to open the target on.
    pub fn new(files: Vec<Sparse>, durability: Durability) -> (Self, Vec<Arc<RecordingStorage>>) {
        Self::aligned(files, durability, 1)
    }

    /// As `new`, with storages that take requests of whole blocks of `alignment` bytes only, as direct I/O does.
    pub fn aligned(
        files: Vec<Sparse>,
        durability: Durability,
        alignment: u32,
    ) -> (Self, Vec<Arc<RecordingStorage>>) {
        let journal = Journal::new();
        let storages = files
            .iter()
            .enumerate()
            .map(|(n, f)| Arc::new(RecordingStorage::new(f.clone(), &journal, n).aligned(alignment)))
            .collect();
        let session = Self {
            journal,
            history: Mutex::default(),
            durability,
            base: files,
            first: 0,
            entries: Vec::new(),
            seen: 0,
            failed: AtomicBool::new(false),
        };
        (session, storages)
    }

    /// Takes the target's content as the durable start. Call it once, before the first operation.
    pub fn start(&self, target: &dyn Target) {
        *self.history.lock() = History::of(target);
    }

    /// As `start`, for an image of this size that is known to contain zeroes.
    pub fn start_empty(&self, size: u64) {
        self.history.lock().sizes = vec![Span { value: size, start: 0, done: 0 }];
    }

    /// The history so far.
    pub fn history(&self) -> History {
        self.history.lock().clone()
    }

    /// Runs one operation as number `generation`, which must be new, and records what it may have changed. Operations
    /// of several threads may run at once where they share no sector.
    ///
    /// # Errors
    /// The target's. The operation then counts as begun and never complete: its values are allowed, not promised.
    pub fn run(&self, target: &dyn Target, op: Op, generation: u32) -> Result<()> {
        let result = self.perform(target, op, generation);
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn perform(&self, target: &dyn Target, op: Op, generation: u32) -> Result<()> {
        let begun = self.journal.position();
        match op {
            Op::Write { offset, len } => {
                self.changing(offset, len, Value::Written(generation), begun, || {
                    target.write(offset, &stamped(offset, len, generation))
                })
            }
            Op::Compressed { offset, len } => {
                let data = stamped(offset, len, generation);
                self.changing(offset, len, Value::Written(generation), begun, || {
                    target.write_compressed(offset, &data)
                })
            }
            Op::Zero { offset, len, unmap } => {
                self.changing(offset, len, Value::Zero, begun, || target.write_zeroes(offset, len, unmap))
            }
            Op::Discard { offset, len } => self.discard(target, offset, len, begun),
            Op::Read { offset, len } => self.verify(target, offset, len),
            Op::Flush => {
                let moment = self.history.lock().tick();
                target.flush()?;
                let now = self.journal.position();
                self.history.lock().flushes.push((moment, now));
                Ok(())
            }
            // A disk that was to be smaller before, and was refused that, can be as large already.
            Op::Grow { size } if size <= target.size() => Ok(()),
            Op::Grow { size } => {
                self.history.lock().sizes.push(Span { value: size, start: begun, done: PENDING });
                target.grow(size)?;
                let mut history = self.history.lock();
                history.sizes.last_mut().unwrap().done = history.tick();
                self.promise(&mut history);
                Ok(())
            }
            Op::Shrink { size } => {
                // What lies behind the end is there, or nothing; if the disk grows again, it is nothing.
                let old = target.size();
                self.history.lock().sizes.push(Span { value: size, start: begun, done: PENDING });
                let done = self.change(size, old - size, Value::Zero, begun, || target.shrink(size));
                let mut history = self.history.lock();
                if done.as_ref().is_err_and(|error| error.kind() == ErrorKind::UnsupportedFeature) {
                    history.sizes.pop();
                    (size / SECTOR..old / SECTOR).for_each(|sector| history.never(sector, begun));
                    return Ok(());
                }
                done?;
                history.sizes.last_mut().unwrap().done = history.tick();
                self.promise(&mut history);
                Ok(())
            }
            // Closing promises what a flush does. Opening again is the caller's.
            Op::Reopen => {
                if self.failed.load(Ordering::Relaxed) {
                    // An image that refuses writes since an error closes without a promise: nobody opens it again here.
                    target.write(0, &[])?;
                }
                target.close()?;
                let now = self.journal.position();
                let mut history = self.history.lock();
                let moment = history.tick();
                history.flushes.push((moment, now));
                Ok(())
            }
        }
    }

    fn promise(&self, history: &mut History) {
        if self.durability == Durability::Each {
            history.flushes.push((history.clock, self.journal.position()));
        }
    }

    fn changing(
        &self,
        offset: u64,
        len: u64,
        value: Value,
        begun: usize,
        f: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.change(offset, len, value, begun, f)?;
        self.promise(&mut self.history.lock());
        Ok(())
    }

    /// Runs `f`, which gives a range a value.
    fn change(
        &self,
        offset: u64,
        len: u64,
        value: Value,
        begun: usize,
        f: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.begin(offset, len, value, begun);
        f()?;
        let mut history = self.history.lock();
        let now = history.tick();
        (offset / SECTOR..(offset + len) / SECTOR).for_each(|sector| history.end(sector, now));
        Ok(())
    }

    /// A change of whole sectors is under way.
    fn begin(&self, offset: u64, len: u64, value: Value, begun: usize) {
        assert!(
            offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR),
            "{len} bytes at {offset}: not whole sectors"
        );
        let mut history = self.history.lock();
        (offset / SECTOR..(offset + len) / SECTOR).for_each(|sector| history.begin(sector, value, begun));
    }

    /// A discarded sector is zero or as before; what it is now is what it stays.
    fn discard(&self, target: &dyn Target, offset: u64, len: u64, begun: usize) -> Result<()> {
        let before: Vec<(u64, Vec<Value>)> = {
            let history = self.history.lock();
            let range = offset / SECTOR..(offset + len) / SECTOR;
            range.filter_map(|sector| Some((sector, history.live(sector)?))).collect()
        };
        self.begin(offset, len, Value::Zero, begun);
        target.discard(offset, len)?;
        let mut undone = Vec::new();
        for run in before.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
            let found = sectors(target, run[0].0 * SECTOR, run.len() as u64 * SECTOR).inspect_err(|_| {
                // Nobody knows which it is.
                let (mut history, now) = (self.history.lock(), self.journal.position());
                for (sector, old) in &before {
                    old.iter().for_each(|value| history.begin(*sector, *value, now));
                }
            })?;
            for ((sector, old), (_, new)) in run.iter().zip(found) {
                match new {
                    Found::Value(Value::Zero) => {}
                    Found::Value(new) if old.contains(&new) => undone.push((*sector, new)),
                    _ => panic!("sector {sector} was {old:?} and is {new:?} after a discard"),
                }
            }
        }
        // At one moment, when it is known what became of each sector: a flush of another thread must not promise zeroes
        // where the discard left the old bytes.
        let now = self.journal.position();
        let mut history = self.history.lock();
        let moment = history.tick();
        (offset / SECTOR..(offset + len) / SECTOR).for_each(|sector| history.end(sector, moment));
        undone.into_iter().for_each(|(sector, value)| history.undo(sector, value, now, moment));
        self.promise(&mut history);
        Ok(())
    }

    /// Fails the test unless the range holds the value of the last complete operation, or of one that failed since.
    ///
    /// # Errors
    /// The target's, for the read.
    pub fn verify(&self, target: &dyn Target, offset: u64, len: u64) -> Result<()> {
        let mut bytes = vec![0; len as usize];
        target.read(offset, &mut bytes)?;
        let history = self.history.lock();
        for (sector, part) in (offset / SECTOR..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let found = identify(sector, part);
            let allowed = history.live(sector).unwrap_or_else(|| vec![Value::Zero]);
            let fine = matches!(found, Found::Value(v) if allowed.contains(&v));
            assert!(
                fine,
                "sector {sector} ({:#x}) reads as {found:?}, expected {allowed:?}",
                sector * SECTOR
            );
        }
        Ok(())
    }

    /// Runs a whole sequence on a target that `open` gives, opening it again where the sequence says so; stops at the
    /// first operation after which the target refuses to go on. Verifies the whole disk at the end.
    ///
    /// # Panics
    /// When something reads wrong, or an operation fails although `may_fail` is false.
    pub fn play(
        &self,
        open: &dyn Fn() -> Result<Box<dyn Target>>,
        ops: &[Op],
        may_fail: bool,
    ) -> Option<Box<dyn Target>> {
        let mut target = match open() {
            Ok(target) => target,
            Err(_) if may_fail => return None,
            Err(e) => panic!("opening: {e:?}"),
        };
        for (generation, op) in (FIRST_GENERATION..).zip(ops) {
            let result = self.run(&*target, *op, generation);
            if std::env::var_os("QCOW2_SHOW_OPERATIONS").is_some() {
                eprintln!("{generation} {op:?}: {result:?}");
            }
            match result {
                Ok(()) if *op == Op::Reopen => match open() {
                    Ok(again) => target = again,
                    Err(_) if may_fail => return None,
                    Err(e) => panic!("opening again at operation {generation}: {e:?}"),
                },
                Ok(()) => {}
                Err(e) if !may_fail || e.kind() == ErrorKind::Internal => {
                    panic!("operation {generation}, {op:?}: {e:?}")
                }
                Err(_) => {}
            }
        }
        Some(target)
    }

    /// Takes in what happened since the last call. No operation may be running.
    fn collect(&mut self) {
        let (first, entries) = self.journal.take();
        assert_eq!(first, self.first + self.entries.len());
        self.entries.extend(entries);
    }

    /// The states that power cuts since the last `forget` can leave; see [`states`].
    pub fn states(&mut self, seed: u64, random: usize) -> states::States<'_> {
        self.collect();
        states::States::new(&self.base, (self.first, self.seen), &self.entries, seed, random)
    }

    /// About `random` states, spread over the power cuts since the last `forget`.
    pub fn sample_states(&mut self, seed: u64, random: usize) -> states::States<'_> {
        self.states(seed, random).sample()
    }

    /// Forgets what is durable by now: later cuts lie behind it.
    pub fn forget(&mut self) {
        self.collect();
        let kept = states::settle(&mut self.base, self.first, &self.entries);
        self.first += self.entries.len() - kept.len();
        self.entries = kept;
        self.seen = self.first + self.entries.len();
        self.history.lock().prune(self.seen);
    }
}

/// Number of the first operation of a sequence; smaller ones are for what an image contains from the start.
pub const FIRST_GENERATION: u32 = 1000;

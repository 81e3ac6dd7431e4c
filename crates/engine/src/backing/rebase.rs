//! Rebase: another backing file under the same disk.

use std::ops::Range;

use qcow2_core::WriteBehind;
use qcow2_format::Header;
use qcow2_format::header::extension::Extension;
use qcow2_format::header::feature::{Autoclear, Incompatible};
use qcow2_format::limits::MAX_BACKING_FILE_NAME;
use qcow2_transform::is_zero;

use crate::amend::publish;
use crate::check::{self, CheckOptions, Repair};
use crate::create::Backing;
use crate::image::{Layer, Qcow2, read_header};
use crate::source::{Extent, ExtentKind};
use crate::storage::Identity;
use crate::walk::{Step, Steps, Walk};
use crate::workers::{Tasks, share};
use crate::{Error, ErrorKind, GuestSource, Image, Job, Mem, MemMut, Result, Storage, StorageExt};

/// Guest bytes that a worker compares at once, aligned.
const CHUNK: u64 = 1 << 20;
/// How much is listed at once.
const STEPS: Steps = Steps::of(64 << 30, 16 << 10);

/// How to rebase.
#[derive(Debug, Clone, Copy)]
pub struct RebaseOptions {
    /// Compress the clusters that are written.
    pub compress: bool,
    /// What reads as zeroes becomes zero clusters. Else it is stored as data, as QEMU does it, up to the end of the old backing file.
    pub detect_zeroes: bool,
    /// Threads that compare and write, the caller's among them; fewer where the system has no more.
    pub workers: usize,
}

impl Default for RebaseOptions {
    fn default() -> Self {
        Self { compress: false, detect_zeroes: true, workers: 2 }
    }
}

/// Changes the backing file of `top`, which is open for writing over its old one, to `backing`, whose disk is `new`
/// (`None` for both: no backing file). What the top does not have and the two backing files differ in is written into the
/// top and durable before its header changes. The image is closed then, whatever comes of it.
///
/// # Errors
/// As [`check_backing`], before anything is written; `Aborted`; what reading and writing give. Before the header is
/// written, which is the last step, the disk reads as before over its old backing file, whatever was copied.
pub fn rebase(
    top: &Image,
    new: Option<&Image>,
    backing: Option<&Backing>,
    options: &RebaseOptions,
    job: &Job,
) -> Result<()> {
    let Some(layer) = top.top_qcow2() else {
        let message = "a raw image cannot have a backing file";
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    };
    let storage = layer.storage();
    check_backing(&**storage, backing)?;
    refuse_loop(layer, new)?;
    if options.compress && !layer.host_is_guest() {
        let message =
            "an image whose data is encrypted cannot hold compressed clusters: rebase it without compressing";
        return Err(layer.error(ErrorKind::UnsupportedFeature, message).with_field("compress"));
    }
    let size = top.virtual_size();
    job.set_total(size);
    let unit =
        if options.compress { layer.geometry().cluster_size() } else { layer.geometry().subcluster_size() };
    // Without a zero flag, zeroes that nothing hides now would be given up, not stored.
    let has_zero_flag = layer.header().version >= 3;
    let old_size = top.layers().get(1).map_or(0, |below| below.virtual_size());
    let zeroes_from = match (has_zero_flag, options.detect_zeroes) {
        (false, _) => u64::MAX,
        (true, true) => 0,
        (true, false) => old_size,
    };
    let shared = shared_depth(top, new);
    let behind = WriteBehind::new(Layer::files(layer));
    let disks = Disks { top, new, shared, unit, size, zeroes_from, compress: options.compress, behind };
    share(
        options.workers,
        job,
        |tasks| disks.find(tasks, job),
        |buffers, task| disks.compare(buffers, &task, job),
    )?;
    job.checkpoint()?;
    // Data and tables become durable. Closing alone would not say that the image refused to write them.
    top.flush()?;
    top.close()?;
    write_backing(&**storage, backing)
}

/// Changes the backing file that the image in `storage` names, and nothing else: the disk reads as before only if the new
/// one has the same contents. Nobody else has the file open.
///
/// # Errors
/// As [`check_backing`]; `ReadOnly`; `Corrupt` for an image that must be repaired first; `Io`.
pub fn set_backing(
    storage: &dyn Storage,
    backing: Option<&Backing>,
    limits: &CheckOptions,
    job: &Job,
) -> Result<()> {
    if !storage.traits().writable {
        let message = "the file is open for reading only: its backing file cannot be changed";
        return Err(storage.located(Error::new(ErrorKind::ReadOnly, message)));
    }
    check_backing(storage, backing)?;
    let marks = |storage| read_header(storage).map(|header| header.incompatible);
    let corrupt = |message| Err(storage.located(Error::new(ErrorKind::Corrupt, message)));
    if marks(storage)?.contains(Incompatible::CORRUPT) {
        return corrupt("the image is marked corrupt: repair it before its backing file is changed");
    }
    if marks(storage)?.contains(Incompatible::DIRTY) {
        check::repair(storage, Repair::All, limits, job)?;
        if marks(storage)?.contains(Incompatible::DIRTY) {
            return corrupt("the image was not closed cleanly and could not be repaired");
        }
    }
    write_backing(storage, backing)
}

/// Refuses a backing file that the header cannot name. Changes nothing.
///
/// # Errors
/// `InvalidArgument` for a name that is empty or longer than 1023 bytes, and for a backing file under an external data file that is a raw image on its own; `Limit` for names that do
/// not fit into the header; those of reading the header.
pub fn check_backing(storage: &dyn Storage, backing: Option<&Backing>) -> Result<()> {
    with_backing(&read_header(storage)?, backing).map(drop).map_err(|e| storage.located(e))
}

fn write_backing(storage: &dyn Storage, backing: Option<&Backing>) -> Result<()> {
    let old = read_header(storage)?;
    let new = with_backing(&old, backing).map_err(|e| storage.located(e))?;
    publish::header(storage, &old, &new)
}

/// `header` with another backing file.
fn with_backing(header: &Header, backing: Option<&Backing>) -> Result<Header> {
    if backing.is_some() && header.data_file_raw() {
        let message =
            "an image whose external data file is a raw image on its own cannot have a backing file";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("backing"));
    }
    let length = backing.map_or(0, |backing| backing.filename.len());
    if length == 0 && backing.is_some() || length > MAX_BACKING_FILE_NAME {
        let message = format!("a backing file's name has 1 to {MAX_BACKING_FILE_NAME} bytes, not {length}");
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("backing"));
    }
    let mut new = header.clone();
    if new.version >= 3 {
        new.autoclear &= Autoclear::SUPPORTED;
    }
    new.backing_file = backing.map(|backing| backing.filename.clone());
    new.extensions.retain(|e| !matches!(e, Extension::BackingFormat(_)));
    if let Some(format) = backing.and_then(|backing| backing.format.clone()) {
        new.extensions.insert(0, Extension::BackingFormat(format));
    }
    match new.encode() {
        Ok(_) => Ok(new),
        Err(error) => Err(Error::new(ErrorKind::Limit, error.to_string()).with_field("backing_file")),
    }
}

fn identity(layer: &dyn Layer) -> Option<Identity> {
    layer.storage().identity()
}

fn refuse_loop(top: &Qcow2, new: Option<&Image>) -> Result<()> {
    let own = top.storage().identity();
    let layers = new.map_or(&[][..], Image::layers);
    if own.is_some() && layers.iter().any(|layer| identity(&**layer) == own) {
        let message = "the new backing chain contains the image itself";
        return Err(top.error(ErrorKind::Chain, message).with_field("backing_file"));
    }
    Ok(())
}

/// Where the new chain is the rest of the old one: what comes from there needs no comparison.
fn shared_depth(top: &Image, new: Option<&Image>) -> Option<u32> {
    let new = new?.layers();
    let depth = top.layers().len().checked_sub(new.len()).filter(|depth| *depth > 0)?;
    let same = |a: &dyn Layer, b: &dyn Layer| {
        identity(a).is_some() && identity(a) == identity(b) && a.format() == b.format()
    };
    let all = top.layers().iter().skip(depth).zip(new).all(|(a, b)| same(&**a, &**b));
    all.then(|| u32::try_from(depth).ok()).flatten()
}

/// The disk over its old backing file, and the new one.
struct Disks<'a> {
    top: &'a Image,
    new: Option<&'a Image>,
    shared: Option<u32>,
    /// What the top allocates at a time, in bytes: a unit is all in the top or not at all.
    unit: u64,
    size: u64,
    /// From here on, zeroes become zero clusters.
    zeroes_from: u64,
    compress: bool,
    behind: WriteBehind<'a>,
}

/// Ranges of whole units inside one chunk that the top does not have, in guest order.
type Task = Vec<Range<u64>>;

impl Disks<'_> {
    /// Hands out what may differ.
    fn find(&self, tasks: &Tasks<'_, Task>, job: &Job) -> Result<()> {
        let mut gather = Gather { chunk: CHUNK.max(self.unit), done: 0, task: Task::new() };
        let mut walk = Walk::new(0..self.size, STEPS);
        let disks = || [Some(self.top as &dyn GuestSource), self.new.map(|image| image as &dyn GuestSource)];
        while let Some(Step { range: Range { end, .. }, extents: [old, new] }) = walk.next(disks(), job)? {
            let mut below = new.iter().peekable();
            for extent in old.iter() {
                let (mut from, to) = (extent.start, (extent.start + extent.length).min(end));
                if !self.is_below(extent) {
                    job.advance(to.saturating_sub(from));
                    continue;
                }
                while from < to {
                    while below.next_if(|e| e.start + e.length <= from).is_some() {}
                    let (next, zero) = match below.peek() {
                        Some(e) => ((e.start + e.length).min(to), e.zero),
                        None => (to, true),
                    };
                    if zero && extent.zero {
                        job.advance(next - from);
                    } else {
                        let units = from - from % self.unit..next.next_multiple_of(self.unit).min(self.size);
                        gather.add(units, tasks)?;
                    }
                    from = next;
                }
            }
        }
        gather.end(tasks)
    }

    /// Whether an extent comes from a layer that will not be there any more.
    fn is_below(&self, extent: &Extent) -> bool {
        let in_top = extent.depth == 0 && extent.kind != ExtentKind::Unallocated;
        !in_top && self.shared.is_none_or(|depth| extent.depth < depth)
    }

    fn compare(&self, buffers: &mut [Vec<u8>; 2], task: &Task, job: &Job) -> Result<()> {
        for range in task {
            let length = range.end - range.start;
            job.pace(length)?;
            let [old, new] = buffers;
            old.resize(length as usize, 0);
            new.resize(length as usize, 0);
            self.top.read_at(MemMut::from(&mut old[..]), range.start)?;
            self.read_new(new, range.start)?;
            self.write_differences(old, new, range.start)?;
            job.advance(length);
        }
        Ok(())
    }

    /// Reads the new backing file; zeroes behind its end.
    fn read_new(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let size = self.new.map_or(0, Image::virtual_size);
        let inside = size.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (front, behind) = buffer.split_at_mut(inside);
        behind.fill(0);
        match self.new {
            Some(image) if inside > 0 => image.read_at(MemMut::from(front), offset),
            _ => Ok(()),
        }
    }

    /// Writes the units of `old`, the disk at `offset`, that `new` has not.
    fn write_differences(&self, old: &[u8], new: &[u8], offset: u64) -> Result<()> {
        let unit = self.unit as usize;
        let kinds: Vec<Kind> = old.chunks(unit).zip(new.chunks(unit)).map(|(a, b)| Kind::of(a, b)).collect();
        let border =
            usize::try_from(self.zeroes_from.saturating_sub(offset)).unwrap_or(usize::MAX).div_ceil(unit);
        let (before, behind) = kinds.split_at(border.min(kinds.len()));
        let same = |a: &Kind, b: &Kind| a == b;
        let mut from = 0;
        for run in before.chunk_by(same).chain(behind.chunk_by(same)) {
            let to = (from + run.len() * unit).min(old.len());
            let (at, bytes) = (offset + from as u64, old.get(from..to).unwrap_or_default());
            match run.first() {
                Some(Kind::Zero) if at >= self.zeroes_from => {
                    self.top.write_zeroes(at, bytes.len() as u64, true)?
                }
                Some(Kind::Same) | None => {}
                Some(_) => {
                    match self.compress {
                        true => self.top.write_compressed_at(Mem::from(bytes), at)?,
                        false => self.top.write_at(Mem::from(bytes), at)?,
                    }
                    self.behind.wrote(bytes.len() as u64);
                }
            }
            from = to;
        }
        Ok(())
    }
}

/// What becomes of a unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Same,
    Zero,
    Data,
}

impl Kind {
    fn of(old: &[u8], new: &[u8]) -> Self {
        if old == new {
            Self::Same
        } else if is_zero(old) {
            Self::Zero
        } else {
            Self::Data
        }
    }
}

/// Collects ranges into tasks of one chunk each: two workers never meet in a unit.
struct Gather {
    chunk: u64,
    /// Everything before is in a task.
    done: u64,
    task: Task,
}

impl Gather {
    fn add(&mut self, range: Range<u64>, tasks: &Tasks<'_, Task>) -> Result<()> {
        let mut start = range.start.max(self.done);
        while start < range.end {
            let chunk = start - start % self.chunk;
            let end = chunk.saturating_add(self.chunk).min(range.end);
            if self.task.last().is_some_and(|last| last.start < chunk) {
                self.end(tasks)?;
            }
            match self.task.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => self.task.push(start..end),
            }
            self.done = end;
            start = end;
        }
        Ok(())
    }

    fn end(&mut self, tasks: &Tasks<'_, Task>) -> Result<()> {
        match std::mem::take(&mut self.task) {
            task if task.is_empty() => Ok(()),
            task => tasks.hand_out(task),
        }
    }
}

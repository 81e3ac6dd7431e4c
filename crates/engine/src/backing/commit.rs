//! Commit: what the layers above a base have goes into the base.

use std::ops::ControlFlow;
use std::sync::Arc;

use qcow2_core::WriteBehind;

use crate::source::ExtentKind;
use crate::walk::{Steps, for_each_extent};
use crate::workers::{Tasks, share};
use crate::{Error, ErrorKind, GuestSource, Image, Job, Layer, Mem, MemMut, Result, Storage, StorageExt};

/// Guest bytes of data that a worker moves at once, aligned: workers seldom meet in a cluster.
const CHUNK: u64 = 1 << 20;
/// Guest bytes of zeroes that a worker writes at once.
const ZERO_CHUNK: u64 = 1 << 30;
/// How much is listed at once.
const STEPS: Steps = Steps::of(64 << 30, 16 << 10);

/// How to commit.
#[derive(Debug, Clone, Copy)]
pub struct CommitOptions {
    /// Empty the top afterwards: it then reads all from the base. Only where the base is its backing file.
    pub empty: bool,
    /// Threads that copy, the caller's among them; fewer where the system has no more.
    pub workers: usize,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self { empty: true, workers: 2 }
    }
}

/// A range of the disk that the base has to get.
struct Task {
    start: u64,
    length: u64,
    content: Content,
}

/// Where its bytes come from.
#[derive(Clone)]
enum Content {
    Zero,
    Read,
    /// Read as well; stored there, and given up when all is committed.
    Once(Arc<dyn Storage>, u64),
}

/// The disk that is written to.
struct Target<'a> {
    disk: &'a Image,
    behind: WriteBehind<'a>,
}

/// Writes what `above` has into `base`. `above` is the part of the chain in front of the base, on its own; `base` the rest,
/// open for writing. A smaller base grows. The base is durable before the top is emptied.
///
/// # Errors
/// `InvalidArgument` for layers that cannot be emptied; `Chain` for a file that is in both; `ReadOnly`; `Aborted`; what
/// reading and writing give. Until the top is emptied it is as it was, and reads as before whatever the base has got.
pub fn commit(above: &Image, base: &Image, options: &CommitOptions, job: &Job) -> Result<()> {
    check(above, base, options)?;
    let size = above.virtual_size();
    job.set_total(size);
    // A disk is whole sectors; qcow2 can name other sizes.
    let wanted = size.next_multiple_of(512);
    if base.virtual_size() < wanted {
        base.resize(wanted)?;
    }
    let files = base.layers().first().map_or_else(Vec::new, |top| top.files());
    let target = Target { disk: base, behind: WriteBehind::new(files) };
    share(
        options.workers,
        job,
        |tasks| find(above, options.empty, tasks, job),
        |buffer, task| copy(above, &target, buffer, &task, job),
    )?;
    job.checkpoint()?;
    base.flush()?;
    if options.empty { above.empty() } else { Ok(()) }
}

fn check(above: &Image, base: &Image, options: &CommitOptions) -> Result<()> {
    if above.layers().iter().any(|layer| !layer.takes_backing()) {
        let message = "an image of this format has no backing file to commit to";
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    if options.empty && above.layers().len() != 1 {
        let message = "the top can be emptied only after a commit into its own backing file: the layers between would \
                       show through";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("drop"));
    }
    let identity = |layer: &dyn Layer| layer.storage().identity();
    for layer in above.layers() {
        if base
            .layers()
            .iter()
            .any(|other| identity(&**other).is_some() && identity(&**other) == identity(&**layer))
        {
            let error = Error::new(ErrorKind::Chain, "the backing chain contains this file twice");
            return Err(layer.storage().located(error));
        }
    }
    Ok(())
}

/// Hands out what the layers have: data, and zeroes that they state. `once`: nobody needs it afterwards.
fn find(above: &Image, once: bool, tasks: &Tasks<'_, Task>, job: &Job) -> Result<()> {
    // What lies behind the end of a layer between reads as zeroes, whatever the base has there.
    let reach = above.layers().iter().skip(1).map(|layer| layer.virtual_size()).min().unwrap_or(u64::MAX);
    for_each_extent(above, 0..above.virtual_size(), STEPS, job, |extent| {
        let end = extent.start + extent.length;
        if extent.kind == ExtentKind::Unallocated {
            let hidden = extent.start.max(reach).min(end);
            job.advance(hidden - extent.start);
            hand_out(tasks, hidden, end, &Content::Zero)?;
        } else {
            let content = match &extent.host {
                _ if extent.zero => Content::Zero,
                Some((storage, host)) if once => Content::Once(Arc::clone(storage), *host),
                _ => Content::Read,
            };
            hand_out(tasks, extent.start, end, &content)?;
        }
        Ok(ControlFlow::Continue(()))
    })
}

fn hand_out(tasks: &Tasks<'_, Task>, from: u64, end: u64, content: &Content) -> Result<()> {
    let mut start = from;
    while start < end {
        let (chunk, content) = match content {
            Content::Zero => (ZERO_CHUNK, Content::Zero),
            Content::Read => (CHUNK, Content::Read),
            Content::Once(storage, host) => {
                (CHUNK, Content::Once(Arc::clone(storage), host + (start - from)))
            }
        };
        let next = (start - start % chunk).saturating_add(chunk).min(end);
        tasks.hand_out(Task { start, length: next - start, content })?;
        start = next;
    }
    Ok(())
}

fn copy(
    above: &dyn GuestSource,
    base: &Target<'_>,
    buffer: &mut Vec<u8>,
    task: &Task,
    job: &Job,
) -> Result<()> {
    let Target { disk, behind } = base;
    if matches!(task.content, Content::Zero) {
        disk.write_zeroes(task.start, task.length, true)?;
    } else {
        job.pace(task.length)?;
        buffer.resize(CHUNK as usize, 0);
        let bytes = buffer.get_mut(..task.length as usize).unwrap_or_default();
        above.read_at(MemMut::from(&mut *bytes), task.start)?;
        // Memory of what is done with is at hand for what is written.
        if let Content::Once(storage, host) = &task.content {
            storage.forget(*host..*host + task.length);
        }
        disk.write_at(Mem::from(&*bytes), task.start)?;
        behind.wrote(task.length);
    }
    job.advance(task.length);
    Ok(())
}

//! The allocation of a chain: extents as `qemu-img map` reports them.

use std::sync::Arc;

use qcow2_format::CryptMethod;

use super::chain::Layer;
use super::mapping::{Segment, SegmentKind};
use super::qcow2::Qcow2;
use crate::source::{Extent, ExtentKind};
use crate::{Job, Result, Storage, StorageExt};

/// Clusters planned between two looks at the job. The plan of a step is held in memory, and every cluster can differ
/// from its neighbours.
const STEP_CLUSTERS: u64 = 8192;
/// Most guest bytes of a step, unless no layer has any of them.
const MAX_STEP: u64 = 1 << 30;

/// Appends the extents of `start..start + length`, clamped to the disk, and stops early once there are `most` or more.
/// Returns the first guest byte that is not covered.
pub(super) fn collect(
    layers: &[Layer],
    start: u64,
    length: u64,
    most: usize,
    job: &Job,
    out: &mut Vec<Extent>,
) -> Result<u64> {
    let size = layers.first().map_or(0, Layer::virtual_size);
    let end = start.saturating_add(length).min(size);
    let first = out.len();
    let smallest = layers.iter().filter_map(Layer::as_qcow2).map(|q| q.geometry().cluster_size()).min();
    let usual = smallest.unwrap_or(64 << 10).saturating_mul(STEP_CLUSTERS).min(MAX_STEP);
    let mut walk = Walk { layers, out, first };
    let mut at = start;
    while at < end && walk.out.len() - first < most {
        job.checkpoint()?;
        // Keeps tables that are planned with from being used again.
        let _pin = layers.first().and_then(Layer::as_qcow2).and_then(Qcow2::pin);
        let step = usual.max(hole(layers, at)).min(end - at);
        walk.range(at, step)?;
        at += step;
    }
    Ok(at)
}

/// Bytes from `at` on that no layer has, by whole L2 tables: a plan of them takes no memory, however many they are.
fn hole(layers: &[Layer], at: u64) -> u64 {
    let runs = layers.iter().map(|layer| match layer {
        _ if at >= layer.virtual_size() => u64::MAX,
        Layer::Raw(_) => 0,
        Layer::Qcow2(qcow2) => qcow2.bytes_without_table(at),
    });
    runs.min().unwrap_or(0)
}

/// What is left to walk, in guest order from the top of a stack: chains can be too long for recursion.
enum Work {
    /// Ask the layer at this depth for a range. `above` is where the layer above would have its first byte, if
    /// that layer has a host cluster there.
    Range { depth: usize, start: u64, length: u64, above: Option<u64> },
    /// The layer at this depth has the segment.
    Segment { depth: usize, segment: Segment },
}

struct Walk<'a> {
    layers: &'a [Layer],
    out: &'a mut Vec<Extent>,
    /// Extents before this one are the caller's.
    first: usize,
}

impl Walk<'_> {
    fn range(&mut self, start: u64, length: u64) -> Result<()> {
        let layers = self.layers;
        let mut segments = Vec::new();
        let mut stack = vec![Work::Range { depth: 0, start, length, above: None }];
        while let Some(work) = stack.pop() {
            let (depth, start, length, above) = match work {
                Work::Range { depth, start, length, above } => (depth, start, length, above),
                Work::Segment { depth, segment } => {
                    if let Some(qcow2) = layers.get(depth).and_then(Layer::as_qcow2) {
                        self.segment(qcow2, &segment, depth)?;
                    }
                    continue;
                }
            };
            let Some(layer) = layers.get(depth) else { continue };
            let inside = layer.virtual_size().saturating_sub(start).min(length);
            if inside == 0 {
                // Behind the end of this layer: the one above decides, by not having it.
                let depth = depth.saturating_sub(1);
                let upper = layers.get(depth).and_then(Layer::as_qcow2);
                let host = above.zip(upper.and_then(stored)).map(|(at, file)| (Arc::clone(file), at));
                self.push(unallocated(start, length, depth, host));
                continue;
            }
            if inside < length {
                stack.push(Work::Range {
                    depth,
                    start: start + inside,
                    length: length - inside,
                    above: above.map(|at| at + inside),
                });
            }
            match layer {
                Layer::Raw(raw) => {
                    let kind = |data| if data { ExtentKind::Data } else { ExtentKind::Zero };
                    self.host_runs(raw.storage(), start, start, inside, depth, kind)?;
                }
                Layer::Qcow2(qcow2) => {
                    segments.clear();
                    qcow2.plan_read(start..start + inside, &mut segments)?;
                    let deeper = depth + 1 < layers.len();
                    stack.extend(segments.iter().rev().map(|&segment| match segment {
                        Segment { start, length, kind: SegmentKind::Unallocated { host } } if deeper => {
                            Work::Range { depth: depth + 1, start, length, above: host }
                        }
                        _ => Work::Segment { depth, segment },
                    }));
                }
            }
        }
        Ok(())
    }

    fn segment(&mut self, qcow2: &Qcow2, segment: &Segment, depth: usize) -> Result<()> {
        let &Segment { start, length, kind } = segment;
        let file = stored(qcow2);
        let place = |host: Option<u64>| file.cloned().zip(host);
        if let (SegmentKind::Data { host }, Some(file)) = (kind, file)
            && qcow2.is_metadata_preallocated()?
        {
            return self.host_runs(file, start, host, length, depth, |_| ExtentKind::Data);
        }
        let extent = match kind {
            SegmentKind::Data { host } => Extent {
                start,
                length,
                kind: ExtentKind::Data,
                depth: depth as u32,
                zero: false,
                host: place(Some(host)),
            },
            SegmentKind::Zero { host } => Extent {
                start,
                length,
                kind: ExtentKind::Zero,
                depth: depth as u32,
                zero: true,
                host: place(host),
            },
            SegmentKind::Compressed(_) => Extent {
                start,
                length,
                kind: ExtentKind::Compressed,
                depth: depth as u32,
                zero: false,
                host: None,
            },
            SegmentKind::Unallocated { host } => unallocated(start, length, depth, place(host)),
        };
        self.push(extent);
        Ok(())
    }

    /// Splits a stored range by the holes of its file.
    #[allow(clippy::too_many_arguments, reason = "one range in two address spaces")]
    fn host_runs(
        &mut self,
        storage: &Arc<dyn Storage>,
        start: u64,
        host: u64,
        length: u64,
        depth: usize,
        kind: impl Fn(bool) -> ExtentKind,
    ) -> Result<()> {
        let file_size = storage.size()?;
        let mut done = 0;
        while done < length {
            let at = host + done;
            let (end, data) = if at >= file_size {
                (host + length, false)
            } else {
                let run = storage.run_at(at).map_err(|e| storage.failure(e, "lseek"))?;
                // A file that shrank meanwhile must not stop the walk.
                (run.end.max(at + 1), run.data)
            };
            let part = end.min(host + length) - at;
            self.push(Extent {
                start: start + done,
                length: part,
                kind: kind(data),
                depth: depth as u32,
                zero: !data,
                host: Some((Arc::clone(storage), at)),
            });
            done += part;
        }
        Ok(())
    }

    fn push(&mut self, extent: Extent) {
        let own = self.out.len() > self.first;
        if let Some(last) = self.out.last_mut().filter(|_| own)
            && mergeable(last, &extent)
        {
            last.length += extent.length;
            return;
        }
        self.out.push(extent);
    }
}

/// The file whose bytes are the layer's guest data as they are: none when they are encrypted, or when the external
/// data file is not open. Whoever copies extents then has to read through the image, and is refused.
fn stored(qcow2: &Qcow2) -> Option<&Arc<dyn Storage>> {
    if qcow2.header().crypt_method != CryptMethod::None {
        None
    } else if qcow2.header().has_data_file() {
        qcow2.data_file()
    } else {
        Some(qcow2.storage())
    }
}

fn unallocated(start: u64, length: u64, depth: usize, host: Option<(Arc<dyn Storage>, u64)>) -> Extent {
    Extent { start, length, kind: ExtentKind::Unallocated, depth: depth as u32, zero: true, host }
}

fn mergeable(a: &Extent, b: &Extent) -> bool {
    let host = match (&a.host, &b.host) {
        (None, None) => true,
        (Some((fa, ha)), Some((fb, hb))) => Arc::ptr_eq(fa, fb) && ha + a.length == *hb,
        _ => false,
    };
    host && a.kind == b.kind && a.depth == b.depth && a.zero == b.zero
}

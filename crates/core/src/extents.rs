//! The allocation of a chain: extents as `qemu-img map` reports them.

use std::sync::Arc;

use crate::layer::{Holes, Layer, Place, Segment, SegmentKind};
use crate::source::{Extent, ExtentKind};
use crate::storage::Run;
use crate::{Job, Result, Storage, StorageExt};

/// Units planned between two looks at the job. The plan of a step is held in memory, and every unit can differ from its
/// neighbours.
const STEP_UNITS: u64 = 8192;
/// Most guest bytes of a step, unless no layer has any of them.
const MAX_STEP: u64 = 1 << 30;

/// Appends the extents of `start..start + length`, clamped to the disk, and stops early once there are `most` or more.
/// Returns the first guest byte that is not covered.
pub(super) fn collect(
    layers: &[Box<dyn Layer>],
    start: u64,
    length: u64,
    most: usize,
    job: &Job,
    out: &mut Vec<Extent>,
) -> Result<u64> {
    let size = layers.first().map_or(0, |top| top.virtual_size());
    let end = start.saturating_add(length).min(size);
    let first = out.len();
    let smallest = layers.iter().filter_map(|layer| layer.unit()).min();
    let usual = smallest.unwrap_or(64 << 10).saturating_mul(STEP_UNITS).min(MAX_STEP);
    let mut walk = Walk { layers, out, first };
    let mut at = start;
    while at < end && walk.out.len() - first < most {
        job.checkpoint()?;
        // Keeps tables that are planned with from being used again.
        let _pin = layers.first().and_then(|top| top.pin());
        let step = usual.max(hole(layers, at)).min(end - at);
        walk.range(at, step)?;
        at += step;
    }
    Ok(at)
}

/// Bytes from `at` on that no layer has: a plan of them takes no memory, however many they are.
fn hole(layers: &[Box<dyn Layer>], at: u64) -> u64 {
    let runs = layers.iter().map(|layer| match layer {
        _ if at >= layer.virtual_size() => u64::MAX,
        _ => layer.absent_from(at),
    });
    runs.min().unwrap_or(0)
}

/// What is left to walk, in guest order from the top of a stack: chains can be too long for recursion.
enum Work {
    /// Ask the layer at this depth for a range. `above` is where the layer above would have its first byte, if
    /// that layer has room for it already.
    Range { depth: usize, start: u64, length: u64, above: Option<Place> },
    /// The layer at this depth has the segment.
    Segment { depth: usize, segment: Segment },
}

struct Walk<'a> {
    layers: &'a [Box<dyn Layer>],
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
                    if let Some(layer) = layers.get(depth) {
                        self.segment(&**layer, &segment, depth)?;
                    }
                    continue;
                }
            };
            let Some(layer) = layers.get(depth) else { continue };
            let inside = layer.virtual_size().saturating_sub(start).min(length);
            if inside == 0 {
                // Behind the end of this layer: the one above decides, by not having it.
                let depth = depth.saturating_sub(1);
                let host = layers.get(depth).and_then(|layer| stored(&**layer, above));
                self.push(unallocated(start, length, depth, host));
                continue;
            }
            if inside < length {
                stack.push(Work::Range {
                    depth,
                    start: start + inside,
                    length: length - inside,
                    above: above.map(|place| place.after(inside)),
                });
            }
            segments.clear();
            layer.plan(start..start + inside, &mut segments)?;
            let deeper = depth + 1 < layers.len();
            stack.extend(segments.iter().rev().map(|&segment| match segment {
                Segment { start, length, kind: SegmentKind::Unallocated(place) } if deeper => {
                    Work::Range { depth: depth + 1, start, length, above: place }
                }
                _ => Work::Segment { depth, segment },
            }));
        }
        Ok(())
    }

    fn segment(&mut self, layer: &dyn Layer, segment: &Segment, depth: usize) -> Result<()> {
        let &Segment { start, length, kind } = segment;
        let (kind, place) = match kind {
            SegmentKind::Data(place) => {
                if let Some(file) = layer.file(place.file) {
                    let holes = layer.holes()?;
                    let kind = |space: bool| match holes {
                        Holes::Zero if !space => ExtentKind::Zero,
                        _ => ExtentKind::Data,
                    };
                    if holes != Holes::Ignored {
                        return self.host_runs(file, segment, place, depth, kind);
                    }
                }
                (ExtentKind::Data, Some(place))
            }
            SegmentKind::Zero(place) => (ExtentKind::Zero, place),
            SegmentKind::Opaque(_) => (ExtentKind::Compressed, None),
            SegmentKind::Unallocated(place) => (ExtentKind::Unallocated, place),
        };
        let zero = matches!(kind, ExtentKind::Zero | ExtentKind::Unallocated);
        let host = stored(layer, place);
        self.push(Extent { start, length, kind, depth: depth as u32, zero, host });
        Ok(())
    }

    /// Splits a segment, which is stored at `place`, by the holes of its file. Zeroes that take space there are data here, too.
    fn host_runs(
        &mut self,
        storage: &Arc<dyn Storage>,
        &Segment { start, length, .. }: &Segment,
        Place { host, .. }: Place,
        depth: usize,
        kind: impl Fn(bool) -> ExtentKind,
    ) -> Result<()> {
        let file_size = storage.size()?;
        let mut done = 0;
        while done < length {
            let at = host + done;
            let Run { end, data, space } = if at >= file_size {
                Run::new(host + length, false)
            } else {
                storage.run(at..host + length)?
            };
            // A file that shrank meanwhile must not stop the walk.
            let part = end.max(at + 1).min(host + length) - at;
            self.push(Extent {
                start: start + done,
                length: part,
                kind: kind(space || data),
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

/// File and offset of a place, where the file's bytes are the guest's as they are. Elsewhere whoever copies extents has to
/// read through the layer, and is refused there if need be.
fn stored(layer: &dyn Layer, place: Option<Place>) -> Option<(Arc<dyn Storage>, u64)> {
    let place = place?;
    layer.file(place.file).map(|file| (Arc::clone(file), place.host))
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

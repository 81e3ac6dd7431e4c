//! What must be copied when a request takes a new host cluster. Pure planning.

use std::ops::Range;

use qcow2_format::{Geometry, L2Mapping, SubclusterBitmap, SubclusterKind};

/// Copies around a write inside one cluster, and the subclusters that hold data afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cow {
    /// Byte ranges of the cluster whose old contents the new host cluster must hold; disjoint, in order, and apart
    /// from the written range.
    pub(super) copy: Vec<Range<u64>>,
    /// Subcluster bitmap of the new entry, for extended L2 entries.
    pub(super) bitmap: SubclusterBitmap,
}

/// Plans a write of `written` (byte range inside the cluster, not empty) where the old mapping is `old`. `reuse` says
/// that the entry keeps its host cluster, so that what is data there already stays.
pub(super) fn plan_cow(g: &Geometry, old: &L2Mapping, written: Range<u64>, reuse: bool) -> Cow {
    let size = g.cluster_size();
    if !g.extended_l2() {
        let copy = [0..written.start, written.end..size];
        return Cow {
            copy: copy.into_iter().filter(|r| !r.is_empty()).collect(),
            bitmap: SubclusterBitmap(0),
        };
    }
    let unit = g.subcluster_size();
    let first = written.start / unit;
    let end = written.end.div_ceil(unit);
    let before = match old {
        L2Mapping::Subclusters { bitmap, .. } => *bitmap,
        // Without subclusters of its own, the whole cluster moves over.
        L2Mapping::Compressed(_) | L2Mapping::Data { .. } => SubclusterBitmap::ALL_DATA,
        L2Mapping::Zero { .. } => SubclusterBitmap::ALL_ZERO,
        L2Mapping::Unallocated => SubclusterBitmap(0),
    };
    let mut copy: Vec<Range<u64>> = Vec::new();
    let mut push = |range: Range<u64>| match copy.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ if range.is_empty() => {}
        _ => copy.push(range),
    };
    for index in 0..32u64 {
        let (start, stop) = (index * unit, (index + 1) * unit);
        let was_data = before.kind(index as u32) == SubclusterKind::Data;
        if index >= first && index < end {
            // A subcluster that is data in the kept host cluster needs no copy around the write.
            if !(reuse && was_data) {
                push(start..written.start.clamp(start, stop));
                push(written.end.clamp(start, stop)..stop);
            }
        } else if was_data && !reuse {
            push(start..stop);
        }
    }
    Cow { copy, bitmap: before.with_data(first as u32, end as u32) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qcow2_format::HostOffset;

    use super::*;

    #[test]
    fn a_standard_cluster_copies_head_and_tail() {
        let g = Geometry::new(16, 4, false).unwrap();
        let cow = plan_cow(&g, &L2Mapping::Unallocated, 4096..8192, false);
        assert_eq!(cow.copy, [0..4096, 8192..65536]);
        assert_eq!(plan_cow(&g, &L2Mapping::Unallocated, 0..65536, false).copy, []);
    }

    proptest! {
        /// Against a model by bytes: afterwards every byte that should be data is written or copied, and nothing else.
        #[test]
        fn subclusters_are_exact(data in any::<u32>(), zero in any::<u32>(), a in 0u64..16384, n in 1u64..16384, reuse in any::<bool>()) {
            let g = Geometry::new(14, 4, true).unwrap();
            let before = SubclusterBitmap(u64::from(data & !zero) | u64::from(zero) << 32);
            let old = L2Mapping::Subclusters { host: Some(HostOffset(0x4000)), copied: reuse, bitmap: before };
            let written = a..(a + n).min(16384);
            let cow = plan_cow(&g, &old, written.clone(), reuse);
            prop_assert!(cow.bitmap.is_valid());
            for byte in 0..16384u64 {
                let sub = (byte / 512) as u32;
                let touched = u64::from(sub) >= written.start / 512 && u64::from(sub) < written.end.div_ceil(512);
                let was_data = before.kind(sub) == SubclusterKind::Data;
                let copied = cow.copy.iter().any(|r| r.contains(&byte));
                let kept = written.contains(&byte) || (reuse && was_data);
                let expected = !kept && (touched || was_data);
                prop_assert_eq!(copied, expected, "byte {}", byte);
                let kind = if touched { SubclusterKind::Data } else { before.kind(sub) };
                prop_assert_eq!(cow.bitmap.kind(sub), kind);
            }
        }
    }
}

//! What every layer that is read must keep, whatever its format: one suite for all of them.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::layer::{Segment, SegmentKind};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, ErrorKind, Layer, MemMut, Raw, Result, Storage, StorageExt};

use crate::Rng;
use crate::storage::{Fault, FaultStorage, Op};

/// Reads that fail, one after the other, before the rest is taken on trust.
const FAULTS: u64 = 40;
/// Lengths to which a file is cut, beside those inside its first bytes.
const CUTS: u64 = 40;

/// Opens the layer on a file.
pub type Open<'a> = &'a dyn Fn(Arc<dyn Storage>) -> Result<Box<dyn Layer>>;

/// An image, and what must be read from it.
pub struct LayerContract<'a> {
    /// For messages.
    pub name: &'a str,
    /// The bytes of the image file.
    pub file: &'a [u8],
    /// Opens it.
    pub open: Open<'a>,
    /// The bytes of the disk.
    pub expected: &'a [u8],
    /// The bytes of the disk below, a multiple of 512; none for an image without a backing file.
    pub below: Option<&'a [u8]>,
}

impl LayerContract<'_> {
    /// Fails the test unless the layer keeps all of it.
    pub fn check(&self) {
        let layer = self.layer(self.storage());
        let size = self.expected.len() as u64;
        assert_eq!(layer.virtual_size(), size, "{}: virtual size", self.name);
        assert!(layer.unit().is_none_or(u64::is_power_of_two), "{}: unit", self.name);
        self.check_range(&*layer, 0..size);
        let mut rng = Rng::new(size);
        for _ in 0..100 {
            let start = rng.below(size);
            self.check_range(&*layer, start..start + 1 + rng.below((size - start).min(200_000)));
        }
        self.check_absent(&*layer);
        self.check_chain(layer.reopen().unwrap(), "opened again");
        self.check_chain(layer, "as a chain");
        self.check_faults();
        self.check_cuts();
    }

    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(MemoryStorage::from_bytes(self.file))
    }

    fn layer(&self, storage: Arc<dyn Storage>) -> Box<dyn Layer> {
        (self.open)(storage).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// The plan covers the range once and in order, and its segments are the disk.
    fn check_range(&self, layer: &dyn Layer, range: Range<u64>) {
        let what = format!("{}, {range:?}", self.name);
        let mut segments = Vec::new();
        layer.plan(range.clone(), &mut segments).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut at = range.start;
        for segment in &segments {
            assert!(segment.start == at && segment.length > 0, "{what}: {segment:?} at {at}");
            at += segment.length;
            self.check_segment(layer, segment, &what);
        }
        assert_eq!(at, range.end, "{what}");
    }

    fn check_segment(&self, layer: &dyn Layer, segment: &Segment, what: &str) {
        let bytes = segment.start as usize..(segment.start + segment.length) as usize;
        let expected = &self.expected[bytes.clone()];
        let mut found = vec![0; expected.len()];
        match segment.kind {
            SegmentKind::Zero(_) => {}
            SegmentKind::Unallocated(_) => {
                let below = self.below.unwrap_or_default();
                let inside = below.get(bytes.start..bytes.end.min(below.len())).unwrap_or_default();
                found[..inside.len()].copy_from_slice(inside);
            }
            SegmentKind::Data(_) | SegmentKind::Opaque(_) => {
                layer
                    .read_segment(segment, MemMut::from(&mut found[..]))
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
            }
        }
        assert!(found == expected, "{what}: {segment:?} has other bytes");
        // Where the layer hands out its file, that has the guest's bytes.
        if let SegmentKind::Data(place) = segment.kind
            && let Some(file) = layer.file(place.file)
        {
            file.read_padded_at(MemMut::from(&mut found[..]), place.host).unwrap();
            assert!(found == expected, "{what}: the file of {segment:?} has other bytes");
        }
    }

    /// What a walk skips is not in the layer.
    fn check_absent(&self, layer: &dyn Layer) {
        let size = layer.virtual_size();
        let mut rng = Rng::new(7);
        for at in (0..100).map(|_| rng.below(size)).chain([0, size - 1]) {
            let end = at.saturating_add(layer.absent_from(at)).min(size);
            let mut segments = Vec::new();
            layer.plan(at..end.max(at), &mut segments).unwrap();
            let there = segments.iter().find(|s| !matches!(s.kind, SegmentKind::Unallocated(_)));
            assert!(at == end || there.is_none(), "{}: {at}..{end} is not absent: {there:?}", self.name);
        }
    }

    fn chain(&self, layer: Box<dyn Layer>) -> Chain {
        let below = self.below.map(|bytes| {
            Box::new(Raw::new(Arc::new(MemoryStorage::from_bytes(bytes))).unwrap()) as Box<dyn Layer>
        });
        Chain::new([Some(layer), below].into_iter().flatten().collect()).unwrap()
    }

    /// Reading is what the segments are.
    fn check_chain(&self, layer: Box<dyn Layer>, how: &str) {
        let chain = self.chain(layer);
        let mut rng = Rng::new(3);
        let size = self.expected.len() as u64;
        let parts = (0..50).map(|_| rng.below(size)).collect::<Vec<_>>();
        let parts = parts.iter().map(|&start| start..size.min(start + 70_001));
        for range in parts.chain(std::iter::once(0..size)) {
            let mut found = vec![0; (range.end - range.start) as usize];
            chain.read_at(MemMut::from(&mut found[..]), range.start).unwrap();
            let expected = &self.expected[range.start as usize..range.end as usize];
            assert!(found == expected, "{} {how}: {range:?} has other bytes", self.name);
            // What is in memory since then is the same.
            let few = found.len().min(512);
            let at_hand = chain.read_at_hand(MemMut::from(&mut found[..few]), range.start);
            assert!(
                !at_hand || found[..few] == expected[..few],
                "{} {how}: {range:?} has other bytes at hand",
                self.name
            );
        }
    }

    fn read(&self, chain: &Chain) -> Result<Vec<u8>> {
        let mut found = vec![0; chain.virtual_size() as usize];
        // In parts: each is a request of its own.
        for (i, part) in found.chunks_mut(100_000).enumerate() {
            chain.read_at(MemMut::from(part), i as u64 * 100_000)?;
        }
        Ok(found)
    }

    /// A read of the file that fails is an `Io` error, and the same can be tried again.
    fn check_faults(&self) {
        for n in 0..FAULTS {
            let storage = Arc::new(FaultStorage::new(
                self.storage(),
                Fault { ops: vec![Op::Read], after: n, once: true, errno: 5 },
            ));
            let open = || (self.open)(Arc::clone(&storage) as Arc<dyn Storage>);
            let layer = open().or_else(|e| {
                assert_eq!(e.kind(), ErrorKind::Io, "{}: read {n}: {e}", self.name);
                open()
            });
            let chain = self.chain(layer.unwrap());
            let found = self.read(&chain).or_else(|e| {
                assert_eq!(e.kind(), ErrorKind::Io, "{}: read {n}: {e}", self.name);
                self.read(&chain)
            });
            assert!(found.unwrap() == self.expected, "{}: other bytes after read {n} failed", self.name);
            if storage.failed() == 0 {
                assert!(n > 0, "{}: nothing was read", self.name);
                return;
            }
        }
    }

    /// A file that is cut off anywhere gives a value or an error.
    fn check_cuts(&self) {
        let length = self.file.len() as u64;
        let mut rng = Rng::new(length);
        let cuts = (0..CUTS).map(|_| rng.below(length.max(1))).collect::<Vec<_>>();
        for cut in cuts.into_iter().chain(0..length.min(120)) {
            let storage = Arc::new(MemoryStorage::from_bytes(&self.file[..cut as usize]));
            let Ok(layer) = (self.open)(storage) else { continue };
            let size = layer.virtual_size();
            let mut segments = Vec::new();
            // What cannot be planned cannot be read either.
            let _ = layer.plan(0..size, &mut segments);
            let _ = self.read(&self.chain(layer));
        }
    }
}

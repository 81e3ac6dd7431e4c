//! Forged images against the slow reader: shapes that QEMU reads but rarely writes, random tables, and chains and
//! snapshots of every size relation.

use std::sync::Arc;

use proptest::prelude::*;
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{
    ErrorKind, ExtentKind, GuestSource, Image, Job, Layer, MemMut, OpenOptions, Qcow2, Raw, Storage,
};
use qcow2_testkit::forge::{Built, COPIED, ZERO, codec};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::reader::SlowReader;
use qcow2_testkit::storage::{CountingStorage, Fault, FaultStorage, Op, ShortIo};
use qcow2_testkit::{Fixture, Forge, Qemu, Rng, chain};

fn memory(built: &Built) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(&built.bytes.to_vec()))
}

fn image_on(storage: Arc<dyn Storage>, options: &OpenOptions) -> Image {
    Image::new(vec![Box::new(Qcow2::open(storage, options).unwrap())]).unwrap()
}

fn slow(fixture: &Fixture, built: &Built) -> SlowReader {
    let path = fixture.path("forged.qcow2");
    built.bytes.write_to(&path);
    SlowReader::open(&path, "qcow2")
}

fn assert_reads_alike(built: &Built, what: &str) {
    let expected = slow(&Fixture::new(), built);
    let image = image_on(memory(built), &OpenOptions::default());
    assert_eq!(image.virtual_size(), expected.size(), "{what}");
    let len = expected.size() as usize;
    let expected = expected.read(0, len);
    assert_same(&expected, &chain::read(&image, 0, len).unwrap(), 0, what);
    for step in [511, 4096, 70_001] {
        for at in (0..len).step_by(step * 7) {
            let n = step.min(len - at);
            assert_same(&expected[at..at + n], &chain::read(&image, at as u64, n).unwrap(), at as u64, what);
        }
    }
}

/// Payloads as QEMU accepts them: no end marker, several frames, bytes behind the end, odd offsets (bit 0 of the
/// entry is not a zero flag), shared sectors, clusters that span two host clusters, and more sectors than needed.
#[test]
fn compressed_clusters_of_every_shape_are_read() {
    for bits in [9, 12, 16, 21] {
        let c = 1usize << bits;
        for zstd in [false, true] {
            let forge = Forge::new(3, bits, 12 * c as u64);
            let mut forge = if zstd { forge.zstd() } else { forge };
            let mut rng = Rng::new(u64::from(bits));
            let shapes: Vec<Vec<u8>> = if zstd {
                [1, 2, 3, 9].map(|frames| codec::zstd(&rng.text(c), frames)).to_vec()
            } else {
                let shape = [codec::deflate, codec::deflate_without_end, codec::deflate];
                shape.map(|deflate| deflate(&rng.text(c))).to_vec()
            };
            // What does not get smaller is not stored compressed: 512 bytes have no room for 9 frames.
            let shapes: Vec<_> = shapes.into_iter().filter(|payload| payload.len() < c).collect();
            assert!(!shapes.is_empty());
            forge.pack_from(1);
            for (i, payload) in shapes.iter().enumerate() {
                forge.compressed(i as u64, payload);
            }
            // The first byte is the last of its host cluster.
            forge.pack_from(c as u64 - 1);
            forge.compressed(4, &shapes[0]);
            // Garbage behind the end, and every sector that the descriptor can name.
            let at = forge.alloc(3);
            let mut payload = shapes[0].clone();
            payload.extend(rng.bytes(c / 2));
            payload.truncate(c);
            forge.compressed_at(5, at, &payload);
            let most = (1 << (bits - 8)) - 1;
            let widest = forge.descriptor(at, most.min(2 * c as u64 / 512 - 1));
            forge.entry(6, widest);
            if !zstd && c < 32768 {
                // Stored blocks: the payload is longer than what it holds.
                let at = forge.alloc(2);
                let stored = codec::deflate_stored(&rng.bytes(c));
                forge.compressed_at(7, at, &stored[..]);
            }
            assert_reads_alike(&forge.build(), &format!("cluster bits {bits}, zstd {zstd}"));
        }
    }
}

/// The last payload ends with the file, inside a sector: QEMU does not pad the file when it closes it.
#[test]
fn a_compressed_cluster_at_the_unpadded_end_of_the_file_is_read() {
    let text = Rng::new(1).text(1 << 16);
    let payload = codec::deflate(&text);
    let built = Forge::new(3, 16, 1 << 17).build();
    let end = built.bytes.len();
    let mut forge = Forge::new(3, 16, 1 << 17);
    let _ = forge.alloc(end >> 16);
    forge.data(1, b"x");
    let shift = 62 - 8;
    let sectors = (payload.len() as u64 - 1) / 512;
    let built = forge.build();
    let end = built.bytes.len();
    let built = built.with_entry(0, (1 << 62) | (sectors << shift) | end).with_bytes(end, &payload);
    assert_eq!(built.bytes.len(), end + payload.len() as u64);
    let image = image_on(memory(&built), &OpenOptions::default());
    assert_same(&text, &chain::read(&image, 0, 1 << 16).unwrap(), 0, "unpadded end");
}

/// One entry of a random L2 table.
#[derive(Debug, Clone)]
enum Kind {
    Unallocated,
    Data,
    ZeroPlain,
    ZeroAllocated,
    Compressed,
    Subclusters(u32, u32),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Unallocated),
        Just(Kind::Data),
        Just(Kind::ZeroPlain),
        Just(Kind::ZeroAllocated),
        Just(Kind::Compressed),
        (any::<u32>(), any::<u32>()).prop_map(|(data, zero)| Kind::Subclusters(data & !zero, zero)),
    ]
}

fn forge_kinds(mut forge: Forge, kinds: &[Kind], extended: bool, seed: u64) -> Built {
    let c = forge.cluster_size() as usize;
    let mut rng = Rng::new(seed);
    for (i, kind) in kinds.iter().enumerate() {
        let cluster = i as u64;
        match kind {
            Kind::Unallocated => {}
            Kind::Data => drop(forge.data(cluster, &rng.bytes(c))),
            Kind::ZeroPlain => forge.zero_plain(cluster),
            Kind::ZeroAllocated => drop(forge.zero_allocated(cluster, &rng.bytes(c))),
            Kind::Compressed => drop(forge.compressed(cluster, &codec::deflate(&rng.text(c)))),
            Kind::Subclusters(data, zero) if extended => {
                forge.data(cluster, &rng.bytes(c));
                forge.subclusters(cluster, u64::from(*zero) << 32 | u64::from(*data));
            }
            Kind::Subclusters(..) => forge.zero_plain(cluster),
        }
    }
    forge.build()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Random tables, any size of the disk (also one that no sector divides), read in random pieces.
    #[test]
    fn random_tables_read_as_the_slow_reader_says(
        kinds in prop::collection::vec(kind(), 1..200),
        bits in 9u32..=15,
        extended in any::<bool>(),
        cut in 0u64..511,
        seed in any::<u64>(),
        pieces in prop::collection::vec((any::<u32>(), 0usize..60_000), 1..12),
    ) {
        let extended = extended && bits >= 14;
        let size = ((kinds.len() as u64) << bits) - cut;
        let forge = Forge::new(3, bits, size);
        let forge = if extended { forge.extended_l2() } else { forge };
        let built = forge_kinds(forge, &kinds, extended, seed);
        let expected = slow(&Fixture::new(), &built).read(0, size as usize);
        let options = OpenOptions { l2_cache_bytes: Some(0), inflated_cache_bytes: Some(0), ..OpenOptions::default() };
        let image = image_on(memory(&built), &options);
        for (at, len) in pieces {
            let at = u64::from(at) % size;
            let len = len.min((size - at) as usize);
            assert_same(&expected[at as usize..][..len], &chain::read(&image, at, len).unwrap(), at, "piece");
        }
        // Extents cover the disk once, in order, and those that say zero are zero.
        let mut extents = Vec::new();
        image.extents(0, size, &Job::new(), &mut extents).unwrap();
        let mut next = 0;
        for e in &extents {
            prop_assert_eq!(e.start, next);
            prop_assert!(e.length > 0);
            next += e.length;
            let bytes = &expected[e.start as usize..next as usize];
            prop_assert!(!e.zero || bytes.iter().all(|b| *b == 0));
            if let (ExtentKind::Data, Some((storage, host))) = (e.kind, &e.host) {
                let mut stored = vec![0u8; bytes.len()];
                qcow2_engine::StorageExt::read_padded_at(&**storage, stored.as_mut_slice().into(), *host).unwrap();
                prop_assert!(stored == bytes, "extent at {:#x} names other bytes", e.start);
            }
        }
        prop_assert_eq!(next, size);
    }
}

#[test]
fn reads_survive_short_transfers() {
    let kinds: Vec<Kind> = (0..60).map(|i| if i % 3 == 0 { Kind::Compressed } else { Kind::Data }).collect();
    let built = forge_kinds(Forge::new(3, 12, 60 << 12), &kinds, false, 9);
    let expected = slow(&Fixture::new(), &built).read(0, 60 << 12);
    for max in [1, 7, 5000] {
        let short: Arc<dyn Storage> = Arc::new(ShortIo::new(memory(&built), max));
        let image = image_on(short, &OpenOptions::default());
        assert_same(
            &expected,
            &chain::read(&image, 0, 60 << 12).unwrap(),
            0,
            &format!("at most {max} bytes"),
        );
    }
}

/// A failed read is reported with its number, and the next try is not answered from what failed.
#[test]
fn every_failed_read_is_an_io_error_and_can_be_tried_again() {
    let kinds = [Kind::Data, Kind::Compressed, Kind::Data, Kind::Compressed];
    let built = forge_kinds(Forge::new(3, 12, 4 << 12), &kinds, false, 10);
    let expected = slow(&Fixture::new(), &built).read(0, 4 << 12);
    let mut failures = 0;
    for nth in 0..100 {
        let storage = Arc::new(FaultStorage::new(
            memory(&built),
            Fault { ops: vec![Op::Read], after: nth, once: true, errno: 5 },
        ));
        let image = match Qcow2::open(storage.clone(), &OpenOptions::default()) {
            Ok(qcow2) => Image::new(vec![Box::new(qcow2)]).unwrap(),
            Err(error) => {
                assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)), "read {nth}: {error}");
                failures += 1;
                continue;
            }
        };
        match chain::read(&image, 0, 4 << 12) {
            Ok(bytes) => assert_same(&expected, &bytes, 0, "without a fault"),
            Err(error) => {
                assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)), "read {nth}: {error}");
                failures += 1;
            }
        }
        if storage.failed() == 0 {
            break;
        }
        assert_same(&expected, &chain::read(&image, 0, 4 << 12).unwrap(), 0, "the second try");
    }
    assert!(failures >= 6, "only {failures} reads failed: header, L1, L2 and data are at least 6");
}

#[test]
fn caches_save_reads_and_opening_reads_no_more_than_it_needs() {
    let mut forge = Forge::new(3, 16, 1 << 34);
    let text = Rng::new(2).text(1 << 16);
    forge.compressed(0, &codec::deflate(&text));
    forge.data(1, &text);
    let storage = Arc::new(CountingStorage::new(memory(&forge.build())));
    let image = image_on(storage.clone(), &OpenOptions::default());
    let opened = storage.of(Op::Read);
    assert!(opened.bytes <= 2 << 16, "opening read {opened:?}");
    storage.reset();
    for at in (0..1 << 16).step_by(512) {
        assert_same(
            &text[at..at + 512],
            &chain::read(&image, at as u64, 512).unwrap(),
            at as u64,
            "in sectors",
        );
    }
    // One slice of the L2 table and one payload.
    assert!(storage.of(Op::Read).calls <= 2, "{:?}", storage.of(Op::Read));
    storage.reset();
    chain::read(&image, 1 << 16, 4096).unwrap();
    assert_eq!(storage.of(Op::Read).bytes, 4096, "a read of data takes its bytes and no metadata");
}

/// The cache holds few clusters of 2 MiB, yet a sequential reader inflates each of them once.
#[test]
fn small_sequential_reads_inflate_each_cluster_once_at_every_cluster_size() {
    for bits in [9, 12, 16, 18, 20, 21] {
        let mut forge = Forge::new(3, bits, 20 << bits);
        let text = Rng::new(3).text(1 << bits);
        let payload = codec::deflate(&text);
        for cluster in 0..20 {
            // Each payload in clusters of its own: equal descriptors would be one cache entry.
            let at = forge.alloc(2);
            forge.compressed_at(cluster, at, &payload);
        }
        for inflated_cache_bytes in [None, Some(0)] {
            let storage = Arc::new(CountingStorage::new(memory(&forge.clone().build())));
            let options = OpenOptions { inflated_cache_bytes, ..OpenOptions::default() };
            let image = image_on(storage.clone(), &options);
            storage.reset();
            let step = (1 << bits) / 4;
            for at in (0..20 << bits).step_by(step) {
                chain::read(&image, at, step).unwrap();
            }
            let reads = storage.of(Op::Read).calls;
            assert!(reads <= 20 + 3, "cluster bits {bits}, cache {inflated_cache_bytes:?}: {reads} reads");
        }
    }
}

fn at_hand(image: &Image, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0xa5; len];
    image.read_at_hand(MemMut::from(&mut bytes[..]), offset).then_some(bytes)
}

/// Without a read of the file: all of a cluster that was inflated, through an overlay that does not have it, and nothing else.
#[test]
fn the_rest_of_an_inflated_cluster_is_at_hand() {
    let c = 1u64 << 16;
    let mut forge = Forge::new(3, 16, 4 * c);
    let text = Rng::new(5).text(c as usize);
    for cluster in [0, 1] {
        let at = forge.alloc(2);
        forge.compressed_at(cluster, at, &codec::deflate(&text));
    }
    forge.data(2, &text);
    let mut above = Forge::new(3, 16, 4 * c - 512);
    above.data(1, &text[..512]);
    let base = Arc::new(CountingStorage::new(memory(&forge.build())));
    let open =
        |storage| -> Box<dyn Layer> { Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap()) };
    let alone = Image::new(vec![open(base.clone())]).unwrap();
    let over = Image::new(vec![open(memory(&above.build())), open(base.clone())]).unwrap();
    for (image, second) in [(&alone, true), (&over, false)] {
        assert_eq!(at_hand(image, 0, 512), None, "nothing was inflated");
        for cluster in 0..4 {
            chain::read(image, cluster * c, 1024).unwrap();
        }
        base.reset();
        assert_same(&text[1024..5120], &at_hand(image, 1024, 4096).unwrap(), 1024, "the first cluster");
        assert_eq!(at_hand(image, 2 * c - 512, 512).is_some(), second, "the overlay has the second one");
        for (offset, len, what) in [
            (c - 512, 1024, "two clusters"),
            (2 * c, 512, "data"),
            (3 * c, 512, "zeroes"),
            (4 * c - 256, 512, "behind the end"),
            (u64::MAX - 10, 512, "no offset"),
        ] {
            assert_eq!(at_hand(image, offset, len), None, "{what}");
        }
        assert_eq!(base.of(Op::Read).calls, 0);
    }
}

#[test]
fn snapshots_are_views_of_their_own_size_found_by_id_then_by_name() {
    let fixture = Fixture::new();
    for version in [2, 3] {
        let mut forge = Forge::new(version, 12, 8 << 12);
        forge.data(0, b"first");
        forge.data(19, b"beyond the active disk");
        // Version 2 entries can lack extra data: then the disk has the image's size.
        forge.snapshot("1", "2", 20 << 12);
        forge.data(0, b"second");
        forge.snapshot("2", "small", 3 << 12);
        forge.data(0, b"active");
        forge.snapshot_with_extra("3", "no extra data", 8 << 12, &[]);
        let built = forge.build();
        let path = fixture.path("snapshots.qcow2");
        built.bytes.write_to(&path);
        let view = |wanted: &str| {
            let options = OpenOptions { snapshot: Some(wanted.into()), ..OpenOptions::default() };
            chain::open(&path, "qcow2", &options)
        };
        for (wanted, name, start, size) in [
            ("1", "2", b"first\0", 20 << 12),
            // An id wins over a name.
            ("2", "small", b"second", 3 << 12),
            ("small", "small", b"second", 3 << 12),
            ("no extra data", "no extra data", b"active", 8 << 12),
        ] {
            let view = view(wanted).unwrap();
            assert_eq!(view.virtual_size(), size, "{wanted}");
            assert_eq!(chain::read(&view, 0, 6).unwrap(), start, "{wanted}");
            let slow = SlowReader::open_snapshot(&path, name);
            let len = size as usize;
            assert_same(&slow.read(0, len), &chain::read(&view, 0, len).unwrap(), 0, wanted);
        }
        assert_eq!(view("4").unwrap_err().kind(), ErrorKind::NoSnapshot);
        assert_eq!(view("").unwrap_err().kind(), ErrorKind::NoSnapshot);
    }
}

/// Overlays of every size relation over each other: a shorter layer hides what lies deeper behind its end.
#[test]
fn chains_of_shrinking_and_growing_layers_read_as_the_slow_reader_says() {
    // QEMU hides a last partial sector of a qcow2 layer, so only the top ends inside one.
    let fixture = Fixture::new();
    let mut rng = Rng::new(11);
    let base = fixture.file("base.raw", &rng.bytes(100_003));
    assert!(base.exists());
    let mut below = (String::from("base.raw"), "raw");
    for (i, size) in [150_016u64, 60_416, 199_680, 200_192, 30_208, 120_500].into_iter().enumerate() {
        let bits = [9, 16, 12, 14, 10, 12][i];
        let mut forge = Forge::new(3, bits, size).backing(&below.0, below.1);
        let clusters = size >> bits;
        for _ in 0..clusters.div_ceil(6) {
            let cluster = rng.below(clusters.max(1));
            match rng.below(3) {
                0 => forge.zero_plain(cluster),
                1 => drop(forge.compressed(cluster, &codec::deflate(&rng.text(1 << bits)))),
                _ => drop(forge.data(cluster, &rng.bytes(1 << bits))),
            }
        }
        below = (format!("layer{i}.qcow2"), "qcow2");
        let path = fixture.path(&below.0);
        forge.build().bytes.write_to(&path);
        let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
        let slow = SlowReader::open(&path, "qcow2");
        let expected = slow.read(0, size as usize);
        assert_same(&expected, &chain::read(&image, 0, size as usize).unwrap(), 0, &below.0);
        for at in (0..size).step_by(777) {
            let len = (size - at).min(1500) as usize;
            assert_same(
                &expected[at as usize..][..len],
                &chain::read(&image, at, len).unwrap(),
                at,
                &below.0,
            );
        }
        if let Some(qemu) = Qemu::find() {
            let read = qemu.guest_bytes(&path, "qcow2", &[]);
            let sectors = size as usize & !511;
            assert_same(&read[..sectors], &expected[..sectors], 0, "QEMU");
        }
    }
}

#[test]
fn a_chain_of_200_layers_is_read_without_recursion_and_one_file_twice_is_refused() {
    let layers = |count: usize| -> Vec<Box<dyn Layer>> {
        (0..count)
            .map(|i| {
                let mut forge = Forge::new(3, 9, 1 << 20);
                if i + 1 == count {
                    forge.data(1000, b"at the bottom");
                }
                Box::new(Qcow2::open(memory(&forge.build()), &OpenOptions::default()).unwrap())
                    as Box<dyn Layer>
            })
            .collect()
    };
    let image = Image::new(layers(200)).unwrap();
    let read = std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || {
            let mut extents = Vec::new();
            image.extents(0, 1 << 20, &Job::new(), &mut extents).unwrap();
            assert_eq!(extents[1].depth, 199);
            chain::read(&image, 512_000, 13).unwrap()
        })
        .unwrap();
    assert_eq!(read.join().unwrap(), b"at the bottom");

    let fixture = Fixture::new();
    let path = fixture.path("self.qcow2");
    Forge::new(3, 16, 1 << 20).backing("self.qcow2", "qcow2").build().bytes.write_to(&path);
    std::fs::hard_link(&path, fixture.path("other-name.qcow2")).unwrap();
    let layer = |name: &str| {
        let storage = chain::file(&fixture.path(name)).unwrap();
        Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap()) as Box<dyn Layer>
    };
    for again in ["self.qcow2", "other-name.qcow2"] {
        let error = Image::new(vec![layer("self.qcow2"), layer(again)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Chain, "{error}");
        assert!(error.path().is_some(), "{error}");
    }
}

/// A guest can write a qcow2 header with a backing file into a raw disk: opened as raw it stays plain bytes.
#[test]
fn a_raw_disk_that_holds_a_qcow2_header_is_plain_bytes() {
    let bytes = Forge::new(3, 16, 1 << 20).backing("/etc/passwd", "raw").build().bytes.to_vec();
    let image =
        Image::new(vec![Box::new(Raw::new(Arc::new(MemoryStorage::from_bytes(&bytes))).unwrap())]).unwrap();
    assert_eq!(image.virtual_size(), bytes.len() as u64);
    assert_same(&bytes, &chain::read(&image, 0, bytes.len()).unwrap(), 0, "raw");
}

#[test]
fn reads_beyond_the_disk_are_refused_and_empty_ones_are_not() {
    let image = image_on(memory(&Forge::new(3, 16, 1000).build()), &OpenOptions::default());
    assert_eq!(chain::read(&image, 1000, 0).unwrap(), b"");
    for (at, len) in [(1000, 1), (999, 2), (u64::MAX, 1), (u64::MAX, 0), (u64::MAX - 5, 100)] {
        let error = chain::read(&image, at, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{at}+{len}");
    }
}

#[test]
fn an_external_data_file_holds_cluster_0_at_offset_0_and_is_needed() {
    let mut forge = Forge::new(3, 16, 4 << 16).external("data.raw", false);
    forge.data(0, b"cluster 0");
    forge.entry(1, COPIED | ZERO | (1 << 16));
    forge.data(3, b"cluster 3");
    let built = forge.build();
    let mut qcow2 = Qcow2::open(memory(&built), &OpenOptions::default()).unwrap();
    assert_eq!(qcow2.references().data_file.unwrap().filename.unwrap(), b"data.raw");
    let without = Qcow2::open(memory(&built), &OpenOptions::default()).unwrap();
    let without = Image::new(vec![Box::new(without)]).unwrap();
    assert_eq!(chain::read(&without, 0, 9).unwrap_err().kind(), ErrorKind::ReferenceDenied);
    // What the data file does not hold is read without it.
    assert_eq!(chain::read(&without, 1 << 16, 9).unwrap(), [0; 9]);
    qcow2.set_data_file(Arc::new(MemoryStorage::from_bytes(&built.data_file.to_vec())));
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    assert_eq!(chain::read(&image, 0, 9).unwrap(), b"cluster 0");
    assert_eq!(chain::read(&image, 1 << 16, 9).unwrap(), [0; 9]);
    assert_eq!(chain::read(&image, 3 << 16, 9).unwrap(), b"cluster 3");
    // Without the data file, no extent names another file's bytes as the guest's.
    assert_no_host(&without);
}

fn assert_no_host(image: &Image) {
    let mut extents = Vec::new();
    image.extents(0, image.virtual_size(), &Job::new(), &mut extents).unwrap();
    assert!(extents.iter().any(|e| e.kind == ExtentKind::Data));
    assert!(extents.iter().all(|e| e.host.is_none()), "{extents:?}");
}

/// Ciphertext is nobody's data: whoever copies extents must not find it, nor take holes of the file for zeroes.
#[test]
fn extents_of_an_encrypted_image_name_no_bytes() {
    let mut forge = Forge::new(3, 16, 40 << 16).crypt_method(1);
    for cluster in 0..40 {
        forge.data(cluster, b"ciphertext");
    }
    let fixture = Fixture::new();
    let path = fixture.path("aes.qcow2");
    // Few bytes are stored of what is allocated, as after a preallocation of metadata.
    forge.build().bytes.write_to(&path);
    let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
    assert_no_host(&image);
    let mut extents = Vec::new();
    image.extents(0, 40 << 16, &Job::new(), &mut extents).unwrap();
    assert!(extents.iter().all(|e| !e.zero), "{extents:?}");
}

/// An image can store two clusters as one stream, as deduplication makes them: each is read from it.
#[test]
fn neighbours_that_share_a_compressed_cluster_are_both_read() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -c -P 7 0 64k"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let l1 = word(&bytes, 40);
    let l2 = word(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let image = image_on(storage, &OpenOptions::default());
    for (start, length) in [(0, 128 << 10), (512, 100 << 10), (60 << 10, 8 << 10), (64 << 10, 64 << 10)] {
        let mut buf = vec![0xff; length];
        image.read_at(MemMut::from(&mut buf[..]), start).unwrap();
        assert!(buf.iter().all(|&byte| byte == 7), "{start} {length}");
    }
}

//! Broken images: each a sound one with one lie told, and the error that a careful reader answers with.

use crate::forge::{Built, COMPRESSED, COPIED, ZERO, codec, field};
use crate::{Forge, Rng};

/// Where a reader must notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// When the image is opened.
    Open,
    /// When the guest cluster of this number is read; the image opens.
    Read(u64),
    /// When the snapshot of this name is opened or its first cluster read; the image opens and reads.
    Snapshot(&'static str),
    /// When the persistent bitmaps are listed; the image opens and reads.
    Bitmaps,
}

/// One broken image.
#[derive(Debug, Clone)]
pub struct Malformed {
    /// What is wrong with it, as a file name.
    pub name: &'static str,
    /// The image.
    pub built: Built,
    /// Where it is noticed.
    pub stage: Stage,
    /// The stable code of the error.
    pub code: &'static str,
}

const HEADER: &str = "ERR_QCOW2_INVALID_HEADER";
const FEATURE: &str = "ERR_QCOW2_UNSUPPORTED_FEATURE";
const SECRET: &str = "ERR_QCOW2_BAD_SECRET";
const CORRUPT: &str = "ERR_QCOW2_CORRUPT";
const LIMIT: &str = "ERR_QCOW2_LIMIT";

/// log2 of the cluster size of most images here.
const BITS: u32 = 16;
const CLUSTER: u64 = 1 << BITS;
/// Far behind the end of every file here, aligned to a cluster.
const FAR: u64 = 1 << 40;

fn forge(version: u32) -> Forge {
    let mut forge = Forge::new(version, BITS, 10 * CLUSTER);
    forge.data(0, b"a cluster that can be read");
    forge
}

fn base() -> Built {
    forge(3).build()
}

/// All broken images.
pub fn all() -> Vec<Malformed> {
    let mut list = List(Vec::new());
    list.header();
    list.header_tables();
    list.extensions();
    list.references();
    list.mapping();
    list.extended();
    list.compressed();
    list.snapshots();
    list.bitmaps();
    list.0
}

struct List(Vec<Malformed>);

impl List {
    fn add(&mut self, name: &'static str, stage: Stage, code: &'static str, built: Built) {
        self.0.push(Malformed { name, built, stage, code });
    }
    fn open(&mut self, name: &'static str, code: &'static str, built: Built) {
        self.add(name, Stage::Open, code, built);
    }
    fn read(&mut self, name: &'static str, code: &'static str, built: Built) {
        self.add(name, Stage::Read(0), code, built);
    }

    fn header(&mut self) {
        self.open("empty-file", HEADER, base().with_len(0));
        self.open("zeroes", HEADER, base().with_bytes(0, &[0; 4096]));
        self.open("wrong-magic", HEADER, base().with_u32(0, 0x5146_49fa));
        self.open("version-0", FEATURE, base().with_u32(field::VERSION, 0));
        self.open("version-1", FEATURE, base().with_u32(field::VERSION, 1));
        self.open("version-4", FEATURE, base().with_u32(field::VERSION, 4));
        for (name, len) in [
            ("truncated-in-magic", 3),
            ("truncated-before-cluster-bits", 20),
            ("truncated-in-v2-fields", 60),
            ("truncated-before-v3-fields", 72),
            ("truncated-in-v3-fields", 100),
            ("truncated-in-additional-fields", 108),
        ] {
            self.open(name, HEADER, base().with_len(len));
        }
        for (name, bits) in [
            ("cluster-bits-0", 0),
            ("cluster-bits-8", 8),
            ("cluster-bits-22", 22),
            ("cluster-bits-max", u32::MAX),
        ] {
            self.open(name, HEADER, base().with_u32(field::CLUSTER_BITS, bits));
        }
        self.open("refcount-order-7", HEADER, base().with_u32(field::REFCOUNT_ORDER, 7));
        self.open("refcount-order-max", HEADER, base().with_u32(field::REFCOUNT_ORDER, u32::MAX));
        for (name, length) in [
            ("header-length-0", 0),
            ("header-length-below-v3", 96),
            ("header-length-unaligned", 109),
            ("header-length-beyond-cluster", CLUSTER as u32 + 8),
            ("header-length-max", !7),
        ] {
            self.open(name, HEADER, base().with_u32(field::HEADER_LENGTH, length));
        }
        for (name, bit) in
            [("incompatible-bit-5", 5), ("incompatible-bit-32", 32), ("incompatible-bit-63", 63)]
        {
            self.open(name, FEATURE, base().with_u64(field::INCOMPATIBLE, 1 << bit));
        }
        let named = forge(3).feature_names(&[(0, 40, "time travel")]).features(1 << 40, 0, 0).build();
        self.open("incompatible-bit-with-a-name", FEATURE, named);
        self.open("crypt-method-3", HEADER, base().with_u32(field::CRYPT_METHOD, 3));
        self.open("luks-without-header", HEADER, forge(3).crypt_method(2).build());
        self.read("aes-is-not-plain-text", SECRET, forge(3).crypt_method(1).build());
        let mut luks = Forge::new(3, BITS, 10 * CLUSTER).crypt_method(2);
        let header = luks.alloc(1);
        luks.data(0, b"ciphertext");
        let pointer = [header.to_be_bytes(), 592u64.to_be_bytes()].concat();
        self.read("luks-is-not-plain-text", SECRET, luks.extension(field::EXT_CRYPTO, &pointer).build());
        self.open("compression-type-without-bit", HEADER, base().with_bytes(field::COMPRESSION_TYPE, &[1]));
        let unknown = forge(3).zstd().build().with_bytes(field::COMPRESSION_TYPE, &[2]);
        self.open("compression-type-2", HEADER, unknown);
        let default = forge(3).zstd().build().with_bytes(field::COMPRESSION_TYPE, &[0]);
        self.open("compression-bit-without-type", HEADER, default);
        let short = Forge::new(3, BITS, CLUSTER).zstd().header_length(112).build();
        self.open("compression-bit-without-field", HEADER, short.with_u32(field::HEADER_LENGTH, 104));
        let small = Forge::new(3, 12, 1 << 20).build();
        self.open("extended-l2-small-clusters", HEADER, small.with_u64(field::INCOMPATIBLE, 16));
        self.open("raw-data-without-data-file", HEADER, base().with_u64(field::AUTOCLEAR, 2));
    }

    fn header_tables(&mut self) {
        self.open("size-max", LIMIT, base().with_u64(field::SIZE, u64::MAX));
        self.open("size-2-to-63", LIMIT, base().with_u64(field::SIZE, 1 << 63));
        self.open("size-needs-more-l1", HEADER, base().with_u64(field::SIZE, 1 << 50));
        self.open("l1-size-0", HEADER, base().with_u32(field::L1_SIZE, 0));
        self.open("l1-size-max", LIMIT, base().with_u32(field::L1_SIZE, u32::MAX));
        self.open("l1-size-above-32-mib", LIMIT, base().with_u32(field::L1_SIZE, (4 << 20) + 1));
        self.open("l1-longer-than-the-file", CORRUPT, base().with_u32(field::L1_SIZE, 4 << 20));
        self.open("l1-unaligned", HEADER, base().with_u64(field::L1_OFFSET, CLUSTER + 512));
        self.open("l1-over-the-header", CORRUPT, base().with_u64(field::L1_OFFSET, 0));
        self.open("l1-behind-the-file", CORRUPT, base().with_u64(field::L1_OFFSET, FAR));
        self.open("l1-offset-max", HEADER, base().with_u64(field::L1_OFFSET, !(CLUSTER - 1)));
        self.open(
            "refcount-table-unaligned",
            HEADER,
            base().with_u64(field::REFCOUNT_OFFSET, 3 * CLUSTER + 8),
        );
        self.open("refcount-table-too-large", LIMIT, base().with_u32(field::REFCOUNT_CLUSTERS, 129));
        self.open("refcount-table-max", LIMIT, base().with_u32(field::REFCOUNT_CLUSTERS, u32::MAX));
        let wraps = base().with_u64(field::REFCOUNT_OFFSET, !(CLUSTER - 1));
        self.open("refcount-table-offset-max", HEADER, wraps);
    }

    fn extensions(&mut self) {
        let with = |data: &[u8]| forge(3).extension(0x1234_5678, data).build();
        for (name, length) in [
            ("extension-longer-than-the-cluster", CLUSTER as u32),
            ("extension-length-max", u32::MAX),
            ("extension-length-wraps", u32::MAX - 7),
        ] {
            let built = with(b"data");
            let at = built.layout.extensions[0];
            self.open(name, HEADER, built.with_u32(at + 4, length));
        }
        let backed = forge(3).extension(0x1234_5678, b"data").backing("base", "raw").build();
        let at = backed.layout.extensions[0];
        self.open("extension-over-the-backing-name", HEADER, backed.with_u32(at + 4, 4096));
        let long = forge(3).backing("base", &"r".repeat(16)).build();
        self.open("backing-format-too-long", LIMIT, long);
        let short = forge(3).extension(field::EXT_BITMAPS, &[0; 8]).build();
        self.open("bitmaps-extension-too-short", HEADER, short);
        let pointer = forge(3).extension(field::EXT_CRYPTO, &[0; 8]).build();
        self.open("encryption-pointer-too-short", HEADER, pointer);
        let plain = forge(3).extension(field::EXT_CRYPTO, &[0; 16]).build();
        self.open("encryption-pointer-without-encryption", HEADER, plain);
    }

    fn references(&mut self) {
        let backed = || forge(3).backing("base.qcow2", "qcow2").build();
        self.open(
            "backing-name-behind-the-first-cluster",
            HEADER,
            backed().with_u64(field::BACKING_OFFSET, CLUSTER + 1),
        );
        self.open("backing-name-offset-max", HEADER, backed().with_u64(field::BACKING_OFFSET, u64::MAX));
        self.open(
            "backing-name-across-the-first-cluster",
            HEADER,
            backed().with_u64(field::BACKING_OFFSET, CLUSTER - 4),
        );
        self.open("backing-name-of-1024-bytes", HEADER, backed().with_u32(field::BACKING_SIZE, 1024));
        self.open("backing-name-length-max", HEADER, backed().with_u32(field::BACKING_SIZE, u32::MAX));
    }

    fn mapping(&mut self) {
        let l1 = |value: u64| {
            let built = base();
            let at = built.layout.l1;
            built.with_u64(at, value)
        };
        self.read("l2-table-unaligned", CORRUPT, l1(COPIED | (CLUSTER + 512)));
        self.read("l2-table-behind-the-file", CORRUPT, l1(COPIED | FAR));
        self.read(
            "l2-table-at-the-last-offset",
            CORRUPT,
            l1(COPIED | (0x00ff_ffff_ffff_fe00 & !(CLUSTER - 1))),
        );
        let host = base().entry(0) & !COPIED;
        self.read("data-unaligned", CORRUPT, base().with_entry(0, COPIED | (host + 512)));
        self.read("zero-with-unaligned-allocation", CORRUPT, base().with_entry(0, ZERO | (host + 512)));
        let v2 = forge(2).build();
        self.read("zero-plain-in-version-2", CORRUPT, v2.clone().with_entry(0, ZERO));
        self.read("zero-allocated-in-version-2", CORRUPT, v2.with_entry(0, ZERO | host));
        let mut external = Forge::new(3, BITS, 10 * CLUSTER).external("data.raw", false);
        external.data(1, b"one");
        let external = external.build();
        let moved = external.clone().with_entry(1, COPIED | (2 * CLUSTER));
        self.add("data-file-at-another-offset", Stage::Read(1), CORRUPT, moved);
        let compressed = external.with_entry(1, COMPRESSED | CLUSTER);
        self.add("compressed-beside-a-data-file", Stage::Read(1), CORRUPT, compressed);
    }

    fn extended(&mut self) {
        let built = |word: u64, bitmap: u64| {
            let mut forge = Forge::new(3, BITS, 10 * CLUSTER).extended_l2();
            let host = forge.data(0, b"subclusters");
            let built = forge.build();
            let at = built.entry_offset(0);
            let word = if word == COPIED { COPIED | host } else { word };
            built.with_u64(at, word).with_u64(at + 8, bitmap)
        };
        self.read("subcluster-allocated-and-zero", CORRUPT, built(COPIED, 1 | 1 << 32));
        self.read("subcluster-allocated-without-a-cluster", CORRUPT, built(0, 1));
        self.read("extended-data-unaligned", CORRUPT, built(CLUSTER + 512, 0xffff_ffff));
    }

    fn compressed(&mut self) {
        let text = Rng::new(7).text(CLUSTER as usize);
        let with = |zstd: bool, payload: &[u8]| {
            let forge = Forge::new(3, BITS, 10 * CLUSTER);
            let mut forge = if zstd { forge.zstd() } else { forge };
            forge.compressed(0, payload);
            forge.build()
        };
        let deflate = codec::deflate(&text);
        let zstd = codec::zstd(&text, 1);
        let flipped = |payload: &[u8]| payload.iter().map(|b| !b).collect::<Vec<u8>>();
        self.read("deflate-garbage", CORRUPT, with(false, &flipped(&deflate)));
        self.read("zstd-garbage", CORRUPT, with(true, &flipped(&zstd)));
        self.read("deflate-zeroes", CORRUPT, with(false, &[0; 4096]));
        self.read("zstd-zeroes", CORRUPT, with(true, &[0; 4096]));
        // A complete stream that yields less than a cluster, with zeroes behind it in the sector.
        self.read("deflate-too-short", CORRUPT, with(false, &codec::deflate(&text[..CLUSTER as usize - 1])));
        self.read("zstd-too-short", CORRUPT, with(true, &codec::zstd(&text[..CLUSTER as usize - 1], 1)));
        self.read("deflate-empty", CORRUPT, with(false, &codec::deflate(&[])));
        let mut cut = |name, zstd, payload: &[u8]| {
            let built = with(zstd, payload);
            let entry = built.entry(0);
            // One sector of many: the data ends too early.
            self.read(name, CORRUPT, built.with_entry(0, COMPRESSED | (entry & ((1 << 54) - 1))));
        };
        cut("deflate-cut-by-the-descriptor", false, &deflate);
        cut("zstd-cut-by-the-descriptor", true, &zstd);
        let far = with(false, &deflate);
        self.read("compressed-behind-the-file", CORRUPT, far.with_entry(0, COMPRESSED | FAR));
        let most = with(false, &deflate).with_entry(0, (COPIED - 1) & !ZERO);
        self.read("compressed-descriptor-all-ones", CORRUPT, most);
        let built = with(false, &deflate);
        let at = built.entry(0) & ((1 << 54) - 1);
        // Block type 3 does not exist.
        self.read("deflate-reserved-block-type", CORRUPT, built.with_bytes(at, &[0x07]));
    }

    fn snapshots(&mut self) {
        let with = || {
            let mut forge = forge(3);
            forge.snapshot("1", "first", 10 * CLUSTER);
            forge.data(0, b"changed after the snapshot");
            forge.snapshot("2", "second", 10 * CLUSTER);
            forge.build()
        };
        let entry = with().layout.snapshot_entries[1];
        // The active disk can be read all the same.
        let second = Stage::Snapshot("second");
        let mut lie = |name, code, built| self.add(name, second.clone(), code, built);
        lie("snapshots-max", LIMIT, with().with_u32(field::SNAPSHOTS, u32::MAX));
        lie("snapshots-65537", LIMIT, with().with_u32(field::SNAPSHOTS, 65537));
        // A table that ends with the file, inside its first entry.
        let end = with().bytes.len();
        let cut =
            with().with_len(end + 64).with_u64(field::SNAPSHOTS_OFFSET, end).with_u64(end + 36, 1024 << 32);
        lie("snapshots-more-than-the-file-holds", CORRUPT, cut.with_u32(field::SNAPSHOTS, 65536));
        lie("snapshot-table-unaligned", HEADER, with().with_u64(field::SNAPSHOTS_OFFSET, CLUSTER + 8));
        lie("snapshot-table-behind-the-file", CORRUPT, with().with_u64(field::SNAPSHOTS_OFFSET, FAR));
        lie("snapshot-extra-data-max", LIMIT, with().with_u32(entry + 36, u32::MAX));
        lie("snapshot-extra-data-1025", LIMIT, with().with_u32(entry + 36, 1025));
        lie("snapshot-l1-behind-the-file", CORRUPT, with().with_u64(entry, FAR));
        lie("snapshot-l1-over-the-header", CORRUPT, with().with_u64(entry, 0));
        lie("snapshot-l1-unaligned", CORRUPT, with().with_u64(entry, CLUSTER + 512));
        lie("snapshot-l1-size-max", LIMIT, with().with_u32(entry + 8, u32::MAX));
        lie("snapshot-l1-longer-than-the-file", CORRUPT, with().with_u32(entry + 8, 4 << 20));
        lie("snapshot-l1-size-0", CORRUPT, with().with_u32(entry + 8, 0));
        lie("snapshot-disk-size-max", CORRUPT, with().with_u64(entry + 48, u64::MAX));
        let l1 = with().layout.snapshot_l1[1];
        lie("snapshot-l2-table-unaligned", CORRUPT, with().with_u64(l1, CLUSTER + 512));
    }

    fn bitmaps(&mut self) {
        let with = || {
            let mut forge = forge(3);
            forge.bitmap("dirty", 0, 16, &[0xff, 3]);
            forge.build()
        };
        let at = with().layout.extensions[0] + 8;
        let directory = with().layout.bitmap_directory;
        let mut lie = |name, code, built| self.add(name, Stage::Bitmaps, code, built);
        lie("bitmaps-0", CORRUPT, with().with_u32(at, 0));
        lie("bitmaps-max", LIMIT, with().with_u32(at, u32::MAX));
        lie("bitmaps-more-than-the-directory-holds", CORRUPT, with().with_u32(at, 2));
        lie("bitmap-directory-size-max", LIMIT, with().with_u64(at + 8, u64::MAX));
        lie("bitmap-directory-longer-than-the-file", CORRUPT, with().with_u64(at + 8, 1 << 25));
        lie("bitmap-directory-unaligned", CORRUPT, with().with_u64(at + 16, CLUSTER + 8));
        lie("bitmap-directory-behind-the-file", CORRUPT, with().with_u64(at + 16, FAR));
        lie("bitmap-table-size-max", LIMIT, with().with_u32(directory + 8, u32::MAX));
        lie("bitmap-granularity-63", CORRUPT, with().with_bytes(directory + 17, &[63]));
        lie("bitmap-granularity-8", CORRUPT, with().with_bytes(directory + 17, &[8]));
        lie("bitmap-type-0", CORRUPT, with().with_bytes(directory + 16, &[0]));
        lie("bitmap-name-empty", CORRUPT, with().with_bytes(directory + 18, &[0, 0]));
        lie("bitmap-name-max", CORRUPT, with().with_bytes(directory + 18, &[0xff, 0xff]));
    }
}

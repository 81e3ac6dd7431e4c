//! The forge: builds qcow2 images byte by byte.
//!
//! It shares no code with the format crate, so it is a second opinion on the specification. What
//! [`Forge::build`] gives is sound (`qemu-img check` finds it clean); broken images are sound ones with bytes
//! changed at the places that [`Layout`] names.

mod build;
pub mod codec;
pub mod field;

use std::collections::{BTreeMap, BTreeSet};

use crate::Sparse;
use crate::storage::Door;

/// L1 and L2: the cluster's refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
/// L2: a compressed cluster descriptor.
pub const COMPRESSED: u64 = 1 << 62;
/// L2: the cluster reads as zeroes.
pub const ZERO: u64 = 1;

/// Where the parts of a built image are, in bytes from the start of the file.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Bytes of an L2 entry: 8 or 16.
    pub entry_size: u64,
    /// Active L1 table.
    pub l1: u64,
    /// Active L2 tables by L1 index.
    pub l2: BTreeMap<u64, u64>,
    /// Refcount table.
    pub refcount_table: u64,
    /// Refcount blocks, by index.
    pub refcount_blocks: BTreeMap<u64, u64>,
    /// Snapshot table; 0 without snapshots.
    pub snapshot_table: u64,
    /// L1 tables of the snapshots.
    pub snapshot_l1: Vec<u64>,
    /// Offsets of the entries in the snapshot table.
    pub snapshot_entries: Vec<u64>,
    /// Bitmap directory; 0 without bitmaps.
    pub bitmap_directory: u64,
    /// Headers of the extensions, the end marker last.
    pub extensions: Vec<u64>,
    /// Backing file name; 0 without.
    pub backing_name: u64,
}

/// A finished image.
#[derive(Debug, Clone)]
pub struct Built {
    /// The bytes of the file.
    pub bytes: Sparse,
    /// The bytes of the external data file; empty without.
    pub data_file: Sparse,
    /// Where what is.
    pub layout: Layout,
}

impl Built {
    /// Where the active L2 entry of a guest cluster is in the file.
    pub fn entry_offset(&self, guest_cluster: u64) -> u64 {
        let per_table = (1u64 << self.layout.cluster_bits) / self.layout.entry_size;
        self.layout.l2[&(guest_cluster / per_table)] + guest_cluster % per_table * self.layout.entry_size
    }

    /// The active L2 entry of a guest cluster.
    pub fn entry(&self, guest_cluster: u64) -> u64 {
        self.bytes.u64(self.entry_offset(guest_cluster))
    }

    /// Replaces the active L2 entry of a guest cluster.
    #[must_use]
    pub fn with_entry(mut self, guest_cluster: u64, value: u64) -> Self {
        let at = self.entry_offset(guest_cluster);
        self.bytes.put_u64(at, value);
        self
    }

    /// Replaces a big-endian 32-bit number of the file.
    #[must_use]
    pub fn with_u32(mut self, offset: u64, value: u32) -> Self {
        self.bytes.put_u32(offset, value);
        self
    }

    /// Replaces a big-endian 64-bit number of the file.
    #[must_use]
    pub fn with_u64(mut self, offset: u64, value: u64) -> Self {
        self.bytes.put_u64(offset, value);
        self
    }

    /// Replaces bytes of the file.
    #[must_use]
    pub fn with_bytes(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.bytes.write(offset, bytes);
        self
    }

    /// Cuts or extends the file.
    #[must_use]
    pub fn with_len(mut self, len: u64) -> Self {
        self.bytes.set_len(len);
        self
    }
}

/// L2 entries by guest cluster: the entry and, for extended L2, its subcluster bitmap.
type Entries = BTreeMap<u64, (u64, u64)>;

#[derive(Debug, Clone)]
struct Snapshot {
    id: Vec<u8>,
    name: Vec<u8>,
    size: u64,
    extra: Vec<u8>,
    entries: Entries,
}

#[derive(Debug, Clone)]
struct Bitmap {
    name: Vec<u8>,
    flags: u32,
    granularity_bits: u8,
    data: Vec<u8>,
}

/// The builder. Guest clusters are numbered from 0.
#[derive(Debug, Clone)]
pub struct Forge {
    version: u32,
    cluster_bits: u32,
    size: u64,
    refcount_order: u32,
    header_length: u32,
    extended: bool,
    zstd: bool,
    external: bool,
    door: Door,
    features: [u64; 3],
    crypt_method: u32,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Vec<u8>,
    entries: Entries,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
    file: Sparse,
    data_file: Sparse,
    refs: BTreeMap<u64, u64>,
    next: u64,
    packed: (u64, u64),
}

impl Forge {
    /// An empty image of `size` bytes. Version 3 gets a header of 112 bytes and 16-bit refcounts.
    pub fn new(version: u32, cluster_bits: u32, size: u64) -> Self {
        Self {
            version,
            cluster_bits,
            size,
            refcount_order: 4,
            header_length: if version == 2 { 72 } else { 112 },
            extended: false,
            zstd: false,
            external: false,
            door: Door::None,
            features: [0; 3],
            crypt_method: 0,
            extensions: Vec::new(),
            backing: Vec::new(),
            entries: Entries::new(),
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            file: Sparse::default(),
            data_file: Sparse::default(),
            refs: BTreeMap::from([(0, 1)]),
            next: 1 << cluster_bits,
            packed: (0, 0),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Refcounts of `1 << order` bits.
    #[must_use]
    pub fn refcount_order(mut self, order: u32) -> Self {
        self.refcount_order = order;
        self
    }

    /// L2 entries with 32 subclusters. Call it before adding clusters.
    #[must_use]
    pub fn extended_l2(mut self) -> Self {
        self.extended = true;
        self.features[0] |= field::INCOMPAT_EXTENDED_L2;
        self
    }

    /// Compression type zstd.
    #[must_use]
    pub fn zstd(mut self) -> Self {
        self.zstd = true;
        self.features[0] |= field::INCOMPAT_COMPRESSION;
        self
    }

    /// Guest clusters live in an external data file; its name goes into an extension unless empty.
    #[must_use]
    pub fn external(mut self, name: &str, raw: bool) -> Self {
        self.external = true;
        self.features[0] |= field::INCOMPAT_DATA_FILE;
        self.features[2] |= if raw { field::AUTOCLEAR_RAW } else { 0 };
        self.data_file = Sparse::new(self.size);
        if name.is_empty() { self } else { self.extension(field::EXT_DATA_FILE, name.as_bytes()) }
    }

    /// Guest data is behind a door. Call it before adding clusters.
    #[must_use]
    pub fn behind(mut self, door: Door) -> Self {
        self.door = door;
        self
    }

    /// Sets feature bits: incompatible, compatible, autoclear.
    #[must_use]
    pub fn features(mut self, incompatible: u64, compatible: u64, autoclear: u64) -> Self {
        for (mine, more) in self.features.iter_mut().zip([incompatible, compatible, autoclear]) {
            *mine |= more;
        }
        self
    }

    /// Sets `crypt_method`.
    #[must_use]
    pub fn crypt_method(mut self, method: u32) -> Self {
        self.crypt_method = method;
        self
    }

    /// Sets the length of the header; bytes that no field defines are zero.
    #[must_use]
    pub fn header_length(mut self, length: u32) -> Self {
        self.header_length = length;
        self
    }

    /// Adds a header extension.
    #[must_use]
    pub fn extension(mut self, magic: u32, data: &[u8]) -> Self {
        self.extensions.push((magic, data.to_vec()));
        self
    }

    /// Adds a feature name table of (type, bit, name).
    #[must_use]
    pub fn feature_names(self, names: &[(u8, u8, &str)]) -> Self {
        let mut data = Vec::new();
        for (kind, bit, name) in names {
            let mut entry = [0u8; 48];
            entry[0] = *kind;
            entry[1] = *bit;
            entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
            data.extend_from_slice(&entry);
        }
        self.extension(field::EXT_FEATURE_NAMES, &data)
    }

    /// Names a backing file, and its format unless empty.
    #[must_use]
    pub fn backing(mut self, name: &str, format: &str) -> Self {
        self.backing = name.as_bytes().to_vec();
        if format.is_empty() { self } else { self.extension(field::EXT_BACKING_FORMAT, format.as_bytes()) }
    }

    /// Takes `clusters` contiguous host clusters; gives their offset.
    pub fn alloc(&mut self, clusters: u64) -> u64 {
        let at = self.next;
        self.next += clusters << self.cluster_bits;
        at
    }

    /// Writes bytes of the file.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.file.write(offset, bytes);
    }

    /// Sets an L2 entry as it is. COPIED is set or cleared by `build`, from the refcount.
    pub fn entry(&mut self, guest_cluster: u64, value: u64) {
        self.entries.entry(guest_cluster).or_default().0 = value;
    }

    /// Sets the subcluster bitmap of an extended L2 entry.
    pub fn subclusters(&mut self, guest_cluster: u64, bitmap: u64) {
        self.entries.entry(guest_cluster).or_default().1 = bitmap;
    }

    /// A data cluster holding `bytes` (up to a cluster; the rest is zero). Gives its host offset.
    pub fn data(&mut self, guest_cluster: u64, bytes: &[u8]) -> u64 {
        let guest = guest_cluster << self.cluster_bits;
        let host = if self.external { guest } else { self.alloc(1) };
        self.place(guest_cluster, host, bytes)
    }

    /// A data cluster at a host offset of the caller's choice.
    pub fn place(&mut self, guest_cluster: u64, host: u64, bytes: &[u8]) -> u64 {
        assert!(bytes.len() as u64 <= self.cluster_size());
        let mut padded = bytes.to_vec();
        padded.resize(self.cluster_size() as usize, 0);
        if self.door.is_some() {
            self.door.store(guest_cluster << self.cluster_bits, host, &mut padded);
            let file = if self.external { &mut self.data_file } else { &mut self.file };
            file.write(host, &padded);
        } else if self.external {
            self.data_file.write(host, bytes)
        } else {
            self.file.write(host, &padded)
        }
        self.entries.insert(guest_cluster, (host | COPIED, if self.extended { 0xffff_ffff } else { 0 }));
        host
    }

    /// A cluster that reads as zeroes and has no host cluster. Extended L2 says so in the bitmap.
    pub fn zero_plain(&mut self, guest_cluster: u64) {
        let entry = if self.extended { (0, 0xffff_ffff << 32) } else { (ZERO, 0) };
        self.entries.insert(guest_cluster, entry);
    }

    /// A cluster that reads as zeroes although its host cluster holds `bytes`.
    pub fn zero_allocated(&mut self, guest_cluster: u64, bytes: &[u8]) -> u64 {
        let host = self.data(guest_cluster, bytes);
        let entry =
            if self.extended { (host | COPIED, 0xffff_ffff << 32) } else { (host | COPIED | ZERO, 0) };
        self.entries.insert(guest_cluster, entry);
        host
    }

    /// A compressed cluster packed behind the last one, sharing its final sector and running on into the
    /// next host cluster where nothing was allocated in between. Gives the payload's offset.
    pub fn compressed(&mut self, guest_cluster: u64, payload: &[u8]) -> u64 {
        let len = payload.len() as u64;
        let (mut at, mut end) = self.packed;
        if at + len > end && end != self.next {
            at = self.next;
            end = self.next;
        }
        if at + len > end {
            self.alloc((at + len - end).div_ceil(self.cluster_size()));
            end = self.next;
        }
        self.packed = (at + len, end);
        self.compressed_at(guest_cluster, at, payload);
        at
    }

    /// A compressed cluster at a host offset of the caller's choice, with the fewest sectors that hold it.
    pub fn compressed_at(&mut self, guest_cluster: u64, host: u64, payload: &[u8]) {
        self.file.write(host, payload);
        let sectors = (host % 512 + payload.len() as u64 - 1) / 512;
        let entry = self.descriptor(host, sectors);
        self.entries.insert(guest_cluster, (entry, 0));
    }

    /// The descriptor of a compressed cluster with `sectors` additional sectors.
    pub fn descriptor(&self, host: u64, sectors: u64) -> u64 {
        let shift = 62 - (self.cluster_bits - 8);
        assert!(host < 1 << shift && sectors < 1 << (62 - shift), "{host:#x}+{sectors} has no descriptor");
        COMPRESSED | sectors << shift | host
    }

    /// Moves the packing position to the next cluster boundary plus `skip` bytes.
    pub fn pack_from(&mut self, skip: u64) {
        let at = self.alloc(1);
        self.packed = (at + skip, self.next);
    }

    /// Freezes the current clusters as a snapshot whose disk has `size` bytes.
    pub fn snapshot(&mut self, id: &str, name: &str, size: u64) {
        let mut extra = vec![0; 8];
        extra.extend_from_slice(&size.to_be_bytes());
        extra.extend_from_slice(&u64::MAX.to_be_bytes());
        self.snapshot_with_extra(id, name, size, &extra);
    }

    /// As `snapshot`, with extra data of the caller's choice.
    pub fn snapshot_with_extra(&mut self, id: &str, name: &str, size: u64, extra: &[u8]) {
        self.snapshots.push(Snapshot {
            id: id.into(),
            name: name.into(),
            size,
            extra: extra.to_vec(),
            entries: self.entries.clone(),
        });
    }

    /// Adds a persistent bitmap of raw `data` bytes (bit 0 of byte 0 is the first granule).
    pub fn bitmap(&mut self, name: &str, flags: u32, granularity_bits: u8, data: &[u8]) {
        self.bitmaps.push(Bitmap { name: name.into(), flags, granularity_bits, data: data.to_vec() });
    }
}

impl Forge {
    fn per_table(&self) -> u64 {
        self.cluster_size() / if self.extended { 16 } else { 8 }
    }

    fn l1_len(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size()).div_ceil(self.per_table()).max(1)
    }

    /// Host clusters that an L2 entry refers to.
    fn referred(&self, entry: u64) -> BTreeSet<u64> {
        if entry & COMPRESSED != 0 {
            let shift = 62 - (self.cluster_bits - 8);
            let sectors = (entry & !COMPRESSED) >> shift;
            let start = entry & ((1 << shift) - 1) & !511;
            let last = start + sectors * 512;
            (start >> self.cluster_bits..=last >> self.cluster_bits).collect()
        } else if self.external {
            BTreeSet::new()
        } else {
            let host = entry & 0x00ff_ffff_ffff_fe00;
            (host != 0).then_some(host >> self.cluster_bits).into_iter().collect()
        }
    }
}

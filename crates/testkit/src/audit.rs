//! A second opinion on refcounts, straight from the specification and from bytes in memory: fast enough to judge a
//! hundred thousand crash states. It reports what a repair could not ignore; leaks are counted, not reported. Like the slow
//! reader it decodes entries by itself, and not by the format crate.

use std::collections::HashMap;

use crate::Sparse;
use crate::forge::{COMPRESSED, COPIED, ZERO, field};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an audit found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Findings {
    /// Damage.
    pub corruptions: Vec<String>,
    /// Clusters that are counted but not referred to.
    pub leaks: u64,
    /// The image says that its refcounts cannot be trusted (lazy refcounts).
    pub dirty: bool,
}

impl Findings {
    /// Whether nothing but leaks was found.
    pub fn is_sound(&self) -> bool {
        self.corruptions.is_empty()
    }
    /// Whether nothing at all was found.
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.leaks == 0 && !self.dirty
    }
}

struct Audit<'a> {
    file: &'a Sparse,
    cluster_bits: u32,
    refcount_order: u32,
    entry_size: u64,
    external: bool,
    references: HashMap<u64, u64>,
    refcounts: HashMap<u64, u64>,
    findings: Findings,
}

/// Audits the image in `file`.
pub fn audit(file: &Sparse) -> Findings {
    if file.u32(0) != field::MAGIC {
        let corruptions = vec![format!("the file starts with {:#010x}", file.u32(0))];
        return Findings { corruptions, ..Findings::default() };
    }
    let incompatible = if file.u32(field::VERSION) == 2 { 0 } else { file.u64(field::INCOMPATIBLE) };
    let mut audit = Audit {
        file,
        cluster_bits: file.u32(field::CLUSTER_BITS),
        refcount_order: if file.u32(field::VERSION) == 2 { 4 } else { file.u32(field::REFCOUNT_ORDER) },
        entry_size: if incompatible & field::INCOMPAT_EXTENDED_L2 != 0 { 16 } else { 8 },
        external: incompatible & field::INCOMPAT_DATA_FILE != 0,
        references: HashMap::new(),
        refcounts: HashMap::new(),
        findings: Findings { dirty: incompatible & field::INCOMPAT_DIRTY != 0, ..Findings::default() },
    };
    if incompatible & field::INCOMPAT_CORRUPT != 0 {
        audit.damage("the corrupt bit is set".into());
    }
    audit.refcount_structures();
    let (l1, entries) = (file.u64(field::L1_OFFSET), u64::from(file.u32(field::L1_SIZE)));
    audit.view(l1, entries, true);
    audit.snapshots();
    audit.bitmaps();
    audit.refer(0, 1, "header");
    audit.compare();
    audit.findings
}

impl Audit<'_> {
    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn damage(&mut self, what: String) {
        if self.findings.corruptions.len() < 20 {
            self.findings.corruptions.push(what);
        }
    }

    /// Counts one reference to the clusters of a range.
    fn refer(&mut self, offset: u64, bytes: u64, what: &str) {
        if bytes == 0 {
            return;
        }
        if (offset + bytes).saturating_sub(self.file.len()) >= self.cluster_size() {
            self.damage(format!(
                "{what} at {offset:#x} lies behind the end of the file ({:#x})",
                self.file.len()
            ));
        }
        for cluster in offset >> self.cluster_bits..=(offset + bytes - 1) >> self.cluster_bits {
            *self.references.entry(cluster).or_default() += 1;
        }
    }

    fn aligned(&mut self, offset: u64, what: &str) -> bool {
        let fine = offset.is_multiple_of(self.cluster_size()) && offset != 0;
        if !fine {
            self.damage(format!("{what} at {offset:#x} is not at a cluster"));
        }
        fine
    }

    fn refcount_structures(&mut self) {
        let table = self.file.u64(field::REFCOUNT_OFFSET);
        let clusters = u64::from(self.file.u32(field::REFCOUNT_CLUSTERS));
        if !self.aligned(table, "refcount table") {
            return;
        }
        self.refer(table, clusters << self.cluster_bits, "refcount table");
        let per_block = (self.cluster_size() * 8) >> self.refcount_order;
        let bits = 1u64 << self.refcount_order;
        for index in 0..(clusters << self.cluster_bits) / 8 {
            let block = self.file.u64(table + index * 8);
            if block == 0 || !self.aligned(block, "refcount block") {
                continue;
            }
            self.refer(block, self.cluster_size(), "refcount block");
            let bytes = self.file.get(block, self.cluster_size() as usize);
            for i in 0..per_block {
                let value = refcount(&bytes, i, bits);
                if value != 0 {
                    self.refcounts.insert(index * per_block + i, value);
                }
            }
        }
    }

    /// Counts an L1 table and all that it leads to. COPIED is judged in the active one, after counting.
    fn view(&mut self, l1: u64, entries: u64, _active: bool) {
        if entries == 0 || !self.aligned(l1, "L1 table") {
            return;
        }
        self.refer(l1, entries * 8, "L1 table");
        for i in 0..entries {
            let entry = self.file.u64(l1 + i * 8);
            let l2 = entry & OFFSET;
            if l2 == 0 || !self.aligned(l2, "L2 table") {
                continue;
            }
            self.refer(l2, self.cluster_size(), "L2 table");
            self.copied(entry, l2, _active, "L1 entry", i);
            self.table(l2, i, _active);
        }
    }

    fn table(&mut self, l2: u64, l1_index: u64, active: bool) {
        let per_table = self.cluster_size() / self.entry_size;
        let bytes = self.file.get(l2, self.cluster_size() as usize);
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
        for i in 0..per_table {
            let entry = word(i * self.entry_size);
            let guest = l1_index * per_table + i;
            if self.entry_size == 16 {
                let bitmap = word(i * 16 + 8);
                let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
                if entry & COMPRESSED == 0 && allocated & zero != 0 {
                    self.damage(format!(
                        "guest cluster {guest}: subclusters both allocated and zero: {bitmap:#x}"
                    ));
                }
                if entry & COMPRESSED == 0 && entry & OFFSET == 0 && allocated != 0 && !self.external {
                    self.damage(format!(
                        "guest cluster {guest}: subclusters allocated without a cluster: {bitmap:#x}"
                    ));
                }
            }
            if entry & COMPRESSED != 0 {
                let shift = 62 - (self.cluster_bits - 8);
                let host = entry & ((1 << shift) - 1);
                let sectors = (entry & !COMPRESSED & !COPIED) >> shift;
                let start = host & !511;
                if entry & COPIED != 0 {
                    self.damage(format!("guest cluster {guest}: a compressed cluster with COPIED"));
                }
                self.refer(start, (sectors + 1) * 512, "compressed cluster");
                continue;
            }
            let host = entry & OFFSET;
            if self.external {
                continue;
            }
            if host != 0 && self.aligned(host, "data cluster") {
                let what = if entry & ZERO != 0 { "allocated zero cluster" } else { "data cluster" };
                self.refer(host, self.cluster_size(), what);
                self.copied(entry, host, active, "L2 entry of guest cluster", guest);
            }
        }
    }

    fn copied(&mut self, entry: u64, host: u64, active: bool, what: &str, index: u64) {
        let count = self.refcounts.get(&(host >> self.cluster_bits)).copied().unwrap_or(0);
        if !active || self.findings.dirty || (count == 1) == (entry & COPIED != 0) {
            return;
        }
        let text = format!("{what} {index} ({entry:#x}): COPIED does not fit a refcount of {count}");
        self.damage(text);
    }

    fn snapshots(&mut self) {
        let mut at = self.file.u64(field::SNAPSHOTS_OFFSET);
        let count = self.file.u32(field::SNAPSHOTS);
        let start = at;
        for _ in 0..count {
            let (l1, entries) = (self.file.u64(at), u64::from(self.file.u32(at + 8)));
            let sizes = self.file.get(at + 12, 4);
            let texts = u64::from(u16::from_be_bytes([sizes[0], sizes[1]]))
                + u64::from(u16::from_be_bytes([sizes[2], sizes[3]]));
            let extra = u64::from(self.file.u32(at + 36));
            self.view(l1, entries, false);
            at = (at + 40 + extra + texts).next_multiple_of(8);
        }
        self.refer(start, at - start, "snapshot table");
    }

    /// Bitmaps are counted, not judged: what they lose in a crash is marked in use.
    fn bitmaps(&mut self) {
        if self.file.u32(field::VERSION) == 2 {
            return;
        }
        let mut at = u64::from(self.file.u32(field::HEADER_LENGTH));
        loop {
            let (kind, len) = (self.file.u32(at), u64::from(self.file.u32(at + 4)));
            if kind == 0 || at + 8 + len > self.cluster_size() {
                return;
            }
            if kind == field::EXT_BITMAPS {
                break;
            }
            at += 8 + len.next_multiple_of(8);
        }
        let count = self.file.u32(at + 8);
        let (size, directory) = (self.file.u64(at + 16), self.file.u64(at + 24));
        self.refer(directory, size, "bitmap directory");
        let mut entry = directory;
        for _ in 0..count {
            let (table, entries) = (self.file.u64(entry), u64::from(self.file.u32(entry + 8)));
            let lengths = self.file.get(entry + 18, 6);
            let name = u64::from(u16::from_be_bytes([lengths[0], lengths[1]]));
            let extra = u64::from(u32::from_be_bytes(lengths[2..6].try_into().unwrap()));
            self.refer(table, entries * 8, "bitmap table");
            for i in 0..entries {
                let data = self.file.u64(table + i * 8) & OFFSET;
                if data != 0 {
                    self.refer(data, self.cluster_size(), "bitmap data");
                }
            }
            entry = (entry + 24 + extra + name).next_multiple_of(8);
        }
    }

    fn compare(&mut self) {
        let references = std::mem::take(&mut self.references);
        let mut short: Vec<(u64, u64, u64)> = Vec::new();
        for (cluster, wanted) in &references {
            let counted = self.refcounts.get(cluster).copied().unwrap_or(0);
            match counted.cmp(wanted) {
                std::cmp::Ordering::Less => short.push((*cluster, counted, *wanted)),
                std::cmp::Ordering::Greater => self.findings.leaks += 1,
                std::cmp::Ordering::Equal => {}
            }
        }
        self.findings.leaks +=
            self.refcounts.keys().filter(|cluster| !references.contains_key(cluster)).count() as u64;
        if self.findings.dirty {
            return;
        }
        short.sort_unstable();
        for (cluster, counted, wanted) in short {
            self.damage(format!("cluster {cluster}: refcount {counted}, references {wanted}"));
        }
    }
}

/// Refcount number `index` of a block, `bits` wide; widths below a byte start at the least significant bit.
fn refcount(block: &[u8], index: u64, bits: u64) -> u64 {
    if bits < 8 {
        let byte = block[(index * bits / 8) as usize];
        return u64::from(byte >> (index * bits % 8)) & ((1 << bits) - 1);
    }
    let at = (index * bits / 8) as usize;
    block[at..at + (bits / 8) as usize].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Forge;

    #[test]
    fn sound_images_are_clean_and_damage_is_found() {
        for order in 0..=6 {
            let mut forge = Forge::new(3, 12, 40 << 12).refcount_order(order);
            for n in 0..5 {
                forge.data(n, &[n as u8 + 1; 4096]);
            }
            forge.zero_allocated(7, &[9; 4096]);
            if order >= 2 {
                forge.snapshot("1", "one", 40 << 12);
                forge.data(2, &[8; 4096]);
            }
            let built = forge.build();
            assert_eq!(audit(&built.bytes), Findings::default(), "refcounts of {} bits", 1 << order);
            // Two guest clusters on one host cluster, and a table entry that points nowhere.
            let shared = built.clone().with_entry(9, built.entry(7) & !ZERO);
            assert!(!audit(&shared.bytes).is_sound());
            let lost = built.clone().with_entry(9, 0x4000_0000 | COPIED);
            assert!(!audit(&lost.bytes).is_sound());
            let leaked = built.clone().with_entry(7, 0);
            let findings = audit(&leaked.bytes);
            assert!(findings.is_sound() && findings.leaks == 1, "{findings:?}");
        }
    }
}

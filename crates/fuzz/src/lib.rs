//! Damaged images: sound ones of the forge, with bytes changed where it matters.

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use qcow2_testkit::forge::{Forge, codec};

/// An image that was sound before the fuzzer touched it, or never was.
#[derive(Debug, Arbitrary)]
pub struct Damaged {
    base: u8,
    patches: Vec<Patch>,
    /// Bytes cut from the end.
    cut: u16,
    /// The whole file, where `base` asks for none of the sound ones.
    bytes: Vec<u8>,
}

impl Damaged {
    /// The bytes of the file.
    pub fn file(&self) -> Vec<u8> {
        let mut file = match BASES.get(usize::from(self.base) % (BASES.len() + 1)) {
            Some(base) => base.clone(),
            None => self.bytes.clone(),
        };
        for patch in self.patches.iter().take(64) {
            apply(&mut file, patch);
        }
        file.truncate(file.len().saturating_sub(usize::from(self.cut)));
        file
    }
}

#[derive(Debug, Arbitrary)]
enum Patch {
    Byte {
        offset: u16,
        value: u8,
    },
    /// Any big-endian field: those of the header first.
    Field {
        offset: u8,
        value: u32,
    },
    /// A table entry, of which every sound image has its own in the first clusters.
    Entry {
        index: u16,
        value: u64,
    },
    /// Points an entry at another cluster, flags kept.
    Redirect {
        index: u16,
        cluster: u16,
    },
}

/// Images that hold every kind of cluster, in geometries that fit in a few clusters of file.
static BASES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut bases = Vec::new();
    for (version, bits, extended, zstd) in [
        (3, 9, false, false),
        (2, 9, false, false),
        (3, 12, false, true),
        (3, 14, true, false),
        (3, 14, true, true),
        (3, 16, false, false),
    ] {
        let size = 24 << bits;
        let mut forge = Forge::new(version, bits, size);
        if extended {
            forge = forge.extended_l2();
        }
        if zstd {
            forge = forge.zstd();
        }
        let text = |seed: u8| (0..1usize << bits).map(|i| seed ^ (i / 7) as u8).collect::<Vec<_>>();
        let pack = |bytes: &[u8]| if zstd { codec::zstd(bytes, 2) } else { codec::deflate(bytes) };
        forge.data(0, &text(1));
        forge.compressed(1, &pack(&text(2)));
        forge.snapshot("1", "before", size);
        forge.data(2, &text(3));
        forge.compressed(4, &pack(&text(4)));
        forge.compressed(5, &pack(&text(5)));
        if version == 3 {
            forge.zero_plain(6);
            forge.zero_allocated(7, &text(6));
            forge.bitmap("dirty", 2, 16, &[0xff; 8]);
        }
        if extended {
            forge.data(8, &text(7));
            forge.subclusters(8, 0xff00_00ff | 0x00ff_0000 << 32);
        }
        bases.push(forge.build().bytes.to_vec());
    }
    bases
});

fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = file.get_mut(offset..offset + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn apply(file: &mut [u8], patch: &Patch) {
    match *patch {
        Patch::Byte { offset, value } => put(file, usize::from(offset), &[value]),
        Patch::Field { offset, value } => put(file, usize::from(offset) & !3, &value.to_be_bytes()),
        Patch::Entry { index, value } => put(file, usize::from(index) * 8, &value.to_be_bytes()),
        Patch::Redirect { index, cluster } => {
            let at = usize::from(index) * 8;
            let bits = file.get(23).map_or(9, |&b| u32::from(b).clamp(9, 21));
            let flags = file.get(at).copied().unwrap_or(0) & 0xc0;
            let entry = u64::from(flags) << 56 | u64::from(cluster) << bits;
            put(file, at, &entry.to_be_bytes());
        }
    }
}

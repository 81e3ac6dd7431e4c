//! The slow reader: decodes one guest sector at a time, straight from the specification, with no cache and
//! no plan. It reads sound images only and shares no code with the engine, so the two can be compared. On purpose it has
//! masks and offsets of its own, those of the forge, and not those of the format crate: a mistake there must show.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::forge::{codec, field};

/// One disk: a qcow2 layer with what lies under it, or a raw file.
#[derive(Debug)]
pub enum SlowReader {
    /// A raw file.
    Raw(File),
    /// A qcow2 image.
    Qcow2(Box<Layer>),
}

/// A qcow2 layer, and one of its views: the active disk or a snapshot.
#[derive(Debug)]
pub struct Layer {
    file: File,
    data_file: Option<File>,
    backing: Option<SlowReader>,
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1: u64,
    l1_len: u64,
    extended: bool,
    zstd: bool,
}

/// What the layer itself says about a guest sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Unallocated,
    Zero,
    Host(u64),
    /// Host offset, bytes to read, offset in the cluster.
    Compressed(u64, usize, u64),
}

fn read_padded(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut filled = 0;
    while filled < len {
        match crate::at::read_at(file, &mut out[filled..], offset + filled as u64).unwrap() {
            0 => break,
            n => filled += n,
        }
    }
    out
}

fn be16(file: &File, offset: u64) -> u64 {
    u16::from_be_bytes(read_padded(file, offset, 2).try_into().unwrap()).into()
}
fn be32(file: &File, offset: u64) -> u64 {
    u32::from_be_bytes(read_padded(file, offset, 4).try_into().unwrap()).into()
}
fn be64(file: &File, offset: u64) -> u64 {
    u64::from_be_bytes(read_padded(file, offset, 8).try_into().unwrap())
}

impl SlowReader {
    /// Opens an image and, relative to it, everything that it names.
    pub fn open(path: &Path, format: &str) -> Self {
        Self::open_view(path, format, None)
    }

    /// Opens the read-only view of a snapshot, by name.
    pub fn open_snapshot(path: &Path, name: &str) -> Self {
        Self::open_view(path, "qcow2", Some(name))
    }

    fn open_view(path: &Path, format: &str, snapshot: Option<&str>) -> Self {
        let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        if format == "raw" {
            return Self::Raw(file);
        }
        Self::Qcow2(Box::new(Layer::open(path, file, snapshot)))
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(file) => file.metadata().unwrap().len(),
            Self::Qcow2(layer) => layer.size,
        }
    }

    /// `len` guest bytes from `offset`; zero beyond the end of the disk.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let layer = match self {
            Self::Raw(file) => return read_padded(file, offset, len),
            Self::Qcow2(layer) => layer,
        };
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let at = offset + out.len() as u64;
            let place = layer.locate(at);
            // A compressed cluster is inflated once for all bytes wanted from it; the rest goes by sector.
            let unit = if matches!(place, Place::Compressed(..)) { 1 << layer.cluster_bits } else { 512 };
            let n = (len - out.len()).min((unit - at % unit) as usize);
            let inside = layer.size.saturating_sub(at).min(n as u64) as usize;
            out.extend(layer.read_place(place, at, inside));
            out.resize(out.len() + n - inside, 0);
        }
        out
    }
}

impl Layer {
    fn open(path: &Path, file: File, snapshot: Option<&str>) -> Self {
        assert_eq!(be32(&file, 0), u64::from(field::MAGIC), "{}: magic", path.display());
        let version = be32(&file, field::VERSION) as u32;
        let v3 = version >= 3;
        let incompatible = if v3 { be64(&file, field::INCOMPATIBLE) } else { 0 };
        let header_length = if v3 { be32(&file, field::HEADER_LENGTH) } else { 72 };
        let zstd = v3 && header_length > 104 && read_padded(&file, field::COMPRESSION_TYPE, 1)[0] == 1;
        let (backing, data_file) = Self::references(path, &file, header_length, incompatible);
        let mut layer = Self {
            version,
            cluster_bits: be32(&file, field::CLUSTER_BITS) as u32,
            size: be64(&file, field::SIZE),
            l1: be64(&file, field::L1_OFFSET),
            l1_len: be32(&file, field::L1_SIZE),
            extended: incompatible & field::INCOMPAT_EXTENDED_L2 != 0,
            zstd,
            backing,
            data_file,
            file,
        };
        if let Some(name) = snapshot {
            layer.select(name);
        }
        layer
    }

    fn references(
        path: &Path,
        file: &File,
        header: u64,
        incompatible: u64,
    ) -> (Option<SlowReader>, Option<File>) {
        let folder = path.parent().unwrap_or(Path::new("."));
        let text = |at, len: u64| String::from_utf8(read_padded(file, at, len as usize)).unwrap();
        let (mut backing_format, mut data_name) = (String::from("raw"), None);
        let mut at = header;
        loop {
            let (magic, len) = (be32(file, at) as u32, be32(file, at + 4));
            match magic {
                0 => break,
                field::EXT_BACKING_FORMAT => backing_format = text(at + 8, len),
                field::EXT_DATA_FILE => data_name = Some(text(at + 8, len)),
                _ => {}
            }
            at = (at + 8 + len).next_multiple_of(8);
        }
        let name_at = be64(file, field::BACKING_OFFSET);
        let backing = (name_at != 0).then(|| {
            let name = PathBuf::from(text(name_at, be32(file, field::BACKING_SIZE)));
            SlowReader::open(&folder.join(name), &backing_format)
        });
        let data_file = (incompatible & field::INCOMPAT_DATA_FILE != 0)
            .then(|| File::open(folder.join(data_name.expect("the image names its data file"))).unwrap());
        (backing, data_file)
    }

    fn select(&mut self, wanted: &str) {
        let mut at = be64(&self.file, field::SNAPSHOTS_OFFSET);
        for _ in 0..be32(&self.file, field::SNAPSHOTS) {
            let extra = be32(&self.file, at + 36);
            let (id_len, name_len) = (be16(&self.file, at + 12), be16(&self.file, at + 14));
            let name = read_padded(&self.file, at + 40 + extra + id_len, name_len as usize);
            if name == wanted.as_bytes() {
                self.l1 = be64(&self.file, at);
                self.l1_len = be32(&self.file, at + 8);
                if extra >= 16 {
                    self.size = be64(&self.file, at + 48);
                }
                return;
            }
            at = (at + 40 + extra + id_len + name_len).next_multiple_of(8);
        }
        panic!("no snapshot is called {wanted}");
    }

    fn locate(&self, guest: u64) -> Place {
        let cluster_size = 1u64 << self.cluster_bits;
        let entry_size = if self.extended { 16 } else { 8 };
        let per_table = cluster_size / entry_size;
        let cluster = guest >> self.cluster_bits;
        let in_cluster = guest % cluster_size;
        let l1_index = cluster / per_table;
        if l1_index >= self.l1_len {
            return Place::Unallocated;
        }
        let table = be64(&self.file, self.l1 + l1_index * 8) & 0x00ff_ffff_ffff_fe00;
        if table == 0 {
            return Place::Unallocated;
        }
        let at = table + cluster % per_table * entry_size;
        let entry = be64(&self.file, at);
        if entry >> 62 & 1 == 1 {
            let x = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << x) - 1) & 0x00ff_ffff_ffff_ffff;
            let sectors = (entry & !(3 << 62)) >> x;
            let len = (sectors + 1) * 512 - host % 512;
            return Place::Compressed(host, len as usize, in_cluster);
        }
        let host = entry & 0x00ff_ffff_ffff_fe00;
        // Offset 0 is a host cluster only with an external data file, and then COPIED says so.
        let has_host = host != 0 || (self.data_file.is_some() && entry >> 63 == 1);
        if self.extended {
            let bitmap = be64(&self.file, at + 8);
            let sub = in_cluster / (cluster_size / 32);
            return match (bitmap >> (32 + sub) & 1 == 1, bitmap >> sub & 1 == 1) {
                (true, _) => Place::Zero,
                (false, true) => Place::Host(host + in_cluster),
                (false, false) => Place::Unallocated,
            };
        }
        match (self.version >= 3 && entry & 1 == 1, has_host) {
            (true, _) => Place::Zero,
            (false, true) => Place::Host(host + in_cluster),
            (false, false) => Place::Unallocated,
        }
    }

    fn read_place(&self, place: Place, guest: u64, len: usize) -> Vec<u8> {
        match place {
            Place::Zero => vec![0; len],
            Place::Host(at) => read_padded(self.data_file.as_ref().unwrap_or(&self.file), at, len),
            Place::Compressed(host, stored, at) => {
                let payload = read_padded(&self.file, host, stored);
                let decode = if self.zstd { codec::unzstd } else { codec::inflate };
                let cluster = decode(&payload, 1 << self.cluster_bits);
                cluster[at as usize..at as usize + len].to_vec()
            }
            Place::Unallocated => match &self.backing {
                None => vec![0; len],
                Some(backing) => {
                    let inside = backing.size().saturating_sub(guest).min(len as u64) as usize;
                    let mut out = backing.read(guest, inside);
                    out.resize(len, 0);
                    out
                }
            },
        }
    }
}

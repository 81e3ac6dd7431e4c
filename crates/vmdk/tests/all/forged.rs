//! What neither QEMU nor VMware makes here: COWD and seSparse extents, extents of zeroes, and damage.

use std::sync::Arc;

use qcow2_core::storage::MemoryStorage;
use qcow2_core::{ErrorKind, Job, Layer, Result, Storage};
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, Rng};
use qcow2_vmdk::{CreateOptions, NewVmdk, OpenOptions, Subformat, Vmdk, descriptor};

use crate::support::{chain, disk, guest, open_bytes, open_with};

fn descriptor(create_type: &str, lines: &str) -> Vec<u8> {
    format!("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{lines}\n")
        .into_bytes()
}

fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    bytes.resize(bytes.len().max(at + value.len()), 0);
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A COWD extent of grains of one sector: data in every third sector.
fn cowd(data: &[u8]) -> Vec<u8> {
    let sectors = data.len() / 512;
    let mut bytes = Vec::new();
    put(&mut bytes, 0, b"COWD");
    for (n, value) in [1u32, 3, sectors as u32, 1, 4, sectors.div_ceil(4096) as u32].into_iter().enumerate() {
        put(&mut bytes, 4 + 4 * n, &value.to_le_bytes());
    }
    let mut next = 8;
    for table in 0..sectors.div_ceil(4096) {
        put(&mut bytes, 4 * 512 + 4 * table, &(next as u32).to_le_bytes());
        let place = next * 512;
        next += 32;
        put(&mut bytes, place + 16383, &[0]);
        for sector in (table * 4096..sectors.min(table * 4096 + 4096)).filter(|sector| sector % 3 == 0) {
            put(&mut bytes, place + sector % 4096 * 4, &(next as u32).to_le_bytes());
            put(&mut bytes, next * 512, &data[sector * 512..sector * 512 + 512]);
            next += 1;
        }
    }
    bytes
}

/// A seSparse extent: data, grains of zeroes, unmapped and missing ones in turn.
fn se_sparse(data: &[u8]) -> Vec<u8> {
    let (grains, entries) = (data.len() / 4096, 4096);
    let mut header = [0u64; 26];
    header[..5].copy_from_slice(&[0xcafe_babe, 0x2_0000_0001, data.len() as u64 / 512, 8, 64]);
    // The volatile header, the directory and its sectors, the tables, the grains.
    for (field, value) in [(10, 1), (16, 8), (17, 1), (18, 16), (24, 512)] {
        header[field] = value;
    }
    let mut bytes: Vec<u8> = header.iter().flat_map(|field| field.to_le_bytes()).collect();
    put(&mut bytes, 512, &0xcafe_cafe_u64.to_le_bytes());
    put(&mut bytes, 1023, &[0]);
    let mut number = 0u64;
    for table in 0..grains.div_ceil(entries) {
        put(&mut bytes, 8 * 512 + 8 * table, &(0x1000_0000_0000_0000u64 | table as u64).to_le_bytes());
        let place = 16 * 512 + table * 32768;
        put(&mut bytes, place + 32767, &[0]);
        for grain in table * entries..grains.min((table + 1) * entries) {
            let entry = match grain % 4 {
                0 => {
                    put(
                        &mut bytes,
                        512 * 512 + number as usize * 4096,
                        &data[grain * 4096..grain * 4096 + 4096],
                    );
                    number += 1;
                    let number = number - 1;
                    0x3000_0000_0000_0000 | (number & 0xfff) << 48 | number >> 12
                }
                1 => 0x2000_0000_0000_0000,
                2 => 0x1000_0000_0000_0000,
                _ => 0,
            };
            put(&mut bytes, place + grain % entries * 8, &entry.to_le_bytes());
        }
    }
    bytes
}

fn noise(size: usize) -> Vec<u8> {
    Rng::new(9).bytes(size)
}

/// The contract of layers, and QEMU as the second reader.
fn check(name: &str, text: &[u8], extent: &[u8], expected: &[u8]) {
    let find = |_: &str| -> Arc<dyn Storage> { Arc::new(MemoryStorage::from_bytes(extent)) };
    let open = |storage| Ok(Box::new(open_with(storage, &find)?) as Box<dyn Layer>);
    LayerContract { name, file: text, open: &open, expected, below: None }.check();
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.file("disk.vmdk", text);
    fixture.file("extent.vmdk", extent);
    assert!(qemu.guest_bytes(&path, "vmdk", &["-U"]) == expected, "{name}: QEMU reads something else");
}

#[test]
fn snapshots_on_vmfs_keep_the_contract_of_layers() {
    let mut expected = noise(4100 * 512);
    let extent = cowd(&expected);
    for sector in (0..4100).filter(|sector| sector % 3 != 0) {
        expected[sector * 512..sector * 512 + 512].fill(0);
    }
    check("COWD", &descriptor("vmfsSparse", "RW 4100 VMFSSPARSE \"extent.vmdk\""), &extent, &expected);

    let mut expected = noise(4100 * 4096);
    let extent = se_sparse(&expected);
    for grain in (0..4100).filter(|grain| grain % 4 != 0) {
        expected[grain * 4096..grain * 4096 + 4096].fill(0);
    }
    check("seSparse", &descriptor("seSparse", "RW 32800 SESPARSE \"extent.vmdk\""), &extent, &expected);
}

#[test]
fn a_vmfs_disk_is_its_file() {
    let expected = disk(4, 1 << 20);
    check("vmfs", &descriptor("vmfs", "RW 2048 VMFS \"extent.vmdk\""), &expected, &expected);
}

/// QEMU leaves out lines that it does not know, and with them a part of the disk.
#[test]
fn extents_of_zeroes_and_such_that_are_only_read_are_part_of_the_disk() {
    let text =
        descriptor("custom", "RW 100 ZERO\nRDONLY 8 FLAT \"extent.vmdk\" 4\nRW 8 FLAT \"extent.vmdk\" 12");
    let file = noise(20 * 512);
    let mut expected = vec![0; 100 * 512];
    expected.extend(&file[4 * 512..]);
    let find = |_: &str| -> Arc<dyn Storage> { Arc::new(MemoryStorage::from_bytes(&file)) };
    let open = |storage| Ok(Box::new(open_with(storage, &find)?) as Box<dyn Layer>);
    LayerContract { name: "custom", file: &text, open: &open, expected: &expected, below: None }.check();
    // What nobody may touch is not opened.
    let text = descriptor("custom", "NOACCESS 8 FLAT \"extent.vmdk\" 0");
    let vmdk = open_with(Arc::new(MemoryStorage::from_bytes(&text)), &find).unwrap();
    assert!(vmdk.references().extents.is_empty());
    let mut byte = [0];
    let error = chain(vmdk).read_at(qcow2_core::MemMut::from(&mut byte[..]), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReferenceDenied);
}

#[test]
fn an_extent_that_does_not_fit_its_line_is_refused() {
    let open = |line: &str, extent: &[u8]| -> Result<Vmdk> {
        let text = descriptor("custom", line);
        let find = |_: &str| -> Arc<dyn Storage> { Arc::new(MemoryStorage::from_bytes(extent)) };
        open_with(Arc::new(MemoryStorage::from_bytes(&text)), &find)
    };
    let kind = |line: &str, extent: &[u8]| open(line, extent).unwrap_err().kind();
    let cowd = cowd(&noise(10 * 512));
    assert_eq!(kind("RW 8 FLAT \"a\" 1", &[0; 8 * 512]), ErrorKind::Corrupt);
    assert_eq!(kind("RW 11 SPARSE \"a\"", &cowd), ErrorKind::Corrupt);
    assert_eq!(kind("RW 9 SPARSE \"a\"\nRW 1 ZERO", &cowd), ErrorKind::Corrupt);
    assert_eq!(kind("RW 10 SESPARSE \"a\"", &cowd), ErrorKind::InvalidHeader);
    assert_eq!(kind("RW 10 SPARSE \"a\"", b"no extent"), ErrorKind::InvalidHeader);
    open("RW 10 SPARSE \"a\"", &cowd).unwrap();
    // An extent alone is a part of a disk.
    assert_eq!(open_bytes(&cowd).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
    assert_eq!(open_bytes(&se_sparse(&noise(4096))).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
    // A journal that waits is not read over.
    let mut dirty = se_sparse(&noise(4096));
    dirty[512 + 24] = 1;
    assert_eq!(kind("RW 8 SESPARSE \"a\"", &dirty), ErrorKind::UnsupportedFeature);
    // What is not opened is not read.
    let text = descriptor("custom", "RW 8 FLAT \"a\" 0");
    let vmdk = Vmdk::open(Arc::new(MemoryStorage::from_bytes(&text)), &OpenOptions::default()).unwrap();
    assert_eq!(vmdk.references().extents[0].filename, b"a");
    let mut bytes = [0; 512];
    let error = chain(vmdk).read_at(qcow2_core::MemMut::from(&mut bytes[..]), 0).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::ReferenceDenied, Some("extent")));
}

/// The bytes of a new image with some data.
pub(crate) fn image(subformat: Subformat, data: &[u8]) -> Vec<u8> {
    use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
    use qcow2_engine::create::NewTarget;
    let options = CreateOptions { size: data.len() as u64, subformat, ..Default::default() };
    let image = Arc::new(NewVmdk::new(options, None).unwrap());
    let storage = Arc::new(MemoryStorage::new());
    let hosts = qcow2_core::new_image::Hosts::from(Arc::clone(&storage) as Arc<dyn Storage>);
    let raw = qcow2_core::Raw::new(Arc::new(MemoryStorage::from_bytes(data))).unwrap();
    let source = qcow2_engine::Image::new(vec![Box::new(raw)]).unwrap();
    let target = ConvertTarget::New(NewTarget::Format { image, hosts });
    convert(&source, target, &ConvertOptions::default(), &Job::new()).unwrap();
    storage.to_vec()
}

fn report(bytes: &[u8]) -> qcow2_core::check::CheckReport {
    open_bytes(bytes).unwrap().as_checkable().unwrap().check(10, &Job::new()).unwrap()
}

#[test]
fn a_check_finds_what_was_damaged() {
    let data = disk(3, 3 << 20);
    let sound = image(Subformat::MonolithicSparse, &data);
    assert!(report(&sound).is_clean());
    assert!(report(&image(Subformat::StreamOptimized, &data)).is_clean());
    // One table of 48 entries: its copy is at sector 22, the table itself at sector 27.
    let (copy, own) = (22 * 512, 27 * 512);
    let entry = |n: usize| u32::from_le_bytes(sound[own + 4 * n..own + 4 * n + 4].try_into().unwrap());
    assert_eq!((entry(0), entry(3)), (128, 0));
    for (at, value, codes) in [
        (copy, 5u32, &["COPY"][..]),
        (own + 4, 128, &["COPY", "BLOCK_SHARED"]),
        (own + 4, 130, &["COPY", "BLOCK_SHARED"]),
        (own + 4, 1 << 24, &["COPY", "BEYOND_END_OF_FILE"]),
        (own + 12, 20, &["COPY", "TABLE_ENTRY"]),
        // The directory, and its copy.
        (26 * 512, 1 << 24, &["BEYOND_END_OF_FILE", "COPY"]),
        (21 * 512, 0, &["COPY"]),
    ] {
        let mut damaged = sound.clone();
        damaged[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let report = report(&damaged);
        let found: Vec<_> = report.findings.iter().map(|finding| finding.code.as_str()).collect();
        assert_eq!(found, codes, "{at} {value}: {:?}", report.findings);
        assert_eq!(report.corruptions, codes.len() as u64);
    }
}

/// The table counts, but for what is damaged there and whole in its copy.
#[test]
fn a_repair_makes_a_table_and_its_copy_one() {
    use qcow2_core::check::Repair;
    let data = disk(3, 3 << 20);
    let sound = image(Subformat::MonolithicSparse, &data);
    let (copy, own) = (22 * 512, 27 * 512);
    let mut damaged = sound.clone();
    damaged[copy..copy + 8].fill(0);
    damaged[own + 4..own + 8].copy_from_slice(&(1u32 << 24).to_le_bytes());
    damaged[copy + 4..copy + 8].copy_from_slice(&sound[own + 4..own + 8]);
    let storage = Arc::new(MemoryStorage::from_bytes(&damaged));
    let open = || Vmdk::open(Arc::clone(&storage) as Arc<dyn Storage>, &OpenOptions::default()).unwrap();
    let repair = |what| open().as_checkable().unwrap().repair(what, 10, &Job::new()).unwrap();
    assert_eq!(repair(Repair::Leaks).corruptions, 2);
    let report = repair(Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{:?}", report.findings);
    assert!(open().as_checkable().unwrap().check(10, &Job::new()).unwrap().is_clean());
    assert!(storage.to_vec() == sound);
}

/// Reading what is damaged gives an error with its place, never something else's bytes.
#[test]
fn damaged_tables_and_grains_are_errors_of_what_they_map() {
    let data = disk(3, 3 << 20);
    let sparse = image(Subformat::MonolithicSparse, &data);
    let kind = |bytes: &[u8], at: u64| -> Result<()> {
        let mut found = [0; 512];
        chain(open_bytes(bytes)?).read_at(qcow2_core::MemMut::from(&mut found[..]), at)
    };
    let mut damaged = sparse.clone();
    damaged[27 * 512..27 * 512 + 4].copy_from_slice(&(1u32 << 24).to_le_bytes());
    let error = kind(&damaged, 0).unwrap_err();
    assert_eq!(
        (error.kind(), error.field(), error.offset()),
        (ErrorKind::Corrupt, Some("grain table entry"), Some(1 << 33))
    );
    kind(&damaged, 70_000).unwrap();
    damaged[26 * 512..26 * 512 + 4].copy_from_slice(&(1u32 << 24).to_le_bytes());
    assert_eq!(kind(&damaged, 70_000).unwrap_err().field(), Some("grain directory entry"));

    let stream = image(Subformat::StreamOptimized, &data);
    assert!(guest(&chain(open_bytes(&stream).unwrap())) == data);
    for (at, byte) in
        [(128 * 512 + 8, 0xff), (128 * 512 + 12, 0), (128 * 512 + 100, stream[128 * 512 + 100] ^ 1)]
    {
        let mut damaged = stream.clone();
        damaged[at] = byte;
        if at == 128 * 512 + 8 {
            damaged[at..at + 4].fill(0xff);
        }
        assert_eq!(kind(&damaged, 0).unwrap_err().kind(), ErrorKind::Corrupt, "{at}");
    }
    // Cut off, it has no footer.
    let error = open_bytes(&stream[..stream.len() - 512]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("gdOffset")));
}

#[test]
fn any_damaged_byte_gives_a_value_or_an_error() {
    let data = disk(3, 1 << 20);
    for subformat in [Subformat::MonolithicSparse, Subformat::StreamOptimized] {
        let sound = image(subformat, &data);
        let mut rng = Rng::new(4);
        let end = sound.len() as u64;
        for round in 0..400u64 {
            let mut damaged = sound.clone();
            let at = if round % 2 == 0 { rng.below(16_000) } else { end - 1 - rng.below(4096) } as usize;
            damaged[at] = rng.below(256) as u8;
            if let Ok(vmdk) = open_bytes(&damaged) {
                let _ = vmdk.check_quietly();
                if vmdk.virtual_size() <= 8 << 20 {
                    let mut bytes = vec![0; vmdk.virtual_size() as usize];
                    let _ = chain(vmdk).read_at(qcow2_core::MemMut::from(&mut bytes[..]), 0);
                }
            }
            let _ = qcow2_vmdk::inspect_bytes(&damaged, None, &OpenOptions::default());
        }
    }
}

trait Quietly {
    fn check_quietly(&self) -> Result<()>;
}

impl Quietly for Vmdk {
    fn check_quietly(&self) -> Result<()> {
        use qcow2_core::check::CheckLayer;
        // A disk that claims to be large is checked by its tables, of which there may be many.
        if self.virtual_size() > 1 << 40 { Ok(()) } else { self.check(5, &Job::new()).map(drop) }
    }
}

#[test]
fn an_inspection_says_what_an_image_names() {
    let inspect = |text: &[u8]| qcow2_vmdk::inspect_bytes(text, None, &OpenOptions::default());
    let codes =
        |text: &[u8]| inspect(text).findings.iter().map(|finding| finding.code.as_str()).collect::<Vec<_>>();
    let text = descriptor("twoGbMaxExtentFlat", "RW 8 FLAT \"../../etc/shadow\" 0\nRW 8 FLAT \"b\" 0");
    let found = inspect(&text);
    assert_eq!((found.virtual_size, codes(&text)), (Some(8192), vec!["DATA_FILE", "DATA_FILE"]));
    assert!(found.findings[0].message.contains("../../etc/shadow"));
    let child = String::from_utf8(text)
        .unwrap()
        .replace("parentCID=ffffffff", "parentCID=5\nparentFileNameHint=\"base\"");
    assert_eq!(codes(child.as_bytes()), ["BACKING_FILE", "DATA_FILE", "DATA_FILE"]);
    let many: String = (0..40).map(|n| format!("RW 8 FLAT \"{n}\" 0\n")).collect();
    assert_eq!(codes(&descriptor("custom", &many)).len(), 17);
    assert_eq!(codes(b"no image at all"), ["HEADER_INVALID"]);
    let sparse = image(Subformat::MonolithicSparse, &disk(1, 1 << 20));
    assert_eq!((codes(&sparse), inspect(&sparse).grain), (vec![], Some(65536)));
    assert_eq!(codes(&image(Subformat::StreamOptimized, &disk(1, 1 << 20))), [""; 0]);
    let tight = OpenOptions { max_virtual_size: 4096, max_metadata_bytes: 3, ..Default::default() };
    assert_eq!(qcow2_vmdk::inspect_bytes(&sparse, None, &tight).findings.len(), 2);
    // One byte more than a descriptor can have, by the bytes and by the length of the file.
    let mut long = b"# Disk DescriptorFile\nversion=1\n".to_vec();
    long.resize(1 << 20, b'\n');
    let found = inspect(&long);
    assert_eq!(codes(&long), ["LIMIT"]);
    assert!(found.findings[0].message.contains("1048576 exceeds the limit of 1048575"), "{found:?}");
    let head = qcow2_vmdk::inspect_bytes(&long[..1024], Some(9 << 20), &OpenOptions::default());
    assert!(head.findings[0].message.contains("9437184 exceeds"), "{head:?}");
    let storage = Arc::new(MemoryStorage::from_bytes(&long));
    assert_eq!(
        qcow2_vmdk::Vmdk::open(storage, &OpenOptions::default()).unwrap_err().kind(),
        ErrorKind::Limit
    );
    assert_eq!(descriptor::NO_PARENT, u32::MAX);
}

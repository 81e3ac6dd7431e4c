//! Images that lie.

use std::sync::Arc;

use qcow2_core::check::{CheckLayer, FindingCode, Repair};
use qcow2_core::storage::{Access, FileStorage};
use qcow2_core::{ErrorKind, Job, MemMut};
use qcow2_testkit::{Fixture, Rng};
use qcow2_vhdx::structures::{
    Guid, HEADER_OFFSETS, Header, METADATA_ITEMS, Payload, REGION_TABLE_OFFSETS, encode_entry,
};
use qcow2_vhdx::{OpenOptions, Vhdx, inspect, inspect_bytes};

use crate::forge::{
    BLOCKS, ITEMS, MIB, TABLE, bitmap_entry, check, header, image, memory, metadata, open_disk, open_layer,
    open_source, put, regions, with_parent,
};

const LOG_GUID: Guid = Guid([0x10; 16]);

/// Gives the file a log with one entry that brings these sectors; the newer header says so.
pub(crate) fn add_log(file: &mut Vec<u8>, number: u64, sectors: &[(u64, &Vec<u8>)]) {
    let sectors: Vec<(u64, &[u8])> = sectors.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    let entry = encode_entry(LOG_GUID, 0, number, file.len() as u64, &sectors);
    put(file, MIB, &entry);
    put(file, HEADER_OFFSETS[1], &Header { log_guid: LOG_GUID, ..header(9) }.encode());
}

fn sound() -> Vec<u8> {
    image(&metadata(4 * MIB, 512), &[Payload::Present(BLOCKS), Payload::Zero, Payload::Present(BLOCKS + MIB)])
}

fn options() -> OpenOptions {
    OpenOptions::default()
}

/// Why the file cannot be opened.
fn refused(file: &[u8]) -> (ErrorKind, Option<&'static str>) {
    let error = Vhdx::open(memory(file), &options()).unwrap_err();
    (error.kind(), error.field())
}

#[test]
fn one_copy_of_a_structure_can_be_damaged() {
    for at in [HEADER_OFFSETS[0], HEADER_OFFSETS[1], REGION_TABLE_OFFSETS[0], REGION_TABLE_OFFSETS[1]] {
        let mut file = sound();
        put(&mut file, at + 100, &[1]);
        open_layer(memory(&file)).unwrap();
        let report = check(memory(&file)).unwrap();
        assert_eq!((report.corruptions, report.findings[0].offset), (1, Some(at)), "{report:?}");
        // Both headers are whole again when it was written to.
        let storage = memory(&file);
        let disk = open_disk(storage.clone()).unwrap();
        disk.write_at(qcow2_core::Mem::from(&[1][..]), 0).unwrap();
        disk.close().unwrap();
        let expected = u64::from(at >= REGION_TABLE_OFFSETS[0]);
        assert_eq!(check(storage).unwrap().corruptions, expected);
    }
    let mut both = sound();
    HEADER_OFFSETS.into_iter().for_each(|at| put(&mut both, at, &[0]));
    assert_eq!(refused(&both), (ErrorKind::InvalidHeader, Some("Signature")));
    let mut both = sound();
    REGION_TABLE_OFFSETS.into_iter().for_each(|at| put(&mut both, at + 9, &[1]));
    assert_eq!(refused(&both), (ErrorKind::InvalidHeader, Some("Checksum")));
}

#[test]
fn structures_that_cannot_be_are_refused() {
    use ErrorKind::{Corrupt, InvalidHeader, Limit, UnsupportedFeature};
    let with = |at: u64, bytes: &[u8]| {
        let mut file = sound();
        put(&mut file, at, bytes);
        refused(&file)
    };
    assert_eq!(with(0, b"V"), (InvalidHeader, Some("Signature")));
    assert_eq!(with(ITEMS, b"M"), (InvalidHeader, Some("Signature")));
    assert_eq!(with(ITEMS + 32, &[1]), (UnsupportedFeature, Some("IsRequired")));
    assert_eq!(with(ITEMS + METADATA_ITEMS.0, &[0, 0, 0, 3]), (InvalidHeader, Some("BlockSize")));
    // More than the table has entries for.
    assert_eq!(with(ITEMS + METADATA_ITEMS.0 + 8 + 4, &[0, 1]), (Corrupt, Some("BAT")));
    let mut cut = sound();
    cut.truncate(TABLE as usize + 8);
    assert_eq!(refused(&cut).0, Corrupt);
    let mut overlapping = sound();
    let table = qcow2_vhdx::structures::RegionTable {
        bat: qcow2_vhdx::structures::Region { offset: MIB, ..regions().bat },
        ..regions()
    };
    REGION_TABLE_OFFSETS.into_iter().for_each(|at| put(&mut overlapping, at, &table.encode()));
    assert_eq!(refused(&overlapping), (Corrupt, Some("FileOffset")));
    let tight = OpenOptions { max_virtual_size: 4 * MIB - 1, ..options() };
    let error = Vhdx::open(memory(&sound()), &tight).unwrap_err();
    assert_eq!((error.kind(), error.field()), (Limit, Some("VirtualDiskSize")));
}

#[test]
fn entries_that_cannot_be_are_told_with_their_place_and_nothing_is_written() {
    let state = |offset: u64, state: u64| offset | state;
    let cases = [
        ("header", state(0, 6)),
        ("log", state(MIB, 6)),
        ("table", state(TABLE, 6)),
        ("metadata", state(ITEMS, 6)),
        ("behind the end", state(BLOCKS + 2 * MIB, 6)),
        ("far behind the end", state(u64::MAX << 20, 6)),
        ("a state that is none", 4),
        ("partial without a parent", state(BLOCKS, 7)),
    ];
    for (name, entry) in cases {
        let mut file = sound();
        put(&mut file, TABLE + 8, &entry.to_le_bytes());
        let disk = open_source(memory(&file)).unwrap();
        let mut buf = [0; 512];
        let error = disk.read_at(MemMut::from(&mut buf[..]), MIB).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("BAT entry")), "{name}: {error}");
        assert!(error.message().contains("0x100000"), "{error}");
        disk.read_at(MemMut::from(&mut buf[..]), 0).unwrap();
        assert_eq!(open_disk(memory(&file)).unwrap_err().kind(), ErrorKind::Corrupt, "{name}");
        let report = check(memory(&file)).unwrap();
        assert_eq!(report.corruptions, 1, "{name}: {report:?}");
    }
}

#[test]
fn blocks_that_overlap_are_found_and_not_written_to() {
    let mut file = sound();
    put(&mut file, TABLE + 8, &(BLOCKS | 6).to_le_bytes());
    open_source(memory(&file)).unwrap().read_at(MemMut::from(&mut [0; 9][..]), MIB).unwrap();
    let error = open_disk(memory(&file)).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(BLOCKS)));
    let report = check(memory(&file)).unwrap();
    assert_eq!((report.corruptions, report.findings[0].offset), (1, Some(BLOCKS)));
    assert_eq!(report.findings[0].code, FindingCode::BlockShared);
    let mut longer = sound();
    longer.resize(longer.len() + 3 * MIB as usize, 0);
    let report = check(memory(&longer)).unwrap();
    assert!(report.is_clean());
    assert_eq!((report.allocated_clusters, report.total_clusters), (2, 4));
    assert_eq!((report.fragmented_clusters, report.image_end_offset), (0, Some(BLOCKS + 2 * MIB)));
}

#[test]
fn a_bitmap_that_is_missing_is_damage() {
    let entries = [Payload::Partial(BLOCKS)];
    let mut file = image(&metadata(4 * MIB, 512), &entries);
    with_parent(&mut file, &[("relative_path", "p")]);
    let read = |file: &[u8]| {
        let layer = open_layer(memory(file)).unwrap();
        layer.plan(0..4096, &mut Vec::new()).map_err(|e| (e.kind(), e.field()))
    };
    let damage = Err((ErrorKind::Corrupt, Some("BAT entry")));
    assert_eq!(read(&file), damage);
    for entry in [TABLE | 6, (BLOCKS + 9 * MIB) | 6, BLOCKS | 7] {
        put(&mut file, bitmap_entry(0, 512), &entry.to_le_bytes());
        assert_eq!(read(&file), damage, "{entry:#x}");
    }
    // Nothing is written where that could hit another block.
    for entry in [BLOCKS | 7, BLOCKS | 6, TABLE | 6] {
        put(&mut file, bitmap_entry(0, 512), &entry.to_le_bytes());
        let mut layer = open_layer(memory(&file)).unwrap();
        let error = layer.make_writable(qcow2_core::DiskOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}");
    }
}

#[test]
fn logs_that_cannot_be() {
    let sector = vec![0; 4096];
    let mut file = sound();
    add_log(&mut file, 1, &[(TABLE, &sector)]);
    let dirty = file.clone();
    // The file was cut when the log knew that it was longer.
    file.truncate(file.len() - 1);
    assert_eq!(refused(&file), (ErrorKind::Corrupt, Some("FlushedFileOffset")));
    let tight = OpenOptions { max_metadata_bytes: MIB - 1, ..options() };
    assert_eq!(Vhdx::open(memory(&dirty), &tight).unwrap_err().kind(), ErrorKind::Limit);
    // An entry that is torn is none.
    let mut torn = dirty.clone();
    put(&mut torn, MIB + 5000, &[1]);
    assert!(!Vhdx::open(memory(&torn), &options()).unwrap().is_dirty());
    // A log that is nowhere.
    put(
        &mut torn,
        HEADER_OFFSETS[1],
        &Header { log_guid: LOG_GUID, log_offset: 1 << 40, ..header(9) }.encode(),
    );
    assert_eq!(refused(&torn), (ErrorKind::Corrupt, Some("LogLength")));
    // Without a log nothing can be written.
    let mut none = sound();
    put(&mut none, HEADER_OFFSETS[1], &Header { log_length: 0, ..header(9) }.encode());
    assert_eq!(open_disk(memory(&none)).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
}

#[test]
fn inspections_find_what_speaks_against_an_image() {
    let codes = |file: &[u8], limits: &OpenOptions| {
        let found = inspect(&*memory(file), limits).unwrap();
        found.findings.iter().map(|finding| finding.code.as_str()).collect::<Vec<_>>()
    };
    assert_eq!(codes(&sound(), &options()), [""; 0]);
    let mut dirty = sound();
    add_log(&mut dirty, 1, &[(TABLE, &vec![0; 4096])]);
    assert_eq!(codes(&dirty, &options()), ["DIRTY_BIT"]);
    let mut child = sound();
    with_parent(&mut child, &[("absolute_win32_path", "C:\\p.vhdx")]);
    assert_eq!(codes(&child, &options()), ["BACKING_FILE", "TABLE_OUT_OF_BOUNDS"][..1]);
    assert_eq!(
        inspect(&*memory(&child), &options()).unwrap().backing_file.as_deref(),
        Some(&b"C:\\p.vhdx"[..])
    );
    assert_eq!(codes(&sound(), &OpenOptions { max_virtual_size: 1, ..options() }), ["LIMIT"]);
    let mut unknown = sound();
    put(&mut unknown, ITEMS + 32, &[1]);
    assert_eq!(codes(&unknown, &options()), ["UNKNOWN_FEATURE"]);
    let mut large = sound();
    put(&mut large, ITEMS + METADATA_ITEMS.0 + 12, &[0, 1]);
    assert_eq!(codes(&large, &options()), ["TABLE_OUT_OF_BOUNDS"]);
    assert_eq!(codes(b"vhdxfile", &options()), ["HEADER_INVALID"]);
    assert!(inspect_bytes(&sound(), &options()).metadata.is_some());
    assert!(inspect_bytes(&sound()[..1 << 20], &options()).header.is_some());
}

/// Any bytes in any structure: a value or an error, and never more memory than the limits.
#[test]
fn noise_anywhere_is_an_error_or_a_disk() {
    let mut rng = Rng::new(11);
    let mut base = sound();
    let table = base[TABLE as usize..TABLE as usize + 4096].to_vec();
    add_log(&mut base, 1, &[(TABLE, &table)]);
    let places = [
        0,
        HEADER_OFFSETS[0],
        HEADER_OFFSETS[1],
        REGION_TABLE_OFFSETS[0],
        MIB,
        TABLE,
        ITEMS,
        ITEMS + METADATA_ITEMS.0,
    ];
    for _ in 0..150 {
        let mut file = base.clone();
        for _ in 0..1 + rng.below(4) {
            let at = places[rng.below(places.len() as u64) as usize] + rng.below(200);
            let length = 1 + rng.below(8) as usize;
            let noise = rng.bytes(length);
            put(&mut file, at, &noise);
        }
        let _ = check(memory(&file));
        let _ = inspect(&*memory(&file), &options());
        if let Ok(disk) = open_source(memory(&file)) {
            let mut buf = vec![0; disk.virtual_size().min(4 * MIB) as usize];
            let _ = disk.read_at(MemMut::from(&mut buf[..]), 0);
        }
        let _ = open_disk(memory(&file));
    }
}

#[test]
fn a_repair_brings_the_log_in_and_replaces_damaged_copies() {
    let mut file = sound();
    let mut sector = file[TABLE as usize..TABLE as usize + 4096].to_vec();
    sector[..8].fill(0);
    add_log(&mut file, 1, &[(TABLE, &sector)]);
    put(&mut file, HEADER_OFFSETS[0] + 9, &[1]);
    put(&mut file, REGION_TABLE_OFFSETS[0] + 9, &[1]);
    let storage = memory(&file);
    let open = || Vhdx::open(storage.clone(), &options()).unwrap();
    let before = open().check(1000, &Job::new()).unwrap();
    let codes: Vec<_> = before.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, [FindingCode::NotClosed, FindingCode::Copy, FindingCode::Copy]);
    let of_leaks = open().repair(Repair::Leaks, 1000, &Job::new()).unwrap();
    assert_eq!((of_leaks.corruptions, of_leaks.corruptions_fixed), (3, 0));
    // The headers are written when the log was brought in: that makes both whole.
    let layer = open();
    let repaired = layer.repair(Repair::All, 1000, &Job::new()).unwrap();
    assert!(layer.check(1000, &Job::new()).unwrap().is_clean());
    assert_eq!((repaired.corruptions, repaired.corruptions_fixed, repaired.allocated_clusters), (0, 2, 1));
    assert!(open().check(1000, &Job::new()).unwrap().is_clean());
    let mut none = vec![9; MIB as usize];
    open_source(storage).unwrap().read_at(MemMut::from(&mut none[..]), 0).unwrap();
    assert!(none.iter().all(|byte| *byte == 0));
    let fixture = Fixture::new();
    let path = fixture.file("damaged.vhdx", &file);
    let read_only = Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap());
    let error = Vhdx::open(read_only, &options()).unwrap().repair(Repair::All, 1, &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

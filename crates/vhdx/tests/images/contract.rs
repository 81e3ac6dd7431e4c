//! The suites that any layer and any disk keep.

use std::sync::Arc;

use qcow2_core::{Chain, ErrorKind, GuestSource, Layer, MemMut, Raw, Storage};
use qcow2_testkit::Rng;
use qcow2_testkit::contract::{DiskContract, LayerContract};
use qcow2_vhdx::structures::{Payload, encode_payload};
use qcow2_vhdx::{NewOptions, OpenOptions, Subformat, Vhdx};

use crate::forge::{
    BLOCKS, DATA_WRITE_GUID, MIB, bitmap_entry, bytes_of, check, create, image, memory, metadata, open_disk,
    open_layer, open_source, put, with_parent,
};

#[test]
fn a_dynamic_image_keeps_the_contract_of_layers() {
    let size = 4 * MIB - 512;
    let entries =
        [Payload::Present(BLOCKS), Payload::NotPresent, Payload::Zero, Payload::Present(BLOCKS + MIB)];
    let file = image(&metadata(size, 512), &entries);
    let mut expected = vec![0; size as usize];
    expected[..MIB as usize].copy_from_slice(&file[BLOCKS as usize..][..MIB as usize]);
    expected[3 * MIB as usize..]
        .copy_from_slice(&file[BLOCKS as usize + MIB as usize..][..MIB as usize - 512]);
    LayerContract { name: "dynamic", file: &file, open: &open_layer, expected: &expected, below: None }
        .check();
    let layer = open_layer(memory(&file)).unwrap();
    assert_eq!((layer.format(), layer.unit(), layer.references().backing), ("vhdx", Some(MIB), None));
}

/// Sectors of 512 and of 4096 bytes that are here or in the parent, by the bitmap of their chunk, whose bits begin with the lowest.
#[test]
fn a_differencing_image_keeps_the_contract_of_layers() {
    for sector_size in [512u64, 4096] {
        let size = 4 * MIB;
        let bitmap = BLOCKS + 8 * MIB;
        let entries =
            [Payload::Partial(BLOCKS), Payload::NotPresent, Payload::Zero, Payload::Partial(BLOCKS + MIB)];
        let mut file = image(&metadata(size, sector_size as u32), &entries);
        put(&mut file, bitmap_entry(0, sector_size), &(bitmap | 6).to_le_bytes());
        with_parent(&mut file, &[("relative_path", ".\\parent.vhdx")]);
        let bits = Rng::new(sector_size).bytes((size / sector_size / 8) as usize);
        put(&mut file, bitmap, &bits);
        put(&mut file, bitmap + MIB - 1, &[0]);
        // Shorter than the image: what is missing there is zero.
        let below = Rng::new(1).text(MIB as usize + 512);
        let mut expected = vec![0; size as usize];
        expected[..below.len()].copy_from_slice(&below);
        for (block, place) in [(0, BLOCKS), (3, BLOCKS + MIB)] {
            for sector in 0..MIB / sector_size {
                let index = block * (MIB / sector_size) + sector;
                if bits[(index / 8) as usize] >> (index % 8) & 1 == 1 {
                    let (to, from) =
                        ((index * sector_size) as usize, (place + sector * sector_size) as usize);
                    expected[to..to + sector_size as usize]
                        .copy_from_slice(&file[from..from + sector_size as usize]);
                }
            }
        }
        let name = format!("differencing, {sector_size}");
        LayerContract {
            name: &name,
            file: &file,
            open: &open_layer,
            expected: &expected,
            below: Some(&below),
        }
        .check();
        let layer = open_layer(memory(&file)).unwrap();
        let parent = layer.references().backing.unwrap();
        assert_eq!(
            (&parent.filename[..], parent.format.as_deref()),
            (&b"./parent.vhdx"[..], Some(&b"vhdx"[..]))
        );
        assert!(layer.takes_backing());
        let report = check(memory(&file)).unwrap();
        assert_eq!((report.corruptions, report.allocated_clusters), (0, 2));
    }
}

#[test]
fn disks_keep_the_contract_of_disks() {
    let dynamic = NewOptions { size: 3 * MIB + 512, block_size: MIB, ..NewOptions::default() };
    let cases = [
        dynamic.clone(),
        NewOptions { block_state_zero: false, block_size: 2 * MIB, ..dynamic.clone() },
        NewOptions { subformat: Subformat::Fixed, ..dynamic.clone() },
        NewOptions { size: 3 * MIB + 4096, sector_size: 4096, log_size: 2 * MIB, ..dynamic },
    ];
    for case in cases {
        let storage = memory(&[]);
        create(&case, Arc::clone(&storage)).unwrap();
        let disk = open_disk(Arc::clone(&storage)).unwrap();
        let reopen = || Box::new(open_source(Arc::clone(&storage)).unwrap()) as Box<dyn GuestSource>;
        DiskContract { name: &format!("{case:?}"), disk: &disk, reopen: &reopen }.check();
        disk.close().unwrap();
        assert!(check(Arc::clone(&storage)).unwrap().is_clean(), "{case:?}");
    }
}

#[test]
fn a_table_of_many_chunks_is_walked_in_bounded_memory() {
    let storage = memory(&[]);
    let new =
        NewOptions { size: 64 << 40, block_size: 16 * MIB, block_state_zero: false, ..NewOptions::default() };
    create(&new, Arc::clone(&storage)).unwrap();
    let layer =
        Vhdx::open(Arc::clone(&storage), &OpenOptions { cache_bytes: Some(0), ..OpenOptions::default() })
            .unwrap();
    assert_eq!((layer.virtual_size(), layer.header().log_length), (64 << 40, 1 << 20));
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    let last = (64u64 << 40) - 100;
    disk.write_at(qcow2_core::Mem::from(&[7; 100][..]), last).unwrap();
    disk.write_at(qcow2_core::Mem::from(&[8; 100][..]), 5 << 40).unwrap();
    disk.close().unwrap();
    let again = open_source(storage).unwrap();
    for (at, byte) in [(last, 7), (5 << 40, 8), (4 << 40, 0)] {
        let mut found = [1; 100];
        again.read_at(MemMut::from(&mut found[..]), at).unwrap();
        assert_eq!(found, [byte; 100]);
    }
}

#[test]
fn a_log_is_brought_in_in_memory_for_reading_and_on_disk_for_writing() {
    let size = 4 * MIB;
    let mut file = image(&metadata(size, 512), &[Payload::Present(BLOCKS)]);
    crate::damaged::add_log(
        &mut file,
        1,
        &[(crate::forge::TABLE, &{
            // The first block is another one now, the second one is new.
            let entries = [Payload::Zero, Payload::Present(BLOCKS)]
                .map(|payload| encode_payload(payload).to_le_bytes());
            let mut sector = vec![0; 4096];
            sector[..16].copy_from_slice(&entries.concat());
            sector
        })],
    );
    let mut expected = vec![0; size as usize];
    expected[MIB as usize..2 * MIB as usize].copy_from_slice(&file[BLOCKS as usize..][..MIB as usize]);
    LayerContract { name: "dirty", file: &file, open: &open_layer, expected: &expected, below: None }.check();
    let storage: Arc<dyn Storage> = memory(&file);
    let read = Vhdx::open(Arc::clone(&storage), &OpenOptions::default()).unwrap();
    assert!(read.is_dirty());
    let mut now = vec![0; file.len()];
    storage.read_at(MemMut::from(&mut now[..]), 0).unwrap();
    assert!(now == file, "reading changed the file");
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    assert!(bytes_of(&disk) == expected);
    drop(disk);
    let clean = Vhdx::open(storage, &OpenOptions::default()).unwrap();
    assert!(!clean.is_dirty() && clean.header().log_guid.is_zero());
    assert_ne!(clean.header().file_write_guid, read.header().file_write_guid);
}

/// A parent that was changed since, or another image, would give wrong bytes.
#[test]
fn a_parent_is_the_one_that_the_image_was_made_on() {
    let metadata = metadata(2 * MIB, 512);
    let parent = image(&metadata, &[Payload::Present(BLOCKS)]);
    let chain = |pairs: &[(&str, &str)], below: Option<Box<dyn Layer>>| {
        let mut file = image(&metadata, &[Payload::NotPresent]);
        with_parent(&mut file, pairs);
        let top = open_layer(memory(&file)).unwrap();
        Chain::new([Some(top), below].into_iter().flatten().collect()).map_err(|e| e.kind())
    };
    let vhdx = || Some(open_layer(memory(&parent)).unwrap());
    let raw = || Some(Box::new(Raw::new(memory(&parent)).unwrap()) as Box<dyn Layer>);
    let guid = format!("{{{}}}", DATA_WRITE_GUID.to_string().to_uppercase());
    let name = ("relative_path", "p");
    let other = ("parent_linkage", "{00000000-0000-0000-0000-000000000001}");
    let read = chain(&[name, ("parent_linkage", &guid)], vhdx()).unwrap();
    let mut found = vec![0; MIB as usize];
    read.read_at(MemMut::from(&mut found[..]), 0).unwrap();
    assert!(found == parent[BLOCKS as usize..][..MIB as usize]);
    chain(&[name, other, ("parent_linkage2", &guid)], vhdx()).unwrap();
    chain(&[name], raw()).unwrap();
    chain(&[name, other], None).unwrap();
    assert_eq!(chain(&[name, other], vhdx()).unwrap_err(), ErrorKind::Chain);
    assert_eq!(chain(&[name, ("parent_linkage", &guid)], raw()).unwrap_err(), ErrorKind::Chain);
    assert_eq!(chain(&[other], None).unwrap_err(), ErrorKind::UnsupportedFeature);
}

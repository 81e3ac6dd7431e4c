//! Power cuts: whatever was flushed is there, and what was not is old or new, sector by sector.

use std::sync::Arc;

use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Layer, Result, Storage};
use qcow2_engine::Image;
use qcow2_testkit::Sparse;
use qcow2_testkit::crash::{Durability, Scope, Session};
use qcow2_testkit::ops::{Menu, Target};
use qcow2_vmdk::{CreateOptions, NewVmdk, OpenOptions, Subformat, Vmdk};

const SIZE: u64 = 2 << 20;

/// An empty image, of which the directory's entries are missing where `bare`: tables are made when they are needed then.
fn empty(bare: bool) -> Sparse {
    use qcow2_core::NewImage;
    let options = CreateOptions { size: SIZE, subformat: Subformat::MonolithicSparse, ..Default::default() };
    let storage = Arc::new(MemoryStorage::new());
    let hosts = qcow2_core::new_image::Hosts::from(Arc::clone(&storage) as Arc<dyn Storage>);
    NewVmdk::new(options, None).unwrap().create(&hosts, &qcow2_core::Job::new()).unwrap();
    let mut bytes = storage.to_vec();
    if bare {
        for directory in [21, 26] {
            bytes[directory * 512..directory * 512 + 4].fill(0);
        }
    }
    let mut sparse = Sparse::new(bytes.len() as u64);
    sparse.write(0, &bytes);
    sparse
}

fn open(storage: Arc<dyn Storage>, write: bool) -> Result<Image> {
    let mut vmdk = Vmdk::open(storage, &OpenOptions::default())?;
    if write {
        vmdk.make_writable(Default::default())?;
    }
    Image::new(vec![Box::new(vmdk)])
}

fn explore(bare: bool, grow: bool, seed: u64) {
    let (mut session, files) = Session::new(vec![empty(bare)], Durability::Flush);
    let file: Arc<dyn Storage> = files[0].clone();
    session.start_empty(SIZE);
    let mut menu = Menu::new(65536, SIZE);
    menu.compression = false;
    menu.discard = false;
    menu.grow = grow;
    let open_target = || Ok(Box::new(open(Arc::clone(&file), true)?) as Box<dyn Target>);
    session.play(&open_target, &menu.sequence(seed, 25), false).unwrap();
    let history = session.history();
    let mut judged = 0;
    for state in session.states(seed, 60) {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&state.files[0].to_vec()));
        let what = format!("bare {bare}, seed {seed}, cut {}, {:?}", state.cut, state.shape);
        let image = open(storage, false).unwrap_or_else(|e| panic!("{what}: {e}"));
        history.judge(&image, state.cut, &Scope::Whole).unwrap_or_else(|e| panic!("{what}: {e}"));
        judged += 1;
    }
    assert!(judged > 50, "{judged}");
}

#[test]
fn no_power_cut_loses_what_was_flushed() {
    for seed in 0..2 {
        explore(false, false, seed);
        explore(true, false, 10 + seed);
    }
}

#[test]
fn no_power_cut_loses_a_disk_that_grows() {
    for seed in 20..22 {
        explore(false, true, seed);
    }
}

/// A new stream or sparse image is none before it is complete.
#[test]
fn no_power_cut_leaves_half_of_a_converted_file() {
    use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
    use qcow2_engine::create::NewTarget;
    for subformat in [Subformat::MonolithicSparse, Subformat::StreamOptimized] {
        let (mut session, storages) = Session::new(vec![Sparse::new(0)], Durability::Flush);
        let disk = crate::support::disk(3, 600_064);
        let raw = qcow2_core::Raw::new(Arc::new(MemoryStorage::from_bytes(&disk))).unwrap();
        let source = Image::new(vec![Box::new(raw)]).unwrap();
        let options = CreateOptions { size: disk.len() as u64, subformat, ..Default::default() };
        let image = Arc::new(NewVmdk::new(options, None).unwrap());
        let own: Arc<dyn Storage> = storages[0].clone();
        let target = ConvertTarget::New(NewTarget::Format { image, hosts: own.into() });
        let options = ConvertOptions { durable: true, ..ConvertOptions::default() };
        convert(&source, target, &options, &qcow2_core::Job::new()).unwrap();
        let (mut images, mut judged) = (0, 0);
        for state in session.states(1, 100) {
            let bytes = state.files[0].to_vec();
            judged += 1;
            if bytes.starts_with(b"KDMV") {
                let image = crate::support::chain(crate::support::open_bytes(&bytes).unwrap());
                assert!(crate::support::guest(&image) == disk, "cut {}, {:?}", state.cut, state.shape);
                images += 1;
            }
        }
        assert!(images > 0 && images < judged, "{images} of {judged} files are complete");
    }
}

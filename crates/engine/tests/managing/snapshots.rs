//! Snapshots made, applied and deleted through plans, on every kind of image; QEMU judges and does the same.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::maintenance::{Plan, Record, Step, Tree};
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, Image, Mem, MemMut, OpenOptions, Qcow2, WriteOptions};
use qcow2_testkit::plans::Table;
use qcow2_testkit::{Fixture, Qemu, Rng};

fn open(path: &Path) -> Image {
    let storage = Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap());
    let mut image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

fn top(image: &Image) -> &Qcow2 {
    image.top_qcow2().unwrap()
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0u8; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

fn create(image: &Image, id: &str) -> Result<(), qcow2_engine::Error> {
    image.execute(&Table::of(image).create(id, &format!("snapshot {id}")))
}

fn apply(image: &Image, index: usize) {
    image.execute(&Table::of(image).apply(index)).unwrap();
}

fn delete(image: &Image, index: usize) {
    image.execute(&Table::of(image).delete(index)).unwrap();
}

fn scribble(image: &Image, rng: &mut Rng, compressible: bool) {
    for _ in 0..12 {
        let size = image.virtual_size();
        let offset = rng.below(size);
        let length = 1 + rng.below(90_000) as usize;
        let bytes = rng.bytes(length);
        let length = bytes.len().min((size - offset) as usize);
        image.write_at(Mem::from(&bytes[..length]), offset).unwrap();
    }
    let cluster = top(image).geometry().cluster_size();
    if compressible {
        let at = rng.below(image.virtual_size() / cluster) * cluster;
        image.write_compressed_at(Mem::from(&vec![9u8; cluster as usize][..]), at).unwrap();
    }
    image.write_zeroes(rng.below(image.virtual_size() / 2), 300_000, true).unwrap();
}

#[test]
fn the_life_cycle_of_snapshots() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, options) in [
        "cluster_size=64k",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
        "cluster_size=4k,refcount_bits=8",
        "refcount_bits=64",
        "compression_type=zstd,cluster_size=2M",
    ]
    .iter()
    .enumerate()
    {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(4 << 20));
        let mut rng = Rng::new(seed as u64);
        let image = open(&path);
        let mut states = Vec::new();
        for id in 1..=4 {
            scribble(&image, &mut rng, true);
            create(&image, &id.to_string()).unwrap();
            states.push(read_all(&image));
        }
        scribble(&image, &mut rng, true);
        apply(&image, 1);
        assert!(read_all(&image) == states[1], "{options}: applied");
        scribble(&image, &mut rng, true);
        delete(&image, 2);
        states.remove(2);
        scribble(&image, &mut rng, true);
        let active = read_all(&image);
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.guest_bytes(&path, "qcow2", &[]) == active, "{options}: active");
        for (state, id) in states.iter().zip(["1", "2", "4"]) {
            assert!(qemu.guest_bytes(&path, "qcow2", &["-l", id]) == *state, "{options}: snapshot {id}");
        }
        // QEMU manages them further, and we what it made.
        qemu.img(&["snapshot", "-d", "snapshot 1", path.to_str().unwrap()]).ok();
        qemu.img(&["snapshot", "-c", "theirs", path.to_str().unwrap()]).ok();
        let image = open(&path);
        assert_eq!(top(&image).snapshots().len(), 3, "{options}");
        apply(&image, 1);
        assert!(read_all(&image) == states[2], "{options}: applied again");
        for _ in 0..3 {
            delete(&image, 0);
        }
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.guest_bytes(&path, "qcow2", &[]) == states[2], "{options}: at the end");
    }
}

#[test]
fn narrow_refcounts_refuse_and_nothing_changes() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "refcount_bits=1", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -P 5 0 300k"]);
    let image = open(&path);
    let error = create(&image, "1").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    image.write_at(Mem::from(&[1u8; 10][..]), 0).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
    assert_eq!(qemu.info_json(&path)["snapshots"].as_array().map_or(0, Vec::len), 0);
}

#[test]
fn the_largest_refcount_takes_no_more() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "refcount_bits=64", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -P 5 0 64k"]);
    let bytes = std::fs::read(&path).unwrap();
    let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap()) & !(1 << 63);
    let (block, data) = (word(word(48)), word(word(word(40))));
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    qcow2_testkit::at::write_all_at(&file, &[0xff; 8], block + 8 * (data >> 16)).unwrap();
    let image = open(&path);
    let error = create(&image, "1").unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Limit, Some("refcount_bits")));
    image.close().unwrap();
    assert_eq!(qemu.info_json(&path)["snapshots"].as_array().map_or(0, Vec::len), 0);
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(1 << 20));
    let image = open(&path);
    create(&image, "1").unwrap();
    let generation = top(&image).generation();
    let keep = || Step::WriteTable(vec![Record::Keep { index: 0, rename: None }]);
    let active = Tree::Active;
    for (generation, steps) in [
        (generation + 1, vec![Step::Barrier]),
        (generation, vec![keep(), Step::Switch]),
        (generation, vec![Step::WriteTable(vec![]), Step::Barrier, Step::Switch]),
        (generation, vec![Step::WriteTable(vec![Record::Keep { index: 1, rename: None }])]),
        (generation, vec![keep(), keep()]),
        (generation, vec![Step::Free]),
        (generation, vec![Step::Fork, Step::Fork]),
        (generation, vec![Step::Share(active)]),
        (generation, vec![Step::Drop(active)]),
        (generation, vec![Step::RestoreCopied]),
        (generation, vec![Step::Fork, Step::Share(active), Step::RestoreCopied]),
        (generation, vec![Step::Fork, Step::Share(active), Step::Barrier, Step::Switch]),
        (generation, vec![Step::Fork, Step::Drop(active), Step::Barrier, Step::Switch]),
        (generation, vec![Step::Fork, Step::Drop(Tree::Snapshot(0)), Step::Barrier, Step::Switch]),
        (generation, vec![Step::Fork, keep(), Step::Drop(Tree::Snapshot(0)), Step::Barrier, Step::Switch]),
    ] {
        let error = image.execute(&Plan { generation, steps: steps.clone() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{steps:?}");
    }
    assert_eq!(top(&image).snapshots().len(), 1);
    image.close().unwrap();
}

#[test]
fn names_are_bytes() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(1 << 20));
    let image = open(&path);
    let names: [&[u8]; 2] = [b"caf\xe9", b"caf\xe8"];
    for (number, name) in (1u8..).zip(names) {
        image.write_at(Mem::from(&[number; 512][..]), 0).unwrap();
        let mut plan = Table::of(&image).create(&number.to_string(), "");
        let named = plan.steps.iter_mut().find_map(|step| match step {
            Step::WriteTable(records) => records.iter_mut().find_map(|record| match record {
                Record::New(new) => Some(&mut new.name),
                Record::Keep { .. } => None,
            }),
            _ => None,
        });
        *named.unwrap() = name.to_vec();
        image.execute(&plan).unwrap();
    }
    image.close().unwrap();
    qemu.assert_clean(&path);
    for (number, name) in (1u8..).zip(names) {
        let storage = Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap());
        let options = OpenOptions { snapshot: Some(name.to_vec()), ..OpenOptions::default() };
        let view = Qcow2::open(storage, &options).unwrap();
        assert_eq!(read_all(&Image::new(vec![Box::new(view)]).unwrap())[0], number);
    }
    let storage = Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap());
    let options = OpenOptions { snapshot: Some(b"caf\xea".to_vec()), ..OpenOptions::default() };
    assert_eq!(Qcow2::open(storage, &options).unwrap_err().kind(), ErrorKind::NoSnapshot);
}

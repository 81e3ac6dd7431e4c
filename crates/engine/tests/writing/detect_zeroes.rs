//! Writes of nothing but zeroes where they are detected: at any offset, over backing files, snapshots and subclusters.

use std::sync::Arc;

use qcow2_engine::{DetectZeroes, Discard, Image, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::Door;
use qcow2_testkit::{Fixture, Qemu, Rng};

fn geometries() -> Vec<Geometry> {
    let small = |cluster_size, clusters| Geometry {
        size: clusters * cluster_size + 512,
        ..Geometry::plain(cluster_size)
    };
    vec![
        small(4096, 20),
        Geometry { backing: Backing::LongerQcow2, ..small(4096, 20) },
        Geometry { backing: Backing::ShorterRaw, ..small(65536, 4) },
        Geometry { version: 2, refcount_bits: 16, backing: Backing::LongerQcow2, ..small(4096, 20) },
        Geometry { extended_l2: true, ..small(16384, 10) },
        Geometry { extended_l2: true, backing: Backing::EqualQcow2, ..small(16384, 10) },
        Geometry { data_file: DataFile::ExternalRaw, ..small(4096, 20) },
        Geometry { door: Door::LegacyAes, ..small(4096, 20) },
        Geometry {
            door: Door::Scrambling,
            extended_l2: true,
            backing: Backing::ShorterRaw,
            ..small(16384, 10)
        },
        Geometry { door: Door::Xts, data_file: DataFile::External, ..small(4096, 20) },
    ]
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn zeroes_that_are_detected_are_those_that_were_written_and_no_others() {
    for geometry in geometries() {
        for seed in 0..6 {
            for (detect_zeroes, discard) in
                [(DetectZeroes::On, Discard::Ignore), (DetectZeroes::Unmap, Discard::Unmap)]
            {
                one(&geometry, seed, WriteOptions { detect_zeroes, discard, ..WriteOptions::default() });
            }
        }
    }
}

fn one(geometry: &Geometry, seed: u64, write: WriteOptions) {
    let what = format!("{} seed {seed} {:?}", geometry.name(), write.detect_zeroes);
    let rig = Rig::forge(geometry, seed);
    let files = rig.files().into_iter().map(|state| Arc::new(RecordingStorage::plain(state)));
    let files: Vec<_> = files.collect();
    let storages: Vec<_> = files.iter().map(|file| Arc::clone(file) as Arc<dyn Storage>).collect();
    let image = rig.open(&storages, &Opening { write: Some(write), ..Opening::default() }).unwrap();
    let mut model = read_all(&image);
    let mut rng = Rng::new(seed);
    let snapshots =
        geometry.data_file == DataFile::Internal && geometry.version >= 3 && geometry.refcount_bits > 1;
    for step in 0..40u32 {
        let (a, b) = (rng.below(model.len() as u64), rng.below(model.len() as u64));
        // Every alignment: of bytes, of sectors, of clusters.
        let unit = [1, 512, geometry.cluster_size][rng.below(3) as usize];
        let (start, end) = (a.min(b) / unit * unit, a.max(b).next_multiple_of(unit).min(model.len() as u64));
        let range = start as usize..end as usize;
        match rng.below(8) {
            0 => {
                let bytes = stamped(start, end - start, step);
                image.write(start, &bytes).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            1 if snapshots => image.execute(&Table::of(&image).create(&format!("n{step}"), "new")).unwrap(),
            2 => image.flush().unwrap(),
            _ => {
                image.write(start, &vec![0; range.len()]).unwrap();
                model[range].fill(0);
            }
        }
        assert!(read_all(&image) == model, "{what} step {step}: {start}..{end}");
    }
    image.close().unwrap();
    let states: Vec<_> = files.iter().map(|file| file.snapshot()).collect();
    let findings = audit(&states[0]);
    assert!(findings.is_clean(), "{what}: {findings:?}");
    assert!(
        read_all(&rig.open_state(&states, &Opening::default()).unwrap()) == model,
        "{what}, opened again"
    );
}

/// What QEMU maps behind such writes is what we map: the same is given up, the same kept.
#[test]
fn what_is_given_up_is_what_qemu_gives_up() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let ranges = [
        (0u64, 65536u64),
        (65536 + 4096, 65536),
        (200 << 10, 100),
        (256 << 10, 131_072 + 512),
        (448 << 10, 512),
    ];
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        for backed in [false, true] {
            let [base, ours, theirs] = ["base", "ours", "theirs"].map(|name| fixture.path(name));
            qemu.create(&base, "", Some(512 << 10));
            qemu.io(&base, "qcow2", &["write -P 9 0 512k"]);
            let backing = format!("{options},backing_file={},backing_fmt=qcow2", base.display());
            qemu.create(&theirs, if backed { &backing } else { options }, Some(512 << 10));
            qemu.io(&theirs, "qcow2", &["write -P 5 0 192k", "write -P 6 256k 100k"]);
            std::fs::copy(&theirs, &ours).unwrap();
            let write = WriteOptions {
                detect_zeroes: DetectZeroes::Unmap,
                discard: Discard::Unmap,
                ..WriteOptions::default()
            };
            let opening = Opening { write: Some(write), ..Opening::default() };
            let image = qcow2_testkit::disk_model::open_file(&ours, &opening).unwrap();
            for (offset, length) in ranges {
                image.write(offset, &vec![0; length as usize]).unwrap();
            }
            image.close().unwrap();
            let image = format!(
                "driver=qcow2,discard=unmap,detect-zeroes=unmap,file.driver=file,file.filename={}",
                theirs.display()
            );
            let mut args = vec!["--image-opts".to_owned(), image];
            args.extend(ranges.iter().flat_map(|(o, l)| ["-c".to_owned(), format!("write -P 0 {o} {l}")]));
            let done = std::process::Command::new("qemu-io").args(&args).output().unwrap();
            assert!(done.status.success(), "{done:?}");
            qemu.assert_clean(&ours);
            qemu.assert_identical(&ours, "qcow2", &theirs, "qcow2");
            let zero = |path| {
                let map = qemu.map_json(path, "qcow2");
                let bytes = map.as_array().unwrap().iter().filter(|e| e["data"] == false);
                bytes.map(|e| e["length"].as_u64().unwrap()).sum::<u64>()
            };
            assert!(zero(&ours) >= zero(&theirs), "{options}, backed: {backed}");
        }
    }
}

/// Part of a unit that reads as zeroes otherwise becomes zero as a whole, whatever is below; where the rest does not, or is data of
/// this layer, the part is data. QEMU maps the same.
#[test]
fn parts_of_units_are_mapped_as_qemu_maps_them() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let [base, ours, theirs] = ["base", "ours", "theirs"].map(|name| fixture.path(name));
    let size = (512 << 10) + 1024;
    for (options, unit) in [("cluster_size=64k", 65536), ("cluster_size=64k,extended_l2=on", 2048)] {
        for backed in [false, true] {
            qemu.create(&base, "", Some(size));
            qemu.io(&base, "qcow2", &[&format!("write -P 9 {} 512", 6 * unit + 1024)]);
            let backing = format!("{options},backing_file={},backing_fmt=qcow2", base.display());
            qemu.create(&theirs, if backed { &backing } else { options }, Some(size));
            qemu.io(&theirs, "qcow2", &[&format!("write -P 5 {} 512", 4 * unit)]);
            std::fs::copy(&theirs, &ours).unwrap();
            // Inside of a unit, over the end of one, both ends; beside data of the layer; over data below, and beside it; at the end of
            // the disk. A head and a tail with a unit between them.
            let ranges = [
                (512, 512),
                (2 * unit - 512, 1024),
                (4 * unit + 512, 512),
                (6 * unit + 512, 1024),
                (7 * unit - 512, unit + 1024),
                (size - 512, 512),
            ];
            let image = qcow2_testkit::disk_model::open_file(
                &ours,
                &Opening { write: Some(WriteOptions::default()), ..Opening::default() },
            )
            .unwrap();
            for (offset, length) in ranges {
                image.write_zeroes(offset, length, false).unwrap();
            }
            image.close().unwrap();
            let commands: Vec<_> = ranges.iter().map(|(o, l)| format!("write -z {o} {l}")).collect();
            qemu.io(&theirs, "qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
            qemu.assert_clean(&ours);
            qemu.assert_identical(&ours, "qcow2", &theirs, "qcow2");
            let map = |path| {
                let mut map = qemu.map_json(path, "qcow2");
                for extent in map.as_array_mut().unwrap() {
                    extent.as_object_mut().unwrap().remove("offset");
                }
                map
            };
            assert_eq!(map(&ours), map(&theirs), "{options}, backed: {backed}");
        }
    }
}

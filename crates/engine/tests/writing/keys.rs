//! Key slots of an encrypted image: power cuts and failing calls while they change, and what an inspection says of a header that was
//! forged.

use std::collections::HashSet;
use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::encryption::{Encryption, Secret};
use qcow2_engine::format::Limits;
use qcow2_engine::image::read_header;
use qcow2_engine::inspect::{inspect, inspect_bytes};
use qcow2_engine::keys::{KeyRemoval, NewKey};
use qcow2_engine::{
    ErrorKind, Image, Job, Layer, LayerExt, Mem, MemMut, OpenOptions, Qcow2, Result, Storage, StorageExt,
    WriteOptions,
};
use qcow2_luks::{Luks, OpenOptions as LuksOptions};
use qcow2_testkit::Sparse;
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Fault, FaultStorage, Op as Call};

const EIO: i32 = 5;
const CLUSTER: u64 = 4096;
/// What an active slot has in front of its iterations.
const ACTIVE: [u8; 4] = [0x00, 0xac, 0x71, 0xf3];

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec())
}

/// A new secret that costs as little as any may.
fn new_key(text: &str, slot: Option<usize>, force: bool) -> NewKey {
    NewKey { secret: secret(text), slot, force, iter_time_ms: Some(0) }
}

fn removal(slot: Option<usize>, of: Option<&str>, force: bool) -> KeyRemoval {
    KeyRemoval { slot, secret: of.map(secret), force }
}

/// What has the key slots.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Holder {
    Qcow2,
    /// A LUKS file.
    Luks,
}

const HOLDERS: [Holder; 2] = [Holder::Qcow2, Holder::Luks];

/// The image, open for writing; with a secret its data is open, too.
fn open(storage: Arc<dyn Storage>, with: Option<&str>) -> Result<Image> {
    let mut layer: Box<dyn Layer> = match holder_of(&*storage) {
        Holder::Qcow2 => Box::new(Qcow2::open(storage, &OpenOptions::default())?),
        Holder::Luks => Box::new(Luks::open(storage, &LuksOptions::default())?),
    };
    if let Some(with) = with {
        layer.unlock(with.as_bytes(), &Job::new())?;
    }
    layer.enable_writing(WriteOptions::default())?;
    Image::new(vec![layer])
}

fn holder_of(storage: &dyn Storage) -> Holder {
    let mut magic = [0; 4];
    storage.read_padded_at(MemMut::from(&mut magic[..]), 0).unwrap();
    if magic == *b"LUKS" { Holder::Luks } else { Holder::Qcow2 }
}

/// What opens an image of which key slots are to change: a LUKS file is not written to without its secret.
fn opening(file: &Sparse, secret: &'static str) -> Option<&'static str> {
    (holder_of(&RecordingStorage::plain(file.clone())) == Holder::Luks).then_some(secret)
}

/// An image with a cluster of sevens, which the secrets open, `one` in slot 0 and so on.
fn made(secrets: &[&str]) -> Sparse {
    made_in(Holder::Qcow2, secrets)
}

fn made_in(holder: Holder, secrets: &[&str]) -> Sparse {
    let storage = Arc::new(RecordingStorage::plain(Sparse::new(0)));
    let encryption = Encryption {
        cipher_alg: Some("aes-128".to_owned()),
        iter_time_ms: Some(0),
        ..Encryption::luks(secret(secrets[0]))
    };
    let options = CreateOptions {
        size: 64 * CLUSTER,
        cluster_size: CLUSTER,
        data_door: Some(encryption.door(&Job::new()).unwrap()),
        ..CreateOptions::default()
    };
    if holder == Holder::Luks {
        let luks = encryption.new_luks(4 * CLUSTER, Preallocation::Off, &Job::new()).unwrap();
        let storage: Arc<dyn Storage> = storage.clone();
        luks.create(&storage.into(), &Job::new()).unwrap();
    } else {
        create(storage.clone(), None, &options, &Job::new()).unwrap();
    }
    let image = open(storage.clone(), Some(secrets[0])).unwrap();
    image.write_at(Mem::from(&[7; CLUSTER as usize][..]), 0).unwrap();
    for more in &secrets[1..] {
        image.add_key(&secret(secrets[0]), &new_key(more, None, false), &Job::new()).unwrap();
    }
    image.close().unwrap();
    storage.snapshot()
}

/// Whether a secret opens the file, and the data is there then.
fn opens(file: &Sparse, with: &str) -> bool {
    let storage = Arc::new(RecordingStorage::plain(file.clone()));
    match open(storage, Some(with)) {
        Ok(image) => {
            let mut bytes = [0; CLUSTER as usize];
            image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
            assert_eq!(bytes, [7; CLUSTER as usize]);
            true
        }
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::BadSecret, "{e}");
            false
        }
    }
}

/// Where the LUKS header lies.
fn luks_at(file: &Sparse) -> u64 {
    let storage = RecordingStorage::plain(file.clone());
    if holder_of(&storage) == Holder::Luks {
        return 0;
    }
    read_header(&storage).unwrap().crypto_header().unwrap().0.get()
}

/// The sectors of a slot's key material.
fn material(file: &Sparse, slot: u64) -> Vec<Vec<u8>> {
    let start = luks_at(file);
    let key = start + u64::from(file.u32(start + 208 + 48 * slot + 40)) * 512;
    (0..250).map(|sector| file.get(key + sector * 512, 512)).collect()
}

/// The salt of a slot.
fn salt(file: &Sparse, slot: u64) -> Vec<u8> {
    file.get(luks_at(file) + 208 + 48 * slot + 8, 32)
}

type Change = fn(&Image) -> Result<()>;

/// A name, the secrets before, those of which one must open at any time, those that do not when it is done, and the change.
type Case = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str], Change);

/// What changes key slots.
fn changes() -> Vec<Case> {
    vec![
        ("add", &["one"], &["one"], &[], |image| {
            image.add_key(&secret("one"), &new_key("new", None, false), &Job::new()).map(drop)
        }),
        // Slot 6 lies across two sectors.
        ("add across sectors", &["one"], &["one"], &[], |image| {
            image.add_key(&secret("one"), &new_key("new", Some(6), false), &Job::new()).map(drop)
        }),
        ("change", &["one"], &["one", "new"], &["one"], |image| {
            image.change_key(&secret("one"), &new_key("new", None, false), &Job::new()).map(drop)
        }),
        ("change in two slots", &["one", "one"], &["one", "new"], &["one"], |image| {
            image.change_key(&secret("one"), &new_key("new", None, false), &Job::new()).map(drop)
        }),
        ("replace the last", &["one"], &["one", "new"], &["one"], |image| {
            image.add_key(&secret("one"), &new_key("new", Some(0), true), &Job::new()).map(drop)
        }),
        ("replace", &["one", "two"], &["two"], &["one"], |image| {
            image.add_key(&secret("two"), &new_key("new", Some(0), true), &Job::new()).map(drop)
        }),
        ("remove", &["one", "two"], &["two"], &["one"], |image| {
            image.remove_keys(&removal(Some(0), None, false), &Job::new()).map(drop)
        }),
        ("remove by secret", &["one", "two", "one"], &["two"], &["one"], |image| {
            image.remove_keys(&removal(None, Some("one"), false), &Job::new()).map(drop)
        }),
    ]
}

#[test]
fn whenever_the_power_is_cut_a_secret_opens_and_a_removed_one_is_gone() {
    let mut judged = 0;
    let cases = HOLDERS.iter().flat_map(|holder| changes().into_iter().map(move |change| (*holder, change)));
    for (holder, (name, secrets, always, gone, change)) in cases {
        let before = made_in(holder, secrets);
        let (mut session, storages) = Session::new(vec![before.clone()], Durability::Flush);
        let image = open(storages[0].clone(), opening(&before, secrets[0])).unwrap();
        change(&image).unwrap_or_else(|e| panic!("{name}: {e}"));
        for state in session.states(1, 3) {
            let open = always.iter().any(|secret| opens(&state.files[0], secret));
            assert!(open, "{name}: cut {}, {:?}", state.cut, state.shape);
            judged += 1;
        }
        // What is complete is durable.
        let last = session.states(1, 0).last().unwrap().files.remove(0);
        for secret in gone {
            assert!(!opens(&last, secret), "{name}: {secret}");
        }
        assert!(always.iter().any(|secret| opens(&last, secret)), "{name}");
        for (slot, _) in (0..).zip(secrets).filter(|(_, secret)| gone.contains(secret)) {
            let bytes = last.to_vec();
            let sectors: HashSet<&[u8]> = bytes.chunks(512).collect();
            let left = material(&before, slot).iter().filter(|sector| sectors.contains(&sector[..])).count();
            assert_eq!(left, 0, "{name}: slot {slot}");
            let header = last.get(luks_at(&last), 592);
            assert!(!header.windows(32).any(|window| window == salt(&before, slot)), "{name}: slot {slot}");
        }
        image.close().unwrap();
    }
    assert!(judged > 100, "{judged}");
}

#[test]
fn any_call_may_fail_while_key_slots_change() {
    let mut failures = 0;
    let kinds = [Fault::nth(0, EIO), Fault { ops: vec![Call::Sync], after: 0, once: false, errno: EIO }];
    let cases = HOLDERS.iter().flat_map(|holder| changes().into_iter().map(move |change| (*holder, change)));
    for (holder, (name, secrets, always, gone, change)) in cases {
        let before = made_in(holder, secrets);
        for fault in &kinds {
            let begin = |fault: Fault| {
                let storage = Arc::new(RecordingStorage::plain(before.clone()));
                let faulty = Arc::new(FaultStorage::new(storage.clone(), fault));
                let image = open(faulty.clone(), opening(&before, secrets[0])).unwrap();
                (storage, faulty, image)
            };
            let (_, dry, image) = begin(Fault { after: u64::MAX, ..fault.clone() });
            let opened = dry.calls();
            change(&image).unwrap();
            for call in 0..dry.calls() - opened {
                let what = format!("{name}, call {call}, {fault:?}");
                let (storage, faulty, image) = begin(Fault { after: opened + call, ..fault.clone() });
                let result = change(&image);
                assert!(faulty.failed() > 0, "{what}");
                let file = storage.snapshot();
                match result {
                    Err(e) if e.kind() == ErrorKind::BadSecret => {
                        assert!(e.message().contains("Input/output error"), "{what}: {e}");
                    }
                    Err(e) => assert_eq!(e.errno(), Some(EIO), "{what}: {e}"),
                    // A slot that could not be read was passed over for one that opened.
                    Ok(()) => assert!(!gone.iter().any(|secret| opens(&file, secret)), "{what}"),
                }
                assert!(always.iter().any(|secret| opens(&file, secret)), "{what}");
                failures += 1;
            }
        }
    }
    assert!(failures > 50, "{failures}");
}

/// Guests write while keys are derived and written.
#[test]
fn guests_write_meanwhile() {
    HOLDERS.into_iter().for_each(guests_write_to);
}

fn guests_write_to(holder: Holder) {
    let storage = Arc::new(RecordingStorage::plain(made_in(holder, &["one"])));
    let image = open(storage.clone(), Some("one")).unwrap();
    let clusters = image.virtual_size() / CLUSTER - 2;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..200 {
                let bytes = [n as u8; 1000];
                image.write_at(Mem::from(&bytes[..]), n % clusters * CLUSTER + 4096 + 5).unwrap();
            }
        });
        for name in ["two", "three"] {
            let image = &image;
            scope.spawn(move || {
                image.add_key(&secret("one"), &new_key(name, None, false), &Job::new()).unwrap();
            });
        }
    });
    image.close().unwrap();
    let file = storage.snapshot();
    assert!(["one", "two", "three"].iter().all(|secret| opens(&file, secret)));
}

#[test]
fn a_place_that_something_else_may_have_is_not_written_to() {
    let mut file = made(&["one"]);
    let header = read_header(&RecordingStorage::plain(file.clone())).unwrap();
    let block = file.u64(header.refcount_table_offset.get());
    let cluster = luks_at(&file) / CLUSTER;
    file.put_u16(block + 2 * cluster, 2);
    let image = open(Arc::new(RecordingStorage::plain(file)), None).unwrap();
    let error = image.add_key(&secret("one"), &new_key("two", None, false), &Job::new()).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(cluster * CLUSTER)), "{error}");
}

#[test]
fn a_forged_header_is_a_finding() {
    let sound = made(&["one"]);
    let luks = luks_at(&sound);
    let slot = |number: u64| luks + 208 + 48 * number;
    let forged = |at: u64, bytes: &[u8]| {
        let mut file = sound.clone();
        file.write(at, bytes);
        let found = inspect(&RecordingStorage::plain(file.clone()), &Limits::default()).unwrap();
        // The first bytes of a file say the same, where they go so far.
        let bytes = inspect_bytes(&file.to_vec(), None, &Limits::default());
        assert_eq!(bytes.findings, found.findings);
        found.findings.iter().map(|f| format!("{}: {}", f.code.as_str(), f.message)).collect::<Vec<_>>()
    };
    assert_eq!(forged(0, &[]), Vec::<String>::new());
    let at = |offset: u64| format!("encryption header, {offset:#x}: ");
    let cases = [
        (
            slot(0) + 4,
            u32::MAX,
            format!(
                "LIMIT: {}key slot 0 demands 4294967295 iterations, above the limit of 268435456",
                at(slot(0))
            ),
        ),
        (
            slot(0) + 44,
            20_000,
            format!("LIMIT: {}key slot 0 demands 20000 stripes, above the limit of 16000", at(slot(0))),
        ),
        (slot(0) + 44, 0, format!("HEADER_INVALID: {}key slot 0 is damaged: it has no stripes", at(slot(0)))),
        (
            slot(0) + 40,
            1,
            format!(
                "HEADER_INVALID: {}key slot 0 is damaged: its key material lies at 0x200, within the header",
                at(slot(0))
            ),
        ),
        (
            luks + 164,
            u32::MAX,
            format!(
                "LIMIT: {}the digest of the volume key demands 4294967295 iterations, above the limit of 268435456",
                at(luks)
            ),
        ),
        (luks, 0, format!("HEADER_INVALID: {}not a LUKS header", at(luks))),
    ];
    for (offset, value, expected) in cases {
        assert_eq!(forged(offset, &value.to_be_bytes()), [expected]);
    }
    let [found] = &forged(luks + 72, b"md5\0")[..] else { panic!() };
    assert!(found.starts_with("UNKNOWN_FEATURE: encryption header, "), "{found}");
    // A slot behind the end of what the image calls its encryption header: no tool reads it.
    let mut behind = [ACTIVE, 1000_u32.to_be_bytes()].concat();
    behind.extend([1; 32]);
    behind.extend([1_000_000_u32.to_be_bytes(), 4000_u32.to_be_bytes()].concat());
    let mut file = sound.clone();
    file.write(slot(3), &behind);
    file.put_u32(luks + 104, 0);
    let found = inspect(&RecordingStorage::plain(file), &Limits::default()).unwrap();
    assert!(found.findings[0].message.contains("behind the end of the encryption header"), "{found:?}");
}

#[test]
fn an_error_of_the_header_names_its_place_in_the_file() {
    let mut file = made(&["one"]);
    let luks = luks_at(&file);
    file.put_u32(luks + 208 + 4, u32::MAX);
    let unlock =
        |file: &Sparse| open(Arc::new(RecordingStorage::plain(file.clone())), Some("one")).unwrap_err();
    let error = unlock(&file);
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Limit, Some(luks + 208)), "{error}");
    file.write(luks, &[0; 6]);
    let error = unlock(&file);
    assert_eq!((error.field(), error.offset()), (Some("encryption header"), Some(luks)), "{error}");
}

#[test]
fn a_header_that_is_cut_off_is_a_finding() {
    let sound = made(&["one"]);
    let luks = luks_at(&sound);
    for (length, expected) in [
        (luks + 591, &["TABLE_OUT_OF_BOUNDS", "HEADER_INVALID"][..]),
        (luks, &["TABLE_OUT_OF_BOUNDS", "HEADER_INVALID"]),
        (luks + 592, &["TABLE_OUT_OF_BOUNDS"]),
    ] {
        let mut file = sound.clone();
        file.set_len(length);
        let found = inspect(&RecordingStorage::plain(file), &Limits::default()).unwrap();
        let codes: Vec<_> = found.findings.iter().map(|f| f.code.as_str()).collect();
        let behind = codes.iter().rev().take(expected.len()).rev().copied().collect::<Vec<_>>();
        assert_eq!(behind, expected, "{length}: {:?}", found.findings);
    }
}

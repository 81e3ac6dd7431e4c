//! Key slots: adding, changing and erasing, judged by the other tools and by power cuts.

use crate::support;

use qcow2_core::{ErrorKind, Job};
use qcow2_luks::luks1::{add_key, change_key, erase_slot, format, replace_key, unlock, unlock_all};
use qcow2_luks::{Cost, FormatOptions, Formatted, Limits, Luks1Header, Plan};
use support::{Folder, SECRET, cryptsetup_tries, qemu_to_raw, reader};

const COST: Cost = Cost::Iterations(1000);

fn made() -> Formatted {
    format(&FormatOptions { cost: COST, ..FormatOptions::new(SECRET.as_bytes()) }, &Job::new()).unwrap()
}

fn apply(bytes: &mut [u8], plan: &Plan) {
    for write in &plan.writes {
        bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }
    assert_eq!(Luks1Header::parse(bytes).unwrap(), plan.header);
}

/// The slot that the secret opens.
fn slot(bytes: &[u8], secret: &str) -> Option<usize> {
    let header = Luks1Header::parse(bytes).unwrap();
    match unlock(&header, secret.as_bytes(), &reader(bytes), &Job::new(), &Limits::default()) {
        Ok(opened) => Some(opened.slot),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::BadSecret, "{e}");
            None
        }
    }
}

#[test]
fn a_key_is_added_changed_and_erased_and_the_other_tools_agree() {
    let Some(folder) = Folder::new() else { return };
    let Formatted { header, mut bytes, key, .. } = made();
    let added = add_key(&header, &key, Some(5), b"second", COST, &Job::new()).unwrap();
    apply(&mut bytes, &added);
    let changed = change_key(&added.header, &key, 5, b"third", COST, &Job::new()).unwrap();
    apply(&mut bytes, &changed);
    assert_eq!((added.slot, changed.slot), (5, 1));
    assert_eq!([SECRET, "second", "third"].map(|secret| slot(&bytes, secret)), [Some(0), None, Some(1)]);
    let erased = erase_slot(&changed.header, 0, false).unwrap();
    apply(&mut bytes, &erased);
    bytes.resize(bytes.len() + 512, 0);
    let image = folder.write("image", &bytes);
    assert!(cryptsetup_tries(&image, "third", 1));
    assert!(!cryptsetup_tries(&image, SECRET, 0) && !cryptsetup_tries(&image, "second", 5));
    let restored = add_key(&erased.header, &key, None, SECRET.as_bytes(), COST, &Job::new()).unwrap();
    assert_eq!(restored.slot, 0);
    apply(&mut bytes, &restored);
    assert_eq!(qemu_to_raw(&folder.write("image", &bytes), &folder.path("raw")).len(), 512);
}

/// Old key material must not lie anywhere once a slot is erased.
#[test]
fn an_erased_slot_is_overwritten() {
    let Formatted { header, bytes, key, .. } = made();
    let plan = add_key(&header, &key, None, b"second", COST, &Job::new()).unwrap();
    let mut bytes = bytes;
    apply(&mut bytes, &plan);
    let before = bytes.clone();
    apply(&mut bytes, &erase_slot(&plan.header, 0, false).unwrap());
    let at = header.slots[0].key_offset as usize;
    let len = header.material_bytes(&header.slots[0]) as usize;
    let same = |at: usize| before[at..][..16] == bytes[at..][..16];
    assert!(!(at..at + len).step_by(16).any(same));
    assert_eq!(bytes[208..256][8..40], [0; 32], "the salt");
}

/// Cut anywhere, within a write too, one of the secrets opens the disk.
#[test]
fn whenever_the_power_is_cut_a_key_opens_the_disk() {
    let Formatted { header, mut bytes, key, .. } = made();
    // Slot 6 lies across two sectors.
    for (number, secret) in ["1", "2", "3", "4", "5"].into_iter().enumerate() {
        let header = Luks1Header::parse(&bytes).unwrap();
        apply(
            &mut bytes,
            &add_key(&header, &key, Some(number + 1), secret.as_bytes(), COST, &Job::new()).unwrap(),
        );
    }
    for slot in [0, 1, 2, 3, 4] {
        let header = Luks1Header::parse(&bytes).unwrap();
        apply(&mut bytes, &erase_slot(&header, slot, false).unwrap());
    }
    let header = Luks1Header { slots: Luks1Header::parse(&bytes).unwrap().slots, ..header };
    let across = add_key(&header, &key, Some(6), b"old", COST, &Job::new()).unwrap();
    apply(&mut bytes, &across);
    apply(&mut bytes, &erase_slot(&across.header, 5, false).unwrap());
    assert_eq!(slot(&bytes, "old"), Some(6));
    let plan = change_key(&Luks1Header::parse(&bytes).unwrap(), &key, 6, b"new", COST, &Job::new()).unwrap();
    let mut cuts = 0;
    for (number, write) in plan.writes.iter().enumerate() {
        let at = write.offset as usize;
        let torn = (at.next_multiple_of(512) - at).min(write.bytes.len());
        for done in [0, torn, write.bytes.len() / 2 / 512 * 512] {
            let mut cut = bytes.clone();
            for write in &plan.writes[..number] {
                cut[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
            }
            cut[at..][..done].copy_from_slice(&write.bytes[..done]);
            assert!(
                slot(&cut, "old").is_some() || slot(&cut, "new").is_some(),
                "write {number}, {done} bytes"
            );
            cuts += 1;
        }
    }
    assert_eq!(cuts, 12);
    apply(&mut bytes, &plan);
    assert_eq!((slot(&bytes, "old"), slot(&bytes, "new")), (None, Some(0)));
}

#[test]
fn the_last_slot_that_opens_goes_only_by_force() {
    let Formatted { header, mut bytes, key, .. } = made();
    assert_eq!(erase_slot(&header, 0, false).unwrap_err().kind(), ErrorKind::DataLoss);
    let added = add_key(&header, &key, None, b"second", COST, &Job::new()).unwrap();
    apply(&mut bytes, &added);
    // A slot that is damaged opens nothing.
    bytes[256 + 44..256 + 48].fill(0xff);
    let header = Luks1Header::parse(&bytes).unwrap();
    assert_eq!(erase_slot(&header, 0, false).unwrap_err().kind(), ErrorKind::DataLoss);
    let damaged = erase_slot(&header, 1, false).unwrap();
    assert_eq!(damaged.writes.len(), 1, "its key material may be another's");
    apply(&mut bytes, &erase_slot(&header, 0, true).unwrap());
    let opened = unlock(&damaged.header, b"second", &reader(&bytes), &Job::new(), &Limits::default());
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::BadSecret);
    let header = Luks1Header::parse(&bytes).unwrap();
    assert!(!header.slots[0].is_active() && header.slots[1].is_active());
}

#[test]
fn what_no_slot_can_do_is_refused() {
    let Formatted { header, mut bytes, key, .. } = made();
    let add = |header: &Luks1Header, slot| add_key(header, &key, slot, b"more", COST, &Job::new());
    assert_eq!(
        add(&header, Some(0)).unwrap_err().to_string(),
        "key slot 0 is in use: remove its key first (field slot)"
    );
    assert_eq!(add(&header, Some(8)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(erase_slot(&header, 3, false).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(erase_slot(&header, 3, true).unwrap().writes.len(), 2, "what is left there is overwritten");
    let mut full = header;
    for _ in 1..8 {
        let plan = add(&full, None).unwrap();
        apply(&mut bytes, &plan);
        full = plan.header;
    }
    assert_eq!(add(&full, None).unwrap_err().kind(), ErrorKind::Limit);
    assert_eq!(change_key(&full, &key, 0, b"x", COST, &Job::new()).unwrap_err().kind(), ErrorKind::Limit);
    let found = |only, secret: &[u8]| {
        unlock_all(&full, only, secret, &reader(&bytes), &Job::new(), &Limits::default())
            .map(|found| found.into_iter().map(|(slot, _)| slot).collect::<Vec<_>>())
    };
    assert_eq!(found(None, b"more").unwrap(), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(found(Some(3), b"more").unwrap(), [3]);
    for (only, secret) in [(Some(0), &b"more"[..]), (None, b"less")] {
        assert_eq!(found(only, secret).unwrap_err().kind(), ErrorKind::BadSecret);
    }
    assert_eq!(found(Some(8), b"more").unwrap_err().kind(), ErrorKind::InvalidArgument);
}

/// A slot in use is taken over by force, and whenever the power is cut a secret that is known opens the disk.
#[test]
fn a_slot_in_use_is_taken_over() {
    let Formatted { header, bytes, key, .. } = made();
    let added = add_key(&header, &key, Some(1), b"second", COST, &Job::new()).unwrap();
    let mut two = bytes.clone();
    apply(&mut two, &added);
    for (mut bytes, writes) in [(bytes, 8), (two, 4)] {
        let header = Luks1Header::parse(&bytes).unwrap();
        let plan = replace_key(&header, &key, 0, b"new", COST, &Job::new()).unwrap();
        assert_eq!((plan.slot, plan.writes.len()), (0, writes));
        for write in &plan.writes {
            assert!([SECRET, "second", "new"].iter().any(|secret| slot(&bytes, secret).is_some()));
            bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
        }
        assert_eq!((slot(&bytes, SECRET), slot(&bytes, "new")), (None, Some(0)));
        assert_eq!(Luks1Header::parse(&bytes).unwrap(), plan.header);
        assert!(!plan.header.slots[2].is_active());
    }
}

#[test]
fn what_is_cancelled_ends() {
    let Formatted { header, bytes, key, .. } = made();
    let job = Job::new();
    job.cancel();
    assert_eq!(
        add_key(&header, &key, None, b"x", Cost::default(), &job).unwrap_err().kind(),
        ErrorKind::Aborted
    );
    let opened = unlock(&header, SECRET.as_bytes(), &reader(&bytes), &job, &Limits::default());
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::Aborted);
    assert_eq!(format(&FormatOptions::new(b"x"), &job).unwrap_err().kind(), ErrorKind::Aborted);
}

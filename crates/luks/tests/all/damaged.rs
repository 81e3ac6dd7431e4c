//! Headers that lie, with the error that each must give.

use crate::support;

use std::sync::LazyLock;

use proptest::prelude::*;
use qcow2_core::{Error, ErrorKind, Job};
use qcow2_luks::luks1::{HEADER_BYTES, add_key, erase_slot, format, unlock};
use qcow2_luks::{Cost, FormatOptions, Limits, Luks1Header, Unlocked};
use support::{SECRET, reader};

const COST: Cost = Cost::Iterations(1000);
const SLOT: usize = 208;

/// A header whose secret opens slot 0, and "second" slot 1.
static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let made =
        format(&FormatOptions { cost: COST, ..FormatOptions::new(SECRET.as_bytes()) }, &Job::new()).unwrap();
    let mut bytes = made.bytes;
    for write in add_key(&made.header, &made.key, None, b"second", COST, &Job::new()).unwrap().writes {
        bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }
    bytes
});

fn with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = SOUND.clone();
    bytes[at..][..value.len()].copy_from_slice(value);
    bytes
}

fn open(bytes: &[u8], secret: &str) -> Result<Unlocked, Error> {
    unlock(&Luks1Header::parse(bytes)?, secret.as_bytes(), &reader(bytes), &Job::new(), &Limits::default())
}

#[test]
fn a_header_that_cannot_be_is_refused_with_the_field() {
    let refused = |at: usize, value: &[u8]| {
        let error = open(&with(at, value), SECRET).unwrap_err();
        (error.kind(), error.field().unwrap(), error.message().to_owned())
    };
    use ErrorKind::{InvalidHeader, Limit, UnsupportedFeature};
    let cases: [(usize, &[u8], ErrorKind, &str, &str); 9] = [
        (0, b"SKUL", InvalidHeader, "magic", "not a LUKS header"),
        (6, &[0, 2], UnsupportedFeature, "version", "LUKS version 2 is not version 1"),
        (8, b"des", UnsupportedFeature, "cipher-name", "the cipher \"des\" is not supported"),
        (
            40,
            b"xts-random\0",
            UnsupportedFeature,
            "cipher-mode",
            "the cipher mode \"xts-random\" is not supported",
        ),
        (72, b"md5\0", UnsupportedFeature, "hash-spec", "the hash \"md5\" is not supported"),
        (104, &[0, 0, 0, 1], InvalidHeader, "payload-offset", "the data begins within the LUKS header"),
        (
            108,
            &[0, 0, 0, 63],
            InvalidHeader,
            "key-bytes",
            "aes-xts-plain64 does not go with a key of 63 bytes",
        ),
        (164, &[0; 4], InvalidHeader, "mk-digest-iter", "the digest of the volume key has no iterations"),
        (
            164,
            &[0xff; 4],
            Limit,
            "mk-digest-iter",
            "the digest of the volume key demands 4294967295 iterations, above the limit of 268435456",
        ),
    ];
    for (at, value, kind, field, message) in cases {
        assert_eq!(refused(at, value), (kind, field, message.to_owned()));
    }
    let error = Luks1Header::parse(&SOUND[..HEADER_BYTES - 1]).unwrap_err();
    assert_eq!(error.to_string(), "the LUKS header is cut off (field magic)");
}

#[test]
fn a_damaged_slot_is_passed_over_and_said_where_nothing_opens() {
    let cases: [(usize, [u8; 4], ErrorKind, &str, &str); 7] = [
        (0, [1, 2, 3, 4], ErrorKind::Corrupt, "active", "key slot 0 is damaged: its state is 0x1020304"),
        (4, [0; 4], ErrorKind::Corrupt, "iterations", "key slot 0 is damaged: it has no iterations"),
        (
            4,
            [0xff; 4],
            ErrorKind::Limit,
            "iterations",
            "key slot 0 demands 4294967295 iterations, above the limit of 268435456",
        ),
        (44, [0; 4], ErrorKind::Corrupt, "stripes", "key slot 0 is damaged: it has no stripes"),
        (
            44,
            [0xff; 4],
            ErrorKind::Limit,
            "stripes",
            "key slot 0 demands 4294967295 stripes, above the limit of 16000",
        ),
        (
            40,
            [0, 0, 0, 1],
            ErrorKind::Corrupt,
            "key-material-offset",
            "key slot 0 is damaged: its key material lies at 0x200, within the header",
        ),
        (
            40,
            [0xff; 4],
            ErrorKind::Corrupt,
            "key-material-offset",
            "key slot 0 is damaged: its key material ends at 0x2000003e600, behind the begin of the data",
        ),
    ];
    for (at, value, kind, field, message) in cases {
        let bytes = with(SLOT + at, &value);
        assert_eq!(open(&bytes, "second").unwrap().slot, 1, "{message}");
        assert_eq!(open(&bytes, SECRET).unwrap_err().kind(), ErrorKind::BadSecret, "{message}");
        let header = Luks1Header::parse(&bytes).unwrap();
        let error = header.check_slot(0, &Limits::default()).unwrap_err();
        assert_eq!((error.kind(), error.field(), error.message()), (kind, Some(field), message));
        // Alone, it is the reason.
        let mut alone = bytes.clone();
        alone[SLOT + 48..SLOT + 52].copy_from_slice(&[0, 0, 0xde, 0xad]);
        let error = open(&alone, SECRET).unwrap_err();
        assert_eq!((error.kind(), error.message()), (kind, message));
    }
}

/// It may be sound still; but writing to it would destroy the other one.
#[test]
fn key_material_that_lies_over_anothers_is_read_and_never_written() {
    let bytes = with(SLOT + 40, &[0, 0, 2, 1]);
    assert_eq!(open(&bytes, "second").unwrap().slot, 1);
    let header = Luks1Header::parse(&bytes).unwrap();
    let error = header.check_place(0, &Limits::default()).unwrap_err();
    assert_eq!(error.message(), "key slot 0 is damaged: its key material lies over that of slot 1");
    assert_eq!(
        (error.kind(), error.field(), error.offset()),
        (ErrorKind::Corrupt, Some("key-material-offset"), Some(208))
    );
    assert_eq!(erase_slot(&header, 0, false).unwrap().writes.len(), 1, "the header alone");
    // A free slot that lies over one in use takes no key.
    let header = Luks1Header::parse(&with(SLOT + 2 * 48 + 40, &[0, 0, 2, 1])).unwrap();
    let opened = open(&SOUND, SECRET).unwrap();
    assert_eq!(
        add_key(&header, &opened.key, Some(2), b"x", COST, &Job::new()).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert_eq!(add_key(&header, &opened.key, None, b"x", COST, &Job::new()).unwrap().slot, 3);
}

#[test]
fn key_material_that_is_damaged_or_missing_leaves_the_other_slots() {
    let mut bytes = SOUND.clone();
    bytes[5000] ^= 1;
    assert_eq!(open(&bytes, SECRET).unwrap_err().to_string(), "the secret opens no key slot");
    assert_eq!(open(&bytes, "second").unwrap().slot, 1);
    let missing = |offset: u64, to: &mut [u8]| {
        if offset == 4096 { Err(Error::new(ErrorKind::Io, "unreadable")) } else { reader(&SOUND)(offset, to) }
    };
    let header = Luks1Header::parse(&SOUND).unwrap();
    let open = |secret: &str| unlock(&header, secret.as_bytes(), &missing, &Job::new(), &Limits::default());
    assert_eq!(open("second").unwrap().slot, 1);
    let error = open(SECRET).unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (ErrorKind::BadSecret, "the secret opens no key slot that can be read; unreadable")
    );
}

#[test]
fn a_header_without_slots_says_so() {
    let mut bytes = with(SLOT, &[0, 0, 0xde, 0xad]);
    bytes[SLOT + 48..SLOT + 52].copy_from_slice(&[0, 0, 0xde, 0xad]);
    let error = open(&bytes, SECRET).unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (ErrorKind::BadSecret, "no key slot is in use: nothing opens this disk any more")
    );
}

#[test]
fn nothing_printed_holds_a_secret_or_a_key() {
    let options = FormatOptions { cost: COST, ..FormatOptions::new(SECRET.as_bytes()) };
    let made = format(&options, &Job::new()).unwrap();
    let plan = add_key(&made.header, &made.key, None, b"second", COST, &Job::new()).unwrap();
    let opened = open(&SOUND, SECRET).unwrap();
    let text = format!("{options:?} {made:?} {plan:?} {opened:?}");
    let list = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    for hidden in
        [&made.key.bytes()[..8], &opened.key.bytes()[..8], &SECRET.as_bytes()[..4], &made.bytes[4096..4104]]
    {
        assert!(!text.contains(&list(hidden)), "{text}");
    }
    assert!(!text.contains(SECRET) && text.len() < 6000, "{}", text.len());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn any_bytes_give_a_header_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..700), at in 0_usize..600) {
        let _ = Luks1Header::parse(&bytes);
        let mut header = SOUND[..HEADER_BYTES].to_vec();
        for (to, from) in header.iter_mut().skip(at).zip(bytes.iter().take(9)) {
            *to = *from;
        }
        if let Ok(header) = Luks1Header::parse(&header) {
            for slot in 0..9 {
                let _ = header.check_slot(slot, &Limits::default());
            }
            let again = Luks1Header::parse(&header.encode()).unwrap();
            prop_assert_eq!((again.slots, again.mk_digest, again.spec), (header.slots, header.mk_digest, header.spec));
        }
    }
}

use super::*;
use crate::Hash;

pub(super) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn spec(cipher: Cipher, mode: Mode, iv: Iv) -> CipherSpec {
    CipherSpec { cipher, mode, iv }
}

/// Every combination that can be.
fn all_specs() -> Vec<CipherSpec> {
    let ivs = [Iv::Plain, Iv::Plain64, Iv::None].into_iter().chain(Hash::ALL.map(Iv::Essiv));
    let all = ivs.flat_map(|iv| {
        Cipher::ALL.into_iter().flat_map(move |cipher| Mode::ALL.map(|mode| spec(cipher, mode, iv)))
    });
    all.filter(|spec| spec.check().is_ok()).collect()
}

#[test]
fn what_is_encrypted_comes_back_with_every_spec_and_each_sector_for_itself() {
    let specs = all_specs();
    assert!(specs.len() > 90, "{}", specs.len());
    for spec in specs {
        let key: Vec<u8> = (0..spec.key_bytes() as u8).map(|byte| byte.wrapping_mul(37)).collect();
        for (size, sectors) in [(512, 19), (1024, 7), (4096, 3)] {
            let cipher = SectorCipher::new(&spec, &key).unwrap().with_sectors(size, 5).unwrap();
            let plain: Vec<u8> = (0..size * sectors).map(|at| (at * at / 7) as u8).collect();
            let first = u64::from(u32::MAX) - 9;
            let mut whole = plain.clone();
            cipher.encrypt(first, &mut whole);
            assert_ne!(whole, plain);
            for (number, piece) in plain.chunks(size).enumerate() {
                let mut alone = piece.to_vec();
                let sector = first + (number * size / 512) as u64;
                cipher.encrypt(sector, &mut alone);
                assert_eq!(alone, whole[number * size..][..size], "{spec}, {size}, {number}");
                cipher.decrypt(sector, &mut alone);
                assert_eq!(alone, piece, "{spec}, {size}, {number}");
            }
            cipher.decrypt(first, &mut whole);
            assert_eq!(whole, plain, "{spec}, {size}");
        }
    }
}

#[test]
fn names_say_what_they_are_parsed_from() {
    for spec in all_specs() {
        assert_eq!(
            CipherSpec::parse(spec.cipher_name(), &spec.cipher_mode(), spec.key_bytes()).unwrap(),
            spec,
            "{spec}"
        );
    }
    assert_eq!(CipherSpec::default().to_string(), "aes-256-xts-plain64");
}

#[test]
fn what_is_no_cipher_is_refused_with_the_field() {
    let refused = |name: &str, mode: &str, bytes: usize| {
        let error = CipherSpec::parse(name, mode, bytes).unwrap_err();
        (error.kind(), error.field().unwrap())
    };
    assert_eq!(refused("rot13", "cbc-plain64", 16), (ErrorKind::UnsupportedFeature, "cipher-name"));
    assert_eq!(refused("aes", "lrw-plain64", 32), (ErrorKind::UnsupportedFeature, "cipher-mode"));
    assert_eq!(refused("aes", "cbc-benbi", 32), (ErrorKind::UnsupportedFeature, "cipher-mode"));
    assert_eq!(refused("aes", "cbc", 32), (ErrorKind::UnsupportedFeature, "cipher-mode"));
    assert_eq!(refused("aes", "cbc-essiv:sha1", 32), (ErrorKind::UnsupportedFeature, "cipher-mode"));
    assert_eq!(refused("aes", "xts-plain64", 33), (ErrorKind::InvalidHeader, "key-bytes"));
    assert_eq!(refused("aes", "xts-plain64", 0), (ErrorKind::InvalidHeader, "key-bytes"));
    assert_eq!(refused("cast5", "cbc-plain64", 32), (ErrorKind::InvalidHeader, "key-bytes"));
    assert_eq!(refused("cast5", "xts-plain64", 32), (ErrorKind::UnsupportedFeature, "cipher-mode"));
}

#[test]
fn a_print_shows_no_key() {
    let cipher = SectorCipher::new(&CipherSpec::default(), &[0xab; 64]).unwrap();
    assert_eq!(format!("{cipher:?}"), "SectorCipher(aes-256-xts-plain64, sectors of 512 bytes)");
}

#[test]
#[should_panic(expected = "whole sectors")]
fn a_part_of_a_sector_is_never_left_in_clear() {
    SectorCipher::new(&CipherSpec::default(), &[1; 64]).unwrap().encrypt(0, &mut [0; 700]);
}

fn encrypted(spec: CipherSpec, key: &str, sector: u64, plain: &[u8]) -> Vec<u8> {
    let cipher = SectorCipher::new(&spec, &unhex(key)).unwrap();
    // What follows in the sector changes nothing in front of it.
    let mut data = [0; 512];
    data[..plain.len()].copy_from_slice(plain);
    cipher.encrypt(sector, &mut data);
    data[..plain.len()].to_vec()
}

/// IEEE 1619-2007, annex B: vectors 1 to 3 (32 bytes, AES-128), 4 and 10 (512 bytes, AES-128 and AES-256; begin and end of the ciphertext).
#[test]
fn xts_gives_the_known_answers() {
    let aes128 = spec(Cipher::Aes128, Mode::Xts, Iv::Plain64);
    let zeroes = "00".repeat(32);
    assert_eq!(
        encrypted(aes128, &zeroes, 0, &[0; 32]),
        unhex("917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e")
    );
    let (ones, twos) = ("11".repeat(16), "22".repeat(16));
    assert_eq!(
        encrypted(aes128, &format!("{ones}{twos}"), 0x33_3333_3333, &[0x44; 32]),
        unhex("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0")
    );
    let key = "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0";
    assert_eq!(
        encrypted(aes128, &format!("{key}{twos}"), 0x33_3333_3333, &[0x44; 32]),
        unhex("af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89")
    );
    let plain: Vec<u8> = (0..512).map(|at| at as u8).collect();
    let key = "2718281828459045235360287471352631415926535897932384626433832795";
    let coded = encrypted(aes128, key, 0, &plain);
    assert_eq!(coded[..16], unhex("27a7479befa1d476489f308cd4cfa6e2"));
    assert_eq!(coded[496..], unhex("0a282df920147beabe421ee5319d0568"));
    let key = "2718281828459045235360287471352662497757247093699959574966967627\
               3141592653589793238462643383279502884197169399375105820974944592";
    let coded = encrypted(spec(Cipher::Aes256, Mode::Xts, Iv::Plain64), key, 0xff, &plain);
    assert_eq!(coded[..16], unhex("1c3b3a102f770386e4836c99e370cf9b"));
    assert_eq!(coded[496..], unhex("c4f36ffda9fcea70b9c6e693e148c151"));
}

/// NIST SP 800-38A: the block of ECB-AES128 and ECB-AES256, and CBC and CTR of what our vectors can say.
#[test]
fn aes_gives_the_known_answers() {
    let plain = unhex("6bc1bee22e409f96e93d7e117393172a");
    let ecb = |cipher, key| encrypted(spec(cipher, Mode::Ecb, Iv::None), key, 0, &plain);
    assert_eq!(
        ecb(Cipher::Aes128, "2b7e151628aed2a6abf7158809cf4f3c"),
        unhex("3ad77bb40d7a3660a89ecaf32466ef97")
    );
    assert_eq!(
        ecb(Cipher::Aes192, "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b"),
        unhex("bd334f1d6e45f25ff712a214571fa5cc")
    );
    assert_eq!(
        ecb(Cipher::Aes256, "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"),
        unhex("f3eed1bdb5d2a03c064b5a7e3db181f8")
    );
}

#[test]
fn the_password_of_legacy_aes_is_cut_or_filled_up() {
    let zeroes = |password: &[u8]| {
        let mut data = [0; 512];
        legacy_aes(password).unwrap().encrypt(7, &mut data);
        data
    };
    assert_eq!(zeroes(b"0123456789abcdefghi"), zeroes(b"0123456789abcdef"));
    assert_eq!(zeroes(b"abc"), zeroes(b"abc\0\0"));
    assert_ne!(zeroes(b"abc"), zeroes(b"abd"));
}

/// Two sectors of 4096 bytes, numbered as sectors of 512 bytes are, as OpenSSL encrypts them.
#[test]
fn large_sectors_are_encrypted_as_one_and_count_512_bytes() {
    let key: Vec<u8> = (0..64).collect();
    let cipher = SectorCipher::new(&CipherSpec::default(), &key).unwrap().with_sectors(4096, 600).unwrap();
    let mut data: Vec<u8> = (0..2 * 4096).map(|at| ((at % 4096) * 7 + at / 4096) as u8).collect();
    cipher.encrypt(400, &mut data);
    assert_eq!(data[..16], unhex("da2869b463abb4d62b6d576295bd008b"));
    assert_eq!(data[8192 - 16..], unhex("d4e1e756ed5786fd2622e9866694c637"));
}

//! Every cipher, mode, vector and hash against QEMU, both ways.

use crate::support;

use qcow2_core::Job;
use qcow2_luks::luks1::format;
use qcow2_luks::{Cipher, CipherSpec, Cost, FormatOptions, Hash, Iv, Mode};
use support::{Folder, SECRET, cryptsetup_tries, data, open, qemu_create, qemu_to_raw, qemu_write};

const LEN: usize = 64 << 10;

fn spec(cipher: Cipher, mode: Mode, iv: Iv) -> CipherSpec {
    CipherSpec { cipher, mode, iv }
}

/// Every cipher in every mode, every vector in every mode, and every hash of key derivation.
fn combinations() -> Vec<(CipherSpec, Hash)> {
    let mut all = Vec::new();
    for cipher in Cipher::ALL {
        all.extend(Mode::ALL.map(|mode| (spec(cipher, mode, Iv::Plain64), Hash::Sha256)));
        all.push((spec(cipher, Mode::Cbc, Iv::Essiv(Hash::Sha256)), Hash::Sha256));
    }
    for mode in Mode::ALL {
        all.extend(
            [Iv::Plain, Iv::Essiv(Hash::Sha256)].map(|iv| (spec(Cipher::Aes256, mode, iv), Hash::Sha256)),
        );
    }
    all.extend(Hash::ALL.map(|hash| (CipherSpec::default(), hash)));
    // The stripes of such a key are no whole sectors: QEMU aborts on them.
    all.retain(|(spec, _)| spec.check().is_ok() && spec.key_bytes() != 24);
    all
}

#[test]
fn qemu_reads_and_writes_what_is_made_here() {
    let Some(folder) = Folder::new() else { return };
    let plain = folder.write("plain", &data(LEN));
    for (spec, hash) in combinations() {
        let options = FormatOptions {
            spec,
            hash,
            cost: Cost::Iterations(1000),
            allow_weak: true,
            ..FormatOptions::new(SECRET.as_bytes())
        };
        let made = format(&options, &Job::new()).unwrap();
        let mut payload: Vec<u8> = data(LEN).into_iter().rev().collect();
        made.cipher.encrypt(0, &mut payload);
        let image = folder.write("ours", &[made.bytes, payload].concat());
        let read = qemu_to_raw(&image, &folder.path("raw"));
        assert!(read.iter().rev().eq(&data(LEN)), "{spec} {}: QEMU reads something else", hash.name());
        qemu_write(&plain, &image);
        let (mut bytes, opened) = open(&image, SECRET).unwrap();
        let payload = &mut bytes[opened.payload_offset as usize..];
        opened.cipher.decrypt(0, payload);
        assert!(payload == data(LEN), "{spec} {}: QEMU writes something else", hash.name());
    }
}

#[test]
fn cryptsetup_opens_keys_whose_stripes_are_no_whole_sectors() {
    let Some(folder) = Folder::new() else { return };
    let spec = spec(Cipher::Aes192, Mode::Cbc, Iv::Plain64);
    let options = FormatOptions {
        spec,
        cost: Cost::Iterations(1000),
        allow_weak: true,
        ..FormatOptions::new(SECRET.as_bytes())
    };
    let mut bytes = format(&options, &Job::new()).unwrap().bytes;
    bytes.extend([0; 512]);
    let image = folder.write("image", &bytes);
    assert!(cryptsetup_tries(&image, SECRET, 0) && !cryptsetup_tries(&image, "hunter3", 0));
    assert_eq!(open(&image, SECRET).unwrap().1.slot, 0);
}

/// QEMU measures for a second or two before it makes a header: few, that have everything once.
#[test]
fn what_qemu_makes_with_every_option_opens_here() {
    let Some(folder) = Folder::new() else { return };
    let made = [
        ("aes-128", "cbc", "essiv:sha256", "sha1"),
        ("serpent-256", "xts", "plain64", "ripemd160"),
        ("twofish-256", "ctr", "plain", "sha512"),
    ];
    std::thread::scope(|scope| {
        for (number, (cipher, mode, iv, hash)) in made.into_iter().enumerate() {
            let (folder, name) = (&folder, format!("{cipher}-{mode}-{iv} {hash}"));
            scope.spawn(move || {
                let image = folder.path(&format!("qemu{number}"));
                let (alg, ivhash) = iv.split_once(':').unwrap_or((iv, ""));
                let ivhash = if ivhash.is_empty() { String::new() } else { format!(",ivgen-hash-alg={ivhash}") };
                let options = format!("cipher-alg={cipher},cipher-mode={mode},ivgen-alg={alg}{ivhash},hash-alg={hash},iter-time=10");
                qemu_create(&image, "64K", &options);
                let plain = folder.write(&format!("plain{number}"), &data(LEN));
                qemu_write(&plain, &image);
                let (mut bytes, opened) = open(&image, SECRET).unwrap();
                let payload = &mut bytes[opened.payload_offset as usize..];
                opened.cipher.decrypt(0, payload);
                assert!(payload == data(LEN), "{name}");
            });
        }
    });
}

//! Ciphers over sectors, one core: `cargo bench -p qcow2-luks --bench ciphers`.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use divan::Bencher;
use divan::counter::BytesCount;
use qcow2_luks::{CipherSpec, SectorCipher};

const NAMES: [(&str, &str); 4] = [
    ("aes", "xts-plain64"),
    ("aes", "cbc-essiv:sha256"),
    ("serpent", "xts-plain64"),
    ("twofish", "xts-plain64"),
];
const SIZES: [usize; 4] = [512, 4 << 10, 64 << 10, 256 << 10];

fn main() {
    divan::main();
}

fn cipher(name: &str, mode: &str) -> SectorCipher {
    let key_bytes = if mode.starts_with("xts") { 64 } else { 32 };
    let spec = CipherSpec::parse(name, mode, key_bytes).unwrap();
    // XTS refuses a key of two equal halves.
    let key: Vec<u8> = (0..key_bytes as u8).collect();
    SectorCipher::new(&spec, &key).unwrap()
}

fn run(bencher: Bencher, cipher: &SectorCipher, size: usize, decrypt: bool) {
    let mut data = vec![0x5a; size];
    bencher.counter(BytesCount::new(size)).bench_local(|| {
        if decrypt {
            cipher.decrypt(7, &mut data);
        } else {
            cipher.encrypt(7, &mut data);
        }
    });
}

#[divan::bench(args = SIZES)]
fn aes_256_xts_encrypt(bencher: Bencher, size: usize) {
    run(bencher, &cipher("aes", "xts-plain64"), size, false);
}

#[divan::bench(args = SIZES)]
fn aes_256_xts_decrypt(bencher: Bencher, size: usize) {
    run(bencher, &cipher("aes", "xts-plain64"), size, true);
}

#[divan::bench(args = NAMES.map(|(name, mode)| format!("{name} {mode}")))]
fn encrypt_64_kib(bencher: Bencher, name: &str) {
    let (name, mode) = name.split_once(' ').unwrap();
    run(bencher, &cipher(name, mode), 64 << 10, false);
}

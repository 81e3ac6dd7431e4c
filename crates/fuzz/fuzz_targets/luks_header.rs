//! Any bytes give a LUKS header of either version or an error, and what it demands is bounded: no panic, no hang, no unbounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2_core::{Error, ErrorKind, Job, Result};
use qcow2_luks::{Limits, Luks1Header, Luks2Header, luks1, luks2};
use sha2::{Digest, Sha256};

/// A second for an input, not a minute.
const LIMITS: Limits =
    Limits { max_iterations: 1000, max_stripes: 4000, max_argon2_memory: 1 << 20, max_argon2_work: 4 << 20 };

fuzz_target!(|data: &[u8]| {
    let read = |offset: u64, to: &mut [u8]| -> Result<()> {
        let begin = usize::try_from(offset).ok().filter(|begin| *begin <= data.len());
        let from = begin.and_then(|begin| data[begin..].get(..to.len()));
        to.copy_from_slice(from.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the file ends here"))?);
        Ok(())
    };
    if let Ok(header) = Luks1Header::parse(data) {
        let again = Luks1Header::parse(&header.encode()).expect("a written header parses");
        assert_eq!((again.slots, again.spec, again.hash), (header.slots, header.spec, header.hash));
        let _ = luks1::unlock(&header, b"secret", &read, &Job::new(), &LIMITS);
        for slot in 0..luks1::SLOTS {
            let _ = header.check_place(slot, &LIMITS);
            let _ = luks1::erase_slot(&header, slot, true);
        }
    }
    // No mutation finds a checksum: the metadata get one that is right.
    let mut sealed = vec![0; 16 << 10];
    let sealed_len = data.len().min(sealed.len());
    sealed[..sealed_len].copy_from_slice(&data[..sealed_len]);
    sealed[..16].copy_from_slice(b"LUKS\xba\xbe\x00\x02\0\0\0\0\0\0\x40\0");
    sealed[72..104].fill(0);
    sealed[72..78].copy_from_slice(b"sha256");
    sealed[256..264].fill(0);
    sealed[448..512].fill(0);
    let checksum = Sha256::digest(&sealed);
    sealed[448..480].copy_from_slice(&checksum);
    let read = |offset: u64, to: &mut [u8]| -> Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|begin| sealed.get(begin..))
            .and_then(|rest| rest.get(..to.len()));
        to.copy_from_slice(from.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the file ends here"))?);
        Ok(())
    };
    if let Ok(header) = Luks2Header::read(&read) {
        let _ = luks2::unlock(&header, b"secret", &read, &Job::new(), &LIMITS);
    }
});

//! From a secret to a key: PBKDF2 (RFC 8018), and how many iterations a given time is worth.

use std::time::{Duration, Instant};

use argon2::{Algorithm, Argon2, Params, Version};
use digest::{KeyInit, Mac};
use hmac::{EagerHash, Hmac};
use qcow2_core::{Error, ErrorKind, Job, Result};
use zeroize::{Zeroize, Zeroizing};

use crate::Hash;
use crate::hash::with_hash;

/// The fewest iterations that are ever written, as in other tools.
pub(crate) const MIN_ITERATIONS: u32 = 1000;
/// Iterations between two looks whether the job is cancelled: well below a hundredth of a second.
const BATCH: u32 = 4096;

/// What opening a key slot costs, whoever tries a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// As many iterations as this machine does in that time, at least 1000. Other tools call it `iter-time`.
    Time(Duration),
    /// This many iterations, at least 1000.
    Iterations(u32),
}

impl Default for Cost {
    /// Two seconds.
    fn default() -> Self {
        Self::Time(Duration::from_secs(2))
    }
}

impl Cost {
    /// Iterations to derive `len` bytes from a secret.
    pub(crate) fn iterations(self, hash: Hash, len: usize, job: &Job) -> Result<u32> {
        let time = match self {
            Self::Iterations(count) => return Ok(count.max(MIN_ITERATIONS)),
            // Nothing to measure.
            Self::Time(Duration::ZERO) => return Ok(MIN_ITERATIONS),
            Self::Time(time) => time,
        };
        let blocks = len.div_ceil(hash.size()).max(1) as f64;
        let count = rate(hash, job)? * time.as_secs_f64() / blocks;
        // A cast of floats saturates.
        Ok((count as u32).max(MIN_ITERATIONS))
    }
}

/// Iterations a second for one block of output, on this core now. The best of some short runs: what else the machine does makes them
/// slower, never faster.
fn rate(hash: Hash, job: &Job) -> Result<f64> {
    const RUN: Duration = Duration::from_millis(20);
    let mut best = 0_f64;
    let mut count = MIN_ITERATIONS;
    let mut runs = 0;
    while runs < 4 {
        let begin = Instant::now();
        pbkdf2(hash, b"password", b"salt", count, hash.size(), job)?;
        let spent = begin.elapsed();
        if spent < RUN && count < u32::MAX / 2 {
            count *= 2;
            continue;
        }
        best = best.max(f64::from(count) / spent.as_secs_f64());
        runs += 1;
    }
    Ok(best)
}

/// `len` bytes derived from `secret`.
///
/// # Errors
/// `Aborted` once the job is cancelled.
pub(crate) fn pbkdf2(
    hash: Hash,
    secret: &[u8],
    salt: &[u8],
    iterations: u32,
    len: usize,
    job: &Job,
) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(vec![0; len]);
    with_hash!(hash, D => derive::<D>(secret, salt, iterations, &mut out, job)?);
    Ok(out)
}

/// `len` bytes derived from `secret` by argon2 (RFC 9106). `memory` is in KiB.
///
/// # Errors
/// `Corrupt` for parameters that cannot be, `Limit` where the memory is not to be had.
pub(crate) fn argon2(
    algorithm: Algorithm,
    secret: &[u8],
    salt: &[u8],
    [time, memory, lanes]: [u32; 3],
    len: usize,
) -> Result<Zeroizing<Vec<u8>>> {
    let corrupt = |e: argon2::Error| match e {
        argon2::Error::OutOfMemory => {
            Error::new(ErrorKind::Limit, format!("no {memory} KiB of memory for argon2")).with_field("memory")
        }
        e => Error::new(ErrorKind::Corrupt, format!("argon2 cannot be asked this: {e}")).with_field("kdf"),
    };
    let params = Params::new(memory, time, lanes, Some(len)).map_err(corrupt)?;
    let mut out = Zeroizing::new(vec![0; len]);
    Argon2::new(algorithm, Version::V0x13, params)
        .hash_password_into(secret, salt, &mut out)
        .map_err(corrupt)?;
    Ok(out)
}

fn derive<D: EagerHash>(secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8], job: &Job) -> Result<()>
where
    Hmac<D>: Clone + Mac + KeyInit,
{
    // HMAC takes keys of any length.
    let keyed = <Hmac<D> as KeyInit>::new_from_slice(secret)
        .map_err(|_| Error::new(ErrorKind::Internal, "HMAC takes keys of any length"))?;
    for (block, chunk) in (1_u32..).zip(out.chunks_mut(<Hmac<D> as digest::OutputSizeUser>::output_size())) {
        let mut mac = keyed.clone();
        mac.update(salt);
        mac.update(&block.to_be_bytes());
        let mut u = mac.finalize().into_bytes();
        let mut sum = u.clone();
        let mut left = iterations.saturating_sub(1);
        while left > 0 {
            job.checkpoint()?;
            for _ in 0..left.min(BATCH) {
                let mut mac = keyed.clone();
                mac.update(&u);
                u = mac.finalize().into_bytes();
                for (to, from) in sum.iter_mut().zip(&u) {
                    *to ^= from;
                }
            }
            left -= left.min(BATCH);
        }
        for (to, from) in chunk.iter_mut().zip(&sum) {
            *to = *from;
        }
        u.zeroize();
        sum.zeroize();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn derived(hash: Hash, secret: &str, salt: &str, iterations: u32, len: usize) -> String {
        hex(&pbkdf2(hash, secret.as_bytes(), salt.as_bytes(), iterations, len, &Job::new()).unwrap())
    }

    const ANSWERS: [(Hash, &str, &str, u32, &str); 22] = [
        // RFC 6070, and the same questions to the other hashes.
        (Hash::Sha1, "password", "salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
        (Hash::Sha1, "password", "salt", 2, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
        (Hash::Sha1, "password", "salt", 4096, "4b007901b765489abead49d926f721d065a429c1"),
        (
            Hash::Sha1,
            "passwordPASSWORDpassword",
            "saltSALTsaltSALTsaltSALTsaltSALTsalt",
            4096,
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038",
        ),
        (Hash::Sha1, "pass\0word", "sa\0lt", 4096, "56fa6aa75548099dcc37d7f03425e0c3"),
        (Hash::Sha224, "password", "salt", 1, "3c198cbdb9464b7857966bd05b7bc92bc1cc4e6e63155d4e490557fd"),
        (Hash::Sha224, "password", "salt", 2, "93200ffa96c5776d38fa10abdf8f5bfc0054b9718513df472d2331d2"),
        (Hash::Sha224, "password", "salt", 4096, "218c453bf90635bd0a21a75d172703ff6108ef603f65bb821aedade1"),
        (
            Hash::Sha256,
            "password",
            "salt",
            1,
            "120fb6cffcf8b32c43e7225256c4f837a86548c92ccc35480805987cb70be17b",
        ),
        (
            Hash::Sha256,
            "password",
            "salt",
            2,
            "ae4d0c95af6b46d32d0adff928f06dd02a303f8ef3c251dfd6e2d85a95474c43",
        ),
        (
            Hash::Sha256,
            "password",
            "salt",
            4096,
            "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a",
        ),
        (
            Hash::Sha256,
            "passwordPASSWORDpassword",
            "saltSALTsaltSALTsaltSALTsaltSALTsalt",
            4096,
            "348c89dbcbd32b2f32d814b8116e84cf2b17347ebc1800181c4e2a1fb8dd53e1c635518c7dac47e9",
        ),
        (Hash::Sha256, "pass\0word", "sa\0lt", 4096, "89b69d0516f829893c696226650a8687"),
        (
            Hash::Sha384,
            "password",
            "salt",
            1,
            "c0e14f06e49e32d73f9f52ddf1d0c5c7191609233631dadd76a567db42b78676b38fc800cc53ddb642f5c74442e62be4",
        ),
        (
            Hash::Sha384,
            "password",
            "salt",
            2,
            "54f775c6d790f21930459162fc535dbf04a939185127016a04176a0730c6f1f4fb48832ad1261baadd2cedd50814b1c8",
        ),
        (
            Hash::Sha384,
            "password",
            "salt",
            4096,
            "559726be38db125bc85ed7895f6e3cf574c7a01c080c3447db1e8a76764deb3c307b94853fbe424f6488c5f4f1289626",
        ),
        (
            Hash::Sha512,
            "password",
            "salt",
            1,
            "867f70cf1ade02cff3752599a3a53dc4af34c7a669815ae5d513554e1c8cf252c02d470a285a0501bad999bfe943c08f050235d7d68b1da55e63f73b60a57fce",
        ),
        (
            Hash::Sha512,
            "password",
            "salt",
            2,
            "e1d9c16aa681708a45f5c7c4e215ceb66e011a2e9f0040713f18aefdb866d53cf76cab2868a39b9f7840edce4fef5a82be67335c77a6068e04112754f27ccf4e",
        ),
        (
            Hash::Sha512,
            "password",
            "salt",
            4096,
            "d197b1b33db0143e018b12f3d1d1479e6cdebdcc97c5c0f87f6902e072f457b5143f30602641b3d55cd335988cb36b84376060ecd532e039b742a239434af2d5",
        ),
        (Hash::Ripemd160, "password", "salt", 1, "b725258b125e0bacb0e2307e34feb16a4d0d6aed"),
        (Hash::Ripemd160, "password", "salt", 2, "768dcc27b7bfdef794a1ff9d935090fcf598555e"),
        (Hash::Ripemd160, "password", "salt", 4096, "99a40d3fe4ee95869791d9faa248645627827621"),
    ];

    #[test]
    fn pbkdf2_gives_the_known_answers() {
        for (hash, secret, salt, iterations, want) in ANSWERS {
            assert_eq!(
                derived(hash, secret, salt, iterations, want.len() / 2),
                want,
                "{hash:?} {iterations}"
            );
        }
    }
}

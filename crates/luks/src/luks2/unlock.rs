//! From a secret to the volume key.

use qcow2_core::{Error, ErrorKind, Job, Result};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::metadata::{Kdf, Luks2Header, Slot};
use crate::kdf::{argon2, pbkdf2};
use crate::{Limits, Read, SectorCipher, Unlocked, VolumeKey, refused, split};

/// Tries the secret on each key slot. A slot that is damaged, of an unknown kind or cannot be read is passed over.
///
/// # Errors
/// `BadSecret` where no slot opens; where each one is passed over, the reason of the first. `Limit` for a header that demands more than
/// `limits`; `Aborted` once the job is cancelled, which argon2 does not see before it has ended.
pub fn unlock(
    header: &Luks2Header,
    secret: &[u8],
    read: &Read<'_>,
    job: &Job,
    limits: &Limits,
) -> Result<Unlocked> {
    let (mut tried, mut passed_over) = (0, None);
    for (number, slot) in &header.slots {
        let opened = match slot {
            Ok(slot) => slot.check(*number, limits).and_then(|()| open_slot(slot, secret, read, job)),
            Err(e) => Err(unusable(*number, e)),
        };
        match opened {
            Ok(Some(key)) => {
                let cipher = SectorCipher::new(&header.spec, key.bytes())?
                    .with_sectors(header.sector_size, header.iv_tweak)?;
                let (payload_offset, payload_size) = (header.payload_offset, header.payload_size);
                return Ok(Unlocked { slot: *number, key, cipher, payload_offset, payload_size });
            }
            Ok(None) => tried += 1,
            Err(e) if e.kind() == ErrorKind::Aborted => return Err(e),
            Err(e) => passed_over = passed_over.or(Some(e)),
        }
    }
    Err(refused(tried, passed_over))
}

/// Why a slot is passed over: once more for each secret that is tried.
fn unusable(slot: usize, why: &Error) -> Error {
    let error = Error::new(why.kind(), format!("key slot {slot}: {}", why.message()));
    match why.field() {
        Some(field) => error.with_field(field),
        None => error,
    }
}

/// The volume key of a slot, if the secret is that slot's.
fn open_slot(slot: &Slot, secret: &[u8], read: &Read<'_>, job: &Job) -> Result<Option<VolumeKey>> {
    let mut material = Zeroizing::new(vec![0; slot.material_bytes() as usize]);
    read(slot.offset, &mut material)?;
    let len = slot.spec.key_bytes();
    job.checkpoint()?;
    let derived = match slot.kdf {
        Kdf::Pbkdf2(hash, iterations) => pbkdf2(hash, secret, &slot.salt, iterations, len, job)?,
        Kdf::Argon2(algorithm, costs) => argon2(algorithm, secret, &slot.salt, costs, len)?,
    };
    SectorCipher::new(&slot.spec, &derived)?.decrypt(0, &mut material);
    material.truncate(slot.key_bytes * slot.stripes as usize);
    let key = split::merge(slot.split_hash, &material, slot.key_bytes);
    let known = &slot.digest;
    let digest = pbkdf2(known.hash, &key, &known.salt, known.iterations, known.digest.len(), job)?;
    Ok(bool::from(digest.ct_eq(&known.digest)).then(|| VolumeKey::new(key)))
}

//! From a secret to the volume key.

use qcow2_core::{Error, ErrorKind, Job, Result};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::header::{DIGEST, Luks1Header, no_such_slot};
use super::keys::not_in_use;
use crate::kdf::pbkdf2;
use crate::{Limits, Read, SectorCipher, Unlocked, VolumeKey, refused, split};

/// Tries the secret on each active key slot. A slot that is damaged or cannot be read is passed over.
///
/// # Errors
/// `BadSecret` where no slot opens; where each one is damaged or unreadable, what became of the first of them. `Limit` for a header
/// that demands more than `limits`, `Aborted` once the job is cancelled.
pub fn unlock(
    header: &Luks1Header,
    secret: &[u8],
    read: &Read<'_>,
    job: &Job,
    limits: &Limits,
) -> Result<Unlocked> {
    header.check_digest(limits)?;
    let mut passed_over: Option<Error> = None;
    let mut tried = 0;
    for (slot, _) in header.slots.iter().enumerate().filter(|(_, slot)| slot.is_active()) {
        match open_slot(header, slot, secret, read, job, limits) {
            Ok(Some(key)) => {
                let cipher = SectorCipher::new(&header.spec, key.bytes())?;
                return Ok(Unlocked {
                    slot,
                    key,
                    cipher,
                    payload_offset: header.payload_offset,
                    payload_size: None,
                });
            }
            Ok(None) => tried += 1,
            Err(e) if e.kind() == ErrorKind::Aborted => return Err(e),
            Err(e) => passed_over = passed_over.or(Some(e)),
        }
    }
    Err(refused(tried, passed_over))
}

/// Every active key slot that the secret opens, with the volume key, at least one; of `only` this slot. One that is damaged is passed
/// over.
///
/// # Errors
/// As [`unlock`]; `InvalidArgument` for a slot that is not in use; that of reading: it may be one of those.
pub fn unlock_all(
    header: &Luks1Header,
    only: Option<usize>,
    secret: &[u8],
    read: &Read<'_>,
    job: &Job,
    limits: &Limits,
) -> Result<Vec<(usize, VolumeKey)>> {
    if let Some(slot) = only
        && !header.slots.get(slot).ok_or_else(|| no_such_slot(slot))?.is_active()
    {
        return Err(not_in_use(slot));
    }
    header.check_digest(limits)?;
    let (mut found, mut tried, mut passed_over) = (Vec::new(), 0, None);
    for (slot, this) in header.slots.iter().enumerate() {
        if !this.is_active() || only.is_some_and(|only| only != slot) {
            continue;
        }
        match open_slot(header, slot, secret, read, job, limits) {
            Ok(Some(key)) => found.push((slot, key)),
            Ok(None) => tried += 1,
            Err(e) if matches!(e.kind(), ErrorKind::Aborted | ErrorKind::Io) => return Err(e),
            Err(e) => passed_over = passed_over.or(Some(e)),
        }
    }
    match only {
        _ if !found.is_empty() => Ok(found),
        Some(slot) if tried > 0 => {
            let message = format!("the secret does not open key slot {slot}");
            Err(Error::new(ErrorKind::BadSecret, message).with_field("slot"))
        }
        _ => Err(refused(tried, passed_over)),
    }
}

/// The volume key of a slot, if the secret is that slot's.
fn open_slot(
    header: &Luks1Header,
    number: usize,
    secret: &[u8],
    read: &Read<'_>,
    job: &Job,
    limits: &Limits,
) -> Result<Option<VolumeKey>> {
    header.check_slot(number, limits)?;
    let Some(slot) = header.slots.get(number) else { return Ok(None) };
    let len = header.spec.key_bytes();
    let mut material = Zeroizing::new(vec![0; header.material_bytes(slot) as usize]);
    read(slot.key_offset, &mut material)?;
    let derived = pbkdf2(header.hash, secret, &slot.salt, slot.iterations, len, job)?;
    SectorCipher::new(&header.spec, &derived)?.decrypt(0, &mut material);
    material.truncate(len * slot.stripes as usize);
    let key = split::merge(header.hash, &material, len);
    Ok(is_volume_key(header, &key, job)?.then(|| VolumeKey::new(key)))
}

/// Whether this is the key that the header was made with.
pub(super) fn is_volume_key(header: &Luks1Header, key: &[u8], job: &Job) -> Result<bool> {
    let digest = pbkdf2(header.hash, key, &header.mk_digest_salt, header.mk_digest_iter, DIGEST, job)?;
    Ok(bool::from(digest.ct_eq(&header.mk_digest)))
}

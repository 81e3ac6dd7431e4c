//! Key slots: adding, changing, erasing. Plans only: what is to be written, in an order that a power cut may interrupt anywhere.

use qcow2_core::{Error, ErrorKind, Job, Result, random};
use zeroize::Zeroizing;

use super::header::{Luks1Header, SALT, SLOTS, no_such_slot};
use crate::kdf::pbkdf2;
use crate::{Cost, Limits, SectorCipher, VolumeKey, split};

/// One write of a plan. It must be durable before the next one begins.
#[derive(Clone, PartialEq, Eq)]
pub struct Write {
    /// Bytes from the header's start.
    pub offset: u64,
    /// What is written there.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Write({} bytes at {:#x})", self.bytes.len(), self.offset)
    }
}

/// What becomes of a header, and the writes that bring it about.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The header afterwards.
    pub header: Luks1Header,
    /// The slot that was filled or erased.
    pub slot: usize,
    /// To be done one after the other.
    pub writes: Vec<Write>,
}

impl Plan {
    /// This plan, and behind it one that was made for the header that it leaves.
    pub fn then(&mut self, next: Self) {
        self.header = next.header;
        self.writes.extend(next.writes);
    }
}

/// A secret more that opens the disk: in `slot`, or the first one that is free. Key material first, then the slot: a cut between leaves it
/// free.
///
/// # Errors
/// `InvalidArgument` for a slot in use, `Limit` where none is free, `Corrupt` for a slot that has no place; `Aborted`.
pub fn add_key(
    header: &Luks1Header,
    key: &VolumeKey,
    slot: Option<usize>,
    secret: &[u8],
    cost: Cost,
    job: &Job,
) -> Result<Plan> {
    let slot = free_slot(header, slot)?;
    let (header, material) = fill_slot(header, slot, key, secret, cost, job)?;
    let this = header.slots.get(slot).ok_or_else(|| no_such_slot(slot))?;
    let writes = vec![
        Write { offset: this.key_offset, bytes: material.to_vec() },
        Write { offset: Luks1Header::slot_at(slot), bytes: this.encode().to_vec() },
    ];
    Ok(Plan { header, slot, writes })
}

/// A new secret in place of that of slot `old`: it goes into a free slot first, so that one of the two opens the disk whenever the power
/// is cut. The plan's slot is the new one.
///
/// # Errors
/// As [`add_key`] and [`erase_slot`].
pub fn change_key(
    header: &Luks1Header,
    key: &VolumeKey,
    old: usize,
    secret: &[u8],
    cost: Cost,
    job: &Job,
) -> Result<Plan> {
    if !header.slots.get(old).ok_or_else(|| no_such_slot(old))?.is_active() {
        return Err(not_in_use(old));
    }
    let mut plan = add_key(header, key, None, secret, cost, job)?;
    plan.then(erase_slot(&plan.header, old, false)?);
    Ok(plan)
}

/// As [`add_key`], into a slot that may be in use: what opened that opens nothing any more. Where no other slot opens the disk, the
/// new secret is in a second one meanwhile.
///
/// # Errors
/// As [`add_key`] but for a slot in use; `Limit` where a second slot is needed and none is free.
pub fn replace_key(
    header: &Luks1Header,
    key: &VolumeKey,
    slot: usize,
    secret: &[u8],
    cost: Cost,
    job: &Job,
) -> Result<Plan> {
    if !header.slots.get(slot).ok_or_else(|| no_such_slot(slot))?.is_active() {
        return add_key(header, key, Some(slot), secret, cost, job);
    }
    let second = match opens_without(header, slot) {
        true => None,
        false => Some(add_key(header, key, None, secret, cost, job)?),
    };
    let mut plan = erase_slot(second.as_ref().map_or(header, |second| &second.header), slot, true)?;
    plan.then(add_key(&plan.header, key, Some(slot), secret, cost, job)?);
    let Some(mut begin) = second else { return Ok(plan) };
    let rest = erase_slot(&plan.header, begin.slot, false)?;
    begin.then(plan);
    begin.then(rest);
    Ok(Plan { slot, ..begin })
}

/// A slot whose secret opens nothing any more: its key material is overwritten, then it is free. A cut between leaves a slot that
/// nothing opens. Where a slot is damaged, so that its place may be another's, only the header is written. By `force` what is left of
/// a free slot's key material is overwritten, too.
///
/// # Errors
/// `DataLoss` for the last slot that can open the disk, unless `force`; `InvalidArgument` for a slot that is not in use.
pub fn erase_slot(header: &Luks1Header, slot: usize, force: bool) -> Result<Plan> {
    let this = header.slots.get(slot).ok_or_else(|| no_such_slot(slot))?;
    if !this.is_active() && !force {
        return Err(not_in_use(slot));
    }
    let limits = places();
    if !force && !opens_without(header, slot) {
        let message =
            format!("key slot {slot} is the last one that opens this disk: without it all data is lost");
        return Err(Error::new(ErrorKind::DataLoss, message).with_field("slot"));
    }
    let mut writes = Vec::new();
    if header.check_place(slot, &limits).is_ok() {
        let mut bytes = vec![0; header.material_bytes(this) as usize];
        random::fill(&mut bytes)?;
        writes.push(Write { offset: this.key_offset, bytes });
    }
    let free = super::header::KeySlot::free(this.key_offset, this.stripes);
    writes.push(Write { offset: Luks1Header::slot_at(slot), bytes: free.encode().to_vec() });
    let mut header = header.clone();
    if let Some(this) = header.slots.get_mut(slot) {
        *this = free;
    }
    Ok(Plan { header, slot, writes })
}

/// Where key material may lie: what its iterations are does not matter.
fn places() -> Limits {
    Limits { max_iterations: u32::MAX, ..Limits::default() }
}

/// Whether a slot beside this one can open the disk.
fn opens_without(header: &Luks1Header, slot: usize) -> bool {
    let limits = places();
    let opens = |other: usize| header.check_slot(other, &limits).is_ok();
    header.slots.iter().enumerate().any(|(other, that)| other != slot && that.is_active() && opens(other))
}

pub(super) fn not_in_use(slot: usize) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("key slot {slot} is not in use")).with_field("slot")
}

/// The slot that was asked for, or the first that is free and has a place.
fn free_slot(header: &Luks1Header, wanted: Option<usize>) -> Result<usize> {
    let place = |slot: usize| with_stripes(header, slot).check_place(slot, &Limits::default());
    if let Some(slot) = wanted {
        if header.slots.get(slot).ok_or_else(|| no_such_slot(slot))?.is_active() {
            let message = format!("key slot {slot} is in use: remove its key first");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("slot"));
        }
        return place(slot).map(|()| slot);
    }
    let free = header.slots.iter().enumerate().filter(|(_, slot)| !slot.is_active());
    free.map(|(slot, _)| slot).find(|slot| place(*slot).is_ok()).ok_or_else(|| {
        let message = format!("all {SLOTS} key slots are in use: remove a key first");
        Error::new(ErrorKind::Limit, message).with_field("slot")
    })
}

/// The header with a free slot as it is filled: whatever stripes it had.
fn with_stripes(header: &Luks1Header, slot: usize) -> Luks1Header {
    let mut header = header.clone();
    if let Some(this) = header.slots.get_mut(slot) {
        this.stripes = super::create::STRIPES;
    }
    header
}

/// The header with a free slot filled, and its key material.
pub(super) fn fill_slot(
    header: &Luks1Header,
    slot: usize,
    key: &VolumeKey,
    secret: &[u8],
    cost: Cost,
    job: &Job,
) -> Result<(Luks1Header, Zeroizing<Vec<u8>>)> {
    let mut header = with_stripes(header, slot);
    let len = header.spec.key_bytes();
    let iterations = cost.iterations(header.hash, len, job)?;
    let mut salt = [0; SALT];
    random::fill(&mut salt)?;
    let this = header.slots.get_mut(slot).ok_or_else(|| no_such_slot(slot))?;
    *this = this.taken(salt, iterations);
    let this = *this;
    let derived = pbkdf2(header.hash, secret, &salt, iterations, len, job)?;
    let mut material = split::split(header.hash, key.bytes(), this.stripes)?;
    material.resize(header.material_bytes(&this) as usize, 0);
    SectorCipher::new(&header.spec, &derived)?.encrypt(0, &mut material);
    Ok((header, material))
}

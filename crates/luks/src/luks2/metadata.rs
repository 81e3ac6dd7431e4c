//! What the metadata say: one segment, the key slots, and what a key is known by.

use argon2::Algorithm;
use qcow2_core::{Error, ErrorKind, Result};
use serde_json::Value;

use super::json::{Object, damaged, unsupported};
use crate::cipher::SECTOR;
use crate::{CipherSpec, Hash, Limits, SlotDetails};

/// A header of LUKS version 2, as far as it takes to open it.
#[derive(Debug)]
pub struct Luks2Header {
    /// The UUID, as text.
    pub uuid: String,
    /// Where the data begins, in bytes; 0 where it lies elsewhere.
    pub payload_offset: u64,
    /// Bytes of the data; nothing where it ends with the file.
    pub payload_size: Option<u64>,
    /// Bytes that are encrypted as one.
    pub sector_size: usize,
    /// Added to each sector's number.
    pub(super) iv_tweak: u64,
    /// How the data is encrypted.
    pub spec: CipherSpec,
    /// The key slots of the segment, by number, or why one cannot be used.
    pub(super) slots: Vec<(usize, Result<Slot>)>,
}

#[derive(Debug)]
pub(super) struct Slot {
    /// Bytes of the key of the data.
    pub(super) key_bytes: usize,
    pub(super) stripes: u32,
    pub(super) split_hash: Hash,
    pub(super) offset: u64,
    pub(super) spec: CipherSpec,
    pub(super) kdf: Kdf,
    pub(super) salt: Vec<u8>,
    pub(super) digest: KeyDigest,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Kdf {
    Pbkdf2(Hash, u32),
    /// Passes, memory in KiB, lanes.
    Argon2(Algorithm, [u32; 3]),
}

/// What the key of the data is known by.
#[derive(Debug, Clone)]
pub(super) struct KeyDigest {
    pub(super) hash: Hash,
    pub(super) iterations: u32,
    pub(super) salt: Vec<u8>,
    pub(super) digest: Vec<u8>,
}

impl Luks2Header {
    pub(super) fn from_json(uuid: String, json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json).map_err(|e| {
            Error::new(ErrorKind::Corrupt, "the metadata of the LUKS header are no JSON")
                .with_field("json")
                .with_source(e)
        })?;
        let all = Object(&value);
        if let Some(requirement) =
            all.object("config")?.object("requirements").ok().and_then(|it| it.texts("mandatory").next())
        {
            return Err(unsupported(format!("a LUKS disk with {requirement:?}"), "requirements"));
        }
        let mut segments = all.entries("segments")?;
        let (name, segment) = segments.next().ok_or_else(|| damaged("segments"))?;
        if segments.next().is_some() {
            return Err(unsupported("a LUKS disk of several segments".to_owned(), "segments"));
        }
        let kind = segment.text("type")?;
        if kind != "crypt" || segment.0.get("integrity").is_some() {
            return Err(unsupported(
                format!("a LUKS segment of type {kind:?}, or with integrity tags,"),
                "segments",
            ));
        }
        let slots = slots(all, name)?;
        let key_bytes =
            slots.iter().find_map(|(_, slot)| slot.as_ref().ok()).map(|slot| slot.key_bytes as u32);
        let (spec, slots) = match key_bytes {
            Some(bytes) => (segment.cipher("encryption", bytes)?, slots),
            None => {
                return Err(slots
                    .into_iter()
                    .find_map(|(_, slot)| slot.err())
                    .unwrap_or_else(|| crate::refused(0, None)));
            }
        };
        let sector_size = segment.u32("sector_size")?;
        let is_whole =
            |bytes: u64| bytes.is_multiple_of(u64::from(sector_size.max(1))) && bytes <= i64::MAX as u64;
        let size = if segment.text("size")? == "dynamic" { None } else { Some(segment.u64("size")?) };
        Ok(Self {
            uuid,
            payload_offset: Some(segment.u64("offset")?)
                .filter(|offset| is_whole(*offset))
                .ok_or_else(|| damaged("offset"))?,
            payload_size: if size.is_none_or(is_whole) { size } else { return Err(damaged("size")) },
            sector_size: sector_size as usize,
            iv_tweak: segment.u64("iv_tweak")?,
            spec,
            slots,
        })
    }
}

impl Luks2Header {
    /// The slots that can be read.
    pub(crate) fn slot_details(&self) -> Vec<SlotDetails> {
        let readable = self.slots.iter().filter_map(|(number, slot)| Some((*number, slot.as_ref().ok()?)));
        let details = readable.map(|(number, slot)| SlotDetails {
            number,
            active: true,
            iters: match slot.kdf {
                Kdf::Pbkdf2(_, iterations) => Some(iterations),
                Kdf::Argon2(..) => None,
            },
            stripes: Some(slot.stripes),
            key_offset: slot.offset,
        });
        details.collect()
    }
}

/// The key slots with a digest for the segment, in the order of their numbers.
fn slots(all: Object<'_>, segment: &str) -> Result<Vec<(usize, Result<Slot>)>> {
    let mut slots = Vec::new();
    for (name, slot) in all.entries("keyslots")? {
        let number = name.parse().map_err(|_| damaged("keyslots"))?;
        let has =
            |digest: Object<'_>, list: &'static str, name: &str| digest.texts(list).any(|it| it == name);
        let digest = all
            .entries("digests")?
            .map(|(_, it)| it)
            .find(|it| has(*it, "segments", segment) && has(*it, "keyslots", name));
        // A slot of another kind, or for another segment, is none of ours.
        if let Some(digest) = digest.filter(|_| slot.text("type").is_ok_and(|kind| kind == "luks2")) {
            slots.push((number, Slot::parse(slot, digest)));
        }
    }
    slots.sort_by_key(|(number, _)| *number);
    Ok(slots)
}

impl Slot {
    fn parse(slot: Object<'_>, digest: Object<'_>) -> Result<Self> {
        let (af, area, kdf) = (slot.object("af")?, slot.object("area")?, slot.object("kdf")?);
        for (object, kind) in [(af, "luks1"), (area, "raw"), (digest, "pbkdf2")] {
            let found = object.text("type")?;
            if found != kind {
                return Err(unsupported(format!("{found:?} in a LUKS key slot"), "type"));
            }
        }
        let key_bytes = slot.u32("key_size")?;
        let argon2 = |algorithm| {
            Ok::<_, Error>(Kdf::Argon2(algorithm, [kdf.u32("time")?, kdf.u32("memory")?, kdf.u32("cpus")?]))
        };
        let parsed = Self {
            key_bytes: key_bytes as usize,
            stripes: af.u32("stripes")?,
            split_hash: af.hash("hash")?,
            offset: area.u64("offset")?,
            spec: area.cipher("encryption", area.u32("key_size")?)?,
            salt: kdf.bytes("salt")?,
            kdf: match kdf.text("type")? {
                "pbkdf2" => Kdf::Pbkdf2(kdf.hash("hash")?, kdf.u32("iterations")?),
                "argon2i" => argon2(Algorithm::Argon2i)?,
                "argon2id" => argon2(Algorithm::Argon2id)?,
                other => return Err(unsupported(format!("the key derivation {other:?}"), "kdf")),
            },
            digest: KeyDigest {
                hash: digest.hash("hash")?,
                iterations: digest.u32("iterations")?,
                salt: digest.bytes("salt")?,
                digest: digest.bytes("digest")?,
            },
        };
        // What is derived has the digest's length: a short one would take any key.
        if !(16..=64).contains(&parsed.digest.digest.len()) {
            return Err(damaged("digest"));
        }
        if !(1..=64).contains(&parsed.key_bytes) || parsed.stripes == 0 || parsed.digest.iterations == 0 {
            return Err(damaged("keyslots"));
        }
        if parsed.material_bytes() > area.u64("size")? || parsed.offset > i64::MAX as u64 {
            return Err(damaged("area"));
        }
        Ok(parsed)
    }

    /// Bytes of the key material, in whole sectors.
    pub(super) fn material_bytes(&self) -> u64 {
        (self.key_bytes as u64 * u64::from(self.stripes)).next_multiple_of(SECTOR as u64)
    }

    /// Whether it may be tried.
    pub(super) fn check(&self, slot: usize, limits: &Limits) -> Result<()> {
        let check = |what: &'static str, value: u64, most: u64| {
            let message = || format!("key slot {slot} demands {value} {what}, above the limit of {most}");
            if value <= most {
                Ok(())
            } else {
                Err(Error::new(ErrorKind::Limit, message()).with_field("kdf"))
            }
        };
        check("stripes", u64::from(self.stripes), u64::from(limits.max_stripes))?;
        check(
            "iterations of the digest",
            u64::from(self.digest.iterations),
            u64::from(limits.max_iterations),
        )?;
        match self.kdf {
            Kdf::Pbkdf2(_, iterations) => {
                check("iterations", u64::from(iterations), u64::from(limits.max_iterations))
            }
            Kdf::Argon2(_, [time, memory, _]) => {
                let bytes = u64::from(memory) * 1024;
                check("bytes of memory", bytes, limits.max_argon2_memory)?;
                check(
                    "bytes of memory in all passes",
                    bytes.saturating_mul(u64::from(time)),
                    limits.max_argon2_work,
                )
            }
        }
    }
}

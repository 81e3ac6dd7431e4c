//! The header's bytes. All numbers have the high byte first, offsets count sectors of 512 bytes.

use qcow2_core::{Error, ErrorKind, Result};

use crate::{CipherSpec, Hash, Limits, MAGIC, cipher::SECTOR, version};

/// Bytes of the header, without key material.
pub const HEADER_BYTES: usize = 592;
/// Key slots of a header.
pub const SLOTS: usize = 8;

const VERSION: u16 = 1;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
pub(super) const SALT: usize = 32;
pub(super) const DIGEST: usize = 20;

/// A header of LUKS version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Luks1Header {
    /// How the data is encrypted, and the key material of each slot.
    pub spec: CipherSpec,
    /// The hash of key derivation and anti-forensic split.
    pub hash: Hash,
    /// Where the data begins, in bytes; 0 where it lies elsewhere.
    pub payload_offset: u64,
    /// What the volume key is known by.
    pub mk_digest: [u8; DIGEST],
    /// What goes into the digest with the key.
    pub mk_digest_salt: [u8; SALT],
    /// Iterations of the digest.
    pub mk_digest_iter: u32,
    /// The UUID, as text.
    pub uuid: String,
    /// The key slots.
    pub slots: [KeySlot; SLOTS],
}

/// One place for a secret that opens the disk. What it says is not judged yet: see [`Luks1Header::check_slot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySlot {
    /// Active or not, as the header says it.
    pub(super) state: u32,
    /// Iterations of the derivation from the secret.
    pub iterations: u32,
    /// What goes into the derivation with the secret.
    pub salt: [u8; SALT],
    /// Where the key material lies, in bytes.
    pub key_offset: u64,
    /// Anti-forensic stripes of the key material.
    pub stripes: u32,
}

impl KeySlot {
    /// A slot without a secret, whose key material would lie at `key_offset`.
    pub(super) fn free(key_offset: u64, stripes: u32) -> Self {
        Self { state: INACTIVE, iterations: 0, salt: [0; SALT], key_offset, stripes }
    }

    /// This slot with a secret's salt and iterations.
    pub(super) fn taken(self, salt: [u8; SALT], iterations: u32) -> Self {
        Self { state: ACTIVE, iterations, salt, ..self }
    }

    /// Whether a secret opens it, or did before it was damaged.
    pub fn is_active(&self) -> bool {
        self.state != INACTIVE
    }

    /// The bytes in the header.
    pub(super) fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut out = Writer(Vec::with_capacity(SLOT_BYTES));
        out.u32(self.state);
        out.u32(self.iterations);
        out.bytes(&self.salt);
        out.sectors(self.key_offset);
        out.u32(self.stripes);
        out.array()
    }

    fn parse(bytes: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            state: bytes.u32()?,
            iterations: bytes.u32()?,
            salt: bytes.array()?,
            key_offset: bytes.sectors()?,
            stripes: bytes.u32()?,
        })
    }
}

impl Luks1Header {
    /// The header in the first [`HEADER_BYTES`] of `bytes`. What the key slots say is judged by [`Self::check_slot`].
    ///
    /// # Errors
    /// `InvalidHeader` for what is no such header or contradicts itself, `UnsupportedFeature` for another version, cipher or hash.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let invalid = |why: &str, field: &'static str| {
            Error::new(ErrorKind::InvalidHeader, why.to_owned()).with_field(field)
        };
        match version(bytes) {
            Some(VERSION) => {}
            Some(version) => {
                let message = format!("LUKS version {version} is not version 1");
                return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version"));
            }
            None => return Err(invalid("not a LUKS header", "magic")),
        }
        let fields = Fields::parse(&mut Reader(bytes))
            .ok_or_else(|| invalid("the LUKS header is cut off", "magic"))?;
        let (name, mode) =
            (text(&fields.cipher_name, "cipher-name")?, text(&fields.cipher_mode, "cipher-mode")?);
        let spec = CipherSpec::parse(name, mode, fields.key_bytes as usize)?;
        let hash = text(&fields.hash_spec, "hash-spec")?;
        let hash = Hash::from_name(hash).ok_or_else(|| {
            let message = format!("the hash {hash:?} is not supported");
            Error::new(ErrorKind::UnsupportedFeature, message).with_field("hash-spec")
        })?;
        if fields.mk_digest_iter == 0 {
            return Err(invalid("the digest of the volume key has no iterations", "mk-digest-iter"));
        }
        if fields.payload_offset != 0 && fields.payload_offset < HEADER_BYTES as u64 {
            return Err(invalid("the data begins within the LUKS header", "payload-offset"));
        }
        Ok(Self {
            spec,
            hash,
            payload_offset: fields.payload_offset,
            mk_digest: fields.mk_digest,
            mk_digest_salt: fields.mk_digest_salt,
            mk_digest_iter: fields.mk_digest_iter,
            uuid: text(&fields.uuid, "uuid").unwrap_or_default().to_owned(),
            slots: fields.slots,
        })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = Writer(Vec::with_capacity(HEADER_BYTES));
        out.bytes(&MAGIC);
        out.bytes(&VERSION.to_be_bytes());
        out.text(self.spec.cipher_name(), 32);
        out.text(&self.spec.cipher_mode(), 32);
        out.text(self.hash.name(), 32);
        out.sectors(self.payload_offset);
        out.u32(self.spec.key_bytes() as u32);
        out.bytes(&self.mk_digest);
        out.bytes(&self.mk_digest_salt);
        out.u32(self.mk_digest_iter);
        out.text(&self.uuid, 40);
        for slot in &self.slots {
            out.bytes(&slot.encode());
        }
        out.array()
    }

    /// Where the bytes of a slot lie in the header.
    pub fn slot_at(slot: usize) -> u64 {
        (SLOTS_AT + slot * SLOT_BYTES) as u64
    }

    /// Bytes of a slot's key material, in whole sectors.
    pub fn material_bytes(&self, slot: &KeySlot) -> u64 {
        (self.spec.key_bytes() as u64 * u64::from(slot.stripes)).next_multiple_of(SECTOR as u64)
    }

    /// Bytes from the header's start to the end of the last key material, of slots in use and free ones. What is cut off there is damaged.
    pub fn end_of_material(&self) -> u64 {
        self.slots.iter().map(|slot| slot.key_offset + self.material_bytes(slot)).max().unwrap_or_default()
    }

    /// Whether the digest of the volume key, which is asked for each slot that is tried, costs no more than it may.
    ///
    /// # Errors
    /// `Limit`.
    pub fn check_digest(&self, limits: &Limits) -> Result<()> {
        let (value, most) = (self.mk_digest_iter, limits.max_iterations);
        if value <= most {
            return Ok(());
        }
        let message =
            format!("the digest of the volume key demands {value} iterations, above the limit of {most}");
        Err(Error::new(ErrorKind::Limit, message).with_field("mk-digest-iter"))
    }

    /// Whether an active slot can be what it says.
    ///
    /// # Errors
    /// `Corrupt` for what no tool writes, `Limit` for what exceeds `limits`.
    pub fn check_slot(&self, slot: usize, limits: &Limits) -> Result<()> {
        let Some(this) = self.slots.get(slot) else {
            return Err(no_such_slot(slot));
        };
        let corrupt = |why: String, field: &'static str| {
            let message = format!("key slot {slot} is damaged: {why}");
            Err(Error::new(ErrorKind::Corrupt, message).with_field(field).with_offset(Self::slot_at(slot)))
        };
        if this.state != ACTIVE && this.state != INACTIVE {
            return corrupt(format!("its state is {:#x}", this.state), "active");
        }
        if this.iterations == 0 && this.state == ACTIVE {
            return corrupt("it has no iterations".to_owned(), "iterations");
        }
        if this.stripes == 0 {
            return corrupt("it has no stripes".to_owned(), "stripes");
        }
        limit(u64::from(this.iterations), u64::from(limits.max_iterations), slot, "iterations")?;
        limit(u64::from(this.stripes), u64::from(limits.max_stripes), slot, "stripes")?;
        let (begin, end) = (this.key_offset, this.key_offset + self.material_bytes(this));
        if begin < HEADER_BYTES as u64 {
            return corrupt(
                format!("its key material lies at {begin:#x}, within the header"),
                "key-material-offset",
            );
        }
        if self.payload_offset != 0 && end > self.payload_offset {
            return corrupt(
                format!("its key material ends at {end:#x}, behind the begin of the data"),
                "key-material-offset",
            );
        }
        Ok(())
    }

    /// Whether a slot's key material may be written: it lies over that of no slot in use. For reading it matters not: one of the two
    /// may be sound, and its digest tells.
    ///
    /// # Errors
    /// As [`Self::check_slot`], and `Corrupt`.
    pub fn check_place(&self, slot: usize, limits: &Limits) -> Result<()> {
        self.check_slot(slot, limits)?;
        let place = |this: &KeySlot| (this.key_offset, this.key_offset + self.material_bytes(this));
        let (begin, end) = self.slots.get(slot).map(place).unwrap_or_default();
        for (other, that) in self.slots.iter().enumerate() {
            let (from, to) = place(that);
            if other != slot && that.is_active() && begin < to && from < end {
                let message =
                    format!("key slot {slot} is damaged: its key material lies over that of slot {other}");
                let error = Error::new(ErrorKind::Corrupt, message).with_field("key-material-offset");
                return Err(error.with_offset(Self::slot_at(slot)));
            }
        }
        Ok(())
    }
}

pub(super) fn no_such_slot(slot: usize) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("there is no key slot {slot}: they count from 0 to {}", SLOTS - 1),
    )
    .with_field("slot")
}

fn limit(value: u64, most: u64, slot: usize, field: &'static str) -> Result<()> {
    if value <= most {
        return Ok(());
    }
    let message = format!("key slot {slot} demands {value} {field}, above the limit of {most}");
    Err(Error::new(ErrorKind::Limit, message).with_field(field).with_offset(Luks1Header::slot_at(slot)))
}

struct Fields {
    cipher_name: [u8; 32],
    cipher_mode: [u8; 32],
    hash_spec: [u8; 32],
    payload_offset: u64,
    key_bytes: u32,
    mk_digest: [u8; DIGEST],
    mk_digest_salt: [u8; SALT],
    mk_digest_iter: u32,
    uuid: [u8; 40],
    slots: [KeySlot; SLOTS],
}

impl Fields {
    fn parse(bytes: &mut Reader<'_>) -> Option<Self> {
        bytes.array::<6>()?;
        bytes.u16()?;
        Some(Self {
            cipher_name: bytes.array()?,
            cipher_mode: bytes.array()?,
            hash_spec: bytes.array()?,
            payload_offset: bytes.sectors()?,
            key_bytes: bytes.u32()?,
            mk_digest: bytes.array()?,
            mk_digest_salt: bytes.array()?,
            mk_digest_iter: bytes.u32()?,
            uuid: bytes.array()?,
            slots: {
                let mut slots = [KeySlot::free(0, 0); SLOTS];
                for slot in &mut slots {
                    *slot = KeySlot::parse(bytes)?;
                }
                slots
            },
        })
    }
}

/// Text that a zero ends.
fn text<'a>(bytes: &'a [u8], field: &'static str) -> Result<&'a str> {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(bytes)
        .map_err(|_| Error::new(ErrorKind::InvalidHeader, format!("{field} is no text")).with_field(field))
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Sectors, as bytes.
    fn sectors(&mut self) -> Option<u64> {
        self.u32().map(|sectors| u64::from(sectors) * SECTOR as u64)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    fn sectors(&mut self, bytes: u64) {
        self.u32((bytes / SECTOR as u64) as u32);
    }

    /// Text in a field of `len` bytes, with at least one zero behind it.
    fn text(&mut self, text: &str, len: usize) {
        let end = self.0.len() + len;
        self.0.extend(text.bytes().take(len - 1));
        self.0.resize(end, 0);
    }

    fn array<const N: usize>(self) -> [u8; N] {
        let mut out = [0; N];
        for (to, from) in out.iter_mut().zip(self.0) {
            *to = from;
        }
        out
    }
}

//! LUKS version 2, as cryptsetup makes it, for reading: a binary header, metadata in JSON, both of them twice.
//!
//! One segment that is encrypted as a whole; what is being reencrypted or carries integrity tags is refused.

mod json;
mod metadata;
mod unlock;

pub use metadata::Luks2Header;
pub use unlock::unlock;

use digest::Digest;
use qcow2_core::{Error, ErrorKind, Result};
use subtle::ConstantTimeEq;

use crate::hash::with_hash;
use crate::{Hash, MAGIC, Read};

/// The magic of the second copy.
const SECOND: [u8; 6] = *b"SKUL\xba\xbe";
const VERSION: u16 = 2;
/// Bytes of the binary header; the metadata follow.
const BINARY: usize = 4096;
const SEQUENCE_AT: usize = 16;
const CHECKSUM_HASH_AT: usize = 72;
const UUID_AT: usize = 168;
const OFFSET_AT: usize = 256;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_BYTES: usize = 64;
/// Sizes that a copy may have, binary header and metadata together: 16 KiB to 4 MiB.
const SIZES: [u64; 9] = [1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22];

/// One copy whose checksum is right.
struct Copy {
    size: u64,
    sequence: u64,
    uuid: String,
    json: Vec<u8>,
}

impl Luks2Header {
    /// The newer of the two copies whose checksum is right.
    ///
    /// # Errors
    /// `InvalidHeader` with what is wrong with the first copy where neither is sound, `UnsupportedFeature` for what cannot be read,
    /// and what `read` says.
    pub fn read(read: &Read<'_>) -> Result<Self> {
        let first = Copy::read(read, 0, MAGIC);
        // Where the first one is damaged, its size is not known, which is the place of the second.
        let places = first.as_ref().map_or(SIZES.to_vec(), |first| vec![first.size]);
        let second = places.into_iter().find_map(|place| Copy::read(read, place, SECOND).ok());
        let copy = match (first, second) {
            (Ok(first), Some(second)) if second.sequence > first.sequence => second,
            (Ok(first), _) => first,
            (Err(_), Some(second)) => second,
            (Err(e), None) => return Err(e),
        };
        Self::from_json(copy.uuid, &copy.json)
    }
}

impl Copy {
    fn read(read: &Read<'_>, place: u64, magic: [u8; 6]) -> Result<Self> {
        let invalid = |why: &str, field: &'static str| {
            Error::new(ErrorKind::InvalidHeader, why.to_owned()).with_field(field).with_offset(place)
        };
        let mut bytes = vec![0; BINARY];
        read(place, &mut bytes)?;
        if bytes.first_chunk() != Some(&magic) || bytes.get(6..8) != Some(&VERSION.to_be_bytes()) {
            return Err(invalid("not a LUKS header of version 2", "magic"));
        }
        let number =
            |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u64::from_be_bytes);
        let (size, sequence) = (number(8), number(SEQUENCE_AT));
        if !SIZES.contains(&size) {
            return Err(invalid(&format!("a LUKS header cannot have {size} bytes"), "hdr_size"));
        }
        if number(OFFSET_AT) != place {
            return Err(invalid("the LUKS header says that it lies elsewhere", "hdr_offset"));
        }
        let (uuid, hash) = (text(&bytes, UUID_AT, 40), text(&bytes, CHECKSUM_HASH_AT, 32));
        let hash = Hash::from_name(&hash).ok_or_else(|| {
            let message = format!("the hash {hash:?} is not supported");
            Error::new(ErrorKind::UnsupportedFeature, message).with_field("csum_alg").with_offset(place)
        })?;
        bytes.resize(size as usize, 0);
        if let Some(json) = bytes.get_mut(BINARY..) {
            read(place + BINARY as u64, json)?;
        }
        let mut said = [0; CHECKSUM_BYTES];
        if let Some(field) = bytes.get_mut(CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_BYTES) {
            said.copy_from_slice(field);
            field.fill(0);
        }
        let is_right = with_hash!(hash, D => said.get(..hash.size()).is_some_and(|said| D::digest(&bytes).ct_eq(said).into()));
        if !is_right {
            return Err(invalid("the checksum of the LUKS header is wrong", "csum"));
        }
        let json = bytes.split_off(BINARY).split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        Ok(Self { size, sequence, uuid, json })
    }
}

/// Text that a zero ends.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

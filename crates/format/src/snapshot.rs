//! Snapshot table entries (section "Snapshots").

use crate::bytes::{be16, be32, be64, padded8, slice};
use crate::limits::{MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA_DATA};
use crate::{FormatError, FormatResult, Geometry, HostOffset};

/// Bytes of an entry before its extra data.
pub const FIXED_LENGTH: usize = 40;
/// Extra data that version 3 images must include.
pub const V3_EXTRA_DATA: usize = 16;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Start of the snapshot's L1 table.
    pub l1_table_offset: HostOffset,
    /// Entries in it.
    pub l1_size: u32,
    /// Unique id, as bytes; QEMU uses decimal numbers.
    pub id: Vec<u8>,
    /// Name, as bytes.
    pub name: Vec<u8>,
    /// Time of the snapshot: seconds since the Epoch.
    pub date_sec: u32,
    /// Time of the snapshot: nanoseconds.
    pub date_nsec: u32,
    /// Time that the guest was running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the VM state in bytes, 0 without one.
    pub vm_state_size: u64,
    /// Virtual disk size in bytes; `None` in old entries that do not say (then it is the image's).
    pub disk_size: Option<u64>,
    /// Record/replay instruction count; `None` where absent or disabled (-1).
    pub icount: Option<u64>,
    /// Length of the extra data as read: fields beyond it were absent.
    pub extra_data_size: u32,
    /// Extra data behind the known fields, kept on rewrite.
    pub unknown_extra_data: Vec<u8>,
}

/// Result of looking for an entry at the start of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParsedSnapshot {
    /// An entry, and the bytes to the next one: the padding counts, and need not be there.
    Record(Box<SnapshotRecord>, usize),
    /// So many bytes are needed to say.
    Needs(usize),
}

/// Bytes of id and name together, of the entry that begins with `fixed`.
///
/// # Errors
/// `Truncated` where they end before.
pub fn names_length(fixed: &[u8]) -> FormatResult<usize> {
    let field = "snapshot table entry";
    Ok(usize::from(be16(fixed, 12, field)?) + usize::from(be16(fixed, 14, field)?))
}

/// Changes how many bytes of extra data the entry at the start of `entry` says that it has.
pub fn set_extra_data_size(entry: &mut [u8], size: u32) {
    if let Some(field) = entry.get_mut(36..40) {
        field.copy_from_slice(&size.to_be_bytes());
    }
}

impl SnapshotRecord {
    /// Parses the entry at the start of `bytes`.
    ///
    /// # Errors
    /// `Limit` for extra data above 1024 bytes. The L1 table is not judged here: see [`SnapshotRecord::check_l1`].
    pub fn parse(bytes: &[u8]) -> FormatResult<ParsedSnapshot> {
        if bytes.len() < FIXED_LENGTH {
            return Ok(ParsedSnapshot::Needs(FIXED_LENGTH));
        }
        let field = "snapshot table entry";
        let id_length = usize::from(be16(bytes, 12, field)?);
        let name_length = usize::from(be16(bytes, 14, field)?);
        let extra_data_size = be32(bytes, 36, field)?;
        if extra_data_size > MAX_SNAPSHOT_EXTRA_DATA {
            return Err(FormatError::Limit {
                field: "extra data of a snapshot table entry",
                value: extra_data_size.into(),
                limit: MAX_SNAPSHOT_EXTRA_DATA.into(),
            });
        }
        let extra_length = extra_data_size as usize;
        // The last entry of a file may end without its padding: QEMU does not write it there.
        let length = FIXED_LENGTH + extra_length + id_length + name_length;
        if bytes.len() < length {
            return Ok(ParsedSnapshot::Needs(length));
        }
        let extra = slice(bytes, FIXED_LENGTH, extra_length, field)?;
        let id_at = FIXED_LENGTH + extra_length;
        let record = Self {
            l1_table_offset: HostOffset(be64(bytes, 0, field)?),
            l1_size: be32(bytes, 8, field)?,
            id: slice(bytes, id_at, id_length, field)?.to_vec(),
            name: slice(bytes, id_at + id_length, name_length, field)?.to_vec(),
            date_sec: be32(bytes, 16, field)?,
            date_nsec: be32(bytes, 20, field)?,
            vm_clock_nsec: be64(bytes, 24, field)?,
            vm_state_size: match be64(extra, 0, field) {
                Ok(size) => size,
                Err(_) => be32(bytes, 32, field)?.into(),
            },
            disk_size: be64(extra, 8, field).ok(),
            icount: be64(extra, 16, field).ok().filter(|&count| count != u64::MAX),
            extra_data_size,
            unknown_extra_data: extra.get(24..).unwrap_or_default().to_vec(),
        };
        Ok(ParsedSnapshot::Record(Box::new(record), padded8(length)))
    }

    /// The id as QEMU knows it: up to the first zero byte.
    pub fn id_text(&self) -> &[u8] {
        until_zero(&self.id)
    }

    /// The name as QEMU knows it: up to the first zero byte.
    pub fn name_text(&self) -> &[u8] {
        until_zero(&self.name)
    }

    /// Bytes that the entry takes in the table it was read from, with padding.
    pub fn encoded_length(&self) -> usize {
        padded8(FIXED_LENGTH + self.extra_data_size as usize + self.id.len() + self.name.len())
    }

    /// Appends the entry with its padding. Extra data up to the disk size is always written, as version 3 requires.
    ///
    /// # Errors
    /// `Limit` for an id or name beyond 65535 bytes or extra data beyond 1024.
    pub fn encode(&self, out: &mut Vec<u8>, image_size: u64) -> FormatResult<()> {
        let mut extra = Vec::with_capacity(V3_EXTRA_DATA + 8 + self.unknown_extra_data.len());
        extra.extend_from_slice(&self.vm_state_size.to_be_bytes());
        extra.extend_from_slice(&self.disk_size.unwrap_or(image_size).to_be_bytes());
        if self.icount.is_some() || self.extra_data_size >= 24 || !self.unknown_extra_data.is_empty() {
            extra.extend_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
            extra.extend_from_slice(&self.unknown_extra_data);
        }
        let length = |field, bytes: &[u8], limit: u32| {
            u32::try_from(bytes.len()).ok().filter(|&l| l <= limit).ok_or(FormatError::Limit {
                field,
                value: bytes.len() as u64,
                limit: limit.into(),
            })
        };
        let id_length = length("snapshot id", &self.id, 65535)? as u16;
        let name_length = length("snapshot name", &self.name, 65535)? as u16;
        let extra_length = length("extra data of a snapshot table entry", &extra, MAX_SNAPSHOT_EXTRA_DATA)?;
        let start = out.len();
        out.extend_from_slice(&self.l1_table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&id_length.to_be_bytes());
        out.extend_from_slice(&name_length.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        // Readers that know the 64-bit field ignore this one; others must not see a wrong size.
        out.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&extra_length.to_be_bytes());
        out.extend_from_slice(&extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(start + padded8(out.len() - start), 0);
        Ok(())
    }

    /// Whether the snapshot's L1 table is within limits and aligned, for a disk of `image_size` where the entry does
    /// not say.
    ///
    /// # Errors
    /// `Limit` or `Invalid`, naming the field.
    pub fn check_l1(&self, geometry: &Geometry, image_size: u64) -> FormatResult<()> {
        let bytes = u64::from(self.l1_size) * 8;
        if bytes > MAX_L1_BYTES {
            return Err(FormatError::Limit { field: "snapshot L1 table", value: bytes, limit: MAX_L1_BYTES });
        }
        if !self.l1_table_offset.is_aligned(geometry.cluster_size())
            || self.l1_table_offset.0 > i64::MAX as u64 - bytes
        {
            return Err(FormatError::invalid(
                "snapshot L1 table offset",
                self.l1_table_offset.0,
                "not a multiple of the cluster size, or beyond the largest file offset",
            ));
        }
        let size = self.disk_size.unwrap_or(image_size);
        if size > crate::limits::MAX_VIRTUAL_SIZE || geometry.l1_entries_for(size) > u64::from(self.l1_size) {
            return Err(FormatError::invalid(
                "snapshot L1 table size",
                self.l1_size.into(),
                "too small for the snapshot's disk size",
            ));
        }
        Ok(())
    }
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(id: Vec<u8>, name: Vec<u8>, icount: Option<u64>, unknown: Vec<u8>) -> SnapshotRecord {
        let extra = if icount.is_some() || !unknown.is_empty() { 24 + unknown.len() } else { 16 };
        SnapshotRecord {
            l1_table_offset: HostOffset(0x30000),
            l1_size: 7,
            id,
            name,
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 1 << 33,
            disk_size: Some(1 << 40),
            icount,
            extra_data_size: extra as u32,
            unknown_extra_data: unknown,
        }
    }

    proptest! {
        #[test]
        fn entries_survive_a_round_trip(
            id in proptest::collection::vec(any::<u8>(), 0..20),
            name in proptest::collection::vec(any::<u8>(), 0..300),
            icount in proptest::option::of(0..u64::MAX),
            unknown in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let before = record(id, name, icount, unknown);
            let mut bytes = Vec::new();
            before.encode(&mut bytes, 0).unwrap();
            prop_assert_eq!(bytes.len() % 8, 0);
            prop_assert_eq!(names_length(&bytes).unwrap(), before.id.len() + before.name.len());
            let expected = ParsedSnapshot::Record(Box::new(before.clone()), bytes.len());
            prop_assert_eq!(SnapshotRecord::parse(&bytes).unwrap(), expected.clone());
            // The padding need not be there, everything before it must.
            let length = 40 + before.extra_data_size as usize + before.id.len() + before.name.len();
            prop_assert_eq!(SnapshotRecord::parse(&bytes[..length]).unwrap(), expected);
            prop_assert_eq!(SnapshotRecord::parse(&bytes[..length - 1]).unwrap(), ParsedSnapshot::Needs(length.max(40)));
        }

        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(ParsedSnapshot::Needs(n)) = SnapshotRecord::parse(&bytes) {
                prop_assert!(n > bytes.len() && n <= 40 + 1024 + 2 * 65535 + 8);
            }
        }
    }

    #[test]
    fn extra_data_can_be_cut() {
        let before = record(b"1".to_vec(), b"name".to_vec(), Some(1), vec![7; 8]);
        let mut bytes = Vec::new();
        before.encode(&mut bytes, 0).unwrap();
        set_extra_data_size(&mut bytes, 24);
        bytes.drain(64..72);
        let ParsedSnapshot::Record(after, _) = SnapshotRecord::parse(&bytes).unwrap() else { panic!() };
        assert_eq!(*after, SnapshotRecord { extra_data_size: 24, unknown_extra_data: vec![], ..before });
        assert!(names_length(&bytes[..15]).is_err());
    }

    #[test]
    fn ids_and_names_end_at_a_zero_byte() {
        let with = |id: &[u8], name: &[u8]| record(id.to_vec(), name.to_vec(), None, Vec::new());
        let padded = with(b"12\0\0", b"\0\0");
        assert_eq!((padded.id_text(), padded.name_text()), (&b"12"[..], &b""[..]));
        assert_eq!(with(b"", b"name").name_text(), b"name");
    }

    #[test]
    fn old_entries_use_the_32_bit_vm_state_size() {
        let mut bytes = vec![0u8; 40];
        bytes[32..36].copy_from_slice(&77u32.to_be_bytes());
        let ParsedSnapshot::Record(r, 40) = SnapshotRecord::parse(&bytes).unwrap() else { panic!() };
        assert_eq!((r.vm_state_size, r.disk_size), (77, None));
    }
}

//! The log ([MS-VHDX] 2.3): a ring of entries, each of which brings whole sectors of 4 KiB to other places of the file.

use std::borrow::Cow;

use qcow2_core::{Error, ErrorKind, Result};

use super::fields::{Fields, Guid, invalid, put, seal, verify};

/// Bytes of a sector of the log, and of what a descriptor brings.
pub const LOG_SECTOR: u64 = 4096;
/// Descriptors of an entry that fit into its first sector. Entries that are written here have no more.
pub const MOST_DESCRIPTORS: usize = (LOG_SECTOR as usize - ENTRY_HEADER) / DESCRIPTOR;

const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
const ENTRY: [u8; 4] = *b"loge";
const DATA_DESCRIPTOR: [u8; 4] = *b"desc";
const ZERO_DESCRIPTOR: [u8; 4] = *b"zero";
const DATA_SECTOR: [u8; 4] = *b"data";
const SECTOR: usize = LOG_SECTOR as usize;

/// One change that an entry brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Patch {
    /// These bytes, a sector, go to this offset.
    Data(u64, Box<[u8]>),
    /// So many bytes from this offset on are zero.
    Zero(u64, u64),
}

/// The entries that have to be brought in, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Where each entry begins and how long it is, in bytes of the log.
    entries: Vec<(u64, u64)>,
    /// Of the newest entry.
    pub sequence_number: u64,
    /// The file had so many bytes that were durable when the newest entry was written: one that is shorter was cut.
    pub flushed_file_offset: u64,
    /// The file has at least so many bytes.
    pub last_file_offset: u64,
}

/// The header of an entry (2.3.1.1).
struct EntryHeader {
    length: u64,
    tail: u64,
    sequence_number: u64,
    descriptors: u64,
    flushed_file_offset: u64,
    last_file_offset: u64,
}

impl EntryHeader {
    /// The header of an entry of this log. Any other bytes are none.
    fn parse(bytes: &[u8], guid: Guid, log_length: u64) -> Option<Self> {
        let mut fields = Fields::new("log entry", bytes);
        fields.signature(&ENTRY).ok()?;
        let mut number = |field| fields.u32(field).map(u64::from);
        number("Checksum").ok()?;
        let (length, tail) = (number("EntryLength").ok()?, number("Tail").ok()?);
        let sequence_number = fields.u64("SequenceNumber").ok()?;
        let descriptors = u64::from(fields.u32("DescriptorCount").ok()?);
        fields.u32("Reserved").ok()?;
        let own = fields.guid("LogGuid").ok()? == guid;
        let flushed_file_offset = fields.u64("FlushedFileOffset").ok()?;
        let last_file_offset = fields.u64("LastFileOffset").ok()?;
        let sectors = [length, tail].iter().all(|value| value.is_multiple_of(LOG_SECTOR));
        let fits = length <= log_length && descriptor_bytes(descriptors) <= length && tail < log_length;
        (own && sectors && fits && length > 0 && sequence_number > 0).then_some(Self {
            length,
            tail,
            sequence_number,
            descriptors,
            flushed_file_offset,
            last_file_offset,
        })
    }
}

/// Bytes of the sectors with an entry's header and descriptors.
fn descriptor_bytes(descriptors: u64) -> u64 {
    (ENTRY_HEADER as u64 + descriptors * DESCRIPTOR as u64).next_multiple_of(LOG_SECTOR)
}

/// Part of a ring that begins anywhere.
fn part(log: &[u8], start: u64, length: u64) -> Cow<'_, [u8]> {
    let (start, length) = (start as usize, length as usize);
    let rest = log.get(start..).unwrap_or_default();
    match rest.get(..length) {
        Some(whole) => Cow::Borrowed(whole),
        None => Cow::Owned([rest, log.get(..length.saturating_sub(rest.len())).unwrap_or(log)].concat()),
    }
}

/// An entry that is whole, with what it brings.
fn parse_entry(bytes: &[u8], header: &EntryHeader) -> Result<Vec<Patch>> {
    verify("log entry", bytes)?;
    let mut descriptors = bytes.get(ENTRY_HEADER..).unwrap_or_default();
    let mut data = bytes.get(descriptor_bytes(header.descriptors) as usize..).unwrap_or_default();
    let mut patches = Vec::new();
    for _ in 0..header.descriptors {
        let (descriptor, rest) = descriptors.split_at_checked(DESCRIPTOR).unwrap_or_default();
        descriptors = rest;
        let mut fields = Fields::new("log descriptor", descriptor);
        let signature = fields.take::<4>("Signature")?;
        let (trailing, leading) = (fields.take::<4>("TrailingBytes")?, fields.take::<8>("LeadingBytes")?);
        let (offset, sequence_number) = (fields.u64("FileOffset")?, fields.u64("SequenceNumber")?);
        let refuse = |field, value: u64, reason| Err(invalid(ErrorKind::Corrupt, field, value, reason));
        if sequence_number != header.sequence_number {
            return refuse("SequenceNumber", sequence_number, "its entry has another one");
        }
        if !offset.is_multiple_of(LOG_SECTOR) || offset > i64::MAX as u64 - LOG_SECTOR {
            return refuse("FileOffset", offset, "no sector of a file");
        }
        match signature {
            ZERO_DESCRIPTOR => {
                let length = u64::from_le_bytes(leading);
                if !length.is_multiple_of(LOG_SECTOR) || length > i64::MAX as u64 - offset {
                    return refuse("ZeroLength", length, "no sectors of a file");
                }
                patches.push(Patch::Zero(offset, length));
            }
            DATA_DESCRIPTOR => {
                let (sector, rest) = data.split_at_checked(SECTOR).unwrap_or_default();
                data = rest;
                patches.push(Patch::Data(offset, parse_sector(sector, sequence_number, leading, trailing)?));
            }
            _ => {
                return refuse(
                    "Signature",
                    u32::from_le_bytes(signature).into(),
                    "neither 'desc' nor 'zero'",
                );
            }
        }
    }
    Ok(patches)
}

/// A data sector (2.3.1.4): its first and last bytes are in its descriptor.
fn parse_sector(
    sector: &[u8],
    sequence_number: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
) -> Result<Box<[u8]>> {
    let mut fields = Fields::new("data sector of the log", sector);
    fields.signature(&DATA_SECTOR)?;
    let high = fields.u32("SequenceHigh")?;
    let mut bytes = sector.to_vec();
    let low = bytes.last_chunk().map_or(0, |word| u32::from_le_bytes(*word));
    let number = u64::from(high) << 32 | u64::from(low);
    if number != sequence_number {
        return Err(invalid(ErrorKind::Corrupt, "SequenceHigh", number, "its descriptor has another one"));
    }
    put(&mut bytes, 0, &leading);
    put(&mut bytes, SECTOR - trailing.len(), &trailing);
    Ok(bytes.into())
}

/// Looks at entries of one log, within the work that a log of its length can be worth.
struct Search<'a> {
    log: &'a [u8],
    guid: Guid,
    /// Bytes that may still be looked at: entries that claim to be long would be summed up again and again.
    budget: u64,
}

impl Search<'_> {
    /// The entry at `start`, if there is one.
    fn entry(&mut self, start: u64) -> Result<Option<EntryHeader>> {
        let length = self.log.len() as u64;
        let front = self.log.get(start as usize..).unwrap_or_default();
        let Some(header) =
            EntryHeader::parse(front.get(..ENTRY_HEADER).unwrap_or_default(), self.guid, length)
        else {
            return Ok(None);
        };
        let Some(budget) = self.budget.checked_sub(header.length) else {
            let message = "the entries of the log overlap too often to make sense of";
            return Err(Error::new(ErrorKind::Corrupt, message).with_field("EntryLength"));
        };
        self.budget = budget;
        let whole = parse_entry(&part(self.log, start, header.length), &header).is_ok();
        Ok(whole.then_some(header))
    }

    /// The sequence that begins at `start`, and where it ends; none where there is no entry, or where the newest one needs
    /// entries that are not there.
    fn sequence(&mut self, start: u64) -> Result<(Option<Sequence>, u64)> {
        let length = self.log.len() as u64;
        let (mut entries, mut newest, mut at, mut bytes) = (Vec::new(), None::<EntryHeader>, start, 0);
        while let Some(header) = self.entry(at)? {
            let follows = newest
                .as_ref()
                .is_none_or(|last| last.sequence_number.checked_add(1) == Some(header.sequence_number));
            bytes += header.length;
            if !follows || bytes > length {
                break;
            }
            entries.push((at, header.length));
            at = (at + header.length) % length;
            newest = Some(header);
        }
        let Some(newest) = newest else { return Ok((None, start + LOG_SECTOR)) };
        let first = entries.iter().position(|(offset, _)| *offset == newest.tail);
        let sequence = first.map(|first| Sequence {
            entries: entries.split_off(first),
            sequence_number: newest.sequence_number,
            flushed_file_offset: newest.flushed_file_offset,
            last_file_offset: newest.last_file_offset,
        });
        let wrapped = at <= start;
        Ok((sequence, if wrapped { length } else { at }))
    }
}

/// The active sequence of a log (2.3.2): of the valid ones that with the newest entry.
///
/// # Errors
/// `Corrupt` for entries that cannot be made sense of with reasonable work.
pub fn active_sequence(log: &[u8], guid: Guid) -> Result<Option<Sequence>> {
    let length = log.len() as u64;
    let mut search = Search { log, guid, budget: 16 * length };
    let (mut active, mut at) = (None::<Sequence>, 0);
    while at < length {
        let (found, next) = search.sequence(at)?;
        if let Some(found) = found
            && active.as_ref().is_none_or(|active| found.sequence_number > active.sequence_number)
        {
            active = Some(found);
        }
        at = next;
    }
    Ok(active)
}

impl Sequence {
    /// What its entries bring, in the order in which they do.
    ///
    /// # Errors
    /// `Corrupt` where `log` is another one.
    pub fn patches(&self, log: &[u8], guid: Guid) -> Result<Vec<Patch>> {
        let mut patches = Vec::new();
        for (start, length) in &self.entries {
            let bytes = part(log, *start, *length);
            let Some(header) = EntryHeader::parse(&bytes, guid, log.len() as u64) else {
                return Err(Error::new(ErrorKind::Corrupt, "a log entry is gone").with_field("LogGuid"));
            };
            patches.extend(parse_entry(&bytes, &header)?);
        }
        Ok(patches)
    }

    /// Entries that it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is nothing to bring in.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// An entry that brings whole sectors to their offsets, at most [`MOST_DESCRIPTORS`] of them, and that is the first of its sequence: it
/// will be written at `position` of the log.
pub fn encode_entry(
    guid: Guid,
    position: u64,
    sequence_number: u64,
    file_length: u64,
    sectors: &[(u64, &[u8])],
) -> Vec<u8> {
    let length = SECTOR * (1 + sectors.len());
    let mut bytes = vec![0; length];
    put(&mut bytes, 0, &ENTRY);
    put(&mut bytes, 8, &(length as u32).to_le_bytes());
    put(&mut bytes, 12, &(position as u32).to_le_bytes());
    put(&mut bytes, 16, &sequence_number.to_le_bytes());
    put(&mut bytes, 24, &(sectors.len() as u32).to_le_bytes());
    put(&mut bytes, 32, &guid.0);
    put(&mut bytes, 48, &file_length.to_le_bytes());
    put(&mut bytes, 56, &file_length.to_le_bytes());
    for (index, (offset, sector)) in sectors.iter().enumerate() {
        let (descriptor, data) = (ENTRY_HEADER + index * DESCRIPTOR, SECTOR * (1 + index));
        put(&mut bytes, data, sector);
        put(&mut bytes, data, &DATA_SECTOR);
        put(&mut bytes, data + 4, &((sequence_number >> 32) as u32).to_le_bytes());
        put(&mut bytes, data + SECTOR - 4, &(sequence_number as u32).to_le_bytes());
        put(&mut bytes, descriptor, &DATA_DESCRIPTOR);
        put(&mut bytes, descriptor + 4, sector.last_chunk::<4>().unwrap_or(&[0; 4]));
        put(&mut bytes, descriptor + 8, sector.first_chunk::<8>().unwrap_or(&[0; 8]));
        put(&mut bytes, descriptor + 16, &offset.to_le_bytes());
        put(&mut bytes, descriptor + 24, &sequence_number.to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GUID: Guid = Guid([3; 16]);
    const LENGTH: usize = 1 << 20;

    fn sector(byte: u8) -> Vec<u8> {
        (0..SECTOR).map(|at| byte ^ at as u8).collect()
    }

    /// Writes an entry for `offset` around the end of the ring; its tail is `tail`. Gives where it ends.
    fn add(log: &mut [u8], at: usize, tail: usize, number: u64, offset: u64) -> usize {
        let data = sector(number as u8);
        let mut entry = encode_entry(GUID, tail as u64, number, 9 << 20, &[(offset, &data)]);
        seal(&mut entry);
        for (index, byte) in entry.iter().enumerate() {
            let length = log.len();
            log[(at + index) % length] = *byte;
        }
        (at + entry.len()) % log.len()
    }

    fn offsets(log: &[u8]) -> Vec<u64> {
        let found = active_sequence(log, GUID).unwrap();
        let patches = found.map_or(vec![], |sequence| sequence.patches(log, GUID).unwrap());
        patches
            .iter()
            .map(|patch| match patch {
                Patch::Data(at, _) | Patch::Zero(at, _) => *at,
            })
            .collect()
    }

    #[test]
    fn an_entry_brings_its_sectors() {
        let mut log = vec![0; LENGTH];
        assert_eq!(active_sequence(&log, GUID).unwrap(), None);
        let (one, two) = (sector(1), sector(200));
        let entry =
            encode_entry(GUID, 8192, u64::from(u32::MAX) + 7, 9 << 20, &[(4096, &one), (1 << 40, &two)]);
        put(&mut log, 8192, &entry);
        let found = active_sequence(&log, GUID).unwrap().unwrap();
        assert_eq!((found.len(), found.last_file_offset, found.is_empty()), (1, 9 << 20, false));
        let patches = found.patches(&log, GUID).unwrap();
        assert_eq!(patches, [Patch::Data(4096, one.into()), Patch::Data(1 << 40, two.into())]);
        assert_eq!(active_sequence(&log, Guid([4; 16])).unwrap(), None);
        // A byte of it that is another one.
        for at in [8192, 8192 + 20, 8192 + 70, 8192 + 4096 + 100, 8192 + entry.len() - 1] {
            log[at] ^= 1;
            assert_eq!(active_sequence(&log, GUID).unwrap(), None, "{at}");
            log[at] ^= 1;
        }
    }

    #[test]
    fn the_newest_sequence_counts_from_its_tail_on() {
        let mut log = vec![0; LENGTH];
        let mut at = add(&mut log, 0, 0, 5, 0x1000);
        let second = at;
        at = add(&mut log, at, second, 6, 0x2000);
        at = add(&mut log, at, second, 7, 0x3000);
        // The first one was done with.
        assert_eq!(offsets(&log), [0x2000, 0x3000]);
        // One that needs what is not there is no sequence.
        add(&mut log, at + 4096, 0, 9, 0x4000);
        assert_eq!(offsets(&log), [0x2000, 0x3000]);
        add(&mut log, at + 4096, at + 4096, 9, 0x4000);
        assert_eq!(offsets(&log), [0x4000]);
        // What follows with another number is another sequence.
        add(&mut log, at + 4096 * 3, at + 4096 * 3, 11, 0x5000);
        assert_eq!(offsets(&log), [0x5000]);
        // The newest is torn: what is before it counts.
        log[at + 4096 * 4 + 17] ^= 1;
        assert_eq!(offsets(&log), [0x4000]);
    }

    #[test]
    fn sequences_go_around_the_end() {
        let mut log = vec![0; LENGTH];
        let first = LENGTH - 4096;
        let at = add(&mut log, first, first, 2, 0x1000);
        assert_eq!(at, 4096);
        add(&mut log, at, first, 3, 0x2000);
        assert_eq!(offsets(&log), [0x1000, 0x2000]);
    }

    #[test]
    fn zeroes_are_brought_in_too() {
        let mut log = vec![0; LENGTH];
        let mut entry = encode_entry(GUID, 0, 1, 9 << 20, &[(0x5000, &sector(0))]);
        entry.truncate(SECTOR);
        put(&mut entry, 8, &4096u32.to_le_bytes());
        put(&mut entry, ENTRY_HEADER, b"zero");
        put(&mut entry, ENTRY_HEADER + 8, &0x3000u64.to_le_bytes());
        seal(&mut entry);
        put(&mut log, 0, &entry);
        let found = active_sequence(&log, GUID).unwrap().unwrap();
        assert_eq!(found.patches(&log, GUID).unwrap(), [Patch::Zero(0x5000, 0x3000)]);
        for (at, field) in [(8, 1u64), (8, !4095), (16, 0x5001), (16, (i64::MAX as u64) - 4095), (24, 2)] {
            let mut damaged = entry.clone();
            put(&mut damaged, ENTRY_HEADER + at, &field.to_le_bytes());
            seal(&mut damaged);
            put(&mut log, 0, &damaged);
            assert_eq!(active_sequence(&log, GUID).unwrap(), None, "{at}");
        }
    }

    #[test]
    fn a_log_of_lies_takes_no_longer_than_others() {
        let mut log = vec![0; 8 << 20];
        let data = sector(0);
        for at in (0..log.len()).step_by(SECTOR) {
            let mut entry = encode_entry(GUID, 0, 1, 0, &[(0, &data)]);
            put(&mut entry, 8, &(8u32 << 20).to_le_bytes());
            put(&mut log, at, &entry[..SECTOR]);
        }
        assert_eq!(active_sequence(&log, GUID).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_log(noise in prop::collection::vec((0usize..16384, any::<u8>()), 0..20), tail in 0usize..4) {
            let mut log = vec![0; 16384];
            let at = add(&mut log, 0, tail * 4096, 1, 0x1000);
            add(&mut log, at, tail * 4096, 2, 0x2000);
            for (at, byte) in noise {
                log[at] = byte;
            }
            if let Ok(Some(found)) = active_sequence(&log, GUID) {
                found.patches(&log, GUID).unwrap();
            }
        }
    }
}

//! The region tables ([MS-VHDX] 2.2.3): where the BAT and the metadata are.

use std::ops::Range;

use qcow2_core::{Error, ErrorKind, Result};

use super::MIB;
use super::fields::{Fields, Guid, invalid, put, seal, verify};
use super::header::{HEADER_SECTION, Header};

/// Where the two tables are.
pub const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a table.
pub const REGION_TABLE_LENGTH: usize = 64 << 10;

const SIGNATURE: [u8; 4] = *b"regi";
/// The most entries that a table can have.
const MAX_ENTRIES: u32 = 2047;
const REQUIRED: u32 = 1;

/// The region with the block allocation table.
pub const BAT: Guid =
    Guid::new(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
/// The region with the metadata table and its items.
pub const METADATA: Guid =
    Guid::new(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);

/// A part of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// What it is.
    pub guid: Guid,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its bytes.
    pub length: u32,
    /// Who does not know it must not open the file.
    pub required: bool,
}

impl Region {
    /// Its bytes of the file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.length)
    }

    fn check(&self) -> Result<()> {
        let fits = self.offset.checked_add(self.length.into()).is_some_and(|end| end <= i64::MAX as u64);
        let offset = format_args!("{:#x}", self.offset).to_string();
        if self.offset < HEADER_SECTION || !self.offset.is_multiple_of(MIB) || !fits {
            let reason =
                format!("of the region {}, no multiple of 1 MiB behind the header section", self.guid);
            return Err(invalid(ErrorKind::Corrupt, "FileOffset", offset, reason));
        }
        if !u64::from(self.length).is_multiple_of(MIB) || self.length == 0 {
            let reason = format!("of the region {}, no multiple of 1 MiB", self.guid);
            return Err(invalid(ErrorKind::Corrupt, "Length", self.length, reason));
        }
        Ok(())
    }
}

/// A region table: its regions do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionTable {
    /// The block allocation table.
    pub bat: Region,
    /// The metadata.
    pub metadata: Region,
    /// Others, of which none is required.
    pub others: Vec<Region>,
}

impl RegionTable {
    /// Reads a table of [`REGION_TABLE_LENGTH`] bytes.
    ///
    /// # Errors
    /// `InvalidHeader` for what is no whole table; `UnsupportedFeature` for a required region that is not known; `Corrupt`
    /// for regions that overlap or are nowhere.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields::new("region table", bytes);
        fields.signature(&SIGNATURE)?;
        verify("region table", bytes.get(..REGION_TABLE_LENGTH).unwrap_or(bytes))?;
        fields.u32("Checksum")?;
        let count = fields.u32("EntryCount")?;
        fields.u32("Reserved")?;
        if count > MAX_ENTRIES {
            let reason = format_args!("a table has at most {MAX_ENTRIES}");
            return Err(invalid(ErrorKind::InvalidHeader, "EntryCount", count, reason));
        }
        let (mut bat, mut metadata, mut others) = (None, None, Vec::new());
        for _ in 0..count {
            let (guid, offset) = (fields.guid("Guid")?, fields.u64("FileOffset")?);
            let (length, required) = (fields.u32("Length")?, fields.u32("Required")? & REQUIRED != 0);
            let region = Region { guid, offset, length, required };
            let known = match guid {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ => {
                    others.push(region);
                    continue;
                }
            };
            if known.replace(region).is_some() {
                return Err(invalid(ErrorKind::Corrupt, "Guid", guid, "two regions have it"));
            }
        }
        let missing = |name| {
            let message = format!("the region table has no entry for the {name}");
            Error::new(ErrorKind::Corrupt, message).with_field("EntryCount")
        };
        let table = Self {
            bat: bat.ok_or_else(|| missing("block allocation table"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
            others,
        };
        table.check()?;
        Ok(table)
    }

    /// All regions, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Region> {
        [&self.bat, &self.metadata].into_iter().chain(&self.others)
    }

    /// What of the file is none of its blocks: the header section, the log and the regions, in the order of their places.
    ///
    /// # Errors
    /// `Corrupt` where two of them overlap.
    pub fn reserved(&self, header: &Header) -> Result<Vec<Range<u64>>> {
        let log = header.log_offset..header.log_offset + u64::from(header.log_length);
        let mut ranges: Vec<(Range<u64>, String)> =
            self.all().map(|region| (region.range(), format!("the region {}", region.guid))).collect();
        ranges.push((log, "the log".to_owned()));
        ranges.push((0..HEADER_SECTION, "the header section".to_owned()));
        ranges.retain(|(range, _)| !range.is_empty());
        ranges.sort_by_key(|(range, _)| range.start);
        for ((before, name), (after, next)) in ranges.iter().zip(ranges.iter().skip(1)) {
            if before.end > after.start {
                let message =
                    format!("{name} ends at {:#x}, {next} begins at {:#x}", before.end, after.start);
                let error = Error::new(ErrorKind::Corrupt, message).with_field("FileOffset");
                return Err(error.with_offset(after.start));
            }
        }
        Ok(ranges.into_iter().map(|(range, _)| range).collect())
    }

    fn check(&self) -> Result<()> {
        if let Some(unknown) = self.others.iter().find(|region| region.required) {
            let message = format!("the image needs the region {}, which is not known", unknown.guid);
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("Required"));
        }
        self.all().try_for_each(Region::check)
    }

    /// The table as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION_TABLE_LENGTH];
        put(&mut bytes, 0, &SIGNATURE);
        let mut count = 0u32;
        for (region, at) in self.all().zip((16..).step_by(32)) {
            put(&mut bytes, at, &region.guid.0);
            put(&mut bytes, at + 16, &region.offset.to_le_bytes());
            put(&mut bytes, at + 24, &region.length.to_le_bytes());
            put(&mut bytes, at + 28, &u32::from(region.required).to_le_bytes());
            count += 1;
        }
        put(&mut bytes, 8, &count.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MI: u64 = MIB;

    fn region(guid: Guid, offset: u64, length: u32) -> Region {
        Region { guid, offset, length, required: true }
    }

    fn sound() -> RegionTable {
        RegionTable {
            bat: region(BAT, 3 * MI, 1 << 20),
            metadata: region(METADATA, 2 * MI, 1 << 20),
            others: vec![Region { required: false, ..region(Guid([7; 16]), 9 * MI, 2 << 20) }],
        }
    }

    fn header() -> Header {
        Header {
            sequence_number: 1,
            file_write_guid: Guid::default(),
            data_write_guid: Guid::default(),
            log_guid: Guid::default(),
            log_length: 1 << 20,
            log_offset: MI,
        }
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let table = RegionTable::parse(&sound().encode()).unwrap();
        assert_eq!(table, sound());
        assert_eq!(
            table.reserved(&header()).unwrap(),
            [0..MI, MI..2 * MI, 2 * MI..3 * MI, 3 * MI..4 * MI, 9 * MI..11 * MI]
        );
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        use ErrorKind::{Corrupt, UnsupportedFeature};
        let of = |change: &dyn Fn(&mut RegionTable)| {
            let mut table = sound();
            change(&mut table);
            let parsed = RegionTable::parse(&table.encode());
            parsed.and_then(|table| table.reserved(&header())).unwrap_err().kind()
        };
        assert_eq!(of(&|table| table.bat.offset = 2 * MI), Corrupt);
        assert_eq!(of(&|table| table.bat.offset = MI), Corrupt);
        assert_eq!(of(&|table| table.bat.offset = 0), Corrupt);
        assert_eq!(of(&|table| table.bat.offset = 3 * MI + 4096), Corrupt);
        assert_eq!(of(&|table| table.bat.offset = u64::MAX - MI + 1), Corrupt);
        assert_eq!(of(&|table| table.bat.length = 0), Corrupt);
        assert_eq!(of(&|table| table.bat.length = 7 << 20), Corrupt);
        assert_eq!(of(&|table| table.bat.guid = Guid([1; 16])), Corrupt);
        assert_eq!(of(&|table| table.others[0].guid = BAT), Corrupt);
        assert_eq!(of(&|table| table.others[0].required = true), UnsupportedFeature);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_or_an_error(rest in prop::collection::vec(any::<u8>(), 130), count in 0u32..5) {
            let mut bytes = sound().encode();
            let _ = RegionTable::parse(&rest);
            put(&mut bytes, 8, &count.to_le_bytes());
            put(&mut bytes, 64, &rest);
            seal(&mut bytes);
            if let Ok(table) = RegionTable::parse(&bytes) {
                let _ = table.reserved(&header());
            }
        }
    }
}

//! The metadata region ([MS-VHDX] 2.6): a table, and the items that it names.

use qcow2_core::{Error, ErrorKind, Result};

use super::MIB;
use super::fields::{Fields, Guid, invalid, put};
use super::locator::ParentLocator;

/// Bytes of the table, in front of the items.
pub const METADATA_TABLE_LENGTH: usize = 64 << 10;
/// The largest disk.
pub const MAX_VIRTUAL_SIZE: u64 = 64 << 40;
/// Where the items of a new image begin, in bytes of the region, and how many they have without a parent.
pub const METADATA_ITEMS: (u64, usize) = (METADATA_TABLE_LENGTH as u64, 40);

const SIGNATURE: [u8; 8] = *b"metadata";
/// Entries that a table has room for.
const MAX_ENTRIES: u16 = 2047;
/// The longest item.
const MAX_ITEM: u32 = 1 << 20;

const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;
const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;

/// 2.6.2.1
const FILE_PARAMETERS: Guid =
    Guid::new(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
/// 2.6.2.2
const VIRTUAL_DISK_SIZE: Guid =
    Guid::new(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
/// 2.6.2.3: the identifier of the disk, as its SCSI inquiry page 0x83 shows it.
const VIRTUAL_DISK_ID: Guid =
    Guid::new(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
/// 2.6.2.4
const LOGICAL_SECTOR_SIZE: Guid =
    Guid::new(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
/// 2.6.2.5
const PHYSICAL_SECTOR_SIZE: Guid =
    Guid::new(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
/// 2.6.2.6
const PARENT_LOCATOR: Guid =
    Guid::new(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

/// The items that are known, and their places in a new image.
const KNOWN: [(Guid, &str, u32); 6] = [
    (FILE_PARAMETERS, "File Parameters", IS_REQUIRED),
    (VIRTUAL_DISK_SIZE, "Virtual Disk Size", IS_REQUIRED | IS_VIRTUAL_DISK),
    (VIRTUAL_DISK_ID, "Virtual Disk ID", IS_REQUIRED | IS_VIRTUAL_DISK),
    (LOGICAL_SECTOR_SIZE, "Logical Sector Size", IS_REQUIRED | IS_VIRTUAL_DISK),
    (PHYSICAL_SECTOR_SIZE, "Physical Sector Size", IS_REQUIRED | IS_VIRTUAL_DISK),
    (PARENT_LOCATOR, "Parent Locator", IS_REQUIRED),
];

/// What the metadata say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block: a power of two, 1 MiB to 256 MiB.
    pub block_size: u64,
    /// A fixed disk: blocks stay allocated.
    pub leave_blocks_allocated: bool,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Where that is stored, in bytes of the region.
    pub virtual_size_at: u64,
    /// Identifier of the disk.
    pub virtual_disk_id: Guid,
    /// Bytes of a sector: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector, as the guest is told: 512 or 4096.
    pub physical_sector_size: u32,
    /// Of a differencing image.
    pub parent: Option<ParentLocator>,
}

/// Where an item is in the region.
#[derive(Debug, Clone, Copy)]
struct Item {
    offset: u32,
    length: u32,
}

/// The known items of a table, in the order of [`KNOWN`].
struct Items([Option<Item>; KNOWN.len()]);

impl Items {
    fn parse(table: &[u8], region: u32) -> Result<Self> {
        let mut fields = Fields::new("metadata table", table);
        fields.signature(&SIGNATURE)?;
        fields.u16("Reserved")?;
        let count = fields.u16("EntryCount")?;
        fields.take::<20>("Reserved2")?;
        if count > MAX_ENTRIES {
            let reason = format_args!("a table has at most {MAX_ENTRIES}");
            return Err(invalid(ErrorKind::InvalidHeader, "EntryCount", count, reason));
        }
        let mut found = [None; KNOWN.len()];
        for _ in 0..count {
            let guid = fields.guid("ItemId")?;
            let item = Item { offset: fields.u32("Offset")?, length: fields.u32("Length")? };
            let flags = fields.u32("Flags")?;
            fields.u32("Reserved2")?;
            // A user's item is another one, whatever its identifier.
            let known = KNOWN.iter().position(|(known, ..)| *known == guid && flags & IS_USER == 0);
            let Some(slot) = known.and_then(|index| found.get_mut(index)) else {
                if flags & IS_REQUIRED != 0 {
                    let message = format!("the image needs the metadata item {guid}, which is not known");
                    return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("IsRequired"));
                }
                continue;
            };
            if slot.replace(item.checked(guid, region)?).is_some() {
                return Err(invalid(ErrorKind::Corrupt, "ItemId", guid, "two items have it"));
            }
        }
        Ok(Self(found))
    }

    fn get(&self, guid: Guid) -> Option<Item> {
        let index = KNOWN.iter().position(|(known, ..)| *known == guid)?;
        self.0.get(index).copied().flatten()
    }

    /// An item that every image has, and its bytes.
    fn bytes<const N: usize>(&self, guid: Guid, read: Read<'_>) -> Result<(Item, [u8; N])> {
        let name = KNOWN.iter().find(|(known, ..)| *known == guid).map_or("", |(_, name, _)| name);
        let Some(item) = self.get(guid) else {
            let message = format!("the metadata have no item {name} ({guid})");
            return Err(Error::new(ErrorKind::Corrupt, message).with_field("ItemId"));
        };
        let bytes = read(item.offset.into(), N)?;
        match bytes.first_chunk() {
            Some(bytes) if item.length as usize >= N => Ok((item, *bytes)),
            _ => {
                Err(invalid(ErrorKind::Corrupt, "Length", item.length, format_args!("{name} has {N} bytes")))
            }
        }
    }
}

impl Item {
    /// Refuses an item that is not behind the table and inside its region.
    fn checked(self, guid: Guid, region: u32) -> Result<Self> {
        let end = self.offset.checked_add(self.length);
        if self.length > MAX_ITEM {
            let reason = format!("the item {guid} is longer than 1 MiB");
            return Err(invalid(ErrorKind::Limit, "Length", self.length, reason));
        }
        if (self.offset as usize) < METADATA_TABLE_LENGTH || end.is_none_or(|end| end > region) {
            let reason =
                format!("the item {guid} with {} bytes is not in its region behind the table", self.length);
            return Err(invalid(ErrorKind::Corrupt, "Offset", format_args!("{:#x}", self.offset), reason));
        }
        Ok(self)
    }
}

/// Reads bytes of the metadata region.
type Read<'a> = &'a dyn Fn(u64, usize) -> Result<Vec<u8>>;

impl Metadata {
    /// Reads the metadata of a region of `region` bytes through `read`, which gets an offset in it and a length of at most 1 MiB.
    ///
    /// # Errors
    /// `InvalidHeader`, `Corrupt`, `Limit` with the field at fault; `UnsupportedFeature` for a required item that is not known, by
    /// its identifier; what `read` says.
    pub fn read(region: u32, read: Read<'_>) -> Result<Self> {
        let items = Items::parse(&read(0, METADATA_TABLE_LENGTH)?, region)?;
        let (_, parameters) = items.bytes::<8>(FILE_PARAMETERS, read)?;
        let mut fields = Fields::new("File Parameters", &parameters);
        let (block_size, flags) = (u64::from(fields.u32("BlockSize")?), fields.u32("LeaveBlockAllocated")?);
        let (size_item, size) = items.bytes(VIRTUAL_DISK_SIZE, read)?;
        let sector = |guid| items.bytes(guid, read).map(|(_, bytes)| u32::from_le_bytes(bytes));
        let locator = items.get(PARENT_LOCATOR);
        let parent = match (flags & HAS_PARENT != 0, locator) {
            (false, _) => None,
            (true, Some(item)) => {
                Some(ParentLocator::parse(&read(item.offset.into(), item.length as usize)?)?)
            }
            (true, None) => {
                let message = "the image has a parent, and no parent locator";
                return Err(Error::new(ErrorKind::Corrupt, message).with_field("HasParent"));
            }
        };
        let metadata = Self {
            block_size,
            leave_blocks_allocated: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            virtual_size: u64::from_le_bytes(size),
            virtual_size_at: size_item.offset.into(),
            virtual_disk_id: Guid(items.bytes(VIRTUAL_DISK_ID, read)?.1),
            logical_sector_size: sector(LOGICAL_SECTOR_SIZE)?,
            physical_sector_size: sector(PHYSICAL_SECTOR_SIZE)?,
            parent,
        };
        metadata.check()?;
        Ok(metadata)
    }

    fn check(&self) -> Result<()> {
        let kind = ErrorKind::InvalidHeader;
        if !BLOCK_SIZES.contains(&self.block_size) || !self.block_size.is_power_of_two() {
            let reason = "no power of two from 1 MiB to 256 MiB";
            return Err(invalid(kind, "BlockSize", self.block_size, reason));
        }
        for (field, size) in [
            ("LogicalSectorSize", self.logical_sector_size),
            ("PhysicalSectorSize", self.physical_sector_size),
        ] {
            if ![512, 4096].contains(&size) {
                return Err(invalid(kind, field, size, "neither 512 nor 4096"));
            }
        }
        if self.virtual_size > MAX_VIRTUAL_SIZE {
            return Err(invalid(ErrorKind::Limit, "VirtualDiskSize", self.virtual_size, "more than 64 TiB"));
        }
        if !self.virtual_size.is_multiple_of(self.logical_sector_size.into()) {
            let reason = format_args!("no multiple of {} bytes", self.logical_sector_size);
            return Err(invalid(kind, "VirtualDiskSize", self.virtual_size, reason));
        }
        Ok(())
    }
}

/// The table and the items of a new image: the bytes at the start of the region, and those at [`METADATA_ITEMS`].
pub fn encode_metadata(metadata: &Metadata) -> (Vec<u8>, Vec<u8>) {
    let mut flags = if metadata.parent.is_some() { HAS_PARENT } else { 0 };
    if metadata.leave_blocks_allocated {
        flags |= LEAVE_BLOCKS_ALLOCATED;
    }
    let block_size = metadata.block_size as u32;
    let parameters = [block_size.to_le_bytes(), flags.to_le_bytes()].concat();
    let mut values = vec![
        parameters,
        metadata.virtual_size.to_le_bytes().to_vec(),
        metadata.virtual_disk_id.0.to_vec(),
        metadata.logical_sector_size.to_le_bytes().to_vec(),
        metadata.physical_sector_size.to_le_bytes().to_vec(),
    ];
    values.extend(metadata.parent.as_ref().map(ParentLocator::encode));
    let (mut table, mut items) = (vec![0; METADATA_TABLE_LENGTH], Vec::new());
    put(&mut table, 0, &SIGNATURE);
    put(&mut table, 10, &(values.len() as u16).to_le_bytes());
    for (((guid, _, flags), value), at) in KNOWN.iter().zip(&values).zip((32..).step_by(32)) {
        let offset = METADATA_TABLE_LENGTH + items.len();
        put(&mut table, at, &guid.0);
        put(&mut table, at + 16, &(offset as u32).to_le_bytes());
        put(&mut table, at + 20, &(value.len() as u32).to_le_bytes());
        put(&mut table, at + 24, &flags.to_le_bytes());
        items.extend_from_slice(value);
    }
    (table, items)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sound() -> Metadata {
        Metadata {
            block_size: 32 << 20,
            leave_blocks_allocated: true,
            virtual_size: 5 << 30,
            virtual_size_at: (64 << 10) + 8,
            virtual_disk_id: Guid([5; 16]),
            logical_sector_size: 512,
            physical_sector_size: 4096,
            parent: None,
        }
    }

    fn parse(table: &[u8], items: &[u8]) -> Result<Metadata> {
        let region = [table, items].concat();
        Metadata::read(1 << 20, &|offset, length| {
            let rest = region.get(offset as usize..).unwrap_or_default();
            Ok(rest[..length.min(rest.len())].to_vec())
        })
    }

    #[test]
    fn what_is_encoded_is_read() {
        let (table, items) = encode_metadata(&sound());
        assert_eq!(items.len(), METADATA_ITEMS.1);
        assert_eq!(parse(&table, &items).unwrap(), sound());
    }

    #[test]
    fn each_field_is_judged() {
        use ErrorKind::{Corrupt, InvalidHeader, Limit, UnsupportedFeature};
        // Offsets from 64 KiB on are of items.
        let cases: [(usize, &[u8], ErrorKind, &str); 14] = [
            (0, b"M", InvalidHeader, "Signature"),
            (10, &[0, 8], InvalidHeader, "EntryCount"),
            (10, &[4], Corrupt, "ItemId"),
            (32, &[9], UnsupportedFeature, "IsRequired"),
            (48, &[0, 0, 0], Corrupt, "Offset"),
            (48, &[0, 0, 0x10], Corrupt, "Offset"),
            (52, &[7], Corrupt, "Length"),
            (52, &[1, 0, 0x10], Limit, "Length"),
            (65536, &[0, 0, 0, 3], InvalidHeader, "BlockSize"),
            (65536, &[0, 0, 8, 0], InvalidHeader, "BlockSize"),
            (65540, &[2], Corrupt, "HasParent"),
            (65544, &[1], InvalidHeader, "VirtualDiskSize"),
            (65544 + 5, &[0x41], Limit, "VirtualDiskSize"),
            (65568, &[0, 4], InvalidHeader, "LogicalSectorSize"),
        ];
        for (at, bytes, kind, field) in cases {
            let (mut table, mut items) = encode_metadata(&sound());
            match at.checked_sub(METADATA_TABLE_LENGTH) {
                Some(at) => put(&mut items, at, bytes),
                None => put(&mut table, at, bytes),
            }
            let error = parse(&table, &items).unwrap_err();
            assert_eq!((error.kind(), error.field()), (kind, Some(field)), "{at}: {error}");
        }
    }

    #[test]
    fn an_item_twice_is_refused_and_a_users_is_another() {
        let (table, items) = encode_metadata(&sound());
        let mut twice = table.clone();
        let first = table[32..64].to_vec();
        put(&mut twice, 10, &[6]);
        put(&mut twice, 32 + 5 * 32, &first);
        assert_eq!(parse(&twice, &items).unwrap_err().field(), Some("ItemId"));
        put(&mut twice, 32 + 5 * 32 + 24, &[1]);
        parse(&twice, &items).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_metadata_or_an_error(
            entries in prop::collection::vec(any::<u8>(), 160),
            items in prop::collection::vec(any::<u8>(), 40),
            at in 32usize..190,
        ) {
            let (mut table, sound) = encode_metadata(&sound());
            let _ = parse(&table, &items);
            put(&mut table, at, &entries[..8]);
            let _ = parse(&table, &sound);
            put(&mut table, 32, &entries);
            let _ = parse(&table, &items);
        }
    }
}

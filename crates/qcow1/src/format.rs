//! Bytes to typed values: the header and the entries of L2 tables. No I/O.
//!
//! All numbers are big endian. The header has 48 bytes; the L1 table has the offsets of L2 tables, whose entries say where
//! clusters are. 0 in either table: not in this image.

use qcow2_core::{Error, ErrorKind, Result};

/// Bytes of a header.
pub const HEADER_LENGTH: usize = 48;
/// The first four bytes, which qcow2 has, too.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The version that is this format.
pub const VERSION: u32 = 1;
/// `cluster_bits` that there are: clusters of 512 bytes to 64 KiB.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u8> = 9..=16;
/// `l2_bits` that there are: L2 tables of 512 bytes to 64 KiB.
pub const L2_BITS: std::ops::RangeInclusive<u8> = 6..=13;
/// Longest backing file name in bytes.
pub const MAX_BACKING_FILE_NAME: u32 = 1023;
/// Most entries of an L1 table.
pub const MAX_L1_ENTRIES: u64 = i32::MAX as u64 / 8;

/// Bit 63 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;
/// Disks are whole sectors of this many bytes, and stored clusters are aligned to it.
const SECTOR: u64 = 512;

/// How the bytes of clusters are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not at all.
    None,
    /// 1: AES.
    Aes,
}

/// A header that keeps to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Where the name of the backing file is, in bytes.
    pub backing_file_offset: u64,
    /// Its length in bytes: 0 where there is none.
    pub backing_file_size: u32,
    /// When the backing file was changed last, in seconds since 1970, as its writer saw it. QEMU writes 0.
    pub mtime: u32,
    /// Size of the disk in bytes, as it is stored: see [`Header::virtual_size`].
    pub size: u64,
    /// The cluster size as a power of two.
    pub cluster_bits: u8,
    /// The entries of an L2 table as a power of two.
    pub l2_bits: u8,
    /// How clusters are encrypted.
    pub crypt_method: CryptMethod,
    /// Where the L1 table is, in bytes.
    pub l1_table_offset: u64,
}

/// How a cluster is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// Not in this image.
    Unallocated,
    /// From this byte of the file on.
    Data(u64),
    /// As a raw deflate stream (RFC 1951).
    Compressed {
        /// First byte in the file.
        offset: u64,
        /// Length in bytes, less than a cluster.
        length: u64,
    },
}

fn invalid(kind: ErrorKind, field: &'static str, value: impl std::fmt::Display, reason: &str) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}

/// The numbers of a header, one behind the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let Some((bytes, rest)) = self.0.split_first_chunk::<N>() else {
            let message = format!("{field} is truncated: the header has {HEADER_LENGTH} bytes");
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field(field));
        };
        self.0 = rest;
        Ok(*bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.take(field).map(u64::from_be_bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.take(field).map(u32::from_be_bytes)
    }

    fn u8(&mut self, field: &'static str) -> Result<u8> {
        self.take(field).map(u8::from_be_bytes)
    }
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for another version; `Limit` for a disk that is too large.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields(bytes);
        if fields.take::<4>("magic")? != MAGIC {
            let message = "not a qcow image: the file does not start with the qcow magic";
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("magic"));
        }
        let version = fields.u32("version")?;
        if version != VERSION {
            let message = format!("unsupported qcow version {version}");
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version"));
        }
        let backing_file_offset = fields.u64("backing_file_offset")?;
        let backing_file_size = fields.u32("backing_file_size")?;
        let mtime = fields.u32("mtime")?;
        let size = fields.u64("size")?;
        let cluster_bits = fields.u8("cluster_bits")?;
        let l2_bits = fields.u8("l2_bits")?;
        fields.take::<2>("padding")?;
        let crypt_method = match fields.u32("crypt_method")? {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            other => {
                return Err(invalid(
                    ErrorKind::InvalidHeader,
                    "crypt_method",
                    other,
                    "neither 0 nor 1 (AES)",
                ));
            }
        };
        let l1_table_offset = fields.u64("l1_table_offset")?;
        let header = Self {
            backing_file_offset,
            backing_file_size: if backing_file_offset == 0 { 0 } else { backing_file_size },
            mtime,
            size,
            cluster_bits,
            l2_bits,
            crypt_method,
            l1_table_offset,
        };
        header.check()?;
        Ok(header)
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let crypt_method = u32::from(self.crypt_method == CryptMethod::Aes);
        let parts: [&[u8]; 9] = [
            &MAGIC,
            &VERSION.to_be_bytes(),
            &self.backing_file_offset.to_be_bytes(),
            &self.backing_file_size.to_be_bytes(),
            &self.mtime.to_be_bytes(),
            &self.size.to_be_bytes(),
            &[self.cluster_bits, self.l2_bits, 0, 0],
            &crypt_method.to_be_bytes(),
            &self.l1_table_offset.to_be_bytes(),
        ];
        let mut bytes = [0; HEADER_LENGTH];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    pub(crate) fn check(&self) -> Result<()> {
        let kind = ErrorKind::InvalidHeader;
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return Err(invalid(kind, "cluster_bits", self.cluster_bits, "not 9 to 16"));
        }
        if !L2_BITS.contains(&self.l2_bits) {
            return Err(invalid(kind, "l2_bits", self.l2_bits, "not 6 to 13"));
        }
        if self.size <= 1 {
            return Err(invalid(kind, "size", self.size, "a disk has at least 2 bytes"));
        }
        if self.size > i64::MAX as u64 || self.l1_entries() > MAX_L1_ENTRIES {
            return Err(invalid(ErrorKind::Limit, "size", self.size, "too large for clusters of this size"));
        }
        if self.backing_file_size > MAX_BACKING_FILE_NAME {
            return Err(invalid(kind, "backing_file_size", self.backing_file_size, "longer than 1023 bytes"));
        }
        Ok(())
    }

    /// Size of the disk in bytes: the whole sectors of `size`, as QEMU has it.
    pub fn virtual_size(&self) -> u64 {
        self.size - self.size % SECTOR
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.l2_coverage())
    }

    /// The entry of a compressed cluster, where the format has one: its length is less than a cluster.
    pub(crate) fn compressed_entry(&self, offset: u64, length: u64) -> Option<u64> {
        let bits = 63 - self.cluster_bits;
        (offset >> bits == 0 && length < self.cluster_size()).then_some(COMPRESSED | length << bits | offset)
    }

    /// What an entry of an L2 table says.
    ///
    /// # Errors
    /// `Corrupt` for an offset that is not one of a sector, or that no file has.
    pub fn l2_entry(&self, entry: u64) -> Result<L2Entry> {
        if entry == 0 {
            return Ok(L2Entry::Unallocated);
        }
        if entry & COMPRESSED != 0 {
            let bits = 63 - self.cluster_bits;
            let length = (entry >> bits) & (self.cluster_size() - 1);
            return Ok(L2Entry::Compressed { offset: entry & ((1 << bits) - 1), length });
        }
        let reason = if !entry.is_multiple_of(SECTOR) {
            "not aligned to 512 bytes"
        } else if entry > i64::MAX as u64 - self.cluster_size() {
            "beyond the end of any file"
        } else {
            return Ok(L2Entry::Data(entry));
        };
        Err(invalid(ErrorKind::Corrupt, "L2 table entry", format_args!("{entry:#x}"), reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header as QEMU makes it, for a disk of 1 MiB.
    fn header() -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(1u32.to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend((1u64 << 20).to_be_bytes());
        bytes.extend([12, 9, 0, 0]);
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(48u64.to_be_bytes());
        bytes
    }

    fn with(offset: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = header();
        bytes[offset..offset + field.len()].copy_from_slice(field);
        bytes
    }

    fn fault(bytes: &[u8]) -> (ErrorKind, Option<&'static str>) {
        let error = Header::parse(bytes).unwrap_err();
        (error.kind(), error.field())
    }

    #[test]
    fn a_header() {
        let header = Header::parse(&header()).unwrap();
        assert_eq!((header.cluster_size(), header.l2_entries(), header.l1_entries()), (4096, 512, 1));
        assert_eq!((header.virtual_size(), header.l1_table_offset), (1 << 20, 48));
        assert_eq!((header.crypt_method, header.backing_file_size), (CryptMethod::None, 0));
    }

    #[test]
    fn what_is_written_is_read() {
        let named = with(8, &[0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0, 4, 0, 0, 0, 9]);
        for bytes in [header(), named, with(36, &1u32.to_be_bytes())] {
            assert_eq!(Header::parse(&bytes).unwrap().encode()[..], bytes);
        }
        let header = Header::parse(&header()).unwrap();
        let entry = header.compressed_entry(0x1_2345, 4095).unwrap();
        let decoded = header.l2_entry(entry).unwrap();
        assert_eq!(decoded, L2Entry::Compressed { offset: 0x1_2345, length: 4095 });
        assert_eq!(header.compressed_entry(1 << 51, 1), None);
        assert_eq!(header.compressed_entry(0, 4096), None);
    }

    #[test]
    fn the_limits_of_qemu() {
        use ErrorKind::{InvalidHeader, Limit, UnsupportedFeature};
        for (offset, bytes, expected) in [
            (0, &b"QFI\xfa"[..], (InvalidHeader, "magic")),
            (4, &2u32.to_be_bytes(), (UnsupportedFeature, "version")),
            (24, &1u64.to_be_bytes(), (InvalidHeader, "size")),
            (24, &(1u64 << 62).to_be_bytes(), (Limit, "size")),
            (24, &u64::MAX.to_be_bytes(), (Limit, "size")),
            (32, &[8], (InvalidHeader, "cluster_bits")),
            (32, &[17], (InvalidHeader, "cluster_bits")),
            (33, &[5], (InvalidHeader, "l2_bits")),
            (33, &[14], (InvalidHeader, "l2_bits")),
            (36, &2u32.to_be_bytes(), (InvalidHeader, "crypt_method")),
            (8, &[0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 4, 0], (InvalidHeader, "backing_file_size")),
        ] {
            assert_eq!(fault(&with(offset, bytes)), (expected.0, Some(expected.1)), "{offset} {bytes:x?}");
        }
        for length in 0..HEADER_LENGTH {
            assert_eq!(fault(&header()[..length]).0, InvalidHeader, "{length}");
        }
        // Without an offset there is no name, whatever its length would be.
        assert_eq!(Header::parse(&with(16, &u32::MAX.to_be_bytes())).unwrap().backing_file_size, 0);
        // The ends of what there is.
        for bits in [[9, 6], [16, 13]] {
            Header::parse(&with(32, &bits)).unwrap();
        }
        assert_eq!(Header::parse(&with(24, &1023u64.to_be_bytes())).unwrap().virtual_size(), 512);
    }

    #[test]
    fn entries() {
        let header = Header::parse(&header()).unwrap();
        let compressed = COMPRESSED | (100 << 51) | 0x1234;
        assert_eq!(header.l2_entry(0).unwrap(), L2Entry::Unallocated);
        assert_eq!(header.l2_entry(0x1200).unwrap(), L2Entry::Data(0x1200));
        assert_eq!(header.l2_entry(compressed).unwrap(), L2Entry::Compressed { offset: 0x1234, length: 100 });
        for damaged in [1, 0x1201, i64::MAX as u64 & !511] {
            assert_eq!(header.l2_entry(damaged).unwrap_err().kind(), ErrorKind::Corrupt, "{damaged:x}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Header::parse(&bytes);
        }

        #[test]
        fn any_fields_keep_to_the_limits_or_are_refused(
            rest in prop::collection::vec(any::<u8>(), 40),
            bits in (8u8..=17, 5u8..=14),
            entry in any::<u64>(),
        ) {
            let mut bytes = header();
            bytes[8..].copy_from_slice(&rest);
            bytes[32] = bits.0;
            bytes[33] = bits.1;
            bytes[36..40].copy_from_slice(&[0, 0, 0, rest[31] & 1]);
            bytes[24] &= rest[0];
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.l1_entries() <= MAX_L1_ENTRIES && header.backing_file_size <= 1023);
                prop_assert!(header.virtual_size() <= header.l1_entries() * header.l2_coverage());
                match header.l2_entry(entry) {
                    Ok(L2Entry::Compressed { offset, length }) => {
                        prop_assert!(length < header.cluster_size() && offset < 1 << 54);
                    }
                    Ok(L2Entry::Data(offset)) => prop_assert_eq!(offset % 512, 0),
                    Ok(L2Entry::Unallocated) | Err(_) => {}
                }
            }
        }
    }
}

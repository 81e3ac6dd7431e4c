//! The file type identifier ([MS-VHDX] 2.2.1) and the two headers (2.2.2).

use qcow2_core::{Error, ErrorKind, Result};

use super::MIB;
use super::fields::{Fields, Guid, invalid, put, seal, verify};

/// The first bytes of every image.
pub const FILE_IDENTIFIER: [u8; 8] = *b"vhdxfile";
/// Bytes of the structure that begins with them.
pub const FILE_IDENTIFIER_LENGTH: usize = 8 + 512;
/// Where the two headers are.
pub const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Bytes of a header.
pub const HEADER_LENGTH: usize = 4096;
/// Bytes of the section with the identifier, the headers and the region tables, in front of everything else.
pub const HEADER_SECTION: u64 = MIB;

const SIGNATURE: [u8; 4] = *b"head";
/// The only version that there is.
const VERSION: u16 = 1;
/// The only version of the log.
const LOG_VERSION: u16 = 0;

/// One of the two headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The valid header with the higher one is current.
    pub sequence_number: u64,
    /// Changes with each opening that changes the file.
    pub file_write_guid: Guid,
    /// Changes when guest data does: what a differencing image knows its parent by.
    pub data_write_guid: Guid,
    /// What valid log entries have; zero where the log is empty.
    pub log_guid: Guid,
    /// Bytes of the log.
    pub log_length: u32,
    /// Where the log is, in bytes.
    pub log_offset: u64,
}

impl Header {
    /// Reads a header of [`HEADER_LENGTH`] bytes.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields::new("header", bytes);
        fields.signature(&SIGNATURE)?;
        if bytes.len() < HEADER_LENGTH {
            return Err(invalid(
                ErrorKind::InvalidHeader,
                "header",
                bytes.len(),
                "the file ends inside of it",
            ));
        }
        verify("header", bytes.get(..HEADER_LENGTH).unwrap_or(bytes))?;
        fields.u32("Checksum")?;
        let sequence_number = fields.u64("SequenceNumber")?;
        let file_write_guid = fields.guid("FileWriteGuid")?;
        let data_write_guid = fields.guid("DataWriteGuid")?;
        let log_guid = fields.guid("LogGuid")?;
        let (log_version, version) = (fields.u16("LogVersion")?, fields.u16("Version")?);
        let log_length = fields.u32("LogLength")?;
        let log_offset = fields.u64("LogOffset")?;
        let unsupported = |field, value: u16, known| {
            Err(invalid(ErrorKind::UnsupportedFeature, field, value, format_args!("only {known} is known")))
        };
        if version != VERSION {
            return unsupported("Version", version, VERSION);
        }
        if log_version != LOG_VERSION && !log_guid.is_zero() {
            return unsupported("LogVersion", log_version, LOG_VERSION);
        }
        let header =
            Self { sequence_number, file_write_guid, data_write_guid, log_guid, log_length, log_offset };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        let kind = ErrorKind::InvalidHeader;
        if !u64::from(self.log_length).is_multiple_of(MIB) {
            return Err(invalid(kind, "LogLength", self.log_length, "no multiple of 1 MiB"));
        }
        let end = self.log_offset.checked_add(self.log_length.into());
        if !self.log_offset.is_multiple_of(MIB) || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(invalid(
                kind,
                "LogOffset",
                format_args!("{:#x}", self.log_offset),
                "no place in a file",
            ));
        }
        if self.log_length > 0 && self.log_offset < HEADER_SECTION {
            let reason = "inside the header section";
            return Err(invalid(kind, "LogOffset", format_args!("{:#x}", self.log_offset), reason));
        }
        Ok(())
    }

    /// The header as it is stored.
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        put(&mut bytes, 0, &SIGNATURE);
        put(&mut bytes, 8, &self.sequence_number.to_le_bytes());
        put(&mut bytes, 16, &self.file_write_guid.0);
        put(&mut bytes, 32, &self.data_write_guid.0);
        put(&mut bytes, 48, &self.log_guid.0);
        put(&mut bytes, 64, &LOG_VERSION.to_le_bytes());
        put(&mut bytes, 66, &VERSION.to_le_bytes());
        put(&mut bytes, 68, &self.log_length.to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// The header that counts, and which of the two it is.
///
/// # Errors
/// What speaks against the first where neither is valid; `Corrupt` for two that are equally new and differ.
pub fn current(first: Result<Header>, second: Result<Header>) -> Result<(Header, usize)> {
    match (first, second) {
        (Ok(first), Ok(second)) if first.sequence_number == second.sequence_number && first != second => {
            let message =
                format!("both headers have the sequence number {} and differ", first.sequence_number);
            Err(Error::new(ErrorKind::Corrupt, message).with_field("SequenceNumber"))
        }
        // Disk2vhd writes the same header twice.
        (Ok(first), Ok(second)) if first.sequence_number >= second.sequence_number => Ok((first, 0)),
        (_, Ok(second)) => Ok((second, 1)),
        (Ok(first), Err(_)) => Ok((first, 0)),
        (Err(first), Err(second)) => {
            let message = format!("neither header is valid: {}; {}", first.message(), second.message());
            let error = Error::new(first.kind(), message);
            Err(first.field().into_iter().fold(error, Error::with_field))
        }
    }
}

/// Refuses a file that does not begin as an image does.
///
/// # Errors
/// `InvalidHeader`.
pub fn check_identifier(bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(&FILE_IDENTIFIER) {
        return Ok(());
    }
    let message = "not a vhdx image: the file does not start with 'vhdxfile'";
    Err(Error::new(ErrorKind::InvalidHeader, message).with_field("Signature"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sound(sequence_number: u64) -> Header {
        Header {
            sequence_number,
            file_write_guid: Guid([1; 16]),
            data_write_guid: Guid([2; 16]),
            log_guid: Guid::default(),
            log_length: 1 << 20,
            log_offset: 1 << 20,
        }
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        assert_eq!(Header::parse(&sound(7).encode()).unwrap(), sound(7));
    }

    #[test]
    fn each_field_is_judged() {
        let cases: [(usize, &[u8], &str); 7] = [
            (0, b"haed", "Signature"),
            (66, &[2, 0], "Version"),
            (68, &[1, 0, 0, 0], "LogLength"),
            (72, &[1, 0, 0, 0], "LogOffset"),
            (72, &[0, 0, 0, 0], "LogOffset"),
            (72, &[0, 0, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff], "LogOffset"),
            (4, &[0, 0, 0, 0], "Checksum"),
        ];
        for (at, field, name) in cases {
            let mut bytes = sound(1).encode();
            put(&mut bytes, at, field);
            if at > 4 {
                seal(&mut bytes);
            }
            assert_eq!(Header::parse(&bytes).unwrap_err().field(), Some(name), "{at}");
        }
        // The version of a log that is empty means nothing.
        let mut bytes = sound(1).encode();
        put(&mut bytes, 64, &[9]);
        seal(&mut bytes);
        Header::parse(&bytes).unwrap();
        put(&mut bytes, 48, &[1]);
        seal(&mut bytes);
        assert_eq!(Header::parse(&bytes).unwrap_err().field(), Some("LogVersion"));
    }

    #[test]
    fn the_newer_valid_header_is_current() {
        let damaged = || Header::parse(&[0; HEADER_LENGTH]);
        assert_eq!(current(Ok(sound(1)), Ok(sound(2))).unwrap(), (sound(2), 1));
        assert_eq!(current(Ok(sound(3)), Ok(sound(2))).unwrap(), (sound(3), 0));
        assert_eq!(current(Ok(sound(3)), damaged()).unwrap(), (sound(3), 0));
        assert_eq!(current(damaged(), Ok(sound(3))).unwrap(), (sound(3), 1));
        assert_eq!(current(Ok(sound(3)), Ok(sound(3))).unwrap(), (sound(3), 0));
        let other = Header { data_write_guid: Guid([9; 16]), ..sound(3) };
        assert_eq!(current(Ok(sound(3)), Ok(other)).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(current(damaged(), damaged()).unwrap_err().kind(), ErrorKind::InvalidHeader);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(rest in prop::collection::vec(any::<u8>(), 72), length in 0..HEADER_LENGTH) {
            let mut bytes = sound(1).encode();
            let _ = Header::parse(&bytes[..length]);
            put(&mut bytes, 8, &rest);
            seal(&mut bytes);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(Header::parse(&header.encode()).unwrap(), header);
            }
        }
    }
}

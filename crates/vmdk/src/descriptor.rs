//! The descriptor: a text that says what the disk is made of. It stands in a file of its own, or inside a sparse extent.

use std::ops::Range;

use qcow2_core::{Error, ErrorKind, Result, check_limit};

use crate::fields::{SECTOR, invalid};

/// Most bytes of a descriptor: what QEMU reads of one.
pub const MAX_BYTES: u64 = (1 << 20) - 1;
/// How a descriptor begins.
pub(crate) const MARK: &[u8] = b"# Disk DescriptorFile";
/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = u32::MAX;
/// Longest name of a parent in bytes, QEMU's limit.
const MAX_PARENT_NAME: usize = 1023;

/// Who may use an extent, as the descriptor has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `RW`
    ReadWrite,
    /// `RDONLY`
    ReadOnly,
    /// `NOACCESS`
    None,
}

/// What an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentType {
    /// `FLAT`: plain bytes.
    Flat,
    /// `VMFS`: plain bytes, on an ESX server.
    Vmfs,
    /// `SPARSE`: a sparse extent, of either kind.
    Sparse,
    /// `VMFSSPARSE`: the same.
    VmfsSparse,
    /// `SESPARSE`
    SeSparse,
    /// `ZERO`: no file, all zeroes.
    Zero,
}

impl ExtentType {
    const ALL: [Self; 6] =
        [Self::Flat, Self::Vmfs, Self::Sparse, Self::VmfsSparse, Self::SeSparse, Self::Zero];

    /// Its name in a descriptor.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
            Self::Zero => "ZERO",
        }
    }

    /// Whether the file is the disk.
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Flat | Self::Vmfs)
    }
}

/// A line that describes an extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// Who may use it.
    pub access: Access,
    /// Its sectors.
    pub sectors: u64,
    /// What it is.
    pub kind: ExtentType,
    /// The file's name as bytes; none of an extent of zeroes.
    pub filename: Option<Vec<u8>>,
    /// First sector in the file, of a plain extent.
    pub offset: u64,
}

impl ExtentLine {
    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// What a descriptor says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes whenever the disk does.
    pub cid: u32,
    /// The CID of the parent as it was, [`NO_PARENT`] without one.
    pub parent_cid: u32,
    /// `createType`: of what kind the disk is.
    pub create_type: String,
    /// The parent's file name, as bytes.
    pub parent: Option<Vec<u8>>,
    /// The extents in guest order.
    pub extents: Vec<ExtentLine>,
    /// The file in which changed blocks are tracked, as bytes.
    pub change_tracking: Option<Vec<u8>>,
    /// Where the digits of the CID are in the text.
    pub cid_digits: Range<usize>,
}

impl Descriptor {
    /// Reads a descriptor; it ends at the first null byte.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for an extent that is a device or of an unknown type; `Limit` for
    /// a disk that no file could hold.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let mut found = Found::default();
        let mut at = 0;
        for line in text.split(|byte| *byte == b'\n') {
            found.line(line, at)?;
            at += line.len() + 1;
        }
        found.finish()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.extents.iter().map(ExtentLine::size).sum()
    }
}

/// The text with another number of sectors for its last extent, and the geometry of a disk of `size` bytes.
pub(crate) fn resized(text: &[u8], sectors: u64, size: u64) -> Vec<u8> {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let is_extent =
        |line: &[u8]| matches!(extent_line(line.trim_ascii()), Ok(Some(extent)) if extent.sectors > 0);
    let last = lines.iter().rposition(|line| is_extent(line));
    let value = |key: &str| {
        let line = lines.iter().find(|line| line.trim_ascii_start().starts_with(key.as_bytes()))?;
        let value = unquoted(line.split(|byte| *byte == b'=').nth(1)?.trim_ascii());
        std::str::from_utf8(value).ok()?.parse::<u64>().ok()
    };
    let track = value("ddb.geometry.heads")
        .zip(value("ddb.geometry.sectors"))
        .map(|(heads, of)| heads.saturating_mul(of));
    let cylinders = track.filter(|track| *track > 0).map(|track| size / SECTOR / track);
    let changed = lines.iter().enumerate().map(|(number, line)| {
        if Some(number) == last {
            let mut words = Words(line);
            words.next();
            let rest = words.0;
            let front = line.get(..line.len() - rest.len()).unwrap_or_default();
            words.next();
            return [front, format!(" {sectors}").as_bytes(), words.0].concat();
        }
        match cylinders {
            Some(cylinders) if line.trim_ascii_start().starts_with(b"ddb.geometry.cylinders") => {
                format!("ddb.geometry.cylinders = \"{cylinders}\"").into_bytes()
            }
            _ => line.to_vec(),
        }
    });
    changed.collect::<Vec<_>>().join(&b'\n')
}

#[derive(Default)]
struct Found {
    cid: Option<(u32, Range<usize>)>,
    parent_cid: Option<u32>,
    create_type: Option<String>,
    parent: Option<Vec<u8>>,
    change_tracking: Option<Vec<u8>>,
    extents: Vec<ExtentLine>,
    sectors: u64,
}

impl Found {
    /// Reads the line at `start` of the text. What is not known is nobody's business.
    fn line(&mut self, line: &[u8], start: usize) -> Result<()> {
        let trimmed = line.trim_ascii();
        if trimmed.is_empty() || trimmed.starts_with(b"#") {
            return Ok(());
        }
        if let Some(extent) = extent_line(trimmed)? {
            self.sectors = self.sectors.saturating_add(extent.sectors);
            check_limit("extent", self.sectors, i64::MAX as u64 / SECTOR)?;
            self.extents.push(extent);
            return Ok(());
        }
        let Some(equals) = line.iter().position(|byte| *byte == b'=') else { return Ok(()) };
        let (key, rest) = line.split_at(equals);
        let raw = rest.get(1..).unwrap_or_default();
        let value = unquoted(raw.trim_ascii());
        match key.trim_ascii() {
            b"CID" if self.cid.is_none() => {
                let blank = raw.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
                let from = start + equals + 1 + blank;
                self.cid = Some((cid("CID", value)?, from..from + raw.trim_ascii().len()));
            }
            b"parentCID" if self.parent_cid.is_none() => self.parent_cid = Some(cid("parentCID", value)?),
            b"createType" if self.create_type.is_none() => {
                self.create_type = Some(String::from_utf8_lossy(value).into_owned());
            }
            b"parentFileNameHint" if self.parent.is_none() => {
                if value.len() > MAX_PARENT_NAME {
                    let reason = "longer than 1023 bytes";
                    return Err(invalid(ErrorKind::InvalidHeader, "parentFileNameHint", value.len(), reason));
                }
                self.parent = (!value.is_empty()).then(|| value.to_vec());
            }
            b"changeTrackPath" => self.change_tracking = (!value.is_empty()).then(|| value.to_vec()),
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<Descriptor> {
        let missing = |field: &'static str| {
            let message =
                format!("the descriptor has no {field}: not a VMDK image, or only an extent of one");
            Error::new(ErrorKind::InvalidHeader, message).with_field(field)
        };
        let (cid, cid_digits) = self.cid.ok_or_else(|| missing("CID"))?;
        let create_type = self.create_type.ok_or_else(|| missing("createType"))?;
        let parent_cid = self.parent_cid.unwrap_or(NO_PARENT);
        if self.parent.is_none() && parent_cid != NO_PARENT && parent_cid != 0 {
            let reason = "the disk has a parent, and no parentFileNameHint says which file that is";
            return Err(invalid(
                ErrorKind::InvalidHeader,
                "parentCID",
                format_args!("{parent_cid:08x}"),
                reason,
            ));
        }
        Ok(Descriptor {
            cid,
            parent_cid,
            create_type,
            parent: self.parent,
            extents: self.extents,
            change_tracking: self.change_tracking,
            cid_digits,
        })
    }
}

fn unquoted(value: &[u8]) -> &[u8] {
    match value.strip_prefix(b"\"") {
        Some(quoted) => quoted.split(|byte| *byte == b'"').next().unwrap_or_default(),
        None => value,
    }
}

fn cid(field: &'static str, value: &[u8]) -> Result<u32> {
    let text = String::from_utf8_lossy(value);
    u32::from_str_radix(&text, 16).map_err(|_| {
        invalid(
            ErrorKind::InvalidHeader,
            field,
            format_args!("'{text}'"),
            "not a number of at most 8 hexadecimal digits",
        )
    })
}

/// What the words of a line are taken from.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        self.0 = self.0.trim_ascii_start();
        let end = self.0.iter().position(u8::is_ascii_whitespace).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }

    fn number(&mut self) -> Option<u64> {
        std::str::from_utf8(self.next()?).ok()?.parse().ok()
    }

    /// A name between quotes.
    fn quoted(&mut self) -> Option<&'a [u8]> {
        let rest = self.0.trim_ascii_start().strip_prefix(b"\"")?;
        let end = rest.iter().position(|byte| *byte == b'"')?;
        let (name, rest) = rest.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        Some(name)
    }
}

/// The extent that a line describes; `None` for another line.
fn extent_line(line: &[u8]) -> Result<Option<ExtentLine>> {
    let mut words = Words(line);
    let access = match words.next() {
        Some(b"RW") => Access::ReadWrite,
        Some(b"RDONLY") => Access::ReadOnly,
        Some(b"NOACCESS") => Access::None,
        _ => return Ok(None),
    };
    let wrong = |reason: &str| {
        let shown = String::from_utf8_lossy(line).into_owned();
        Err(invalid(ErrorKind::InvalidHeader, "extent", format_args!("line '{shown}'"), reason))
    };
    let Some(sectors) = words.number() else { return wrong("no number of sectors follows the access") };
    let Some(word) = words.next() else { return wrong("it has no type") };
    let Some(kind) = ExtentType::ALL.into_iter().find(|kind| kind.name().as_bytes() == word) else {
        let word = String::from_utf8_lossy(word);
        let reason = "an extent of this type is a device, or of no known type";
        return Err(invalid(ErrorKind::UnsupportedFeature, "extent type", word, reason));
    };
    if kind == ExtentType::Zero {
        return Ok(Some(ExtentLine { access, sectors, kind, filename: None, offset: 0 }));
    }
    let filename = match words.quoted() {
        Some(name) if !name.is_empty() => Some(name.to_vec()),
        _ => return wrong("it names no file between quotes"),
    };
    let offset = match (words.number(), kind) {
        (None, ExtentType::Flat) => return wrong("a flat extent says its first sector in the file"),
        (offset, kind) if kind.is_plain() => offset.unwrap_or(0),
        (None | Some(0), _) => 0,
        (Some(_), _) => return wrong("a sparse extent begins with its file"),
    };
    check_limit("extent", offset.saturating_add(sectors), i64::MAX as u64 / SECTOR)?;
    Ok(Some(ExtentLine { access, sectors, kind, filename, offset }))
}

/// What a new descriptor says. Its bytes are those of QEMU, but for the CID.
#[derive(Debug, Clone)]
pub struct NewDescriptor<'a> {
    /// The CID.
    pub cid: u32,
    /// The CID of the parent, [`NO_PARENT`] without one.
    pub parent_cid: u32,
    /// `createType`
    pub create_type: &'a str,
    /// The parent's file name.
    pub parent: Option<&'a [u8]>,
    /// The extents in guest order.
    pub extents: &'a [ExtentLine],
    /// `ddb.virtualHWVersion`
    pub hardware_version: &'a str,
    /// `ddb.adapterType`
    pub adapter_type: &'a str,
    /// `ddb.toolsVersion`
    pub tools_version: &'a str,
    /// Heads of the geometry, which 63 sectors go with.
    pub heads: u64,
}

impl NewDescriptor<'_> {
    /// The text.
    pub fn encode(&self) -> Vec<u8> {
        let size: u64 = self.extents.iter().map(ExtentLine::size).sum();
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:x}\nparentCID={:x}\ncreateType=\"{}\"\n",
            self.cid, self.parent_cid, self.create_type
        )
        .into_bytes();
        if let Some(parent) = self.parent {
            text.extend(b"parentFileNameHint=\"");
            text.extend(parent);
            text.push(b'"');
        }
        text.extend(b"\n# Extent description\n");
        for ExtentLine { sectors, kind, filename, offset, .. } in self.extents {
            text.extend(format!("RW {sectors} {} \"", kind.name()).as_bytes());
            text.extend(filename.as_deref().unwrap_or_default());
            let end = if kind.is_plain() { format!("\" {offset}\n") } else { "\"\n".to_owned() };
            text.extend(end.as_bytes());
        }
        text.extend(
            format!(
                "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{}\"\n\
                 ddb.geometry.heads = \"{}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
                 ddb.toolsVersion = \"{}\"\n",
                self.hardware_version,
                size / (63 * self.heads.max(1) * SECTOR),
                self.heads,
                self.adapter_type,
                self.tools_version,
            )
            .as_bytes(),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &[u8] =
        b"# Disk DescriptorFile\r\nversion=1\nencoding=\"UTF-8\"\nCID= 0a1b2c3d\r\nparentCID=ffffffff\n\
        createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\nRW 4192256 FLAT \"a disk-f001.vmdk\" 0\n\
        RDONLY 63 ZERO \n RW 100 VMFS \"b\"\nddb.geometry.cylinders = \"7\"\nddb.geometry.heads = \"2\"\n\
        ddb.geometry.sectors = \"63\"\n\0\0RW 1 FLAT \"c\" 0\n";

    fn fault(text: &str) -> (ErrorKind, Option<&'static str>) {
        let error = Descriptor::parse(text.as_bytes()).unwrap_err();
        (error.kind(), error.field())
    }

    #[test]
    fn a_descriptor() {
        let found = Descriptor::parse(TEXT).unwrap();
        assert_eq!(
            (found.cid, found.parent_cid, &found.create_type[..]),
            (0x0a1b_2c3d, NO_PARENT, "twoGbMaxExtentFlat")
        );
        assert_eq!(TEXT.get(found.cid_digits.clone()), Some(&b"0a1b2c3d"[..]));
        let kinds: Vec<_> =
            found.extents.iter().map(|extent| (extent.kind, extent.access, extent.sectors)).collect();
        assert_eq!(
            kinds,
            [
                (ExtentType::Flat, Access::ReadWrite, 4_192_256),
                (ExtentType::Zero, Access::ReadOnly, 63),
                (ExtentType::Vmfs, Access::ReadWrite, 100)
            ]
        );
        assert_eq!(found.extents[0].filename.as_deref(), Some(&b"a disk-f001.vmdk"[..]));
        assert_eq!(found.size(), (4_192_256 + 163) * 512);
    }

    #[test]
    fn what_is_refused_is_named() {
        use ErrorKind::{InvalidHeader, Limit, UnsupportedFeature};
        let whole = |line: &str| format!("CID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{line}\n");
        for (text, expected) in [
            ("".to_owned(), (InvalidHeader, "CID")),
            ("CID=1\n".to_owned(), (InvalidHeader, "createType")),
            (whole("CID=1").replace("CID=1", "CID=123456789"), (InvalidHeader, "CID")),
            ("CID=1\nparentCID=5\ncreateType=\"x\"\n".to_owned(), (InvalidHeader, "parentCID")),
            (whole("RW x FLAT \"a\" 0"), (InvalidHeader, "extent")),
            (whole("RW -5 FLAT \"a\" 0"), (InvalidHeader, "extent")),
            (whole("RW 5"), (InvalidHeader, "extent")),
            (whole("RW 5 FLAT \"a\""), (InvalidHeader, "extent")),
            (whole("RW 5 FLAT \"\" 0"), (InvalidHeader, "extent")),
            (whole("RW 5 FLAT a 0"), (InvalidHeader, "extent")),
            (whole("RW 5 SPARSE \"a\" 7"), (InvalidHeader, "extent")),
            (whole("RW 5 VMFSRDM \"a\""), (UnsupportedFeature, "extent type")),
            (whole("RW 18446744073709551615 ZERO"), (Limit, "extent")),
            (whole("RW 5 FLAT \"a\" 18446744073709551615"), (Limit, "extent")),
            (
                whole(&format!("parentFileNameHint=\"{}\"", "a".repeat(1024))),
                (InvalidHeader, "parentFileNameHint"),
            ),
        ] {
            assert_eq!(fault(&text), (expected.0, Some(expected.1)), "{text}");
        }
    }

    #[test]
    fn another_size() {
        let text = b"CID=1\ncreateType=\"x\"\nRW 7 FLAT \"f\" 3\nRW  16 SPARSE \"RW 9\"\nddb.geometry.cylinders = \"0\"\n\
            ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n";
        let resized = resized(text, 123, 16 * 63 * 512 * 9);
        let expected = String::from_utf8_lossy(text).replace("RW  16 ", "RW 123 ").replace("\"0\"", "\"9\"");
        assert_eq!(String::from_utf8_lossy(&resized), expected);
    }

    proptest! {
        #[test]
        fn any_text_is_a_descriptor_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            lines in prop::collection::vec("(RW|RDONLY) [0-9]{1,20} (FLAT|SPARSE|ZERO) \"?[a-z]{0,4}\"? ?[0-9]{0,20}", 0..5),
        ) {
            let _ = Descriptor::parse(&bytes);
            let text = format!("CID=1\nparentCID=ffffffff\ncreateType=\"x\"\n{}\n", lines.join("\n"));
            if let Ok(found) = Descriptor::parse(text.as_bytes()) {
                prop_assert!(found.size() <= i64::MAX as u64);
                let _ = resized(text.as_bytes(), 5, 5 * 512);
            }
        }
    }
}

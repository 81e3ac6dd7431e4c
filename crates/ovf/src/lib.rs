//! The disks that an OVF descriptor lists: its `References` and its `DiskSection`, and nothing else of it.
//!
//! Source: the OVF specification (DSP0243 2.1.1), sections 7.1 and 9.1. No entity but XML's own five is resolved, and nothing outside of
//! the text is read.
#![forbid(unsafe_code)]

use qcow2_core::{Error, ErrorKind, Result, check_limit};
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

/// Longest descriptor, in bytes: those of large appliances have some hundred KiB.
pub const MAX_LENGTH: u64 = 4 << 20;
/// Most files, and most disks, of a descriptor.
const MAX_ENTRIES: u64 = 1000;

/// A disk of a descriptor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// What the machine's devices call it.
    pub id: String,
    /// The file of its contents, as the descriptor has it; none of a disk that is empty.
    pub href: Option<String>,
    /// Bytes of that file, where that is said.
    pub file_size: Option<u64>,
    /// How that file is compressed besides, as `gzip`.
    pub compression: Option<String>,
    /// Bytes of the disk; none where the descriptor leaves that to whoever deploys it.
    pub capacity: Option<u64>,
    /// The URI of its format.
    pub format: Option<String>,
    /// Bytes that are in use, where that is said.
    pub populated_size: Option<u64>,
    /// The disk that it is made on, by its id.
    pub parent: Option<String>,
}

/// A file of `References`.
struct File {
    id: String,
    href: String,
    size: Option<u64>,
    compression: Option<String>,
}

/// The disks of a descriptor, in its order.
///
/// # Errors
/// `InvalidHeader` with the place for what is no XML, or no descriptor; `Limit` for one that is too long.
pub fn parse(bytes: &[u8]) -> Result<Vec<Disk>> {
    check_limit("OVF descriptor", bytes.len() as u64, MAX_LENGTH)?;
    let text =
        str::from_utf8(bytes).map_err(|error| invalid(error.valid_up_to() as u64, "it is not UTF-8"))?;
    let mut reader = Reader::from_str(text);
    let (mut files, mut disks) = (Vec::new(), Vec::new());
    let mut seen = false;
    loop {
        let at = reader.buffer_position();
        let event =
            reader.read_event().map_err(|error| invalid(reader.error_position(), &error.to_string()))?;
        let (Event::Start(element) | Event::Empty(element)) = event else {
            match event {
                Event::Eof if seen => break,
                Event::Eof => return Err(invalid(at, "there is no Envelope")),
                _ => continue,
            }
        };
        let name = element.local_name();
        match AsRef::<str>::as_ref(&name) {
            "Envelope" => seen = true,
            _ if !seen => return Err(invalid(at, "it does not begin with an Envelope")),
            "File" => files.push(file(&element, at)?),
            "Disk" => disks.push(disk(&element, at)?),
            _ => {}
        }
        check_limit("OVF entries", files.len().max(disks.len()) as u64, MAX_ENTRIES)?;
    }
    Ok(disks.into_iter().map(|(disk, file)| with_file(disk, file.as_deref(), &files)).collect())
}

fn invalid(at: u64, reason: &str) -> Error {
    let message = format!("the OVF descriptor cannot be read at {at}: {reason}");
    Error::new(ErrorKind::InvalidHeader, message).with_offset(at)
}

/// Attributes by their names without prefixes.
fn attributes(element: &BytesStart<'_>, at: u64, mut each: impl FnMut(&str, String)) -> Result<()> {
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|error| invalid(at, &error.to_string()))?;
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|error| invalid(at, &error.to_string()))?;
        let name = attribute.key.local_name();
        each(AsRef::<str>::as_ref(&name), value.into_owned());
    }
    Ok(())
}

fn file(element: &BytesStart<'_>, at: u64) -> Result<File> {
    let mut file = File { id: String::new(), href: String::new(), size: None, compression: None };
    attributes(element, at, |name, value| match name {
        "id" => file.id = value,
        "href" => file.href = value,
        "size" => file.size = value.parse().ok(),
        "compression" => file.compression = Some(value).filter(|name| name != "identity"),
        _ => {}
    })?;
    Ok(file)
}

fn disk(element: &BytesStart<'_>, at: u64) -> Result<(Disk, Option<String>)> {
    let (mut disk, mut file) = (Disk::default(), None);
    let (mut capacity, mut units) = (None, None);
    attributes(element, at, |name, value| match name {
        "diskId" => disk.id = value,
        "fileRef" => file = Some(value),
        "capacity" => capacity = value.parse().ok(),
        "capacityAllocationUnits" => units = Some(value),
        "format" => disk.format = Some(value),
        "populatedSize" => disk.populated_size = value.parse().ok(),
        "parentRef" => disk.parent = Some(value),
        _ => {}
    })?;
    let factor = units.as_deref().map_or(Some(1), unit);
    disk.capacity = capacity.zip(factor).and_then(|(count, factor): (u64, u64)| count.checked_mul(factor));
    Ok((disk, file))
}

fn with_file(disk: Disk, id: Option<&str>, files: &[File]) -> Disk {
    match files.iter().find(|file| Some(&*file.id) == id) {
        Some(file) => Disk {
            href: Some(file.href.clone()),
            file_size: file.size,
            compression: file.compression.clone(),
            ..disk
        },
        None => disk,
    }
}

/// Bytes of a unit: `byte`, `byte * 2^30`, `byte*1024`; and the words of OVF 0.9, `GigaBytes`.
fn unit(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(word) = text.strip_suffix("Bytes").or_else(|| text.strip_suffix("bytes")) {
        let shift = ["", "Kilo", "Mega", "Giga", "Tera"].iter().position(|prefix| *prefix == word)?;
        return Some(1 << (10 * shift));
    }
    let mut factors = text.split('*').map(str::trim);
    if factors.next()? != "byte" {
        return None;
    }
    factors.try_fold(1u64, |product, factor| {
        let (base, power) = factor.split_once('^').unwrap_or((factor, "1"));
        let value = base.trim().parse::<u64>().ok()?.checked_pow(power.trim().parse().ok()?)?;
        product.checked_mul(value)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DESCRIPTOR: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
        <ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
          <ovf:References>
            <ovf:File ovf:id="f1" ovf:href="a&amp;b.vmdk" ovf:size="1000"/>
            <ovf:File ovf:id="f2" ovf:href="c.vmdk" ovf:compression="gzip"></ovf:File>
          </ovf:References>
          <ovf:DiskSection>
            <ovf:Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:capacity="3" ovf:capacityAllocationUnits="byte * 2^30"
              ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="7"/>
            <ovf:Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="512" ovf:parentRef="d2"/>
            <ovf:Disk ovf:diskId="d3" ovf:capacity="${size}"/>
          </ovf:DiskSection>
        </ovf:Envelope>"#;

    #[test]
    fn the_disks_are_there_in_the_descriptors_order() {
        let disks = parse(DESCRIPTOR.as_bytes()).unwrap();
        let first = Disk {
            id: "d2".into(),
            href: Some("c.vmdk".into()),
            compression: Some("gzip".into()),
            capacity: Some(3 << 30),
            format: Some("http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized".into()),
            populated_size: Some(7),
            ..Disk::default()
        };
        let second = Disk {
            id: "d1".into(),
            href: Some("a&b.vmdk".into()),
            file_size: Some(1000),
            capacity: Some(512),
            parent: Some("d2".into()),
            ..Disk::default()
        };
        assert_eq!(disks, [first, second, Disk { id: "d3".into(), ..Disk::default() }]);
        assert_eq!(parse(b"<Envelope/>").unwrap(), []);
    }

    #[test]
    fn units_are_bytes() {
        for (text, bytes) in [
            ("byte", Some(1)),
            ("byte * 2^20", Some(1 << 20)),
            ("byte*2^10 * 3", Some(3072)),
            ("GigaBytes", Some(1 << 30)),
            ("byte * 2^64", None),
            ("sector", None),
            ("byte * x", None),
        ] {
            assert_eq!(unit(text), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_descriptor_is_refused_and_no_entity_grows() {
        let bomb = r#"<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b SYSTEM "file:///etc/passwd">]><Envelope><File href="&a;"/></Envelope>"#;
        let outside = bomb.replace("&a;", "&b;");
        for text in
            [bomb, &*outside, "", "text", "<html/>", "<Envelope", "<Envelope><File href=\"x</Envelope>"]
        {
            assert_eq!(parse(text.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidHeader, "{text}");
        }
        assert_eq!(parse(b"<Envelope \xff/>").unwrap_err().offset(), Some(10));
        let many = format!("<Envelope>{}</Envelope>", "<Disk/>".repeat(1001));
        assert_eq!(parse(many.as_bytes()).unwrap_err().kind(), ErrorKind::Limit);
        assert_eq!(parse(&vec![b' '; 5 << 20]).unwrap_err().kind(), ErrorKind::Limit);
    }

    proptest! {
        #[test]
        fn any_bytes_give_disks_or_an_error(at in 0..DESCRIPTOR.len(), bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut text = DESCRIPTOR.as_bytes().to_vec();
            let end = (at + bytes.len()).min(text.len());
            text.splice(at..end, bytes.iter().copied());
            let _ = parse(&text);
            let _ = parse(&bytes);
        }
    }
}

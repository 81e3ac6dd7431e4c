//! `DiskDescriptor.xml` of a bundle: which files the disk is made of. No I/O.
//!
//! Source: `docs/interop/prl-xml.rst` of QEMU; a disk may be split into several storages here. No entity but XML's own five is
//! resolved, and nothing outside of the text is read.

use std::collections::HashSet;

use qcow2_core::{Error, ErrorKind, Result, check_limit};
use quick_xml::events::Event;
use quick_xml::{Reader, XmlVersion};

use crate::structures::SECTOR;

/// Longest descriptor, in bytes.
pub const MAX_LENGTH: u64 = 1 << 20;
/// Most storages, and most images of all of them together.
pub const MAX_FILES: u64 = 1024;
/// Most snapshots, of which a disk stands on 200 at most.
const MAX_SHOTS: u64 = 4096;
/// Most images that lie on each other.
const MAX_DEPTH: usize = 200;
/// Deepest element.
const MAX_NESTING: usize = 32;
/// The element that it all is.
const ROOT: &str = "Parallels_disk_image";
/// The image that is the disk, where the descriptor does not say.
const DEFAULT_TOP: &str = "5fbaabe3-6958-40ff-92a7-860e329aab41";
/// The parent of what has none.
const NO_PARENT: &str = "00000000-0000-0000-0000-000000000000";

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageType {
    /// Its bytes are the disk's.
    Plain,
    /// An expanding image.
    Compressed,
}

/// A file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// The name as the descriptor has it.
    pub name: String,
    /// What it is.
    pub kind: ImageType,
}

/// A part of the disk: its images lie on each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoragePart {
    /// First byte of the disk.
    pub start: u64,
    /// Behind its last byte.
    pub end: u64,
    /// Top first; only the last one can be plain.
    pub images: Vec<ImageFile>,
}

/// A disk that keeps to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes of the disk.
    pub size: u64,
    /// One behind the other, without gaps, from the start of the disk to its end or beyond.
    pub storages: Vec<StoragePart>,
}

/// The elements as they are read.
#[derive(Default)]
struct Elements {
    disk_size: Option<u64>,
    padding: u64,
    engine: String,
    storages: Vec<Storage>,
    images: u64,
    top: Option<String>,
    shots: Vec<(String, String)>,
}

#[derive(Default)]
struct Storage {
    start: Option<u64>,
    end: Option<u64>,
    images: Vec<Image>,
}

#[derive(Default)]
struct Image {
    guid: String,
    kind: String,
    file: String,
}

impl Descriptor {
    /// Whether a file whose first bytes these are can be one.
    #[must_use]
    pub fn is_one(head: &[u8]) -> bool {
        head.windows(ROOT.len() + 1).any(|word| word.split_first() == Some((&b'<', ROOT.as_bytes())))
    }

    /// Reads a descriptor.
    ///
    /// # Errors
    /// `InvalidHeader` with the place or the field for what is no descriptor, or contradicts itself; `Chain` for snapshots without an
    /// end; `UnsupportedFeature` for an encrypted or padded disk; `Limit`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        check_limit("DiskDescriptor.xml", bytes.len() as u64, MAX_LENGTH)?;
        let text = str::from_utf8(bytes)
            .map_err(|error| unreadable(error.valid_up_to() as u64, "it is not UTF-8"))?;
        let elements = read(text)?;
        if elements.padding != 0 {
            return Err(unsupported("Padding", "the disk is padded"));
        }
        if !matches!(&*guid(&elements.engine), "" | NO_PARENT) {
            return Err(unsupported("Encryption", "the disk is encrypted"));
        }
        let chain = chain(&elements)?;
        let mut storages: Vec<StoragePart> = Vec::with_capacity(elements.storages.len());
        let mut files = HashSet::new();
        for storage in &elements.storages {
            let part = part(storage, &chain, storages.last().map_or(0, |last| last.end))?;
            if let Some(twice) = part.images.iter().find(|image| !files.insert(image.name.clone())) {
                return Err(invalid("File", &format!("'{}' is there twice", twice.name)));
            }
            storages.push(part);
        }
        check_limit("files of the disk", files.len() as u64, MAX_FILES)?;
        let end = storages.last().map_or(0, |last| last.end);
        let size = elements.disk_size.and_then(|sectors| sectors.checked_mul(SECTOR));
        match size {
            Some(size) if size <= end && !storages.is_empty() => Ok(Self { size, storages }),
            Some(size) => Err(invalid(
                "Disk_size",
                &format!("the disk has {size} bytes, and its storages end at {end}"),
            )),
            None => Err(invalid("Disk_size", "it is missing, or no number of sectors")),
        }
    }
}

/// A storage with the images that the chain has of it.
fn part(storage: &Storage, chain: &[&str], start: u64) -> Result<StoragePart> {
    let bytes = |sectors: Option<u64>| sectors.and_then(|sectors| sectors.checked_mul(SECTOR));
    let (Some(first), Some(end)) = (bytes(storage.start), bytes(storage.end)) else {
        return Err(invalid("Storage", "its Start or End is missing, or no number of sectors"));
    };
    if first != start || end <= first || end > i64::MAX as u64 {
        return Err(invalid("Storage", &format!("{first} to {end} do not follow what ends at {start}")));
    }
    let mut images: Vec<ImageFile> = Vec::with_capacity(chain.len());
    for wanted in chain {
        let mut found = storage.images.iter().filter(|image| image.guid == *wanted);
        let (Some(image), None) = (found.next(), found.next()) else {
            let message = format!("the storage from {first} on has no image {{{wanted}}}, or several");
            return Err(invalid("Image", &message));
        };
        let kind = match &*image.kind {
            "Compressed" => ImageType::Compressed,
            "Plain" => ImageType::Plain,
            other => return Err(unsupported("Type", &format!("'{other}' is neither Compressed nor Plain"))),
        };
        if images.last().is_some_and(|above| above.kind == ImageType::Plain) {
            return Err(invalid("Type", "a plain image lies on another one, of which nothing would show"));
        }
        images.push(ImageFile { name: image.file.clone(), kind });
    }
    Ok(StoragePart { start, end, images })
}

/// The GUIDs of the images from the top one to the root.
fn chain(elements: &Elements) -> Result<Vec<&str>> {
    // A bundle without snapshots has one image of each storage, whatever its GUID.
    let first = elements.storages.first().map_or(&[][..], |storage| &storage.images);
    let mut next = match (&elements.top, first) {
        (Some(top), _) => top,
        (None, [only]) => &*only.guid,
        (None, _) => DEFAULT_TOP,
    };
    let (mut chain, mut seen) = (Vec::new(), HashSet::new());
    loop {
        if !seen.insert(next) || chain.len() >= MAX_DEPTH {
            let message = match chain.len() {
                MAX_DEPTH.. => format!("more than {MAX_DEPTH} snapshots lie on each other"),
                _ => format!("the snapshot {{{next}}} is its own ancestor"),
            };
            return Err(Error::new(ErrorKind::Chain, message).with_field("ParentGUID"));
        }
        chain.push(next);
        let mut shots = elements.shots.iter().filter(|(own, _)| own == next);
        match (shots.next(), shots.next()) {
            (None, _) => return Ok(chain),
            (Some((_, parent)), None) if parent == NO_PARENT => return Ok(chain),
            (Some((_, parent)), None) => next = parent,
            (Some(_), Some(_)) => {
                return Err(invalid("Shot", &format!("{{{next}}} is there twice")));
            }
        }
    }
}

fn read(text: &str) -> Result<Elements> {
    let mut reader = Reader::from_str(text);
    let (mut elements, mut path, mut content) = (Elements::default(), Vec::<String>::new(), String::new());
    let mut seen = false;
    loop {
        let at = reader.buffer_position();
        let event =
            reader.read_event().map_err(|error| unreadable(reader.error_position(), &error.to_string()))?;
        match event {
            Event::Start(element) => {
                let name = element.local_name();
                let name: &str = name.as_ref();
                if path.is_empty() && (seen || name != ROOT) {
                    return Err(unreadable(at, "it is not one Parallels_disk_image"));
                }
                seen = true;
                path.push(name.to_owned());
                check_limit("DiskDescriptor.xml nesting", path.len() as u64, MAX_NESTING as u64)?;
                content.clear();
                elements.begin(&path)?;
            }
            Event::End(_) => {
                elements.end(&path, content.trim()).ok_or_else(|| unreadable(at, "a number is none"))?;
                path.pop();
                content.clear();
            }
            Event::Text(text) => content.push_str(&text.xml_content(XmlVersion::Implicit1_0)),
            Event::CData(text) => content.push_str(&text.xml_content(XmlVersion::Implicit1_0)),
            Event::GeneralRef(entity) => {
                let known = match entity.resolve_char_ref() {
                    Ok(Some(character)) => Some(character.to_string()),
                    Ok(None) => quick_xml::escape::resolve_xml_entity(&entity).map(str::to_owned),
                    Err(error) => return Err(unreadable(at, &error.to_string())),
                };
                content.push_str(&known.ok_or_else(|| unreadable(at, "an entity that XML does not have"))?);
            }
            Event::Eof if seen && path.is_empty() => return Ok(elements),
            Event::Eof => return Err(unreadable(at, "it ends too early")),
            Event::Empty(_) | Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
}

impl Elements {
    fn begin(&mut self, path: &[String]) -> Result<()> {
        match names(path)[..] {
            [_, "StorageData", "Storage"] => self.storages.push(Storage::default()),
            [_, "StorageData", "Storage", "Image"] => {
                self.images += 1;
                if let Some(storage) = self.storages.last_mut() {
                    storage.images.push(Image::default());
                }
            }
            [_, "Snapshots", "Shot"] => self.shots.push(Default::default()),
            _ => return Ok(()),
        }
        check_limit("storages of the disk", self.storages.len() as u64, MAX_FILES)?;
        check_limit("images of the disk", self.images, MAX_SHOTS)?;
        check_limit("snapshots of the disk", self.shots.len() as u64, MAX_SHOTS)
    }

    /// `None` for what should be a number.
    fn end(&mut self, path: &[String], text: &str) -> Option<()> {
        let storage = self.storages.last_mut();
        match names(path)[..] {
            [_, "Disk_Parameters", "Disk_size"] => self.disk_size = Some(text.parse().ok()?),
            [_, "Disk_Parameters", "Padding"] => self.padding = text.parse().ok()?,
            [_, "Disk_Parameters", "Encryption", "Engine"] => text.clone_into(&mut self.engine),
            [_, "StorageData", "Storage", "Start"] => storage?.start = Some(text.parse().ok()?),
            [_, "StorageData", "Storage", "End"] => storage?.end = Some(text.parse().ok()?),
            [_, "StorageData", "Storage", "Image", field] => {
                let image = storage?.images.last_mut()?;
                match field {
                    "GUID" => image.guid = guid(text),
                    "Type" => text.clone_into(&mut image.kind),
                    "File" => text.clone_into(&mut image.file),
                    _ => {}
                }
            }
            [_, "Snapshots", "TopGUID"] => self.top = Some(guid(text)),
            [_, "Snapshots", "Shot", "GUID"] => self.shots.last_mut()?.0 = guid(text),
            [_, "Snapshots", "Shot", "ParentGUID"] => self.shots.last_mut()?.1 = guid(text),
            _ => {}
        }
        Some(())
    }
}

fn names(path: &[String]) -> Vec<&str> {
    path.iter().map(String::as_str).collect()
}

/// Without its brackets, in small letters.
fn guid(text: &str) -> String {
    text.trim_matches(|c| matches!(c, '{' | '}')).to_ascii_lowercase()
}

fn unreadable(at: u64, reason: &str) -> Error {
    let message = format!("DiskDescriptor.xml cannot be read at {at}: {reason}");
    Error::new(ErrorKind::InvalidHeader, message).with_offset(at)
}

fn invalid(field: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::InvalidHeader, format!("invalid {field} of a Parallels disk: {reason}"))
        .with_field(field)
}

fn unsupported(field: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::UnsupportedFeature, format!("{field} of a Parallels disk: {reason}"))
        .with_field(field)
}

//! A bundle, `disk.hdd`: a descriptor and the images that it names, as one layer that is read. Its files are attached one by one; what
//! is not attached cannot be read.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::layer::{ExtentReference, Layer, Place, PlanBuilder, References, Segment, SegmentKind};
use qcow2_core::{Error, ErrorKind, MemMut, Raw, Result, Storage, StorageExt, check_limit};

use crate::OpenOptions;
use crate::descriptor::{Descriptor, ImageType, MAX_LENGTH};

/// Bytes of a file in which its kind shows.
const HEAD: usize = 1024;

/// Opens what is in `storage`: an expanding image, or the descriptor of a bundle.
///
/// # Errors
/// As [`crate::open`] and [`Bundle::open`].
pub fn open_any(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Layer>> {
    let mut head = [0; HEAD];
    let got = storage.read_up_to_at(MemMut::from(&mut head[..]), 0)?;
    if Descriptor::is_one(head.get(..got).unwrap_or_default()) {
        return Ok(Box::new(Bundle::open(storage, options)?));
    }
    Ok(Box::new(crate::layer::open(storage, options)?))
}

/// An open bundle.
#[derive(Debug)]
pub struct Bundle {
    storage: Arc<dyn Storage>,
    descriptor: Descriptor,
    /// The images of all storages, top first each, one storage behind the other: as extents are counted.
    images: Vec<Option<Box<dyn Layer>>>,
    options: OpenOptions,
}

impl Bundle {
    /// Opens the bundle whose descriptor is in `storage`.
    ///
    /// # Errors
    /// As [`Descriptor::parse`]; `Limit`; `Io`.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let length = storage.size()?;
        let located = |error| storage.located(error);
        check_limit("DiskDescriptor.xml", length, MAX_LENGTH).map_err(located)?;
        let mut text = vec![0; length as usize];
        storage.read_exact_at(MemMut::from(&mut text[..]), 0)?;
        let descriptor = Descriptor::parse(&text).map_err(located)?;
        check_limit("size", descriptor.size, options.max_virtual_size).map_err(located)?;
        let count: usize = descriptor.storages.iter().map(|part| part.images.len()).sum();
        let images = (0..count).map(|_| None).collect();
        Ok(Self { storage, descriptor, images, options: options.clone() })
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The number of a storage's first image, the bytes of the disk that it has, and how many images.
    fn parts(&self) -> impl Iterator<Item = (usize, Range<u64>, usize)> {
        let mut first = 0;
        self.descriptor.storages.iter().map(move |part| {
            let number = first;
            first += part.images.len();
            (number, part.start..part.end, part.images.len())
        })
    }

    fn missing(&self, number: usize) -> Error {
        let name = self.references().extents.get(number).map(|extent| extent.filename.clone());
        let name = String::from_utf8_lossy(name.as_deref().unwrap_or_default()).into_owned();
        let message = format!("the extent '{name}' is not open: references did not allow it");
        self.storage.located(Error::new(ErrorKind::ReferenceDenied, message).with_field("extent"))
    }

    /// Plans what the images from `number` to `last` have of a storage that begins at `start`; `range` counts the disk's bytes.
    fn plan_image(
        &self,
        images: Range<usize>,
        start: u64,
        range: Range<u64>,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<()> {
        let length = range.end - range.start;
        if images.is_empty() {
            plan.push(range.start, length, SegmentKind::Unallocated(None));
            return Ok(());
        }
        let number = images.start;
        let Some(image) = self.images.get(number).and_then(Option::as_ref) else {
            // Reading it says what is missing.
            let place = Place { file: number as u32, host: range.start - start };
            plan.push(range.start, length, SegmentKind::Data(place));
            return Ok(());
        };
        // A disk that grew has what is behind the end of an older image in no older one either.
        let inside =
            (range.start - start).min(image.virtual_size())..(range.end - start).min(image.virtual_size());
        let behind = (range.end - start) - inside.end.max(range.start - start);
        let mut segments = Vec::new();
        if !inside.is_empty() {
            image.plan(inside, &mut segments)?;
        }
        for segment in segments {
            let at = start + segment.start;
            match segment.kind {
                SegmentKind::Data(place) => {
                    let place = Place { file: number as u32, ..place };
                    plan.push(at, segment.length, SegmentKind::Data(place));
                }
                SegmentKind::Unallocated(_) => {
                    self.plan_image(number + 1..images.end, start, at..at + segment.length, plan)?;
                }
                SegmentKind::Zero(_) => plan.push(at, segment.length, SegmentKind::Zero(None)),
                SegmentKind::Opaque(_) => {
                    return Err(Error::new(ErrorKind::Internal, "an image of a bundle has no such segments"));
                }
            }
        }
        plan.push(range.end - behind, behind, SegmentKind::Unallocated(None));
        Ok(())
    }
}

impl Layer for Bundle {
    fn format(&self) -> &'static str {
        "parallels"
    }

    fn virtual_size(&self) -> u64 {
        self.descriptor.size
    }

    fn unit(&self) -> Option<u64> {
        self.images.iter().flatten().filter_map(|image| image.unit()).max()
    }

    fn takes_backing(&self) -> bool {
        false
    }

    fn references(&self) -> References {
        let images = self.descriptor.storages.iter().flat_map(|part| &part.images);
        let extents = images
            .map(|image| ExtentReference { filename: image.name.clone().into_bytes(), writable: false });
        References { extents: extents.collect(), ..References::default() }
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn files(&self) -> Vec<&Arc<dyn Storage>> {
        std::iter::once(&self.storage)
            .chain(self.images.iter().flatten().map(|image| image.storage()))
            .collect()
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        Some(self.images.get(index as usize)?.as_ref()?.storage())
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let mut plan = PlanBuilder::new(segments);
        for (first, bytes, count) in self.parts() {
            let part = range.start.max(bytes.start)..range.end.min(bytes.end);
            if part.start < part.end {
                self.plan_image(first..first + count, bytes.start, part, &mut plan)?;
            }
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        let SegmentKind::Data(place) = segment.kind else {
            return Err(Error::new(ErrorKind::Internal, "a segment without bytes was read"));
        };
        match self.file(place.file) {
            Some(file) => file.read_padded_at(buf, place.host),
            None => Err(self.missing(place.file as usize)),
        }
    }

    /// An image must have what its storage has of the disk, if nothing lies on it.
    fn attach_extent(&mut self, index: usize, file: Arc<dyn Storage>) -> Result<()> {
        let found = self.descriptor.storages.iter().flat_map(|part| {
            part.images.iter().enumerate().map(move |(depth, image)| (depth, image, part.end - part.start))
        });
        let (Some((depth, image, length)), Some(slot)) =
            (found.clone().nth(index), self.images.get_mut(index))
        else {
            return Err(Error::new(ErrorKind::Internal, "the bundle has no such file"));
        };
        let layer: Box<dyn Layer> = match image.kind {
            ImageType::Plain => Box::new(Raw::new(file)?),
            ImageType::Compressed => Box::new(crate::layer::open(file, &self.options)?),
        };
        let size = layer.virtual_size();
        if depth == 0 && size < length {
            let message = format!("the image has {size} bytes of the disk, and its storage {length}");
            let error = Error::new(ErrorKind::Corrupt, message).with_field("Storage");
            return Err(layer.storage().located(error));
        }
        *slot = Some(layer);
        Ok(())
    }

    fn make_writable(&mut self, _: DiskOptions) -> Result<()> {
        let message = "a Parallels bundle is read only: convert it, or name one of its images";
        Err(self.storage.located(Error::new(ErrorKind::UnsupportedFeature, message)))
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        let mut again = Self::open(Arc::clone(&self.storage), &self.options)?;
        for (index, image) in self.images.iter().enumerate() {
            if let Some(image) = image {
                again.attach_extent(index, Arc::clone(image.storage()))?;
            }
        }
        Ok(Box::new(again))
    }
}

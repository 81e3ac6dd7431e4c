//! Copying the persistent bitmaps of one image to another, as a convert does.

use std::sync::Arc;

use qcow2_format::bitmap::BitmapFlags;

use crate::image::{Image, Qcow2};
use crate::{Error, ErrorKind, Result};

/// The persistent bitmaps of an image that can be copied.
#[derive(Debug)]
pub struct CopyableBitmaps<'a> {
    pub(crate) source: &'a Qcow2,
    /// Names in the directory's order.
    pub(crate) names: Vec<Vec<u8>>,
    /// Names of inconsistent ones, which are left out.
    pub skipped: Vec<Vec<u8>>,
}

impl<'a> CopyableBitmaps<'a> {
    /// Looks at the bitmaps of the top layer; `skip` leaves inconsistent ones out.
    ///
    /// # Errors
    /// `UnsupportedFeature` for a raw or version 2 source; `Corrupt` for an inconsistent bitmap without `skip`.
    pub fn of(source: &'a Image, skip: bool) -> Result<Self> {
        let Some(source) = source.top_qcow2() else {
            let message = format!("a {} source has no bitmaps", source.format());
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("bitmaps"));
        };
        refuse_version_2(source)?;
        let (mut names, mut skipped) = (Vec::new(), Vec::new());
        for record in source.bitmaps()? {
            let entry = record.entry;
            if !entry.flags.contains(BitmapFlags::IN_USE) || source.tracks_bitmap(&entry.name) {
                names.push(entry.name);
            } else if skip {
                skipped.push(entry.name);
            } else {
                let name = String::from_utf8_lossy(&entry.name);
                let message = format!("the bitmap '{name}' is inconsistent and cannot be copied");
                return Err(source.error(ErrorKind::Corrupt, message));
            }
        }
        Ok(Self { source, names, skipped })
    }

    /// Refuses a target that cannot have bitmaps, before anything is written to it, whether there are any or not.
    ///
    /// # Errors
    /// `UnsupportedFeature`.
    pub fn refuse_target(target: &Image) -> Result<()> {
        match target.top_qcow2() {
            Some(image) => refuse_version_2(image),
            _ => Err(Error::new(ErrorKind::UnsupportedFeature, "a raw target has no bitmaps")
                .with_field("bitmaps")),
        }
    }

    /// Adds the bitmaps to an image that is open for writing.
    ///
    /// # Errors
    /// As [`CopyableBitmaps::refuse_target`]; `InvalidArgument` for a disk of another size and for a name that the target has; `Io`.
    pub fn add_to(&self, target: &Image) -> Result<()> {
        let records = self.source.bitmaps()?;
        for name in &self.names {
            let tracked = self.source.open_writer().and_then(|writer| writer.bitmaps.find(name));
            let (bits, enabled) = match (tracked, records.iter().find(|r| r.entry.name == *name)) {
                (Some(tracked), _) => (tracked.bits, tracked.enabled),
                (None, Some(record)) => {
                    let bits = self.source.stored_bits(&record.entry)?;
                    (Arc::new(bits), record.entry.flags.contains(BitmapFlags::AUTO))
                }
                // Removed meanwhile.
                (None, None) => continue,
            };
            if bits.size() != target.virtual_size() {
                let name = String::from_utf8_lossy(name);
                let message = format!(
                    "the bitmap '{name}' is of a disk of {} bytes, and the target's has {}",
                    bits.size(),
                    target.virtual_size()
                );
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("bitmaps"));
            }
            // A copy: the source's may change while this one is stored.
            let bits = bits.resized(bits.size(), self.source.limits().max_memory)?;
            target.insert_bitmap(name, bits, enabled)?;
        }
        Ok(())
    }
}

fn refuse_version_2(image: &Qcow2) -> Result<()> {
    if image.header().version < 3 {
        let message = "an image of version 2 has no bitmaps";
        return Err(image.error(ErrorKind::UnsupportedFeature, message).with_field("bitmaps"));
    }
    Ok(())
}

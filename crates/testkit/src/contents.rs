//! All that users see of an image: the active disk, every snapshot's disk, and the persistent bitmaps.

use std::ops::Range;

use qcow2_engine::format::bitmap::BitmapFlags;
use qcow2_engine::format::header::feature::Autoclear;
use qcow2_engine::{Image, MemMut, OpenOptions};

use crate::Sparse;
use crate::disk_model::{Opening, Rig};

/// One snapshot.
#[derive(Clone, PartialEq, Eq)]
pub struct Shot {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its disk.
    pub disk: Vec<u8>,
}

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    /// Its name.
    pub name: String,
    /// Bytes that a bit is about.
    pub granularity: u64,
    /// Whether it records changes.
    pub enabled: bool,
    /// What is dirty; `None` for one that is marked in use, which nobody believes.
    pub ranges: Option<Vec<Range<u64>>>,
}

/// What an image holds.
#[derive(Clone, PartialEq, Eq)]
pub struct Contents {
    /// The active disk.
    pub active: Vec<u8>,
    /// The snapshots, in the order of the table.
    pub snapshots: Vec<Shot>,
    /// The bitmaps, in the order of the directory.
    pub bitmaps: Vec<Marked>,
    /// Whether the header says that the bitmaps are to be believed.
    pub consistent: bool,
}

/// A disk in a message: its length and a sum.
fn brief(disk: &[u8]) -> String {
    let sum = disk.iter().fold(0u32, |n, b| n.wrapping_mul(31).wrapping_add(u32::from(*b)));
    format!("{} bytes ({sum:08x})", disk.len())
}

impl std::fmt::Debug for Shot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "snapshot {} '{}' of {}", self.id, self.name, brief(&self.disk))
    }
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { active, snapshots, bitmaps, consistent } = self;
        write!(f, "{}, {snapshots:?}, bitmaps {bitmaps:?}, consistent {consistent}", brief(active))
    }
}

/// All bytes of a disk.
///
/// # Errors
/// What reading fails with.
pub fn disk(image: &Image) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).map_err(|e| format!("reading the disk: {e:?}"))?;
    Ok(bytes)
}

impl Contents {
    /// Reads an image from these files, in the order of [`Rig::files`], as a program that opens it anew does.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn read(rig: &Rig, files: &[Sparse]) -> Result<Self, String> {
        let open = |snapshot: Option<String>| {
            let read = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
            rig.open_state(files, &Opening { read, write: None }).map_err(|e| format!("opening: {e:?}"))
        };
        let image = open(None)?;
        let top = image.top_qcow2().unwrap();
        if let Some(e) = top.snapshot_error() {
            return Err(format!("the snapshot table: {e:?}"));
        }
        let mut snapshots = Vec::new();
        for record in top.snapshots().iter() {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let id = text(&record.id);
            let disk = disk(&open(Some(id.clone()))?).map_err(|e| format!("snapshot {id}: {e}"))?;
            snapshots.push(Shot { id, name: text(&record.name), disk });
        }
        let consistent = top.header().autoclear.contains(Autoclear::BITMAPS);
        Ok(Self { active: disk(&image)?, snapshots, bitmaps: bitmaps(&image)?, consistent })
    }

    /// As `read`, but the active disk and the bitmaps are what an open image says that they are.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn live(image: &Image, rig: &Rig, files: &[Sparse]) -> Result<Self, String> {
        let stored = Self::read(rig, files)?;
        Ok(Self { active: disk(image)?, bitmaps: bitmaps(image)?, ..stored })
    }

    /// The same where the order of snapshots and bitmaps says nothing.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.snapshots.sort_by(|a, b| a.id.cmp(&b.id));
        self.bitmaps.sort_by(|a, b| a.name.cmp(&b.name));
        self
    }

    /// Whether this may be what a crash left of a change from `old` to `new`: one of them as a whole. Each bitmap is as
    /// before or as after, or says that it is not to be believed: those that record changes, and with `resized` all.
    ///
    /// # Errors
    /// What is neither.
    pub fn judge(&self, old: &Self, new: &Self, resized: bool) -> Result<(), String> {
        let same = |other: &Self| self.active == other.active && self.snapshots == other.snapshots;
        if !same(old) && !same(new) {
            let first = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
            let places = (first(&self.active, &old.active), first(&self.active, &new.active));
            return Err(format!(
                "found {self:?}\nold   {old:?}\nnew   {new:?}\nfirst bytes that differ: {places:x?}"
            ));
        }
        if !self.consistent {
            return if self.bitmaps.is_empty() {
                Ok(())
            } else {
                Err(format!("bitmaps nobody vouches for: {self:?}"))
            };
        }
        let names = |c: &Self| c.bitmaps.iter().map(|b| b.name.clone()).collect::<Vec<_>>();
        if names(self) != names(old) && names(self) != names(new) {
            return Err(format!("bitmaps {:?}, old {:?}, new {:?}", names(self), names(old), names(new)));
        }
        let find = |c: &Self, name: &str| c.bitmaps.iter().find(|b| b.name == name).cloned();
        for bitmap in &self.bitmaps {
            let (before, after) = (find(old, &bitmap.name), find(new, &bitmap.name));
            let records = [&before, &after].into_iter().flatten().any(|b| b.enabled);
            let doubtful = bitmap.ranges.is_none() && (resized || records);
            let fine = doubtful || [before.as_ref(), after.as_ref()].contains(&Some(bitmap));
            if !fine {
                return Err(format!("{bitmap:?}, old {before:?}, new {after:?}"));
            }
        }
        Ok(())
    }
}

fn bitmaps(image: &Image) -> Result<Vec<Marked>, String> {
    let top = image.top_qcow2().unwrap();
    let records = top.bitmaps().map_err(|e| format!("the bitmap directory: {e:?}"))?;
    let mut bitmaps = Vec::new();
    for record in records {
        let flags = record.entry.flags;
        let name = String::from_utf8_lossy(&record.entry.name).into_owned();
        let doubtful = flags.contains(BitmapFlags::IN_USE) && !top.tracks_bitmap(&record.entry.name);
        let ranges = match doubtful {
            true => None,
            false => Some(image.bitmap_extents(&name).map_err(|e| format!("bitmap {name}: {e:?}"))?),
        };
        let granularity = 1 << record.entry.granularity_bits;
        bitmaps.push(Marked { name, granularity, enabled: flags.contains(BitmapFlags::AUTO), ranges });
    }
    Ok(bitmaps)
}

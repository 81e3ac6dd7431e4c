//! A larger disk: its last extent grows. What is new is durable before the header says that it is there, and the line in the descriptor
//! follows.

use std::ops::Range;
use std::sync::atomic::Ordering;

use qcow2_core::disk::WriteLayer;
use qcow2_core::layer::Layer;
use qcow2_core::space::{Preallocation, reserve, write_zero_bytes, zero_out};
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, Result, Storage, StorageExt, check_limit};

use super::Vmdk;
use super::extent::{Data, Extent};
use super::grains::{Directory, Grains, front};
use super::write::Tables;
use crate::descriptor::{self, MAX_BYTES};
use crate::fields::SECTOR;
use crate::geometry::Geometry;
use crate::sparse;

/// Bytes of an extent of the kinds whose extents have at most 2 GiB.
const SPLIT: u64 = 2 << 30;
/// Where the header has its capacity, and the places of both directories.
const CAPACITY: Range<usize> = 12..20;
const REDUNDANT: Range<usize> = 48..56;
const DIRECTORY: Range<usize> = 56..64;

impl Vmdk {
    pub(super) fn grow_to(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        let old = self.virtual_size();
        if size == old {
            return Ok(());
        }
        let refuse =
            |kind, message: String| Err(self.storage.located(Error::new(kind, message).with_field("size")));
        let Some(last) = self.extents.last().filter(|_| size > old) else {
            return refuse(
                ErrorKind::UnsupportedFeature,
                "a vmdk image is not made smaller, because its size stands in its descriptor and in each extent, and no order of writes keeps all of them true: convert its disk into another image (an empty one does not grow, either)".to_owned(),
            );
        };
        if self.below.load(Ordering::Acquire) > old {
            let message = "the parent is longer than the disk, and its end would show in the new part";
            return refuse(ErrorKind::UnsupportedFeature, message.to_owned());
        }
        check_limit("size", size, self.options.max_virtual_size).map_err(|e| self.storage.located(e))?;
        let bytes = last.size() + (size - old);
        if self.create_type().starts_with("twoGbMaxExtent") && bytes > SPLIT {
            let message = format!(
                "the last extent would have {bytes} bytes, more than 2 GiB: the disk needs another one"
            );
            return refuse(ErrorKind::UnsupportedFeature, message);
        }
        self.change_cid()?;
        self.flush()?;
        let sectors = bytes / SECTOR;
        let text = self.resized_descriptor(sectors, size)?;
        match &last.data {
            Data::Plain(storage) => grow_plain(last, &**storage, bytes, preallocation, job)?,
            Data::Grains(grains) => {
                if preallocation != Preallocation::Off {
                    let message = "only flat extents can be preallocated";
                    let error = Error::new(ErrorKind::InvalidArgument, message).with_field("preallocation");
                    return Err(self.storage.located(error));
                }
                grains.grow(
                    self.tables(self.extents.len() - 1),
                    sectors,
                    self.options.max_metadata_bytes,
                    job,
                )?;
            }
            Data::Missing | Data::Zero => return Err(self.not_open(last)),
        }
        self.storage.write_all_at(Mem::from(&text[..]), self.descriptor_room.start)?;
        self.storage.flush()?;
        last.sectors.store(sectors, Ordering::Release);
        Ok(())
    }

    /// The descriptor of the disk with another size, as long as the one that it replaces, or longer.
    fn resized_descriptor(&self, sectors: u64, size: u64) -> Result<Vec<u8>> {
        let room = (self.descriptor_room.end - self.descriptor_room.start).min(MAX_BYTES);
        let mut old = front(&*self.storage, self.descriptor_room.start, room as usize)?;
        if let Some(end) = old.iter().position(|byte| *byte == 0) {
            old.truncate(end);
        }
        let mut text = descriptor::resized(&old, sectors, size);
        check_limit("descriptor", text.len() as u64, room).map_err(|e| self.storage.located(e))?;
        // A shorter one leaves nothing of the old one behind.
        let fill = if self.own.is_some() { 0 } else { b'\n' };
        text.resize(text.len().max(old.len()), fill);
        Ok(text)
    }
}

fn grow_plain(
    extent: &Extent,
    storage: &dyn Storage,
    bytes: u64,
    mode: Preallocation,
    job: &Job,
) -> Result<()> {
    let start = extent.line.offset * SECTOR;
    let (old, new) = (start + extent.size(), start + bytes);
    let refuse = |message: &str| {
        Err(storage.located(Error::new(ErrorKind::UnsupportedFeature, message).with_field("extent")))
    };
    if storage.traits().block_device {
        return refuse("an extent on a device does not grow");
    }
    if storage.size()? != old {
        return refuse("the file has bytes behind the extent: it cannot grow");
    }
    let prepared = match mode {
        Preallocation::Metadata => {
            refuse("a flat extent has no metadata to preallocate: falloc and full are possible")
        }
        Preallocation::Falloc => reserve(storage, old..new, job),
        Preallocation::Full => write_zero_bytes(storage, old, new - old, job),
        Preallocation::Off => Ok(()),
    };
    let sized = prepared.and_then(|()| storage.resize(new)).and_then(|()| storage.flush());
    if sized.is_err() {
        storage.resize(old)?;
    }
    sized
}

impl Grains {
    /// Gives the extent more sectors. All that was written before is in the file.
    fn grow(&self, tables: Tables<'_>, sectors: u64, most: u64, job: &Job) -> Result<()> {
        let old = self.geometry();
        let new = Geometry { capacity: sectors, ..old }.checked().map_err(|e| self.storage.located(e))?;
        check_limit("grain directory size", new.directory_bytes(), most)
            .map_err(|e| self.storage.located(e))?;
        self.clear_end(tables, old)?;
        let directories =
            if new.tables() > old.tables() { Some(self.write_directories(old, new, job)?) } else { None };
        self.storage.flush()?;
        self.write_header(sectors, directories.as_ref())?;
        if let Some((redundant, directory)) = directories {
            if let (Some(mine), Some(new)) = (self.writer()?.redundant.as_ref(), redundant) {
                *mine.write() = new;
            }
            *self.directory.write() = directory;
        }
        self.set_capacity(sectors);
        Ok(())
    }

    /// What lies behind the end of the disk must be nothing when it becomes a part of it.
    fn clear_end(&self, tables: Tables<'_>, old: Geometry) -> Result<()> {
        let grain = old.grain_bytes();
        let end = old.size().next_multiple_of(grain);
        self.stored(tables, old.size(), end - old.size(), |host, length| {
            self.storage.zero(host, length, false)
        })?;
        let (index, number) = (end / old.coverage(), end % old.coverage() / grain);
        let rest = if number == 0 { None } else { self.table(tables.cache, tables.extent, index)? };
        let unused = rest.is_some_and(|table| table.empty_from(number) + number != old.table_entries);
        if unused {
            let message = format!("the grain table {index} has entries behind the end of the disk");
            return Err(self.error(ErrorKind::Corrupt, message, "grain table entry"));
        }
        Ok(())
    }

    /// Both directories anew, with new tables that are empty.
    fn write_directories(
        &self,
        old: Geometry,
        new: Geometry,
        job: &Job,
    ) -> Result<(Option<Directory>, Directory)> {
        let writer = self.writer()?;
        let added = new.tables() - old.tables();
        let table = new.table_bytes().next_multiple_of(SECTOR);
        let list = new.directory_bytes().next_multiple_of(SECTOR);
        let copies = 1 + u64::from(writer.redundant.is_some());
        let length = ((list + added * table) * copies).next_multiple_of(new.grain_bytes());
        let place = self.allocate(writer, length)?;
        zero_out(&*self.storage, place..place + length, false, job)?;
        let mut at = place;
        let mut make = |entries: Vec<u64>| -> Result<Directory> {
            let tables = (0..added).map(|number| (at + list + number * table) / SECTOR);
            let entries: Vec<u64> = entries.into_iter().take(old.tables() as usize).chain(tables).collect();
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| (*entry as u32).to_le_bytes()).collect();
            self.storage.write_all_at(Mem::from(&bytes[..]), at)?;
            let directory = Directory::new(at / SECTOR, entries);
            at += list + added * table;
            Ok(directory)
        };
        let redundant =
            writer.redundant.as_ref().map(|mine| make(mine.read().all().collect())).transpose()?;
        let directory = make(self.directory.read().all().collect())?;
        Ok((redundant, directory))
    }

    /// Changes the header by one write of its sector.
    fn write_header(&self, sectors: u64, directories: Option<&(Option<Directory>, Directory)>) -> Result<()> {
        let mut bytes = [0; sparse::HEADER_BYTES];
        self.storage.read_exact_at(MemMut::from(&mut bytes[..]), 0)?;
        let mut put = |range: Range<usize>, number: u64| {
            if let Some(field) = bytes.get_mut(range) {
                field.copy_from_slice(&number.to_le_bytes());
            }
        };
        put(CAPACITY, sectors);
        if let Some((redundant, directory)) = directories {
            put(DIRECTORY, directory.sector);
            if let Some(redundant) = redundant {
                put(REDUNDANT, redundant.sector);
            }
        }
        self.storage.write_all_at(Mem::from(&bytes[..]), 0)?;
        self.storage.flush()
    }
}

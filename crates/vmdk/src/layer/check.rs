//! Holding the metadata against itself: tables and their copies, places in the file, and grains that lie over each other.

use qcow2_core::check::{CheckLayer, CheckReport, FindingCode, Repair, Tally};
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, Result, StorageExt};

use super::extent::{Data, Extent};
use super::grains::{Directory, Grains, read_directory};
use super::{OpenOptions, Vmdk};
use crate::fields::SECTOR;
use crate::geometry::{Geometry, Grain};

/// Most grains whose places are held in memory: 256 MiB of them.
const MAX_PLACES: usize = 32 << 20;
/// Tables that are read between two looks at the job.
const STEP: u64 = 64;

impl CheckLayer for Vmdk {
    /// What QEMU does not count stays 0, so that both say the same.
    fn check(&self, max_findings: usize, job: &Job) -> Result<CheckReport> {
        self.judge(max_findings, false, job)
    }

    /// Copies of tables become those of the tables, which count. Nothing else has a second source.
    fn repair(&self, repair: Repair, max_findings: usize, job: &Job) -> Result<CheckReport> {
        let report = self.judge(max_findings, repair == Repair::All, job)?;
        for extent in &self.extents {
            if let Some(grains) = extent.grains().filter(|_| report.corruptions_fixed > 0) {
                grains.storage.flush()?;
            }
        }
        Ok(report)
    }
}

impl Vmdk {
    fn judge(&self, max_findings: usize, repair: bool, job: &Job) -> Result<CheckReport> {
        job.set_total(self.extents.iter().map(Extent::size).sum());
        let mut tally = Tally::new(max_findings);
        let mut report = CheckReport::default();
        for extent in &self.extents {
            match &extent.data {
                Data::Missing => report.failure = Some(self.not_open(extent)),
                Data::Zero | Data::Plain(_) => {}
                Data::Grains(grains) => {
                    let options = &self.options;
                    Check { grains, extent, options, repair, tally: &mut tally, places: Vec::new() }
                        .run(job)?;
                }
            }
            job.advance(if extent.grains().is_none() { extent.size() } else { 0 });
        }
        report.take(tally);
        Ok(report)
    }
}

struct Check<'a> {
    grains: &'a Grains,
    extent: &'a Extent,
    options: &'a OpenOptions,
    /// Copies that differ are written.
    repair: bool,
    tally: &'a mut Tally,
    /// The first byte of each grain and table, and how many bytes it has.
    places: Vec<(u64, u32)>,
}

impl Check<'_> {
    fn run(mut self, job: &Job) -> Result<()> {
        let geometry = self.grains.geometry();
        let copy = self.redundant(geometry)?;
        let end = self.grains.storage.size()?;
        for table in 0..geometry.tables() {
            if table % STEP == 0 {
                job.checkpoint()?;
            }
            let mut own = self.table(table, self.grains.entry(table), "grain directory", end)?;
            if let Some(copy) = &copy {
                let other = self.table(table, copy.get(table), "copy of the grain directory", end)?;
                if own.is_some() != other.is_some() {
                    let message = format!("grain table {table} and its copy are not both there");
                    self.corrupt(FindingCode::Copy, message, 0);
                }
                if let Some((entries, other)) = own.take_if(|_| other.is_some()).zip(other) {
                    own = Some(self.compare(table, entries, copy, &other, end)?);
                }
            }
            self.entries(table, &own.unwrap_or_default(), end)?;
            job.advance(
                geometry
                    .coverage()
                    .min(geometry.size().saturating_sub(table.saturating_mul(geometry.coverage()))),
            );
        }
        self.overlaps();
        Ok(())
    }

    fn corrupt(&mut self, code: FindingCode, message: String, offset: u64) {
        let name = self.extent.line.filename.as_deref().map(String::from_utf8_lossy);
        let message = match name.filter(|_| self.extent.start > 0) {
            Some(name) => format!("extent '{name}': {message}"),
            None => message,
        };
        self.tally.corruption(code, offset, || message);
    }

    /// The copy of the directory, if the header names one.
    fn redundant(&mut self, geometry: Geometry) -> Result<Option<Directory>> {
        let Some(sector) = geometry.redundant else { return Ok(None) };
        match read_directory(&*self.grains.storage, "rgdOffset", geometry, sector, self.options) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.corrupt(FindingCode::Copy, error.message().to_owned(), sector * SECTOR);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The entries of a table that a directory names, if it is in the file.
    fn table(&mut self, index: u64, entry: u64, whose: &str, end: u64) -> Result<Option<Vec<u64>>> {
        let geometry = self.grains.geometry();
        let place = match geometry.table(entry) {
            Ok(None) => return Ok(None),
            Ok(Some(place)) => place,
            Err(error) => {
                self.corrupt(
                    FindingCode::TableEntry,
                    format!("{whose}, entry {index}: {}", error.message()),
                    0,
                );
                return Ok(None);
            }
        };
        let used = geometry.used_table_bytes(index);
        if place.checked_add(used).is_none_or(|behind| behind > end) {
            let message = format!(
                "{whose}, entry {index}: the table at {place:#x} lies outside the file ({end} bytes)"
            );
            self.corrupt(FindingCode::BeyondEndOfFile, message, place);
            return Ok(None);
        }
        self.note(place, geometry.table_bytes() as u32)?;
        let mut bytes = vec![0; geometry.table_bytes() as usize];
        self.grains.storage.read_padded_at(MemMut::from(&mut bytes[..]), place)?;
        let mut entries = geometry.decode(&bytes);
        entries.truncate((used / geometry.entry_bytes()) as usize);
        Ok(Some(entries))
    }

    fn note(&mut self, place: u64, length: u32) -> Result<()> {
        if self.places.len() >= MAX_PLACES {
            let message =
                format!("the extent has more than {MAX_PLACES} grains: their places take too much memory");
            return Err(self.grains.storage.located(Error::new(ErrorKind::Limit, message)));
        }
        self.places.push((place, length));
        Ok(())
    }

    /// Holds a table against its copy, and gives the entries that count from here on.
    fn compare(
        &mut self,
        index: u64,
        own: Vec<u64>,
        copy: &Directory,
        other: &[u64],
        end: u64,
    ) -> Result<Vec<u64>> {
        let differs = |(a, b): (&u64, &u64)| a != b;
        let Some(number) = own.iter().zip(other).position(differs) else { return Ok(own) };
        let count = own.iter().zip(other).filter(|(a, b)| a != b).count();
        let message =
            || format!("grain table {index} and its copy differ in {count} entries, from entry {number} on");
        let geometry = self.grains.geometry();
        let place = |entry| geometry.table(entry).ok().flatten();
        let places = place(self.grains.entry(index)).zip(place(copy.get(index)));
        let Some((table, copied)) = places.filter(|_| self.repair) else {
            // A power cut can leave the copy behind: nothing is lost, and nobody reads it while the table is whole.
            self.tally.corruption(FindingCode::Copy, place(self.grains.entry(index)), message);
            return Ok(own);
        };
        // The table counts, but for entries that are damaged there and not in the copy.
        let better = |(own, other): (&u64, &u64)| {
            let restored = !self.is_sound(*own, end) && self.is_sound(*other, end);
            if restored { *other } else { *own }
        };
        let entries: Vec<u64> = own.iter().zip(other).map(better).collect();
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| (*entry as u32).to_le_bytes()).collect();
        for to in [table, copied] {
            self.grains.storage.write_all_at(Mem::from(&bytes[..]), to)?;
        }
        self.tally.fixed_corruption(FindingCode::Copy, table, message);
        Ok(entries)
    }

    /// Whether an entry can be one.
    fn is_sound(&self, entry: u64, end: u64) -> bool {
        let geometry = self.grains.geometry();
        match geometry.grain(entry) {
            Ok(Grain::Data(place)) => place < end && place >= geometry.overhead * SECTOR,
            Ok(Grain::Zero | Grain::Unallocated) => true,
            Err(_) => false,
        }
    }

    fn entries(&mut self, index: u64, entries: &[u64], end: u64) -> Result<()> {
        let geometry = self.grains.geometry();
        for (number, &entry) in (0u64..).zip(entries).filter(|(_, entry)| **entry != 0) {
            let at = self.extent.start + (index * geometry.table_entries + number) * geometry.grain_bytes();
            let place = match geometry.grain(entry) {
                Ok(Grain::Data(place)) => place,
                Ok(Grain::Zero | Grain::Unallocated) => continue,
                Err(error) => {
                    self.corrupt(
                        FindingCode::TableEntry,
                        format!("guest offset {at:#x}: {}", error.message()),
                        0,
                    );
                    continue;
                }
            };
            if place >= end {
                let message = format!(
                    "guest offset {at:#x}: the grain at {place:#x} lies outside the file ({end} bytes)"
                );
                self.corrupt(FindingCode::BeyondEndOfFile, message, place);
            } else if place < geometry.overhead * SECTOR {
                let message = format!("guest offset {at:#x}: the grain at {place:#x} lies in the metadata");
                self.corrupt(FindingCode::TableEntry, message, place);
            } else {
                // How long a compressed one is, its marker says; two must not begin in one place.
                let length = if geometry.compressed { 1 } else { geometry.grain_bytes() };
                self.note(place, u32::try_from(length).unwrap_or(u32::MAX))?;
            }
        }
        Ok(())
    }

    fn overlaps(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        places.sort_unstable();
        for pair in places.windows(2) {
            if let [(first, length), (second, _)] = *pair
                && first + u64::from(length) > second
            {
                let message = format!("the grain or table at {second:#x} lies over the one at {first:#x}");
                self.corrupt(FindingCode::BlockShared, message, second);
            }
        }
    }
}

//! The log: how changes of the table become durable.

use std::sync::atomic::Ordering;

use qcow2_core::{Layer, Mem, Result, StorageExt};

use super::{Writer, changed_header};
use crate::Vhdx;
use crate::file::{new_guid, write_headers};
use crate::sectors::Sector;
use crate::structures::{Guid, Header, LOG_SECTOR, MOST_DESCRIPTORS, encode_entry};

/// The headers and the log, as the file has them.
#[derive(Debug)]
pub(super) struct LogState {
    header: Header,
    slot: usize,
    /// Where the next entry goes, in bytes of the log.
    position: u64,
    /// Its number.
    sequence_number: u64,
    /// What the entries have since the log began at its start.
    guid: Guid,
}

impl LogState {
    pub(super) fn new(header: Header, slot: usize) -> Self {
        Self { header, slot, position: 0, sequence_number: 1, guid: Guid::default() }
    }

    /// Whether the file has to be brought in by who opens it now.
    pub(super) fn is_in_use(&self) -> bool {
        !self.guid.is_zero() && self.header.log_guid == self.guid
    }
}

impl Vhdx {
    /// Says in the headers that the file changes ([MS-VHDX] 2.2.2), before it does.
    pub(super) fn begin(&self, writer: &Writer) -> Result<()> {
        if writer.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut log = writer.log.lock();
        if !writer.begun.load(Ordering::Acquire) {
            let header = changed_header(&log.header)?;
            self.write_headers(writer, &mut log, &header)?;
            writer.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn write_headers(&self, writer: &Writer, log: &mut LogState, header: &Header) -> Result<()> {
        let written = write_headers(&**self.storage(), header, log.slot);
        log.header = written.inspect_err(|e| writer.lose(e))?;
        Ok(())
    }

    /// Makes everything durable that was written.
    fn sync(&self, writer: &Writer) -> Result<()> {
        self.storage().flush().inspect_err(|e| writer.lose(e))
    }

    /// Changes metadata, all at once, in memory.
    pub(super) fn change(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        while !self.sectors.change(&*self.data, parts, self.most_changed())? {
            self.commit()?;
        }
        Ok(())
    }

    /// So many sectors make one entry of the log, of at most half of it.
    fn most_changed(&self) -> usize {
        let half = u64::from(self.front.header.log_length) / 2 / LOG_SECTOR;
        MOST_DESCRIPTORS.min(half.saturating_sub(1) as usize)
    }

    /// Makes everything durable that was written: data, then the entries of the table that refer to it.
    pub(super) fn commit(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut log = writer.log.lock();
        self.commit_with(writer, &mut log)
    }

    fn commit_with(&self, writer: &Writer, log: &mut LogState) -> Result<()> {
        let given_up = writer.space.lock().take_given_up();
        if let Err(error) = self.commit_changed(writer, log) {
            writer.space.lock().keep_given_up(given_up);
            return Err(error);
        }
        let left = {
            let mut space = writer.space.lock();
            space.leave(given_up);
            space.left()
        };
        for offset in &left {
            // Space that stays in use is no damage.
            let _ = self.storage().free(*offset, self.geometry().block_size);
        }
        writer.space.lock().freed(left);
        Ok(())
    }

    fn commit_changed(&self, writer: &Writer, log: &mut LogState) -> Result<()> {
        let changed = self.sectors.changed();
        // The data of new blocks; and, in its place, what the log has: it is not needed any more.
        self.sync(writer)?;
        if changed.is_empty() {
            return Ok(());
        }
        self.append(writer, log, &changed)?;
        for (offset, sector) in &changed {
            self.storage().write_all_at(Mem::from(&**sector), *offset)?;
        }
        self.sectors.written(&changed);
        Ok(())
    }

    /// Makes an entry durable that brings these sectors. One that goes to the start of the log gets another GUID: entries that were
    /// done with never look like what follows it.
    fn append(&self, writer: &Writer, log: &mut LogState, changed: &[(u64, Sector)]) -> Result<()> {
        let sectors: Vec<(u64, &[u8])> =
            changed.iter().map(|(offset, sector)| (*offset, &**sector)).collect();
        let length = (1 + sectors.len() as u64) * LOG_SECTOR;
        if !log.header.log_guid.is_zero() && log.position + length > log.header.log_length.into() {
            self.end_log(writer, log)?;
        }
        if log.header.log_guid.is_zero() {
            (log.position, log.guid) = (0, new_guid()?);
        }
        let file_length = self.storage().size()?;
        let entry = encode_entry(log.guid, log.position, log.sequence_number, file_length, &sectors);
        self.storage().write_all_at(Mem::from(&entry[..]), log.header.log_offset + log.position)?;
        self.sync(writer)?;
        if log.header.log_guid.is_zero() {
            let header = Header { log_guid: log.guid, ..log.header };
            self.write_headers(writer, log, &header)?;
        }
        log.position += length;
        log.sequence_number += 1;
        Ok(())
    }

    /// Says that the log is empty. What it brought is durable in its place.
    fn end_log(&self, writer: &Writer, log: &mut LogState) -> Result<()> {
        let header = Header { log_guid: Guid::default(), ..log.header };
        self.write_headers(writer, log, &header)
    }

    /// As [`Vhdx::commit`], and leaves a file with an empty log.
    pub(super) fn settle_log(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut log = writer.log.lock();
        self.commit_with(writer, &mut log)?;
        if log.is_in_use() {
            self.sync(writer)?;
            self.end_log(writer, &mut log)?;
        }
        Ok(())
    }
}

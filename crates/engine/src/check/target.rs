//! What is checked, how, and why a check ends early.

use qcow2_format::{Header, Limits};

use qcow2_core::check::Repair;

use crate::{Error, ErrorKind, Job, Result, Storage, StorageExt};

/// Bytes of a sector: lengths are counted in whole sectors.
pub(super) const SECTOR: u64 = 512;

/// Most clusters in an image file that can be checked; QEMU's limit as well.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// How to check.
#[derive(Debug, Clone, Copy)]
pub struct CheckOptions {
    /// Limits on memory and on metadata.
    pub limits: Limits,
    /// Most findings that are kept with their message; all are counted.
    pub max_findings: usize,
    /// Threads that read L2 tables ahead of the walk; 0 reads in the walk itself.
    pub readers: usize,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { limits: Limits::default(), max_findings: 10_000, readers: 2 }
    }
}

/// What is checked, and under which rules.
pub(super) struct Target<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) header: &'a Header,
    pub(super) options: &'a CheckOptions,
    pub(super) job: &'a Job,
    /// What a repair may change; `None` for a check that only reads.
    pub(super) repair: Option<Repair>,
}

/// Why a check ends early.
pub(super) enum Stop {
    /// The image is too damaged to go on: part of the result.
    Failed(Error),
    /// The caller, the system or a limit ends the call.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Stop {
    pub(super) fn corrupt(message: impl Into<String>, offset: u64) -> Self {
        Self::Failed(Error::new(ErrorKind::Corrupt, message).with_offset(offset))
    }
}

/// The size of the image file.
pub(super) struct File {
    /// Bytes, in whole sectors.
    pub(super) length: u64,
    pub(super) clusters: u64,
}

impl File {
    pub(super) fn measure(target: &Target<'_>) -> Result<Self, Stop> {
        let length = target.storage.size()?.next_multiple_of(SECTOR);
        let clusters = target.header.geometry.clusters_for(length);
        if clusters > MAX_CLUSTERS {
            let message = format!("an image file of {clusters} clusters is too large to check");
            return Err(Stop::Failed(Error::new(ErrorKind::Limit, message)));
        }
        Ok(Self { length, clusters })
    }
}

/// Whether the file ends inside the active L1 table.
pub(super) fn short_l1(storage: &dyn Storage, header: &Header) -> Result<bool> {
    let bytes = u64::from(header.l1_size) * 8;
    Ok(bytes > 0 && header.l1_table_offset.get().saturating_add(bytes) > storage.size()?)
}

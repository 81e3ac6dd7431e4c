//! Compacting: giving back to the file system what an image does not need.
//!
//! **In place** ([`in_place`]): leaked clusters are freed, clusters that hold nothing but zeroes given up (on request),
//! holes punched for every free host cluster and for what nothing refers to in a data file, and the file cut behind
//! the last cluster in use.
//!
//! **Rewriting** ([`rewrite`]): then clusters are moved from the end of the file into the free ones further down, so
//! that the file becomes short, in batches, without a second copy of the data.
//!
//! **Crash rule.** Every change keeps what the disk and the snapshots read as. A move is: take a free cluster and give
//! it the refcount that it will need; copy; sync; change what refers to it, each reference by one write inside a
//! sector; sync; free. Between the two syncs either place has all the references it may get counted and holds the
//! same bytes, so it does not matter which references a power cut lets through: what is left over is a leak. A zero
//! cluster replaces one of zeroes by the same rule, without a new place. COPIED flags stay right: a cluster whose
//! refcount is one has one reference, which moves; others have no flag.
//!
//! Guest writes wait, guest reads go on: clusters are given up once no read can reach them.

mod compressed;
mod data_file;
mod holes;
mod in_place;
mod l2_tables;
mod options;
mod packing;
mod rewrite;
mod space;
mod structures;
mod survey;
mod sweep;
mod table_edit;
mod tables;

use self::options::measure;
pub use self::options::{CompactOptions, CompactResult};
use crate::check::{CheckOptions, References, count_references};
use crate::image::{Image, Qcow2, read_header};
use crate::maintenance::Session;
use crate::{Error, ErrorKind, Job, Result};

impl Image {
    /// Compacts the top layer. What the disk and its snapshots read as stays. Cancelled through `job`, it leaves a
    /// sound image, compacted in part. Progress is told in bytes of the image file. A dry run needs no image
    /// that is open for writing.
    ///
    /// # Errors
    /// `UnsupportedFeature` for a disk of another format, and for zeroes of what is encrypted; `Corrupt` for an image with
    /// errors, which must be repaired first, before anything is changed; `Limit` when the bookkeeping exceeds the limit on memory; `Aborted`; else as
    /// [`Image::write_at`].
    pub fn compact(&self, options: CompactOptions, job: &Job) -> Result<CompactResult> {
        let Some(image) = self.top_qcow2() else {
            let message = match self.layers().first().and_then(|top| top.unit()) {
                None => format!(
                    "a {} disk has no clusters to compact: discard gives its space back",
                    self.format()
                ),
                Some(_) => format!("compacting {} images is not supported", self.format()),
            };
            return Err(Error::new(ErrorKind::UnsupportedFeature, message));
        };
        if options.dry_run {
            return self.settled(|| {
                let references = references(image, job)?;
                survey::estimate(image, &references, options, self.layers().len() > 1, job)
            });
        }
        let session = Session::begin(self)?;
        // With what waits behind the last cluster to be used, which is given back next.
        let mut result = measure(image)?;
        session.writer.restart_allocation(image)?;
        let references = references(image, job)?;
        let compacted = session.compact(&references, options, job, &mut result);
        // Also after an error or a cancellation: what was freed is cut off.
        let finished = session.writer.restart_allocation(image);
        compacted.and(finished)?;
        let after = measure(image)?;
        Ok(CompactResult {
            length_after: after.length_before,
            allocated_after: after.allocated_before,
            ..result
        })
    }
}

/// What refers to the clusters of a sound image.
fn references(image: &Qcow2, job: &Job) -> Result<References> {
    let storage = &**image.storage();
    let options = CheckOptions { limits: *image.limits(), max_findings: 1, ..CheckOptions::default() };
    let header = read_header(storage)?;
    let references = count_references(storage, &header, &options, &job.silent())?;
    if references.errors == 0 {
        return Ok(references);
    }
    let message = format!("the image has {} errors: repair it before it is compacted", references.errors);
    Err(image.error(ErrorKind::Corrupt, message))
}

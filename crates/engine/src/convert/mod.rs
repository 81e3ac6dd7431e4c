//! Convert: copies the disk of a [`GuestSource`] into a new target, or one that exists ([`core`](qcow2_core::convert) has
//! the way that all of them share).
//!
//! For a new qcow2 image, host clusters are allocated strictly in the order of the chunks, and written by whichever worker is there:
//! the target's bytes do not depend on the number of workers. The header comes last: a target that was not finished is no image.

mod bitmaps;
mod prepare;
mod qcow2;

pub use qcow2_core::convert::{
    Compression, ConvertOptions, ConvertResult, DEFAULT_SPARSE_SIZE, Delta, Window, data_bytes,
};
use qcow2_core::convert::{DiskSink, RawSink, Sink, copy_disk};

use self::qcow2::Qcow2Sink;
use crate::create::{CreateOptions, NewTarget, Preallocation, check_data_file};
use crate::{Error, ErrorKind, GuestSource, Image, Job, Qcow2, Result};

/// Where to convert to.
#[derive(Debug, Clone)]
pub enum ConvertTarget<'a> {
    /// A new disk; of a qcow2 image the source's size is the size.
    New(NewTarget),
    /// An image that is open for writing, at least as large as the source. What its disk has behind the source's end stays; closing it
    /// is the caller's. An error leaves part of the source there.
    Existing(&'a Image),
}

/// Converts `source` into `target`. The caller removes the target on an error.
///
/// # Errors
/// `InvalidArgument` or `Limit` for options that contradict each other (nothing is written then), `Aborted`,
/// `Io` (with `ENOSPC` on a full disk), and whatever reading the source meets.
pub fn convert(
    source: &dyn GuestSource,
    target: ConvertTarget<'_>,
    options: &ConvertOptions,
    job: &Job,
) -> Result<ConvertResult> {
    check(&target, options)?;
    copy_disk(source, options, job, |context, workers| {
        let sink: Box<dyn Sink + '_> = match target {
            ConvertTarget::New(NewTarget::Raw { storage, preallocation, keep }) => {
                Box::new(RawSink::new(context, storage, preallocation, keep)?)
            }
            ConvertTarget::New(NewTarget::Format { image, hosts }) => image.sink(hosts, context, workers)?,
            ConvertTarget::New(NewTarget::Qcow2 { storage, data_file, mut create }) => {
                create.size = source.virtual_size();
                Box::new(Qcow2Sink::new(context, storage, data_file, *create, workers)?)
            }
            ConvertTarget::Existing(image) => {
                let unit = image.layers().first().and_then(|top| top.unit());
                let sink = DiskSink::new(context, image, unit)?;
                // Version 2 has no zero clusters.
                let hides = image.layers().len() == 1
                    || image.top_qcow2().is_none_or(|top| top.header().version >= 3);
                Box::new(if hides { sink } else { sink.with_zeroes_as_data() })
            }
        };
        Ok(sink)
    })
}

fn check(target: &ConvertTarget<'_>, options: &ConvertOptions) -> Result<()> {
    let refuse =
        |field, message: &str| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
    match target {
        ConvertTarget::New(NewTarget::Raw { .. }) if options.compression.is_some() => {
            refuse("compress", "a raw target cannot be compressed")
        }
        ConvertTarget::New(NewTarget::Format { image, .. })
            if options.compression.is_some() && !image.compresses() =>
        {
            refuse("compress", &format!("a {} target cannot be compressed", image.format()))
        }
        ConvertTarget::New(NewTarget::Raw { .. }) if options.delta.is_some() => {
            refuse("base", "a raw target cannot have a backing file")
        }
        ConvertTarget::New(NewTarget::Format { image, .. })
            if options.delta.is_some() != image.has_backing() =>
        {
            let message = match image.has_backing() {
                true => "a convert onto a backing file needs its base".to_owned(),
                false => format!("a {} target has no backing file", image.format()),
            };
            refuse("base", &message)
        }
        ConvertTarget::New(NewTarget::Raw { preallocation: Preallocation::Metadata, .. }) => {
            refuse("preallocation", "a raw target has no metadata to preallocate")
        }
        ConvertTarget::New(NewTarget::Raw { .. } | NewTarget::Format { .. }) => Ok(()),
        ConvertTarget::Existing(_) if options.delta.is_some() && options.target_is_zero => {
            refuse("target_is_zero", "a target that is zero everywhere lacks what the base has")
        }
        ConvertTarget::Existing(_) if options.delta.is_some() && options.compression.is_some() => refuse(
            "compress",
            "a part of a target that exists cannot be compressed: its clusters are not whole",
        ),
        ConvertTarget::Existing(image) => {
            let top = image.top_qcow2();
            let compresses = |top: &Qcow2| !top.header().has_data_file() && top.host_is_guest();
            if options.compression.is_some() && !top.is_some_and(compresses) {
                return refuse("compress", "the target cannot hold compressed clusters");
            }
            Ok(())
        }
        ConvertTarget::New(NewTarget::Qcow2 { create, data_file, .. }) => {
            if options.compression.is_some() {
                check_compressed(create)?;
            }
            if options.delta.is_none() && create.backing.is_some() {
                return refuse("backing_file", "a convert onto a backing file needs its base");
            }
            if options.delta.is_some() && create.backing.is_none() {
                return refuse("base", "a convert onto a base needs the name of the backing file");
            }
            check_data_file(create, data_file.is_some())?;
            create.validate()
        }
    }
}

/// Refuses a new image that cannot hold compressed clusters.
pub(crate) fn check_compressed(create: &CreateOptions) -> Result<()> {
    let refuse =
        |field, message: &str| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
    if create.data_file.is_some() {
        return refuse("compress", "an external data file cannot hold compressed clusters");
    }
    if create.data_door.is_some() {
        return refuse("compress", "an encrypted target cannot hold compressed clusters");
    }
    if create.preallocation != Preallocation::Off {
        return refuse("preallocation", "compressed clusters cannot be preallocated");
    }
    Ok(())
}

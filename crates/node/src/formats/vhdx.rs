//! VHDX: its row, and the options of new images by their names in the API.

use std::sync::Arc;

use qcow2_engine::files::NewDisk;
use qcow2_engine::measure::MeasureTarget;
use qcow2_engine::{Error, ErrorKind, OpenOptions, Result};
use qcow2_vhdx::{NewOptions, NewVhdx, Parent, ParentId, Subformat, Vhdx};

use super::{Format, Untrusted, unknown_parent};
use crate::inspect::{Inspected, Seen};
use crate::shape::{Purpose, Shape, StoredParent};

pub(super) const VHDX: Format = Format {
    name: "vhdx",
    plain: false,
    open: |files, options| Ok(Box::new(Vhdx::open(files.own, &open_options(options))?)),
    inspect: |image, options| {
        let options = open_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_vhdx::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_vhdx::inspect_bytes(bytes, &options),
        };
        let metadata = found.metadata.as_ref();
        let seen = found.header.map(|_| Seen {
            virtual_size: metadata.map_or(0, |metadata| metadata.virtual_size),
            cluster_size: metadata.map(|metadata| metadata.block_size),
            backing_format: Some("vhdx"),
            ..Seen::default()
        });
        Ok(Inspected::of_other(seen, found.backing_file.as_deref(), &found.findings))
    },
    make: |shape, Purpose { size, .. }| Ok(NewDisk::Format(new(shape, shape.parent()?, size)?)),
    measure: |shape, Purpose { size, .. }| Ok(MeasureTarget::Format(new(shape, None, size)?)),
};

fn open_options(options: &OpenOptions) -> qcow2_vhdx::OpenOptions {
    qcow2_vhdx::OpenOptions {
        max_virtual_size: options.limits.max_virtual_size,
        max_metadata_bytes: options.limits.max_metadata_bytes,
        cache_bytes: options.l2_cache_bytes,
    }
}

/// A disk of `size` bytes, rounded up to a sector.
fn new(shape: &Shape, parent: Option<StoredParent<'_>>, size: u64) -> Result<Arc<NewVhdx>> {
    let defaults = NewOptions::default();
    let subformat = match shape.word("subformat") {
        None | Some("dynamic") => Subformat::Dynamic,
        Some("fixed") => Subformat::Fixed,
        Some(other) => {
            let message = format!("unknown subformat '{other}' of a vhdx image: known are dynamic and fixed");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("subformat"));
        }
    };
    // What Hyper-V makes itself.
    let block_size = if shape.word("preset") == Some("hyper-v") { 32 << 20 } else { 0 };
    let sector_size = match shape.number("logicalSectorSize") {
        Some(4096) => 4096,
        _ => defaults.sector_size,
    };
    let parent = match parent {
        None => None,
        Some((filename, id)) => {
            let id = ParentId::parse(id).ok_or_else(|| unknown_parent("vhdx"))?;
            if shape.number("logicalSectorSize").is_some_and(|size| size != u64::from(id.sector_size)) {
                let message =
                    format!("the parent has sectors of {} bytes, and so has the image", id.sector_size);
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("logicalSectorSize"));
            }
            Some(Parent { filename, id })
        }
    };
    let options = NewOptions {
        size: size.checked_next_multiple_of(sector_size.into()).unwrap_or(size),
        sector_size,
        subformat,
        block_size: shape.number("blockSize").unwrap_or(block_size),
        log_size: shape.number("logSize").unwrap_or_default(),
        block_state_zero: shape.flag("blockStateZero").unwrap_or(defaults.block_state_zero),
        parent,
    };
    options.plan().map(Arc::new)
}

//! VMDK: its row, and the options of new images by their names in the API.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::files::NewDisk;
use qcow2_engine::measure::MeasureTarget;
use qcow2_engine::{Error, ErrorKind, OpenOptions, Result};
use qcow2_vmdk::{AdapterType, CreateOptions, NewVmdk, Parent, Subformat, Vmdk};

use super::{Format, Untrusted};
use crate::inspect::{Inspected, Seen};
use crate::shape::{Purpose, Shape};

pub(super) const VMDK: Format = Format {
    name: "vmdk",
    plain: false,
    open: |files, options| Ok(Box::new(Vmdk::open(files.own, &open_options(options))?)),
    inspect: |image, options| {
        let options = open_options(options);
        let found = match image {
            Untrusted::File(storage) => qcow2_vmdk::inspect(*storage, &options)?,
            Untrusted::Bytes(bytes) => qcow2_vmdk::inspect_bytes(bytes, None, &options),
        };
        let descriptor = found.descriptor.as_ref();
        let seen = descriptor.map(|_| Seen {
            virtual_size: found.virtual_size.unwrap_or_default(),
            cluster_size: found.grain,
            backing_format: Some("vmdk"),
            ..Seen::default()
        });
        let parent = descriptor.and_then(|descriptor| descriptor.parent.as_deref());
        Ok(Inspected::of_other(seen, parent, &found.findings))
    },
    make: |shape, Purpose { size, path, .. }| {
        Ok(NewDisk::Format(Arc::new(NewVmdk::new(create_options(shape, size)?, path)?)))
    },
    measure: |shape, Purpose { size, .. }| {
        // What the files are called does not matter.
        let new = NewVmdk::new(create_options(shape, size)?, Some(Path::new("disk.vmdk")))?;
        Ok(MeasureTarget::Format(Arc::new(new)))
    },
};

fn open_options(options: &OpenOptions) -> qcow2_vmdk::OpenOptions {
    qcow2_vmdk::OpenOptions {
        max_virtual_size: options.limits.max_virtual_size,
        max_metadata_bytes: options.limits.max_metadata_bytes,
        l2_cache_bytes: options.l2_cache_bytes,
    }
}

/// What products take that import images: ESXi, and who reads OVF packages.
fn preset(name: Option<&str>) -> Result<CreateOptions> {
    match name {
        None => Ok(CreateOptions::default()),
        Some("esxi" | "ovf") => Ok(CreateOptions {
            subformat: Subformat::StreamOptimized,
            adapter_type: AdapterType::LsiLogic,
            hardware_version: Some("10".to_owned()),
            ..CreateOptions::default()
        }),
        Some(other) => Err(unknown("preset", other, &["esxi", "ovf"])),
    }
}

fn create_options(shape: &Shape, size: u64) -> Result<CreateOptions> {
    let preset = preset(shape.word("preset"))?;
    let subformat = match shape.word("subformat") {
        None => preset.subformat,
        Some(name) => Subformat::from_name(name)
            .ok_or_else(|| unknown("subformat", name, &Subformat::ALL.map(Subformat::name)))?,
    };
    let adapter_type = match shape.word("adapterType") {
        None => preset.adapter_type,
        Some(name) => AdapterType::from_name(name)
            .ok_or_else(|| unknown("adapterType", name, &AdapterType::ALL.map(AdapterType::name)))?,
    };
    let parent = shape.backing_file.as_ref().map(|filename| Parent {
        filename: filename.clone().into_bytes(),
        cid: shape.word("parentId").and_then(|id| id.parse().ok()).unwrap_or_default(),
    });
    let text = |name| shape.word(name).map(str::to_owned);
    Ok(CreateOptions {
        size,
        subformat,
        adapter_type,
        hardware_version: text("hardwareVersion").or(preset.hardware_version),
        tools_version: text("toolsVersion"),
        compat6: shape.flag("compat6").unwrap_or(false),
        zeroed_grain: shape.flag("zeroedGrain").unwrap_or(false),
        parent,
    })
}

fn unknown(field: &'static str, name: &str, known: &[&str]) -> Error {
    let message = format!("unknown {field} '{name}' of a vmdk image: known are {}", known.join(", "));
    Error::new(ErrorKind::InvalidArgument, message).with_field(field)
}

//! OVF descriptors.

use napi::bindgen_prelude::{BufferSlice, Env, ToNapiValue};
use napi_derive::napi;

use crate::bytes::Bytes;
use crate::runtime::Runtime;

/// A disk that a descriptor lists.
#[napi(object, object_from_js = false)]
pub struct OvfDisk {
    /// What devices call it.
    pub id: String,
    /// Its file.
    pub href: Option<String>,
    /// Bytes of that file.
    #[napi(ts_type = "number | bigint")]
    pub file_size: Option<Bytes>,
    /// How that file is compressed besides.
    pub compression: Option<String>,
    /// Bytes of the disk.
    #[napi(ts_type = "number | bigint")]
    pub capacity: Option<Bytes>,
    /// A URI.
    pub format: Option<String>,
    /// Bytes in use.
    #[napi(ts_type = "number | bigint")]
    pub populated_size: Option<Bytes>,
    /// The disk that it is made on.
    pub parent: Option<String>,
}

/// Reads a descriptor. The bytes are copied.
#[napi(catch_unwind)]
pub fn read_ovf(env: Env, request: u32, bytes: BufferSlice<'_>) -> napi::Result<()> {
    let bytes = bytes.to_vec();
    let work = move || {
        let disks = qcow2_ovf::parse(&bytes)?.into_iter().map(|disk| OvfDisk {
            id: disk.id,
            href: disk.href,
            file_size: disk.file_size.map(Bytes),
            compression: disk.compression,
            capacity: disk.capacity.map(Bytes),
            format: disk.format,
            populated_size: disk.populated_size.map(Bytes),
            parent: disk.parent,
        });
        Ok(disks.collect::<Vec<_>>())
    };
    // SAFETY: on the environment's thread, with its own env.
    Runtime::of(&env)?
        .run(&env, request, work, |_, env, disks| unsafe { Vec::to_napi_value(env.raw(), disks) })
}

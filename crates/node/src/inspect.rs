//! Inspection of untrusted images.

use napi::bindgen_prelude::{BufferSlice, Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::format::Header;
use qcow2_engine::format::header::feature::{FeatureSet, Incompatible, names_of};
use qcow2_engine::inspect::{Inspection, inspect, inspect_bytes};

use crate::info::{compression_name, encryption_name};
use crate::open::LimitOptions;
use crate::runtime::Runtime;
use crate::text::Text;

/// What an image says about itself.
#[napi(object, object_from_js = false)]
pub struct Inspected {
    /// It has the qcow2 magic.
    pub is_qcow2: bool,
    /// Present where the header could be read.
    pub header: Option<InspectedHeader>,
    /// The backing file's name where the header could not be read as a whole.
    pub backing_filename: Option<Text>,
    /// Bit numbers.
    pub unknown_incompatible: Vec<u32>,
    /// What speaks against opening it.
    pub findings: Vec<InspectFinding>,
}

/// What a header says.
#[napi(object, object_from_js = false)]
pub struct InspectedHeader {
    /// 2 or 3.
    pub version: u32,
    /// Bytes.
    pub virtual_size: f64,
    /// Bytes.
    pub cluster_size: f64,
    /// The name that the image stores.
    pub backing_filename: Option<Text>,
    /// The format that the image stores.
    pub backing_format: Option<Text>,
    /// The name that the image stores.
    pub data_file: Option<Text>,
    /// `aes` or `luks`.
    pub encryption: Option<String>,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Feature bit: names are the image's to choose.
    pub extended_l2: bool,
    /// Names.
    pub incompatible: Vec<String>,
    /// Names.
    pub compatible: Vec<String>,
    /// Names.
    pub autoclear: Vec<String>,
}

/// One finding.
#[napi(object, object_from_js = false)]
pub struct InspectFinding {
    /// Stable.
    pub code: String,
    /// For people.
    pub message: String,
}

/// Inspects an open file.
#[napi(catch_unwind)]
pub fn inspect_file(env: Env, request: u32, file: u32, limits: Option<LimitOptions>) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    let limits = LimitOptions::read(limits.as_ref());
    runtime.run(
        &env,
        request,
        move || inspect(&*storage, &limits),
        // SAFETY: on the environment's thread, with its own env.
        |_, env, found| unsafe { Inspected::to_napi_value(env.raw(), Inspected::from(&found)) },
    )
}

/// Inspects the first bytes of an image. The bytes are copied.
#[napi(catch_unwind)]
pub fn inspect_prefix(
    env: Env,
    request: u32,
    bytes: BufferSlice<'_>,
    limits: Option<LimitOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let limits = LimitOptions::read(limits.as_ref());
    let bytes = bytes.to_vec();
    runtime.run(
        &env,
        request,
        move || Ok(inspect_bytes(&bytes, None, &limits)),
        // SAFETY: on the environment's thread, with its own env.
        |_, env, found| unsafe { Inspected::to_napi_value(env.raw(), Inspected::from(&found)) },
    )
}

impl From<&Inspection> for Inspected {
    fn from(found: &Inspection) -> Self {
        let findings = found.findings.iter().map(|finding| InspectFinding {
            code: finding.code.as_str().to_owned(),
            message: finding.message.clone(),
        });
        Self {
            is_qcow2: found.is_qcow2,
            header: found.header.as_ref().map(InspectedHeader::from),
            backing_filename: found.backing_file.as_deref().map(Text::from),
            unknown_incompatible: (0..64).filter(|bit| found.unknown_incompatible >> bit & 1 == 1).collect(),
            findings: findings.collect(),
        }
    }
}

impl From<&Header> for InspectedHeader {
    fn from(header: &Header) -> Self {
        let names = |set, bits| names_of(set, bits, header.feature_names());
        Self {
            version: header.version,
            virtual_size: header.size as f64,
            cluster_size: header.geometry.cluster_size() as f64,
            backing_filename: header.backing_file.as_deref().map(Text::from),
            backing_format: header.backing_format().map(Text::from),
            data_file: header.data_file().map(Text::from),
            encryption: encryption_name(header.crypt_method).map(str::to_owned),
            compression_type: compression_name(header.compression_type).to_owned(),
            extended_l2: header.incompatible.contains(Incompatible::EXTENDED_L2),
            incompatible: names(FeatureSet::Incompatible, header.incompatible.bits()),
            compatible: names(FeatureSet::Compatible, header.compatible.bits()),
            autoclear: names(FeatureSet::Autoclear, header.autoclear.bits()),
        }
    }
}

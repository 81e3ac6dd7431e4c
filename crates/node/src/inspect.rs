//! Inspection of untrusted images.

use napi::bindgen_prelude::{BufferSlice, Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::OpenOptions;
use qcow2_engine::format::Header;
use qcow2_engine::format::header::feature::{FeatureSet, Incompatible, names_of};
use qcow2_engine::inspect::{Finding, Inspection};
use qcow2_qcow1::format::CryptMethod;

use crate::bytes::Bytes;
use crate::formats::{Format, Untrusted};
use crate::info::{compression_name, encryption_name};
use crate::open::LimitOptions;
use crate::runtime::Runtime;
use crate::text::Text;

/// What an image says about itself.
#[napi(object, object_from_js = false)]
pub struct Inspected {
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
    /// 2 or 3, of qcow2.
    pub version: Option<u32>,
    /// Bytes.
    #[napi(ts_type = "number | bigint")]
    pub virtual_size: Bytes,
    /// Bytes, of a format that has clusters.
    pub cluster_size: Option<f64>,
    /// The name that the image stores.
    pub backing_filename: Option<Text>,
    /// The format that the image stores.
    pub backing_format: Option<Text>,
    /// The name that the image stores.
    pub data_file: Option<Text>,
    /// `aes` or `luks`.
    pub encryption: Option<String>,
    /// `zlib` or `zstd`, of qcow2.
    pub compression_type: Option<String>,
    /// Feature bit of qcow2.
    pub extended_l2: Option<bool>,
    /// Names: they are the image's to choose.
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

/// Inspects an open file as an image of a format, by QEMU's name of it.
#[napi(catch_unwind)]
pub fn inspect_file(
    env: Env,
    request: u32,
    file: u32,
    format: String,
    limits: Option<LimitOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let format = Format::named(&format)?;
    let storage = runtime.storage(file)?;
    let options = OpenOptions { limits: LimitOptions::read(limits.as_ref()), ..OpenOptions::default() };
    runtime.run(
        &env,
        request,
        move || format.inspect(&Untrusted::File(&*storage), &options),
        // SAFETY: on the environment's thread, with its own env.
        |_, env, found| unsafe { Inspected::to_napi_value(env.raw(), found) },
    )
}

/// Inspects the first bytes of an image of a format. The bytes are copied.
#[napi(catch_unwind)]
pub fn inspect_prefix(
    env: Env,
    request: u32,
    bytes: BufferSlice<'_>,
    format: String,
    limits: Option<LimitOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let format = Format::named(&format)?;
    let options = OpenOptions { limits: LimitOptions::read(limits.as_ref()), ..OpenOptions::default() };
    let bytes = bytes.to_vec();
    runtime.run(
        &env,
        request,
        move || format.inspect(&Untrusted::Bytes(&bytes), &options),
        // SAFETY: on the environment's thread, with its own env.
        |_, env, found| unsafe { Inspected::to_napi_value(env.raw(), found) },
    )
}

impl Inspected {
    /// What a qcow2 image claims.
    pub(crate) fn of_qcow2(found: &Inspection) -> Self {
        Self {
            header: found.header.as_ref().map(InspectedHeader::from),
            backing_filename: found.backing_file.as_deref().map(Text::from),
            unknown_incompatible: (0..64).filter(|bit| found.unknown_incompatible >> bit & 1 == 1).collect(),
            findings: to_findings(&found.findings),
        }
    }

    /// What an image of version 1 claims.
    pub(crate) fn of_qcow(found: &qcow2_qcow1::Inspection) -> Self {
        let backing_filename = found.backing_file.as_deref().map(Text::from);
        Self {
            header: found.header.as_ref().map(InspectedHeader::from),
            backing_filename,
            unknown_incompatible: Vec::new(),
            findings: to_findings(&found.findings),
        }
    }
}

/// What the header of an image says that is not of qcow2.
#[derive(Default)]
pub(crate) struct Seen {
    /// Bytes; 0 where it is not known.
    pub(crate) virtual_size: u64,
    /// Bytes; of an image that has blocks.
    pub(crate) cluster_size: Option<u64>,
    /// The format that its backing file has, where it can have one of that alone.
    pub(crate) backing_format: Option<&'static str>,
    /// How it is encrypted.
    pub(crate) encryption: Option<&'static str>,
}

impl Inspected {
    /// What an image of another format than qcow2 claims; `seen` is nothing where its header could not be read.
    pub(crate) fn of_other(seen: Option<Seen>, backing: Option<&[u8]>, findings: &[Finding]) -> Self {
        let header = seen.map(|seen| InspectedHeader {
            version: None,
            virtual_size: Bytes(seen.virtual_size),
            cluster_size: seen.cluster_size.map(|size| size as f64),
            backing_filename: backing.map(Text::from),
            backing_format: backing.and(seen.backing_format).map(|name| Text::from(name.as_bytes())),
            data_file: None,
            encryption: seen.encryption.map(str::to_owned),
            compression_type: None,
            extended_l2: None,
            incompatible: Vec::new(),
            compatible: Vec::new(),
            autoclear: Vec::new(),
        });
        Self {
            header,
            backing_filename: backing.map(Text::from),
            unknown_incompatible: Vec::new(),
            findings: to_findings(findings),
        }
    }
}

fn to_findings(findings: &[Finding]) -> Vec<InspectFinding> {
    let findings = findings.iter().map(|finding| InspectFinding {
        code: finding.code.as_str().to_owned(),
        message: finding.message.clone(),
    });
    findings.collect()
}

impl From<&qcow2_qcow1::format::Header> for InspectedHeader {
    fn from(header: &qcow2_qcow1::format::Header) -> Self {
        Self {
            version: None,
            virtual_size: Bytes(header.virtual_size()),
            cluster_size: Some(header.cluster_size() as f64),
            backing_filename: None,
            backing_format: None,
            data_file: None,
            encryption: (header.crypt_method == CryptMethod::Aes).then(|| "aes".to_owned()),
            compression_type: None,
            extended_l2: None,
            incompatible: Vec::new(),
            compatible: Vec::new(),
            autoclear: Vec::new(),
        }
    }
}

impl From<&Header> for InspectedHeader {
    fn from(header: &Header) -> Self {
        let names = |set, bits| names_of(set, bits, header.feature_names());
        Self {
            version: Some(header.version),
            virtual_size: Bytes(header.size),
            cluster_size: Some(header.geometry.cluster_size() as f64),
            backing_filename: header.backing_file.as_deref().map(Text::from),
            backing_format: header.backing_format().map(Text::from),
            data_file: header.data_file().map(Text::from),
            encryption: encryption_name(header.crypt_method).map(str::to_owned),
            compression_type: Some(compression_name(header.compression_type).to_owned()),
            extended_l2: Some(header.incompatible.contains(Incompatible::EXTENDED_L2)),
            incompatible: names(FeatureSet::Incompatible, header.incompatible.bits()),
            compatible: names(FeatureSet::Compatible, header.compatible.bits()),
            autoclear: names(FeatureSet::Autoclear, header.autoclear.bits()),
        }
    }
}

//! Amending an image's options.

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::amend::{AmendOptions, amend};
use qcow2_engine::check::CheckOptions;
use qcow2_engine::{Error, ErrorKind};

use crate::job::Ticket;
use crate::open::nothing;
use crate::runtime::Runtime;
use crate::text::Text;

/// What to change; what is absent stays.
#[napi(object, object_to_js = false)]
pub struct AmendChanges {
    /// 2 or 3.
    pub version: Option<u32>,
    /// Bits.
    pub refcount_bits: Option<u32>,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file; empty for none.
    pub data_file: Option<Text>,
    /// Whether the external data file is a raw image.
    pub data_file_raw: Option<bool>,
    /// What the backing file is: it cannot be amended.
    pub backing_file: Option<Text>,
    /// What its format is.
    pub backing_format: Option<Text>,
}

/// Changes the options of the top layer of an image, which was opened for a check, and is good for nothing else
/// afterwards.
#[napi(catch_unwind)]
pub fn amend_image(env: Env, request: u32, job: u32, image: u32, changes: AmendChanges) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let options = AmendOptions {
        version: changes.version,
        refcount_bits: changes.refcount_bits,
        lazy_refcounts: changes.lazy_refcounts,
        data_file: changes.data_file.map(Text::into_bytes),
        data_file_raw: changes.data_file_raw,
        backing_file: changes.backing_file.map(Text::into_bytes),
        backing_format: changes.backing_format.map(Text::into_bytes),
    };
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| {
            handle.run(|image| {
                let Some(qcow2) = image.top_qcow2() else {
                    let message = "a raw image has no options to amend";
                    return Err(Error::new(ErrorKind::UnsupportedFeature, message));
                };
                let limits = CheckOptions { limits: *qcow2.limits(), ..CheckOptions::default() };
                amend(&**qcow2.storage(), &options, &limits, job)
            })
        },
        nothing,
    )
}

//! Compacting.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::compact::{CompactOptions, CompactResult};

use crate::job::Ticket;
use crate::runtime::Runtime;

/// What a compaction did, or would do.
#[napi(object, object_from_js = false)]
pub struct Compacted {
    /// Bytes.
    pub file_length_before: f64,
    /// Bytes.
    pub file_length_after: f64,
    /// Bytes.
    pub actual_size_before: f64,
    /// Bytes.
    pub actual_size_after: f64,
    /// Bytes.
    pub reclaimed_bytes: f64,
    /// Clusters.
    pub leaked_clusters: f64,
    /// Clusters.
    pub zero_clusters: f64,
    /// Clusters.
    pub moved_clusters: f64,
}

/// Compacts the top layer of an image.
#[napi(catch_unwind)]
pub fn compact_image(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    rewrite: bool,
    zeroes: bool,
    dry_run: bool,
) -> napi::Result<()> {
    let options = CompactOptions { rewrite, zeroes, dry_run };
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| handle.run(|image| image.compact(options, job)),
        |_, env, result: CompactResult| {
            let compacted = Compacted {
                file_length_before: result.length_before as f64,
                file_length_after: result.length_after as f64,
                actual_size_before: result.allocated_before as f64,
                actual_size_after: result.allocated_after as f64,
                reclaimed_bytes: result.reclaimed() as f64,
                leaked_clusters: result.leaked_clusters as f64,
                zero_clusters: result.zero_clusters as f64,
                moved_clusters: result.moved_clusters as f64,
            };
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Compacted::to_napi_value(env.raw(), compacted) }
        },
    )
}

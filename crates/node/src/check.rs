//! Checking an image's metadata.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::check::{self, CheckOptions, CheckReport, Repair, Severity};
use qcow2_engine::image::read_header_for_check;
use qcow2_engine::{Error, ErrorKind};

use crate::failure::Failure;
use crate::job::Ticket;
use crate::runtime::Runtime;

/// What a check found.
#[napi(object, object_from_js = false)]
pub struct CheckOutcome {
    /// Bytes.
    pub image_end_offset: f64,
    /// Clusters.
    pub total_clusters: f64,
    /// Clusters.
    pub allocated_clusters: f64,
    /// Clusters.
    pub fragmented_clusters: f64,
    /// Clusters.
    pub compressed_clusters: f64,
    /// Count.
    pub corruptions: f64,
    /// Clusters.
    pub leaks: f64,
    /// Count.
    pub check_errors: f64,
    /// Count.
    pub corruptions_fixed: f64,
    /// Clusters.
    pub leaks_fixed: f64,
    /// In QEMU's order.
    pub findings: Vec<CheckFinding>,
    /// Counted and not kept.
    pub omitted_findings: f64,
    /// Why the check ended early.
    pub failure: Option<Failure>,
}

/// One finding.
#[napi(object, object_from_js = false)]
pub struct CheckFinding {
    /// `corruption`, `leak`, `check-error` or `note`.
    pub severity: String,
    /// Whether it was repaired.
    pub repaired: bool,
    /// Stable.
    pub code: String,
    /// The line that a user sees.
    pub message: String,
    /// Byte offset in the image file.
    pub offset: Option<f64>,
}

/// Checks the top layer of an image. With `repair`, `leaks` or `all`, it also repairs: then the image must have been
/// opened for that, and is good for nothing but another check afterwards.
#[napi(catch_unwind)]
pub fn check_image(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    readers: Option<u32>,
    max_findings: u32,
    repair: Option<String>,
) -> napi::Result<()> {
    let repair = match repair.as_deref() {
        None => None,
        Some("leaks") => Some(Repair::Leaks),
        Some("all") => Some(Repair::All),
        Some(other) => return Err(napi::Error::from_reason(format!("no such repair: {other}"))),
    };
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| {
            handle.run(|image| {
                let Some(qcow2) = image.top_qcow2() else {
                    let max = max_findings as usize;
                    if let Some(layer) = image.layers().first().and_then(|top| top.as_checkable()) {
                        return match repair {
                            Some(repair) => layer.repair(repair, max, job),
                            None => image.settled(|| layer.check(max, job)),
                        };
                    }
                    let message = match image.layers().first().and_then(|top| top.unit()) {
                        None => format!("a {} image has nothing to check", image.format()),
                        Some(_) => format!("checking {} images is not supported", image.format()),
                    };
                    return Err(Error::new(ErrorKind::UnsupportedFeature, message));
                };
                let defaults = CheckOptions::default();
                let options = CheckOptions {
                    limits: *qcow2.limits(),
                    max_findings: max_findings as usize,
                    readers: readers.map_or(defaults.readers, |readers| readers as usize),
                };
                if let Some(repair) = repair {
                    return check::repair(&**qcow2.storage(), repair, &options, job);
                }
                // An image that is open for writing has a header of its own making in the file.
                image.settled(|| {
                    let header = read_header_for_check(&**qcow2.storage())?;
                    check::check(&**qcow2.storage(), &header, &options, job)
                })
            })
        },
        |_, env, report| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { CheckOutcome::to_napi_value(env.raw(), CheckOutcome::from(report)) }
        },
    )
}

impl From<CheckReport> for CheckOutcome {
    fn from(report: CheckReport) -> Self {
        let finding = |finding: &check::Finding| CheckFinding {
            severity: match finding.severity {
                Severity::Corruption => "corruption",
                Severity::Leak => "leak",
                Severity::CheckError => "check-error",
                Severity::Note => "note",
            }
            .to_owned(),
            repaired: finding.repaired,
            code: finding.code.as_str().to_owned(),
            message: finding.to_string(),
            offset: finding.offset.map(|offset| offset as f64),
        };
        Self {
            image_end_offset: report.image_end_offset.unwrap_or(0) as f64,
            total_clusters: report.total_clusters as f64,
            allocated_clusters: report.allocated_clusters as f64,
            fragmented_clusters: report.fragmented_clusters as f64,
            compressed_clusters: report.compressed_clusters as f64,
            corruptions: report.corruptions as f64,
            leaks: report.leaks as f64,
            check_errors: report.check_errors as f64,
            corruptions_fixed: report.corruptions_fixed as f64,
            leaks_fixed: report.leaks_fixed as f64,
            findings: report.findings.iter().map(finding).collect(),
            omitted_findings: report.omitted_findings as f64,
            failure: report.failure.as_ref().map(Failure::from),
        }
    }
}

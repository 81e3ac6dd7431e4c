//! Operations on backing chains.

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::backing::{Backing, CommitOptions, RebaseOptions, commit, rebase, set_backing};
use qcow2_engine::check::CheckOptions;
use qcow2_engine::{Error, ErrorKind, Image, Job, Qcow2, Result};

use crate::job::{Lane, Ticket};
use crate::open::nothing;
use crate::pool::threads;
use crate::runtime::Runtime;
use crate::text::Text;

/// How to commit.
#[napi(object, object_to_js = false)]
pub struct CommitOrder {
    /// Empty the top afterwards.
    pub empty: bool,
    /// Threads.
    pub concurrency: Option<u32>,
    /// Bytes a second.
    pub rate: Option<f64>,
}

/// A backing file as the header is to name it.
#[napi(object, object_to_js = false)]
pub struct BackingInput {
    /// File name.
    pub filename: Text,
    /// Format.
    pub format: Option<Text>,
}

impl BackingInput {
    fn read(self) -> Backing {
        Backing { filename: self.filename.into_bytes(), format: self.format.map(Text::into_bytes) }
    }
}

/// Writes what the image `above` has into the image `base`, which is the rest of its chain.
#[napi(catch_unwind)]
pub fn commit_image(
    env: Env,
    request: u32,
    job: u32,
    above: u32,
    base: u32,
    order: CommitOrder,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let (above, base) = (runtime.image(above)?, runtime.image(base)?);
    let options = CommitOptions { empty: order.empty, workers: threads(order.concurrency) };
    let lane = Lane::of_rate(order.rate);
    let work = move |job: &Job| {
        job.set_rate(order.rate.map_or(0, |rate| rate as u64));
        above.run(|above| base.run(|base| commit(above, base, &options, job)))
    };
    start(&env, lane, Ticket { request, job }, work)
}

/// Changes the backing file of an image that is open for writing, and closes the image. `chain` is the new backing chain.
#[napi(catch_unwind)]
#[allow(clippy::too_many_arguments, reason = "the arguments of one call from JavaScript")]
pub fn rebase_image(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    chain: Option<u32>,
    backing: Option<BackingInput>,
    compress: bool,
    detect_zeroes: bool,
    concurrency: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let top = runtime.image(image)?;
    let chain = chain.map(|chain| runtime.image(chain)).transpose()?;
    let backing = backing.map(BackingInput::read);
    let options = RebaseOptions { compress, detect_zeroes, workers: threads(concurrency) };
    let work = move |job: &Job| {
        top.run(|top| match &chain {
            Some(chain) => chain.run(|chain| rebase(top, Some(chain), backing.as_ref(), &options, job)),
            None => rebase(top, None, backing.as_ref(), &options, job),
        })
    };
    start(&env, Lane::Usual, Ticket { request, job }, work)
}

/// Changes the backing file that an image names and nothing else. The image was opened for a check, and is good for nothing
/// else afterwards.
#[napi(catch_unwind)]
pub fn set_backing_file(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    backing: Option<BackingInput>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let backing = backing.map(BackingInput::read);
    let work = move |job: &Job| {
        handle.run(|image| {
            let top = top(image)?;
            let limits = CheckOptions { limits: *top.limits(), ..CheckOptions::default() };
            set_backing(&**top.storage(), backing.as_ref(), &limits, job)
        })
    };
    start(&env, Lane::Usual, Ticket { request, job }, work)
}

fn top(image: &Image) -> Result<&Qcow2> {
    let top = image.top_qcow2();
    top.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "a raw image cannot have a backing file"))
}

/// Starts a job that answers with nothing.
fn start(
    env: &Env,
    lane: Lane,
    ticket: Ticket,
    work: impl FnOnce(&Job) -> Result<()> + Send + 'static,
) -> napi::Result<()> {
    Runtime::of(env)?.start_job_in(lane, env, ticket, move |job| work(job), nothing)
}

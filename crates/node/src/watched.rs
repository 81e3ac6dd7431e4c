//! Requests of the pool that a signal can cancel. JavaScript numbers them; those without a signal have no number and cost
//! nothing here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::Job;

use crate::runtime::Runtime;

/// The requests of one environment that can be cancelled. Used on its thread only.
#[derive(Default)]
pub(crate) struct Watched {
    jobs: RefCell<HashMap<u32, Arc<Job>>>,
}

impl Watched {
    /// The control block of the request with this number, if it has one.
    pub(crate) fn begin(&self, number: Option<u32>) -> Option<Arc<Job>> {
        let number = number?;
        let job = Arc::new(Job::new());
        self.jobs.borrow_mut().insert(number, Arc::clone(&job));
        Some(job)
    }

    fn cancel(&self, number: u32) {
        self.jobs.borrow().get(&number).into_iter().for_each(|job| job.cancel());
    }

    /// Cancels all.
    pub(crate) fn close(&self) {
        self.jobs.take().into_values().for_each(|job| job.cancel());
    }
}

/// Runs `work` on this thread: what waits in it looks whether the job is cancelled, if there is one.
pub(crate) fn during<T>(job: Option<&Job>, work: impl FnOnce() -> T) -> T {
    match job {
        Some(job) => job.during(work),
        None => work(),
    }
}

/// Asks a request to stop. It ends as failed, or completes if it was done anyway.
#[napi(catch_unwind)]
pub fn cancel_request(env: Env, number: u32) -> napi::Result<()> {
    Runtime::of(&env)?.watched().cancel(number);
    Ok(())
}

/// Forgets a request; tells how many bytes it has done.
#[napi(catch_unwind)]
pub fn end_request(env: Env, number: u32) -> napi::Result<f64> {
    let job = Runtime::of(&env)?.watched().jobs.borrow_mut().remove(&number);
    Ok(job.map_or(0.0, |job| job.progress().0 as f64))
}

//! Long work, each on a thread of its own, so that it never takes a worker from requests.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::{Job, Result};

use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::guard::guarded;
use crate::runtime::Runtime;

struct Running {
    request: u32,
    job: Arc<Job>,
    thread: JoinHandle<()>,
}

/// The jobs of one environment. Only its thread starts, watches and ends them.
pub(crate) struct Jobs {
    delivery: Arc<Delivery>,
    running: RefCell<Vec<Running>>,
}

impl Jobs {
    /// No jobs yet.
    pub(crate) fn new(delivery: Arc<Delivery>) -> Self {
        Self { delivery, running: RefCell::default() }
    }

    /// Runs `work` for the request of that number. The work checks the job for cancellation.
    ///
    /// # Errors
    /// The system cannot start a thread.
    fn start(
        &self,
        request: u32,
        work: impl FnOnce(&Arc<Job>) -> Result<IntoJs> + Send + 'static,
    ) -> std::io::Result<()> {
        self.running.borrow_mut().retain(|running| !running.thread.is_finished());
        let job = Arc::new(Job::new());
        let (delivery, control) = (Arc::clone(&self.delivery), Arc::clone(&job));
        let thread = thread::Builder::new().name("qcow2-job".to_owned()).spawn(move || {
            let outcome = Outcome::from_result(guarded(|| work(&control)));
            delivery.push(Completion { request, outcome });
        })?;
        self.running.borrow_mut().push(Running { request, job, thread });
        Ok(())
    }

    fn find<T>(&self, request: u32, look: impl FnOnce(&Job) -> T) -> Option<T> {
        let running = self.running.borrow();
        // The newest first: numbers are used again once their request is delivered.
        running.iter().rev().find(|running| running.request == request).map(|running| look(&running.job))
    }

    /// Cancels all jobs and waits for them.
    pub(crate) fn close(&self) {
        let running = self.running.take();
        for Running { job, .. } in &running {
            job.cancel();
        }
        for Running { thread, .. } in running {
            // Panics are caught inside; there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

impl Runtime {
    /// Runs `work` as a job for the request of that number. The event loop stays alive until it is delivered.
    pub(crate) fn start_job(
        &self,
        env: &Env,
        request: u32,
        work: impl FnOnce(&Arc<Job>) -> Result<IntoJs> + Send + 'static,
    ) -> napi::Result<()> {
        self.jobs().start(request, work).map_err(|e| napi::Error::from_reason(e.to_string()))?;
        self.expect(env);
        Ok(())
    }
}

/// Asks the job of that request to stop. It ends as failed, or completes if it was done anyway.
#[napi]
pub fn cancel_job(env: Env, request: u32) -> napi::Result<()> {
    let cancel = |job: &Job| job.cancel();
    Runtime::of(&env)?.jobs().find(request, cancel);
    Ok(())
}

/// Bytes done and bytes in all of the job of that request.
#[napi(ts_return_type = "[current: number, total: number]")]
pub fn job_progress(env: Env, request: u32) -> napi::Result<Vec<f64>> {
    let progress = Runtime::of(&env)?.jobs().find(request, Job::progress).unwrap_or_default();
    Ok(vec![progress.0 as f64, progress.1 as f64])
}

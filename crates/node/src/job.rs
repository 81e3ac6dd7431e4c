//! Long work, each on a thread of its own, so that it never takes a worker from requests.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use napi::bindgen_prelude::Env;
use napi::sys;
use napi_derive::napi;
use qcow2_engine::{Job, Result};

use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::guard::guarded;
use crate::runtime::Runtime;

struct Running {
    number: u32,
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

    /// Runs `work` as the job of that number; it answers the request. The work checks the job for cancellation.
    ///
    /// # Errors
    /// The system cannot start a thread.
    fn start(
        &self,
        Ticket { request, job: number }: Ticket,
        work: impl FnOnce(&Arc<Job>) -> Result<IntoJs> + Send + 'static,
    ) -> std::io::Result<()> {
        let job = Arc::new(Job::new());
        let (delivery, control) = (Arc::clone(&self.delivery), Arc::clone(&job));
        let thread = thread::Builder::new().name("qcow2-job".to_owned()).spawn(move || {
            let outcome = Outcome::from_result(guarded(|| work(&control)));
            delivery.push(Completion { request, outcome });
        })?;
        self.running.borrow_mut().push(Running { number, job, thread });
        Ok(())
    }

    fn find<T>(&self, number: u32, look: impl FnOnce(&Job) -> T) -> Option<T> {
        let running = self.running.borrow();
        running.iter().find(|running| running.number == number).map(|running| look(&running.job))
    }

    /// Waits for a job that has delivered its outcome, and forgets it.
    fn end(&self, number: u32) {
        let mut running = self.running.borrow_mut();
        if let Some(index) = running.iter().position(|running| running.number == number) {
            // Panics are caught inside; there is nothing to hear from it.
            let _ = running.swap_remove(index).thread.join();
        }
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

/// The number of the job, and of the request that it answers.
#[derive(Clone, Copy)]
pub(crate) struct Ticket {
    /// The request.
    pub(crate) request: u32,
    /// The job.
    pub(crate) job: u32,
}

impl Runtime {
    /// Runs `work` on a thread of its own; `into_js` makes the value of its result, on the environment's thread. The
    /// event loop stays alive until it is delivered.
    pub(crate) fn start_job<T: Send + 'static>(
        &self,
        env: &Env,
        ticket: Ticket,
        work: impl FnOnce(&Arc<Job>) -> Result<T> + Send + 'static,
        into_js: impl FnOnce(&Self, &Env, T) -> napi::Result<sys::napi_value> + Send + 'static,
    ) -> napi::Result<()> {
        let work = |job: &Arc<Job>| -> Result<IntoJs> {
            let value = work(job)?;
            Ok(Box::new(move |runtime, env| into_js(runtime, env, value)))
        };
        self.jobs().start(ticket, work).map_err(|e| napi::Error::from_reason(e.to_string()))?;
        self.expect(env);
        Ok(())
    }
}

/// Asks a job to stop. It ends as failed, or completes if it was done anyway.
#[napi(catch_unwind)]
pub fn cancel_job(env: Env, job: u32) -> napi::Result<()> {
    let cancel = |job: &Job| job.cancel();
    Runtime::of(&env)?.jobs().find(job, cancel);
    Ok(())
}

/// Bytes done and bytes in all of a job.
#[napi(catch_unwind, ts_return_type = "[current: number, total: number]")]
pub fn job_progress(env: Env, job: u32) -> napi::Result<Vec<f64>> {
    let progress = Runtime::of(&env)?.jobs().find(job, Job::progress).unwrap_or_default();
    Ok(vec![progress.0 as f64, progress.1 as f64])
}

/// Waits for a job that has delivered its outcome, and forgets it.
#[napi(catch_unwind)]
pub fn end_job(env: Env, job: u32) -> napi::Result<()> {
    Runtime::of(&env)?.jobs().end(job);
    Ok(())
}

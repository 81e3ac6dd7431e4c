//! Long work, on threads of its own, so that it never takes a worker from requests.
//!
//! Jobs run in lanes, so that what is long never holds up what is short. In each lane so many run at the same time
//! ([`max_jobs`]), and the others wait in line. None that runs waits for one that does not: what a job waits for are locks of
//! requests and jobs that have begun, never JavaScript.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::thread;

use napi::bindgen_prelude::Env;
use napi::sys;
use napi_derive::napi;
use qcow2_engine::{Error, Job, Result};

use crate::crew::{Crew, Entry, Work, ending};
use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::guard::guarded;
use crate::pool::Task;
use crate::runtime::Runtime;

/// How many jobs of a lane run at the same time: the cores, within these.
const DEFAULT_JOBS: (usize, usize) = (4, 16);

/// Where a job waits its turn.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lane {
    /// Short ones, whose caller or whose guests wait: a new image, an overlay, a clone's point in time, another size.
    Brief,
    /// Everything else.
    Usual,
    /// The second half of one that began as a brief one: before all others.
    Continued,
    /// Those with a rate limit: they sleep most of the time.
    Paced,
    /// Those that reach for a server.
    Connecting,
    /// Those that read what is still coming: they wait for whoever sends it.
    Arriving,
}

/// How many streams are read at the same time. The others come in and wait: they are stored meanwhile.
const MOST_ARRIVING: usize = 256;

impl Lane {
    /// The lane of a job that has a rate limit, or not.
    pub(crate) fn of_rate(rate: Option<f64>) -> Self {
        if rate.is_some_and(|rate| rate > 0.0) { Self::Paced } else { Self::Usual }
    }
}

/// The jobs of one environment. Only its thread starts, watches and ends them.
pub(crate) struct Jobs {
    delivery: Arc<Delivery>,
    /// Those that JavaScript knows.
    known: RefCell<HashMap<u32, Arc<Entry>>>,
    most: Cell<usize>,
    brief: Crew,
    usual: Crew,
    paced: Crew,
    connecting: Crew,
    arriving: Crew,
}

impl Jobs {
    /// No jobs yet.
    pub(crate) fn new(delivery: Arc<Delivery>) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let most = cores.clamp(DEFAULT_JOBS.0, DEFAULT_JOBS.1);
        let crew = |name| Crew::new(name, most, Arc::clone(&delivery));
        Self {
            brief: crew("qcow2-brief"),
            usual: crew("qcow2-job"),
            paced: crew("qcow2-paced"),
            connecting: crew("qcow2-connect"),
            arriving: Crew::new("qcow2-arriving", MOST_ARRIVING, Arc::clone(&delivery)),
            known: RefCell::default(),
            most: Cell::new(most),
            delivery,
        }
    }

    /// Puts `work` in line as the job of that number; it answers the request. The work checks the job for cancellation.
    ///
    /// # Errors
    /// As [`Crew::submit`].
    fn start(&self, Ticket { request, job }: Ticket, lane: Lane, work: Work) -> Result<()> {
        let entry = Arc::new(Entry::new(request, work));
        let (crew, second_half) = match lane {
            Lane::Brief => (&self.brief, false),
            Lane::Usual => (&self.usual, false),
            Lane::Continued => (&self.usual, true),
            Lane::Paced => (&self.paced, false),
            Lane::Connecting => (&self.connecting, false),
            Lane::Arriving => (&self.arriving, false),
        };
        crew.submit(Arc::clone(&entry), second_half)?;
        self.known.borrow_mut().insert(job, entry);
        Ok(())
    }

    /// Runs `work`, which waits for a stream and ends with it, as the answer to a request.
    ///
    /// # Errors
    /// As [`Crew::submit`].
    fn answer(&self, request: u32, work: Work) -> Result<()> {
        self.arriving.submit(Arc::new(Entry::new(request, work)), false)
    }

    fn find(&self, number: u32) -> Option<Arc<Entry>> {
        self.known.borrow().get(&number).cloned()
    }

    /// Those whose threads are as many as the jobs that may run at the same time.
    fn crews(&self) -> [&Crew; 4] {
        [&self.brief, &self.usual, &self.paced, &self.connecting]
    }

    fn set_most(&self, most: usize) {
        self.most.set(most);
        for crew in self.crews() {
            crew.set_most(most);
        }
    }

    /// Cancels all jobs; those that have not begun have failed. What is returned drops these, and waits for those that run.
    pub(crate) fn close(&self) -> impl FnOnce() + Send + use<> {
        let mut withdrawn = Vec::new();
        for entry in self.known.take().into_values() {
            entry.job.cancel();
            if let Some(work) = entry.withdraw() {
                withdrawn.push(work);
                self.delivery.push(Completion { request: entry.request, outcome: Outcome::Failed(ending()) });
            }
        }
        let crews = self.crews().map(Crew::close);
        let arriving = self.arriving.close();
        move || {
            withdrawn.into_iter().for_each(give_up);
            crews.into_iter().for_each(|wait| wait());
            arriving();
        }
    }
}

/// Drops work that never began. What it holds may be the last use of an image, or a file that is to go.
fn give_up(work: Work) {
    let _dropped = guarded(|| {
        drop(work);
        Ok(())
    });
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
    /// Runs `work` on a thread of the usual lane; `into_js` makes the value of its result, on the environment's thread. The
    /// event loop stays alive until it is delivered.
    pub(crate) fn start_job<T: Send + 'static>(
        &self,
        env: &Env,
        ticket: Ticket,
        work: impl FnOnce(&Arc<Job>) -> Result<T> + Send + 'static,
        into_js: impl FnOnce(&Self, &Env, T) -> napi::Result<sys::napi_value> + Send + 'static,
    ) -> napi::Result<()> {
        self.start_job_in(Lane::Usual, env, ticket, work, into_js)
    }

    /// As [`Runtime::start_job`], in another lane.
    pub(crate) fn start_job_in<T: Send + 'static>(
        &self,
        lane: Lane,
        env: &Env,
        ticket: Ticket,
        work: impl FnOnce(&Arc<Job>) -> Result<T> + Send + 'static,
        into_js: impl FnOnce(&Self, &Env, T) -> napi::Result<sys::napi_value> + Send + 'static,
    ) -> napi::Result<()> {
        let work = move |job: &Arc<Job>| -> Result<IntoJs> {
            let value = work(job)?;
            Ok(Box::new(move |runtime, env| into_js(runtime, env, value)))
        };
        let started = self.jobs().start(ticket, lane, Box::new(work));
        self.expect(env, ticket.request, started);
        Ok(())
    }

    /// As [`Runtime::run`], where the work may wait for a stream: on a thread that nobody else waits for.
    pub(crate) fn run_arriving<T: Send + 'static>(
        &self,
        env: &Env,
        request: u32,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        into_js: impl FnOnce(&Self, &Env, T) -> napi::Result<sys::napi_value> + Send + 'static,
    ) -> napi::Result<()> {
        let work = move |_: &Arc<Job>| -> Result<IntoJs> {
            let value = work()?;
            Ok(Box::new(move |runtime, env| into_js(runtime, env, value)))
        };
        let started = self.jobs().answer(request, Box::new(work));
        self.expect(env, request, started);
        Ok(())
    }

    /// Cancels a job. One that has not begun ends now, whatever runs: a worker drops what it holds.
    fn cancel_job(&self, job: u32) {
        let Some(entry) = self.jobs().find(job) else { return };
        entry.job.cancel();
        let Some(work) = entry.withdraw() else { return };
        let request = entry.request;
        let end = move || {
            give_up(work);
            Outcome::Failed(Error::aborted())
        };
        if let Err(error) = self.pool().submit(request, Task::Call(Box::new(end))) {
            self.fail(request, error);
        }
    }
}

/// Asks a job to stop. It ends as failed, or completes if it was done anyway.
#[napi(catch_unwind)]
pub fn cancel_job(env: Env, job: u32) -> napi::Result<()> {
    Runtime::of(&env)?.cancel_job(job);
    Ok(())
}

/// Bytes done and bytes in all of a job: 0 of 0 before it begins. Behind them its steps since the last call: see [`Job::take_steps`].
#[napi(catch_unwind, ts_return_type = "[current: number, total: number, ...steps: number[]]")]
pub fn job_progress(env: Env, job: u32) -> napi::Result<Vec<f64>> {
    let entry = Runtime::of(&env)?.jobs().find(job);
    let Some(entry) = entry else { return Ok(vec![0.0, 0.0]) };
    let (current, total) = entry.job.progress();
    let steps = entry.job.take_steps();
    Ok([current, total].into_iter().chain(steps).map(|bytes| bytes as f64).collect())
}

/// Forgets a job that has delivered its outcome.
#[napi(catch_unwind)]
pub fn end_job(env: Env, job: u32) -> napi::Result<()> {
    Runtime::of(&env)?.jobs().known.borrow_mut().remove(&job);
    Ok(())
}

/// How many jobs of a lane run at the same time, from now on as many as given.
#[napi(catch_unwind)]
pub fn max_jobs(env: Env, most: Option<u32>) -> napi::Result<u32> {
    let jobs = Runtime::of(&env)?.jobs();
    if let Some(most) = most {
        jobs.set_most(most.max(1) as usize);
    }
    Ok(u32::try_from(jobs.most.get()).unwrap_or(u32::MAX))
}

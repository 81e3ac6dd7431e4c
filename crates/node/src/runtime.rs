//! What one environment owns. Everything here is used on the environment's thread only, except the pool's queue
//! and the delivery, which have locks of their own.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use napi::JsValue;
use napi::bindgen_prelude::{Env, Unknown};
use napi::sys;
use napi_derive::napi;
use parking_lot::Mutex;
use qcow2_engine::storage::Spool;
use qcow2_engine::{Error, ErrorKind, Layer, Result, Storage};

use crate::boundary::{self, Numbers, Wake};
use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::failure;
use crate::guard::guarded;
use crate::job::Jobs;
use crate::nbd::Serving;
use crate::pool::{Pool, Task, default_threads};
use crate::resource::{Handle, Resource, Resources};
use crate::source::Asking;
use crate::streamed::Streamed;
use crate::tls::Encrypting;
use crate::watch::Watch;
use crate::watched::Watched;

/// Most requests in a row that are answered where they are made, before the event loop has its turn: a caller that awaits each before
/// the next one would keep everything else waiting. 4 KiB each, they take some 50 us.
const MOST_ANSWERED: u32 = 32;

/// The state of one environment.
pub(crate) struct Runtime {
    delivery: Arc<Delivery>,
    pool: Pool,
    /// For requests that wait for devices and other machines: see [`Pool::waiting`].
    waiting: Pool,
    watch: Watch,
    /// Requests that were answered where they were made since anything was delivered.
    answered: Cell<u32>,
    jobs: Jobs,
    watched: Watched,
    resources: RefCell<Resources>,
    /// Requests that JavaScript waits for.
    outstanding: Cell<u32>,
    /// Those among them that do not keep the event loop alive.
    unreferenced: Cell<u32>,
    /// Where the numbers of finished requests are written for JavaScript.
    numbers: Numbers,
    /// The vector that the delivery's queue goes on with, kept for its capacity.
    spare: Cell<Vec<Completion>>,
}

/// Starts the runtime of this environment, once. When requests have finished, `deliver(count, others)` is called:
/// `count` of them had nothing to say and their numbers are in `numbers`; `others` is undefined or a flat list of
/// number, whether it succeeded, and value or failure.
#[napi(
    catch_unwind,
    ts_args_type = "deliver: (count: number, others: unknown[] | undefined) => void, numbers: Uint32Array"
)]
pub fn start(env: Env, deliver: Unknown<'_>, numbers: Unknown<'_>) -> napi::Result<()> {
    if boundary::instance(&env)?.is_some() {
        return Err(napi::Error::from_reason("the addon is already started in this environment"));
    }
    let numbers = Numbers::new(&env, &numbers)?;
    let wake = Wake::new(&env, &deliver)?;
    let delivery = Arc::new(Delivery::new(wake.function()));
    let runtime = Rc::new(Runtime {
        pool: Pool::new(Arc::clone(&delivery)),
        waiting: Pool::waiting(Arc::clone(&delivery)),
        watch: Watch::new(default_threads()),
        answered: Cell::new(0),
        jobs: Jobs::new(Arc::clone(&delivery)),
        watched: Watched::default(),
        delivery,
        resources: RefCell::default(),
        outstanding: Cell::new(0),
        unreferenced: Cell::new(0),
        numbers,
        spare: Cell::default(),
    });
    runtime.delivery.hold(env.raw(), false);
    wake.connect(Rc::clone(&runtime));
    boundary::set_instance(&env, Rc::clone(&runtime))?;
    // Registered after the thread-safe function, so it runs before that one's own hook: hooks run last in, first out.
    env.add_env_cleanup_hook(runtime, |runtime| runtime.close())?;
    Ok(())
}

/// Ends all work of this environment now, and closes its images: for `process.exit()`, which does not run the cleanup hook.
#[napi(catch_unwind)]
pub fn stop(env: Env) -> napi::Result<()> {
    Runtime::of(&env)?.close();
    Ok(())
}

/// Delivers what is done, now, by the function that `start` was given. Returns whether to call this again in the next round
/// of the event loop: until then, requests that finish do not wake the thread.
#[napi(catch_unwind, ts_args_type = "deliver: (count: number, others: unknown[] | undefined) => void")]
pub fn look(env: Env, deliver: Unknown<'_>) -> napi::Result<bool> {
    let runtime = Runtime::of(&env)?;
    let goes_on = runtime.watch.goes_on();
    if runtime.delivery.watch(goes_on) {
        runtime.deliver(&env, deliver.raw())?;
    } else {
        // To the worker, where the system has put it on this thread's core.
        std::thread::yield_now();
    }
    Ok(goes_on)
}

impl Runtime {
    /// The runtime of the calling environment.
    pub(crate) fn of(env: &Env) -> napi::Result<&Self> {
        #[cfg(feature = "panics")]
        crate::panics::at("call", "");
        boundary::instance(env)?
            .ok_or_else(|| napi::Error::from_reason("the addon is not started in this environment"))
    }

    /// Queues a task for the request of that number. The event loop stays alive until it is delivered.
    pub(crate) fn submit(&self, env: &Env, request: u32, task: Task) -> napi::Result<()> {
        self.submit_where(env, request, task, false)
    }

    /// As [`Runtime::submit`]; `waits` as [`Handle::waits`] says.
    pub(crate) fn submit_where(&self, env: &Env, request: u32, task: Task, waits: bool) -> napi::Result<()> {
        self.expect(env, request, self.pool_for(waits).submit(request, task));
        Ok(())
    }

    fn pool_for(&self, waits: bool) -> &Pool {
        if waits { &self.waiting } else { &self.pool }
    }

    /// As [`Runtime::submit`], for one of very many requests; `waits` as [`Handle::waits`] says. Returns whether to begin to [`look`].
    pub(crate) fn submit_soon(&self, env: &Env, request: u32, task: Task, waits: bool) -> napi::Result<bool> {
        self.expect(env, request, self.pool_for(waits).submit(request, task));
        let begins = self.watch.requested();
        if begins {
            self.delivery.watch(true);
        }
        Ok(begins)
    }

    /// Whether a request may be answered where it is made, see [`MOST_ANSWERED`].
    pub(crate) fn may_answer(&self) -> bool {
        self.answered.get() < MOST_ANSWERED
    }

    /// One was.
    pub(crate) fn answered(&self) {
        self.answered.set(self.answered.get() + 1);
    }

    /// Counts a request that will be delivered: as failed, where it could not even be queued.
    pub(crate) fn expect(&self, env: &Env, request: u32, queued: Result<()>) {
        self.count(env, self.outstanding.get() + 1, self.unreferenced.get());
        if let Err(error) = queued {
            self.fail(request, error);
        }
    }

    /// Answers a request that is expected.
    pub(crate) fn fail(&self, request: u32, error: Error) {
        self.delivery.push(Completion { request, outcome: Outcome::Failed(error) });
    }

    /// The workers of this environment.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The jobs of this environment.
    pub(crate) fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// The requests that can be cancelled.
    pub(crate) fn watched(&self) -> &Watched {
        &self.watched
    }

    /// The image of that number.
    pub(crate) fn image(&self, number: u32) -> napi::Result<Arc<Handle>> {
        let resources = self.resources.borrow();
        resources.image(number).cloned().ok_or_else(|| napi::Error::from_reason("no such image"))
    }

    /// The file of that number.
    pub(crate) fn storage(&self, number: u32) -> napi::Result<Arc<dyn Storage>> {
        let resources = self.resources.borrow();
        resources.storage(number).cloned().ok_or_else(|| napi::Error::from_reason("no such file"))
    }

    /// The stream of that number.
    pub(crate) fn streamed(&self, number: u32) -> napi::Result<Arc<Streamed>> {
        let resources = self.resources.borrow();
        resources.streamed(number).cloned().ok_or_else(|| napi::Error::from_reason("no such stream"))
    }

    /// The connections to encrypt of that number.
    pub(crate) fn encrypting(&self, number: u32) -> napi::Result<Arc<Encrypting>> {
        let resources = self.resources.borrow();
        let found = resources.encrypting(number).cloned();
        found.ok_or_else(|| napi::Error::from_reason("no such connections to encrypt"))
    }

    /// The questions to an object of that number.
    pub(crate) fn source(&self, number: u32) -> napi::Result<Arc<Asking>> {
        let resources = self.resources.borrow();
        resources.source(number).cloned().ok_or_else(|| napi::Error::from_reason("no such source"))
    }

    /// The stream of that number.
    pub(crate) fn spool(&self, number: u32) -> napi::Result<Arc<Spool>> {
        let resources = self.resources.borrow();
        resources.spool(number).cloned().ok_or_else(|| napi::Error::from_reason("no such stream"))
    }

    /// Looks at the server of that number.
    pub(crate) fn with_server<T>(&self, number: u32, look: impl FnOnce(&Serving) -> T) -> napi::Result<T> {
        let resources = self.resources.borrow();
        resources.server(number).map(look).ok_or_else(|| napi::Error::from_reason("no such server"))
    }

    /// The way of what is done to JavaScript.
    pub(crate) fn completions(&self) -> Arc<Delivery> {
        Arc::clone(&self.delivery)
    }

    /// Changes the layer of that number.
    pub(crate) fn with_layer<T>(
        &self,
        number: u32,
        change: impl FnOnce(&mut dyn Layer) -> T,
    ) -> napi::Result<T> {
        let mut resources = self.resources.borrow_mut();
        resources.layer_mut(number).map(change).ok_or_else(|| napi::Error::from_reason("no such layer"))
    }

    /// Runs `work` on a worker; `into_js` makes the value of its result, on the environment's thread.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        env: &Env,
        request: u32,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        into_js: impl FnOnce(&Self, &Env, T) -> napi::Result<sys::napi_value> + Send + 'static,
    ) -> napi::Result<()> {
        let call = move || {
            let value = guarded(work);
            Outcome::from_result(
                value.map(|value| -> IntoJs { Box::new(move |runtime, env| into_js(runtime, env, value)) }),
            )
        };
        self.submit(env, request, Task::Call(Box::new(call)))
    }

    /// Holds a resource; returns its number.
    pub(crate) fn hold(&self, resource: Resource) -> u32 {
        self.resources.borrow_mut().hold(resource)
    }

    /// Gives a resource up.
    pub(crate) fn release(&self, number: u32) -> Option<Resource> {
        self.resources.borrow_mut().release(number)
    }

    /// Ends all work: nothing of this environment runs afterwards. Images that nobody closed are closed, so that what was
    /// written to them stays, as it would with a file. Called by the system, where a panic would end the process.
    ///
    /// The environment's thread only says so and waits: whatever a request, a job or an image still has to do, it does on
    /// other threads.
    fn close(&self) {
        let jobs = self.jobs.close();
        self.watched.close();
        // Nobody answers from here on.
        self.resources.borrow().cancel_sources();
        let requests = [self.pool.close(), self.waiting.close()];
        let resources = self.resources.borrow_mut().take();
        let end = move || {
            jobs();
            requests.into_iter().for_each(|requests| requests());
            for resource in resources {
                // There is nobody left to hear of a failure.
                let _closed = guarded(|| resource.close());
            }
        };
        let end = Mutex::new(Some(end));
        let run = || {
            let end = end.lock().take();
            end.into_iter().for_each(|end| end());
        };
        thread::scope(|scope| {
            let closing = thread::Builder::new().name("qcow2-end".to_owned()).spawn_scoped(scope, run);
            // Where the system starts no thread, better here than not at all.
            closing.map_or_else(|_| run(), |closing| drop(closing.join()));
        });
    }

    /// Hands everything that is done to JavaScript.
    pub(crate) fn deliver(&self, env: &Env, callback: sys::napi_value) -> napi::Result<()> {
        let (mut batch, woken) = self.delivery.take(self.spare.take());
        self.watch.delivered(woken);
        self.answered.set(0);
        let delivered = u32::try_from(batch.len()).unwrap_or(u32::MAX);
        let result = self.hand_over(env, callback, &mut batch);
        batch.clear();
        self.spare.set(batch);
        let outstanding = self.outstanding.get().saturating_sub(delivered);
        self.count(env, outstanding, self.unreferenced.get());
        result
    }

    /// A request that is expected keeps the event loop alive, or does not any more. Whoever said that it does not says that it does
    /// when it was delivered.
    pub(crate) fn reference(&self, env: &Env, holds: bool) {
        let unreferenced = self.unreferenced.get();
        let now = if holds { unreferenced.saturating_sub(1) } else { unreferenced + 1 };
        self.count(env, self.outstanding.get(), now);
    }

    fn count(&self, env: &Env, outstanding: u32, unreferenced: u32) {
        let held = self.outstanding.replace(outstanding) > self.unreferenced.replace(unreferenced);
        let holds = outstanding > unreferenced;
        if holds != held {
            self.delivery.hold(env.raw(), holds);
        }
    }

    fn hand_over(
        &self,
        env: &Env,
        callback: sys::napi_value,
        batch: &mut Vec<Completion>,
    ) -> napi::Result<()> {
        let (mut count, mut others) = (0, Vec::new());
        for Completion { request, outcome } in batch.drain(..) {
            match outcome {
                Outcome::Done => {
                    self.numbers.set(count, request);
                    count += 1;
                    if count == self.numbers.capacity() {
                        boundary::call(env, callback, count, &[])?;
                        count = 0;
                    }
                }
                Outcome::Value(make) => match self.value(env, make) {
                    Ok(value) => others.push((request, true, value)),
                    Err(error) => others.push((request, false, failure::to_js(env, &error)?)),
                },
                Outcome::Failed(error) => others.push((request, false, failure::to_js(env, &error)?)),
            }
        }
        boundary::call(env, callback, count, &others)
    }

    /// A panic here is that of one request: all others of the batch are still to be told.
    fn value(&self, env: &Env, make: IntoJs) -> Result<sys::napi_value> {
        guarded(|| {
            #[cfg(feature = "panics")]
            crate::panics::at("value", "");
            make(self, env)
                .map_err(|error| Error::new(ErrorKind::Internal, format!("no value could be made: {error}")))
        })
    }
}

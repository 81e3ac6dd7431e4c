//! Exports of NBD servers as files.

use std::sync::Arc;
use std::time::Duration;

use napi::Either;
use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::storage::DirectStorage;
use qcow2_engine::{Error, ErrorKind, Result};
use qcow2_nbd::Encrypt;
use qcow2_nbd::client::{Listed, Location, NbdStorage, Times, Way, list};

use crate::failure::Failure;
use crate::job::{Lane, Ticket};
use crate::open::Looked;
use crate::runtime::Runtime;
use crate::text::Text;

/// How to connect. Checked in TypeScript; what is absent has the client's default.
#[napi(object, object_to_js = false)]
pub struct NbdConnectOptions {
    /// For reading and writing.
    pub writable: Option<bool>,
    /// Milliseconds to be reached, and to begin.
    pub connect_time: Option<f64>,
    /// Milliseconds that the server may say nothing while requests wait.
    pub silence_time: Option<f64>,
    /// Milliseconds for which a lost connection is made again.
    pub reconnect_time: Option<f64>,
    /// Number of what encrypts the connection.
    pub tls: Option<u32>,
}

impl NbdConnectOptions {
    fn way(&self, env: &Env) -> napi::Result<Way> {
        let default = Times::default();
        let time =
            |given: Option<f64>, default| given.map_or(default, |time| Duration::from_millis(time as u64));
        let tls = self.tls.map(|tls| Runtime::of(env)?.encrypting(tls)).transpose()?;
        Ok(Way {
            times: Times {
                connect: time(self.connect_time, default.connect),
                silence: time(self.silence_time, default.silence),
            },
            tls: tls.map(|tls| -> Arc<dyn Encrypt> { tls }),
            reconnect: time(self.reconnect_time, Duration::ZERO),
        })
    }
}

fn location(name: &Text) -> Result<Location> {
    match name.as_utf8() {
        Some(name) => Location::parse(name),
        None => {
            let message = "the name of an export is not UTF-8: its URI has the bytes percent-encoded";
            Err(Error::new(ErrorKind::InvalidArgument, message).with_field("uri"))
        }
    }
}

/// The URI of an export, by any name of it; why the name is none.
#[napi(catch_unwind)]
pub fn nbd_location(name: Text) -> Either<String, Failure> {
    match location(&name) {
        Ok(location) => Either::A(location.to_string()),
        Err(error) => Either::B(Failure::from(&error)),
    }
}

/// Opens an export, as a job: cancelled at any time, it ends the connection.
#[napi(catch_unwind)]
pub fn open_nbd(
    env: Env,
    request: u32,
    job: u32,
    name: Text,
    options: NbdConnectOptions,
) -> napi::Result<()> {
    let way = options.way(&env)?;
    let work = move |job: &Arc<_>| {
        let writable = options.writable == Some(true);
        let storage = NbdStorage::open(&location(&name)?, writable, way, job)?;
        Looked::at(DirectStorage::over(Arc::new(storage)))
    };
    Runtime::of(&env)?.start_job_in(Lane::Connecting, &env, Ticket { request, job }, work, Looked::hold)
}

/// An export that a server tells of.
#[napi(object, object_from_js = false)]
pub struct ListedExport {
    /// Its name.
    pub name: Text,
    /// What it is, for a person.
    pub description: Text,
    /// Bytes, where the server tells.
    pub size: Option<f64>,
    /// Transmission flags.
    pub flags: Option<u32>,
    /// Sizes of requests in bytes: least, best, largest.
    pub block_sizes: Option<Vec<u32>>,
    /// Names of its contexts.
    pub contexts: Vec<Text>,
    /// Lengths of requests can have 64 bits.
    pub extended_headers: bool,
}

impl From<Listed> for ListedExport {
    fn from(listed: Listed) -> Self {
        Self {
            name: Text::from(&*listed.name),
            description: Text::from(&*listed.description),
            size: listed.export.map(|(size, _)| size as f64),
            flags: listed.export.map(|(_, flags)| flags.into()),
            block_sizes: listed.blocks.map(|sizes| vec![sizes.minimum, sizes.preferred, sizes.maximum]),
            contexts: listed.contexts.iter().map(|name| Text::from(&**name)).collect(),
            extended_headers: listed.extended,
        }
    }
}

/// The exports of a server.
#[napi(catch_unwind)]
pub fn list_nbd(
    env: Env,
    request: u32,
    job: u32,
    name: Text,
    options: NbdConnectOptions,
) -> napi::Result<()> {
    let way = options.way(&env)?;
    let work = move |job: &Arc<_>| list(&location(&name)?, way, job);
    let lane = Lane::Connecting;
    Runtime::of(&env)?.start_job_in(lane, &env, Ticket { request, job }, work, |_, env, listed| {
        let exports: Vec<ListedExport> = listed.into_iter().map(ListedExport::from).collect();
        // SAFETY: on the environment's thread, with its own env.
        unsafe { Vec::to_napi_value(env.raw(), exports) }
    })
}

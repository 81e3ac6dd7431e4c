//! Key slots of an encrypted image that is open for writing.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::keys::{KeyRemoval, NewKey};

use crate::encryption::SecretSource;
use crate::job::{Lane, Ticket};
use crate::runtime::Runtime;

/// A secret that is to open an image.
#[napi(object, object_to_js = false)]
pub struct KeyOrder {
    /// One that opens it already.
    pub secret: SecretSource,
    /// The new one.
    pub new_secret: SecretSource,
    /// Its key slot.
    pub slot: Option<u32>,
    /// Also a slot in use.
    pub force: Option<bool>,
    /// Milliseconds that a guess takes.
    pub iter_time: Option<u32>,
    /// The old one goes.
    pub replaces: bool,
}

/// Which key slots are to go.
#[napi(object, object_to_js = false)]
pub struct KeyRemovalOrder {
    /// This one.
    pub slot: Option<u32>,
    /// Those that it opens.
    pub secret: Option<SecretSource>,
    /// Also the last one.
    pub force: Option<bool>,
}

/// Adds a secret, or puts one in the place of another; tells its key slot.
#[napi(catch_unwind)]
pub fn add_key(env: Env, request: u32, job: u32, image: u32, order: KeyOrder) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let secret = order.secret.into_secret()?;
    let new = NewKey {
        secret: order.new_secret.into_secret()?,
        slot: order.slot.map(|slot| slot as usize),
        force: order.force == Some(true),
        iter_time_ms: order.iter_time,
    };
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| {
            handle.run(|image| {
                if order.replaces {
                    image.change_key(&secret, &new, job)
                } else {
                    image.add_key(&secret, &new, job)
                }
            })
        },
        // SAFETY: on the environment's thread, with its own env.
        |_, env, slot| unsafe { u32::to_napi_value(env.raw(), slot as u32) },
    )
}

/// Frees key slots; tells which.
#[napi(catch_unwind)]
pub fn remove_keys(env: Env, request: u32, job: u32, image: u32, order: KeyRemovalOrder) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let removal = KeyRemoval {
        slot: order.slot.map(|slot| slot as usize),
        secret: order.secret.map(SecretSource::into_secret).transpose()?,
        force: order.force == Some(true),
    };
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| handle.run(|image| image.remove_keys(&removal, job)),
        |_, env, slots| {
            let slots = slots.into_iter().map(|slot| slot as u32).collect();
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Vec::<u32>::to_napi_value(env.raw(), slots) }
        },
    )
}

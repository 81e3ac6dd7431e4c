//! Secrets on their way in, and what is done with them.

use napi::bindgen_prelude::{Env, ToNapiValue, Uint8Array};
use napi_derive::napi;
use qcow2_engine::encryption::{Encryption, Secret};
use qcow2_engine::{Layer, LayerExt, Result};

use crate::job::{Lane, Ticket};
use crate::resource::Resource;
use crate::runtime::Runtime;
use crate::text::Text;

/// A secret: its bytes, or the file that has them.
#[napi(object, object_to_js = false)]
pub struct SecretSource {
    /// The secret itself.
    pub bytes: Option<Uint8Array>,
    /// A file whose bytes are the secret, all of them.
    pub file: Option<Text>,
    /// Guest data may be written also where its encryption is weak.
    pub allow_weak: Option<bool>,
}

impl SecretSource {
    /// Takes the secret over. A file is read later, by whoever needs it.
    pub(crate) fn into_secret(self) -> napi::Result<Secret> {
        match (self.bytes, self.file) {
            (Some(bytes), _) => Ok(Secret::new(bytes.to_vec())),
            (None, Some(file)) => Ok(Secret::in_file(file.into_path()?)),
            (None, None) => Err(napi::Error::from_reason("a secret without bytes")),
        }
    }
}

/// How a new image is encrypted. Names were checked in TypeScript; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct EncryptOptions {
    /// What opens the image.
    pub secret: SecretSource,
    /// `luks` (the default) or `aes`.
    pub format: Option<String>,
    /// QEMU's name: `aes-256`.
    pub cipher_alg: Option<String>,
    /// QEMU's name: `xts`.
    pub cipher_mode: Option<String>,
    /// QEMU's name: `plain64`.
    pub ivgen_alg: Option<String>,
    /// QEMU's name of the hash of `essiv`.
    pub ivgen_hash_alg: Option<String>,
    /// QEMU's name: `sha256`.
    pub hash_alg: Option<String>,
    /// Milliseconds that a guess takes.
    pub iter_time: Option<u32>,
    /// Also a weak combination.
    pub allow_weak: Option<bool>,
}

impl EncryptOptions {
    /// The engine's options.
    pub(crate) fn into_encryption(self) -> napi::Result<Encryption> {
        Ok(Encryption {
            secret: self.secret.into_secret()?,
            legacy_aes: self.format.as_deref() == Some("aes"),
            cipher_alg: self.cipher_alg,
            cipher_mode: self.cipher_mode,
            ivgen_alg: self.ivgen_alg,
            ivgen_hash_alg: self.ivgen_hash_alg,
            hash_alg: self.hash_alg,
            iter_time_ms: self.iter_time,
            allow_weak: self.allow_weak == Some(true),
        })
    }
}

/// Opens the guest data of a layer with a secret; tells the layer's new number. The old one is gone, however it ends.
#[napi(catch_unwind)]
pub fn unlock_layer(env: Env, request: u32, job: u32, layer: u32, secret: SecretSource) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let allow_weak = secret.allow_weak == Some(true);
    let secret = secret.into_secret()?;
    let Some(Resource::Layer(layer)) = runtime.release(layer) else {
        return Err(napi::Error::from_reason("no such layer"));
    };
    let lane = if layer.storage().arriving().is_some() { Lane::Arriving } else { Lane::Brief };
    runtime.start_job_in(
        lane,
        &env,
        Ticket { request, job },
        move |job| -> Result<Box<dyn Layer>> {
            let mut layer = layer;
            layer.unlock(&secret.read()?, job)?;
            if let Some(qcow2) = layer.as_qcow2_mut().filter(|_| allow_weak) {
                qcow2.allow_weak();
            }
            Ok(layer)
        },
        |runtime, env, layer| {
            let number = runtime.hold(Resource::Layer(layer));
            // SAFETY: on the environment's thread, with its own env.
            unsafe { u32::to_napi_value(env.raw(), number) }
        },
    )
}

//! Opening, step by step: a file, a layer on it, a chain of layers. Which file comes next is JavaScript's decision.

use std::path::PathBuf;
use std::sync::Arc;

use napi::bindgen_prelude::{BufferSlice, Either, Env, ToNapiValue};
use napi::sys;
use napi_derive::napi;
use qcow2_engine::format::Limits;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Image, Layer, MemMut, OpenOptions, Qcow2, Raw, Result, Storage, StorageExt};

use crate::resource::{Handle, Resource};
use crate::runtime::Runtime;

/// Bytes of a new file that JavaScript sees, to tell its format.
const HEAD: usize = 1024;

/// An open file.
#[napi(object, object_from_js = false)]
pub struct OpenedFile<'env> {
    /// Number of the resource.
    pub file: u32,
    /// Its path, where one is known.
    pub path: Option<String>,
    /// Length in bytes.
    pub length: f64,
    /// Device and inode: equal strings are the same file.
    pub identity: Option<String>,
    /// The first bytes, 1024 at most.
    pub head: BufferSlice<'env>,
}

/// Opens a file for reading.
#[napi]
pub fn open_file(env: Env, request: u32, path: Either<String, BufferSlice<'_>>) -> napi::Result<()> {
    let path = to_path(path)?;
    open_storage(&env, request, move || FileStorage::open(path, Access::ReadOnly))
}

/// The path that JavaScript gave, as text or as bytes.
pub(crate) fn to_path(path: Either<String, BufferSlice<'_>>) -> napi::Result<PathBuf> {
    match path {
        Either::A(text) => Ok(PathBuf::from(text)),
        Either::B(bytes) => path_of(&bytes),
    }
}

#[cfg(unix)]
fn path_of(bytes: &[u8]) -> napi::Result<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

#[cfg(not(unix))]
fn path_of(bytes: &[u8]) -> napi::Result<PathBuf> {
    let text = std::str::from_utf8(bytes).map_err(|_| napi::Error::from_reason("the path is not UTF-8"))?;
    Ok(PathBuf::from(text))
}

/// Opens the file behind a descriptor, which stays JavaScript's.
#[cfg(unix)]
#[napi]
pub fn open_descriptor(env: Env, request: u32, descriptor: i32) -> napi::Result<()> {
    // SAFETY: the descriptor is that of a `FileHandle` which JavaScript keeps open during this call; it is
    // duplicated before the call returns.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    let own = borrowed.try_clone_to_owned().map_err(|e| napi::Error::from_reason(e.to_string()))?;
    open_storage(&env, request, move || {
        use std::os::fd::AsFd;
        FileStorage::from_borrowed(own.as_fd())
    })
}

fn open_storage(
    env: &Env,
    request: u32,
    open: impl FnOnce() -> Result<FileStorage> + Send + 'static,
) -> napi::Result<()> {
    let work = move || {
        let storage: Arc<dyn Storage> = Arc::new(open()?);
        let length = storage.size()?;
        let mut head = vec![0; HEAD];
        let got = storage.read_up_to_at(MemMut::from(&mut head[..]), 0)?;
        head.truncate(got);
        Ok((storage, length, head))
    };
    Runtime::of(env)?.run(env, request, work, |runtime, env, (storage, length, head)| {
        let opened = OpenedFile {
            path: storage.path().map(|path| path.to_string_lossy().into_owned()),
            length: length as f64,
            identity: storage.traits().identity.map(|(device, inode)| format!("{device}:{inode}")),
            head: BufferSlice::copy_from(env, head)?,
            file: runtime.hold(Resource::Storage(storage)),
        };
        // SAFETY: on the environment's thread, with its own env.
        unsafe { OpenedFile::to_napi_value(env.raw(), opened) }
    })
}

/// How to open a layer. Sizes are bytes; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct LayerOptions {
    /// Id or name of the internal snapshot to view.
    pub snapshot: Option<String>,
    /// Most bytes of L2 tables to cache.
    pub l2_cache_size: Option<f64>,
    /// Keep a damaged snapshot table as a finding.
    pub for_check: Option<bool>,
    /// Safety limits.
    pub limits: Option<LimitOptions>,
}

/// Safety limits; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct LimitOptions {
    /// Bytes.
    pub max_virtual_size: Option<f64>,
    /// Bytes.
    pub max_metadata_bytes: Option<f64>,
    /// Count.
    pub max_snapshots: Option<u32>,
    /// Count.
    pub max_bitmaps: Option<u32>,
    /// Bytes.
    pub max_memory: Option<f64>,
}

/// Largest size that JavaScript can say exactly.
const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

impl LimitOptions {
    /// The engine's limits: its defaults, and what the caller tightened.
    pub(crate) fn read(given: Option<&Self>) -> Limits {
        let mut limits = Limits { max_virtual_size: MAX_SAFE_INTEGER, ..Limits::default() };
        if let Some(given) = given {
            let bytes = |value: Option<f64>, default: u64| value.map_or(default, |value| value as u64);
            limits.max_virtual_size = bytes(given.max_virtual_size, limits.max_virtual_size);
            limits.max_metadata_bytes = bytes(given.max_metadata_bytes, limits.max_metadata_bytes);
            limits.max_snapshots = given.max_snapshots.unwrap_or(limits.max_snapshots);
            limits.max_bitmaps = given.max_bitmaps.unwrap_or(limits.max_bitmaps);
            limits.max_memory = bytes(given.max_memory, limits.max_memory);
        }
        limits
    }
}

/// An open layer and the files that it names.
#[napi(object, object_from_js = false)]
pub struct OpenedLayer {
    /// Number of the resource.
    pub layer: u32,
    /// Bytes.
    pub virtual_size: f64,
    /// Bytes, of a qcow2 layer.
    pub cluster_size: Option<f64>,
    /// The backing file it names.
    pub backing: Option<NamedFile>,
    /// The data file it needs.
    pub data_file: Option<NamedFile>,
}

/// A file that an image names.
#[napi(object, object_from_js = false)]
pub struct NamedFile {
    /// The name; empty where the image stores none.
    pub filename: String,
    /// Whether the name is exact: false for one that is not UTF-8.
    pub exact: bool,
    /// The format that the image claims.
    pub format: Option<String>,
}

impl NamedFile {
    fn new(filename: &[u8], format: Option<&[u8]>) -> Self {
        let format = format.map(|format| String::from_utf8_lossy(format).into_owned());
        let exact = std::str::from_utf8(filename).is_ok();
        Self { filename: String::from_utf8_lossy(filename).into_owned(), exact, format }
    }
}

/// Opens a qcow2 layer on a file. The file's number stays valid.
#[napi]
pub fn open_qcow2(env: Env, request: u32, file: u32, options: LayerOptions) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    let options = OpenOptions {
        limits: LimitOptions::read(options.limits.as_ref()),
        snapshot: options.snapshot,
        l2_cache_bytes: options.l2_cache_size.map(|size| size as u64),
        for_check: options.for_check.unwrap_or(false),
        ..OpenOptions::default()
    };
    let work = move || Ok(Layer::Qcow2(Box::new(Qcow2::open(storage, &options)?)));
    runtime.run(&env, request, work, hold_layer)
}

/// Makes a raw layer of a file. The file's number stays valid.
#[napi]
pub fn open_raw(env: Env, request: u32, file: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    runtime.run(&env, request, move || Ok(Layer::Raw(Raw::new(storage)?)), hold_layer)
}

fn hold_layer(runtime: &Runtime, env: &Env, layer: Layer) -> napi::Result<sys::napi_value> {
    let references = layer.as_qcow2().map(Qcow2::references).unwrap_or_default();
    let opened = OpenedLayer {
        virtual_size: layer.virtual_size() as f64,
        cluster_size: layer.as_qcow2().map(|qcow2| qcow2.geometry().cluster_size() as f64),
        backing: references
            .backing
            .map(|backing| NamedFile::new(&backing.filename, backing.format.as_deref())),
        data_file: references
            .data_file
            .map(|data| NamedFile::new(data.filename.as_deref().unwrap_or_default(), Some(b"raw"))),
        layer: runtime.hold(Resource::Layer(layer)),
    };
    // SAFETY: on the environment's thread, with its own env.
    unsafe { OpenedLayer::to_napi_value(env.raw(), opened) }
}

/// Attaches an external data file to a layer. The file's number stays valid.
#[napi]
pub fn set_data_file(env: Env, request: u32, layer: u32, file: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    runtime.with_layer(layer, |layer| {
        if let Layer::Qcow2(qcow2) = layer {
            qcow2.set_data_file(storage);
        }
    })?;
    runtime.run(&env, request, || Ok(()), nothing)
}

/// Makes an image of layers, top first, which become part of it.
#[napi]
pub fn assemble(env: Env, request: u32, layers: Vec<u32>) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let layers: Vec<Layer> = layers
        .into_iter()
        .filter_map(|number| match runtime.release(number) {
            Some(Resource::Layer(layer)) => Some(layer),
            _ => None,
        })
        .collect();
    runtime.run(
        &env,
        request,
        move || Image::new(layers),
        |runtime, env, image| {
            let number = runtime.hold(Resource::Image(Arc::new(Handle::new(image))));
            // SAFETY: on the environment's thread, with its own env.
            unsafe { u32::to_napi_value(env.raw(), number) }
        },
    )
}

/// Gives a file, layer or image up. It closes on a worker, when the last request that uses it is done: closing can block.
#[napi]
pub fn release(env: Env, request: u32, number: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let resource = runtime.release(number);
    let work = move || {
        drop(resource);
        Ok(())
    };
    runtime.run(&env, request, work, nothing)
}

fn nothing(_: &Runtime, env: &Env, (): ()) -> napi::Result<sys::napi_value> {
    // SAFETY: on the environment's thread, with its own env.
    unsafe { <()>::to_napi_value(env.raw(), ()) }
}

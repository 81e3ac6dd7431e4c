//! Opening, step by step: a file, a layer on it, a chain of layers. Which file comes next is JavaScript's decision.

use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::{BufferSlice, Env, ToNapiValue};
use napi::sys;
use napi_derive::napi;
use qcow2_engine::files::Lock;
use qcow2_engine::format::Limits;
use qcow2_engine::image::{BackingReference, ExtentReference};
use qcow2_engine::storage::{Access, CacheMode, FileStorage, Locking, Part, ReadOnly};
use qcow2_engine::{
    DetectZeroes, Discard, Error, ErrorKind, Image, Layer, LayerExt, MemMut, OpenOptions, Result, Storage,
    StorageExt, WriteOptions,
};

use crate::bytes::is_exact;
use crate::formats::{Files, Format};
use crate::resource::{Handle, Resource};
use crate::runtime::Runtime;
use crate::text::Text;

/// Bytes of a new file that JavaScript sees, to tell its format.
const HEAD: usize = 1024;

/// An open file.
#[napi(object, object_from_js = false)]
pub struct OpenedFile<'env> {
    /// Number of the resource.
    pub file: u32,
    /// Its path, where one is known.
    pub path: Option<Text>,
    /// The same from the root of the file system.
    pub absolute_path: Option<Text>,
    /// Length in bytes.
    pub length: f64,
    /// Equal strings are the same file.
    pub identity: Option<String>,
    /// The first bytes, 1024 at most.
    pub head: BufferSlice<'env>,
}

/// How to open a file.
#[napi(object, object_to_js = false)]
pub struct FileOptions {
    /// For reading and writing.
    pub writable: Option<bool>,
    /// The cache mode's name; `writeback` without one.
    pub cache: Option<String>,
    /// Bytes in front of the part of the file that is meant, which is only read then.
    pub offset: Option<f64>,
    /// Bytes of that part; to the end without it.
    pub length: Option<f64>,
}

impl FileOptions {
    fn read(&self) -> napi::Result<(Access, CacheMode)> {
        let access = if self.writable == Some(true) { Access::ReadWrite } else { Access::ReadOnly };
        Ok((access, cache_mode(self.cache.as_deref())?))
    }

    /// The part of the file that is meant.
    fn part(&self) -> Option<(u64, u64)> {
        let offset = self.offset? as u64;
        Some((offset, self.length.map_or(u64::MAX, |length| length as u64)))
    }
}

pub(crate) fn cache_mode(name: Option<&str>) -> napi::Result<CacheMode> {
    match name {
        None => Ok(CacheMode::default()),
        Some(name) => CacheMode::from_name(name).ok_or_else(|| unknown("cache mode", name)),
    }
}

/// The facade checks names; one that it lets through is a bug.
fn unknown(what: &str, name: &str) -> napi::Error {
    napi::Error::from_reason(format!("unknown {what} '{name}'"))
}

/// Opens a file.
#[napi(catch_unwind)]
pub fn open_file(env: Env, request: u32, path: Text, options: FileOptions) -> napi::Result<()> {
    let path = path.into_path()?;
    let (access, cache) = options.read()?;
    open_storage(&env, request, options.part(), move || FileStorage::open_cached(path, access, cache))
}

/// A path from the root of the file system, by the directory that the process works in now. None where that is gone.
pub(crate) fn absolute(path: &Path) -> Option<Text> {
    std::path::absolute(path).ok().map(|path| Text::from(path.as_path()))
}

/// Opens the file behind a descriptor, which stays JavaScript's.
#[cfg(unix)]
#[napi(catch_unwind)]
pub fn open_descriptor(env: Env, request: u32, descriptor: i32, options: FileOptions) -> napi::Result<()> {
    let (access, cache) = options.read()?;
    // SAFETY: the descriptor is that of a `FileHandle` which JavaScript keeps open during this call; it is
    // duplicated before the call returns.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    let own = borrowed.try_clone_to_owned().map_err(|e| napi::Error::from_reason(e.to_string()))?;
    open_storage(&env, request, options.part(), move || {
        use std::os::fd::AsFd;
        FileStorage::from_borrowed_cached(own.as_fd(), Some(access), cache)
    })
}

fn open_storage(
    env: &Env,
    request: u32,
    part: Option<(u64, u64)>,
    open: impl FnOnce() -> Result<FileStorage> + Send + 'static,
) -> napi::Result<()> {
    let work = move || {
        let storage = open()?.into_storage();
        Looked::at(match part {
            Some((start, length)) => Arc::new(ReadOnly(Part::new(storage, start, length))),
            None => storage,
        })
    };
    Runtime::of(env)?.run(env, request, work, Looked::hold)
}

/// A storage that was opened, and what JavaScript sees of it.
pub(crate) struct Looked {
    storage: Arc<dyn Storage>,
    length: u64,
    head: Vec<u8>,
}

impl Looked {
    /// Looks at a storage.
    pub(crate) fn at(storage: Arc<dyn Storage>) -> Result<Self> {
        #[cfg(feature = "panics")]
        let storage = crate::panics::hook(storage);
        let length = storage.size()?;
        let mut head = vec![0; HEAD];
        let got = storage.read_up_to_at(MemMut::from(&mut head[..]), 0)?;
        head.truncate(got);
        Ok(Self { storage, length, head })
    }

    /// Holds it for JavaScript.
    pub(crate) fn hold(
        runtime: &Runtime,
        env: &Env,
        Self { storage, length, head }: Self,
    ) -> napi::Result<sys::napi_value> {
        let identity = storage.identity();
        // What is no file of the system has a name, and no folder.
        let is_file = identity.as_ref().is_none_or(|identity| identity.kind() == "file");
        let opened = OpenedFile {
            path: storage.path().map(Text::from),
            absolute_path: storage.path().filter(|_| is_file).and_then(absolute),
            length: length as f64,
            identity: identity.map(|identity| identity.to_string()),
            head: BufferSlice::copy_from(env, head)?,
            file: runtime.hold(Resource::Storage(storage)),
        };
        // SAFETY: on the environment's thread, with its own env.
        unsafe { OpenedFile::to_napi_value(env.raw(), opened) }
    }
}

/// How to open a layer. Sizes are bytes; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct LayerOptions {
    /// Id or name of the internal snapshot to view.
    pub snapshot: Option<Text>,
    /// Most bytes of L2 tables to cache.
    pub l2_cache_size: Option<f64>,
    /// Open an image whose active L1 table is not whole: what it maps cannot be read.
    pub salvage: Option<bool>,
    /// Safety limits.
    pub limits: Option<LimitOptions>,
    /// Bytes of the disk in a compressed file, where that is known.
    pub size: Option<f64>,
    /// Number of the file with the header, where that is another one: of LUKS.
    pub header: Option<u32>,
    /// How to lock the files; not at all without it.
    pub lock: Option<LockOptions>,
}

/// How to lock a file against other processes.
#[napi(object, object_to_js = false)]
pub struct LockOptions {
    /// `auto` or `on`.
    pub locking: String,
    /// Also while another process writes.
    pub force_share: Option<bool>,
    /// To write to it.
    pub writable: Option<bool>,
}

impl LockOptions {
    pub(crate) fn read(given: Option<&Self>) -> napi::Result<Lock> {
        let Some(given) = given else { return Ok(Lock::NONE) };
        let locking = match given.locking.as_str() {
            "auto" => Locking::Auto,
            "on" => Locking::On,
            other => return Err(unknown("locking", other)),
        };
        Ok(Lock {
            locking,
            force_share: given.force_share == Some(true),
            writable: given.writable == Some(true),
        })
    }
}

/// How to write to an image.
#[napi(object, object_to_js = false)]
pub struct WritingOptions {
    /// The cache mode's name; `writeback` without one.
    pub cache: Option<String>,
    /// `ignore` (the default) or `unmap`.
    pub discard: Option<String>,
    /// `off` (the default), `on` or `unmap`.
    pub detect_zeroes: Option<String>,
    /// Late refcounts.
    pub lazy_refcounts: Option<bool>,
    /// The first free clusters, none reserved ahead.
    pub first_fit: Option<bool>,
}

impl WritingOptions {
    pub(crate) fn read(&self) -> napi::Result<WriteOptions> {
        Ok(WriteOptions {
            discard: match self.discard.as_deref() {
                None | Some("ignore") => Discard::Ignore,
                Some("unmap") => Discard::Unmap,
                Some(other) => return Err(unknown("discard", other)),
            },
            detect_zeroes: match self.detect_zeroes.as_deref() {
                None | Some("off") => DetectZeroes::Off,
                Some("on") => DetectZeroes::On,
                Some("unmap") => DetectZeroes::Unmap,
                Some(other) => return Err(unknown("detectZeroes", other)),
            },
            flush_each: cache_mode(self.cache.as_deref())?.flushes_every_write(),
            lazy_refcounts: self.lazy_refcounts == Some(true),
            first_fit: self.first_fit == Some(true),
            ..WriteOptions::default()
        })
    }
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

impl LimitOptions {
    /// The engine's limits: its defaults, and what the caller tightened.
    pub(crate) fn read(given: Option<&Self>) -> Limits {
        let mut limits = Limits::default();
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
    /// Bytes, of a layer that has clusters.
    pub cluster_size: Option<f64>,
    /// How its guest data is encrypted, by QEMU's name.
    pub encryption: Option<String>,
    /// The backing file it names.
    pub backing: Option<NamedFile>,
    /// The data file it needs.
    pub data_file: Option<NamedFile>,
    /// The files that its disk is made of beside its own.
    pub extents: Vec<NamedExtent>,
    /// What an image that is made on it stores to know it again.
    pub content_id: Option<String>,
}

/// A file with a part of a disk, as an image names it.
#[napi(object, object_from_js = false)]
pub struct NamedExtent {
    /// The name.
    pub filename: Text,
    /// Whether it may be written to.
    pub writable: bool,
}

/// A file that an image names.
#[napi(object, object_from_js = false)]
pub struct NamedFile {
    /// The name; empty where the image stores none.
    pub filename: Text,
    /// The format that the image claims.
    pub format: Option<Text>,
}

impl NamedFile {
    fn new(filename: &[u8], format: Option<&[u8]>) -> Self {
        Self { filename: Text::from(filename), format: format.map(Text::from) }
    }
}

impl From<&ExtentReference> for NamedExtent {
    fn from(extent: &ExtentReference) -> Self {
        Self { filename: Text::from(&extent.filename[..]), writable: extent.writable }
    }
}

impl From<BackingReference> for NamedFile {
    fn from(backing: BackingReference) -> Self {
        Self::new(&backing.filename, backing.format.as_deref())
    }
}

/// Opens a layer of a format, by QEMU's name of it, on a file. The file's number stays valid.
#[napi(catch_unwind)]
pub fn open_layer(
    env: Env,
    request: u32,
    file: u32,
    format: String,
    options: LayerOptions,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    let format = Format::named(&format)?;
    let lock = LockOptions::read(options.lock.as_ref())?;
    let header = options.header.map(|header| runtime.storage(header)).transpose()?;
    let options = OpenOptions {
        limits: LimitOptions::read(options.limits.as_ref()),
        snapshot: options.snapshot.map(Text::into_bytes),
        l2_cache_bytes: options.l2_cache_size.map(|size| size as u64),
        salvage: options.salvage.unwrap_or(false),
        ..OpenOptions::default()
    };
    let arrives = storage.arriving().is_some();
    let work = move || {
        // Before anything of the image is believed.
        lock.claim(&*storage, !format.plain)?;
        if let Some(header) = &header {
            lock.for_writing(false).claim(&**header, true)?;
        }
        let layer = format.open(Files { own: storage, header }, &options)?;
        let size = layer.virtual_size();
        if is_exact(size) { Ok(layer) } else { Err(layer.storage().located(inexact(size))) }
    };
    if arrives {
        return runtime.run_arriving(&env, request, work, hold_layer);
    }
    runtime.run(&env, request, work, hold_layer)
}

/// What counts with its size in JavaScript must not be off by some bytes.
fn inexact(size: u64) -> Error {
    let message = format!(
        "size of {size} is not exact as a number: beyond 2^53, a disk must be whole sectors of 512 bytes"
    );
    Error::new(ErrorKind::Limit, message).with_field("size")
}

fn hold_layer(runtime: &Runtime, env: &Env, layer: Box<dyn Layer>) -> napi::Result<sys::napi_value> {
    let references = layer.references();
    let opened = OpenedLayer {
        virtual_size: layer.virtual_size() as f64,
        cluster_size: layer.unit().map(|unit| unit as f64),
        encryption: layer.encryption().map(str::to_owned),
        backing: references.backing.map(NamedFile::from),
        data_file: references
            .data_file
            .map(|data| NamedFile::new(data.filename.as_deref().unwrap_or_default(), Some(b"raw"))),
        extents: references.extents.iter().map(NamedExtent::from).collect(),
        content_id: layer.content_id(),
        layer: runtime.hold(Resource::Layer(layer)),
    };
    // SAFETY: on the environment's thread, with its own env.
    unsafe { OpenedLayer::to_napi_value(env.raw(), opened) }
}

/// Attaches an external data file to a layer. The file's number stays valid.
#[napi(catch_unwind)]
pub fn set_data_file(
    env: Env,
    request: u32,
    layer: u32,
    file: u32,
    lock: Option<LockOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    let lock = LockOptions::read(lock.as_ref())?;
    let data = Arc::clone(&storage);
    runtime.with_layer(layer, |layer| {
        if let Some(qcow2) = layer.as_qcow2_mut() {
            qcow2.set_data_file(storage);
        }
    })?;
    runtime.run(&env, request, move || lock.claim(&*data, true), nothing)
}

/// Attaches the files of a layer's extents, in their order, to the layer, which has another number then. The files' numbers stay valid.
#[napi(catch_unwind)]
pub fn attach_extents(
    env: Env,
    request: u32,
    layer: u32,
    files: Vec<u32>,
    lock: Option<LockOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let lock = LockOptions::read(lock.as_ref())?;
    let files = files.into_iter().map(|file| runtime.storage(file)).collect::<napi::Result<Vec<_>>>()?;
    let Some(Resource::Layer(layer)) = runtime.release(layer) else {
        return Err(napi::Error::from_reason("no such layer"));
    };
    let work = move || {
        let mut layer = layer;
        for (index, file) in files.into_iter().enumerate() {
            // Before anything of it is believed.
            lock.claim(&*file, true)?;
            layer.attach_extent(index, file)?;
        }
        Ok(layer)
    };
    runtime.run(&env, request, work, hold_layer)
}

/// Makes an image of layers, top first, which become part of it. With `write`, the top layer is made writable: only now, when
/// everything that it names was accepted, may opening change the file (an image that was not closed cleanly is repaired).
#[napi(catch_unwind)]
pub fn assemble(env: Env, request: u32, layers: Vec<u32>, write: Option<WritingOptions>) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let write = write.as_ref().map(WritingOptions::read).transpose()?;
    let mut layers: Vec<Box<dyn Layer>> = layers
        .into_iter()
        .filter_map(|number| match runtime.release(number) {
            Some(Resource::Layer(layer)) => Some(layer),
            _ => None,
        })
        .collect();
    runtime.run(
        &env,
        request,
        move || {
            if let (Some(write), Some(top)) = (write, layers.first_mut()) {
                top.enable_writing(write)?;
            }
            Image::new(layers)
        },
        |runtime, env, image| {
            let number = runtime.hold(Resource::Image(Arc::new(Handle::new(image))));
            // SAFETY: on the environment's thread, with its own env.
            unsafe { u32::to_napi_value(env.raw(), number) }
        },
    )
}

/// Gives a file, layer or image up. It closes on a worker: closing can block, and an image that was written to is flushed
/// first. It is given up also when that fails; its files close with the last request that uses them.
#[napi(catch_unwind)]
pub fn release(env: Env, request: u32, number: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let resource = runtime.release(number);
    runtime.run(&env, request, move || resource.map_or(Ok(()), Resource::close), nothing)
}

pub(crate) fn nothing(_: &Runtime, env: &Env, (): ()) -> napi::Result<sys::napi_value> {
    // SAFETY: on the environment's thread, with its own env.
    unsafe { <()>::to_napi_value(env.raw(), ()) }
}

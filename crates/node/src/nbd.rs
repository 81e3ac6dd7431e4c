//! Disks served over NBD.

use std::ops::Range;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use parking_lot::Mutex;
use qcow2_engine::{Error, ErrorKind, Extent, GuestSource, Image, Job, Mem, MemMut, Result};
use qcow2_nbd::server::{Address, Bitmap, DirtyRanges, Export, HANDSHAKE_TIME, Server, ServerOptions};
use qcow2_nbd::{Disk, Durability, Encrypt};

use crate::delivery::{Completion, Delivery, Outcome};
use crate::resource::{Handle, Resource};
use crate::runtime::Runtime;
use crate::text::{Text, path_text};

/// How to serve images. Checked in TypeScript.
#[napi(object, object_to_js = false)]
pub struct NbdOrder {
    /// Path of a unix socket; else TCP.
    pub path: Option<Text>,
    /// Name or address; all of the machine without one.
    pub host: Option<String>,
    /// Port; 0 for any.
    pub port: u32,
    /// Go on when the last client has gone.
    pub persistent: bool,
    /// Clients at once.
    pub max_connections: u32,
    /// Milliseconds that a client may take to begin.
    pub handshake_time: Option<f64>,
    /// Number of what encrypts connections.
    pub tls: Option<u32>,
    /// What is served.
    pub exports: Vec<NbdExportOrder>,
}

/// How to serve one image.
#[napi(object, object_to_js = false)]
pub struct NbdExportOrder {
    /// The image.
    pub image: u32,
    /// The export's name.
    pub export_name: Text,
    /// What it is, for a person.
    pub description: Text,
    /// First byte of the disk that is served.
    pub offset: f64,
    /// Refuse writes.
    pub read_only: bool,
    /// Tell how deep in the chain data is.
    pub allocation_depth: bool,
    /// Bitmaps to tell of.
    pub bitmaps: Vec<Text>,
}

/// A server that runs.
#[napi(object, object_from_js = false)]
pub struct NbdStarted {
    /// Number of the resource.
    pub server: u32,
    /// Path of its socket.
    pub path: Option<Text>,
    /// Address that it listens on.
    pub host: Option<String>,
    /// Port that it listens on.
    pub port: Option<u32>,
}

/// A server, and who waits for its end.
pub(crate) struct Serving {
    server: Server,
    end: Arc<End>,
}

/// The end of a server, which comes once.
struct End {
    delivery: Arc<Delivery>,
    state: Mutex<EndState>,
}

#[derive(Default)]
struct EndState {
    ended: bool,
    /// The request that waits for it.
    waits: Option<u32>,
}

impl End {
    fn comes(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        self.tell(&mut state);
    }

    fn wait(&self, request: u32) {
        let mut state = self.state.lock();
        state.waits = Some(request);
        if state.ended {
            self.tell(&mut state);
        }
    }

    fn tell(&self, state: &mut EndState) {
        if let Some(request) = state.waits.take() {
            self.delivery.push(Completion { request, outcome: Outcome::Done });
        }
    }
}

impl Serving {
    /// Ends it, and waits for its threads.
    pub(crate) fn close(&self) {
        self.server.close();
    }
}

/// An open image as it is served: every request is one of the image's.
struct Served(Arc<Handle>);

impl GuestSource for Served {
    fn virtual_size(&self) -> u64 {
        // An image that met a bug has nothing to read.
        self.0.run_apart(|image| Ok(image.virtual_size())).unwrap_or(0)
    }

    fn cluster_size(&self) -> u64 {
        self.0.run_apart(|image| Ok(image.cluster_size())).unwrap_or(1)
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        self.0.run_apart(|image| image.extents_up_to(start, length, most, job, out))
    }

    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.0.run(|image| image.read_at(buf, offset))
    }
}

impl Disk for Served {
    fn write_at(&self, buf: Mem<'_>, offset: u64, durability: Durability) -> Result<()> {
        self.0.run(|image| Disk::write_at(image, buf, offset, durability))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool, durability: Durability) -> Result<()> {
        self.0.run(|image| Disk::write_zeroes(image, offset, length, unmap, durability))
    }

    fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.0.run(|image| Disk::discard(image, offset, length, durability))
    }

    fn flush(&self) -> Result<()> {
        self.0.run(Image::flush)
    }

    fn grow(&self, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::UnsupportedFeature, "a client does not resize the disk"))
    }
}

/// A bitmap of the image, as it is when it is asked.
struct ServedBitmap {
    handle: Arc<Handle>,
    name: Text,
    /// One looks at a time: the bits of a large disk are copied for that.
    turn: Mutex<()>,
}

impl DirtyRanges for ServedBitmap {
    fn dirty(&self, start: u64, visit: &mut dyn FnMut(Range<u64>) -> bool) -> Result<()> {
        let _turn = self.turn.lock();
        let bits = self.handle.run(|image| image.bitmap_bits(self.name.as_bytes()))?;
        for range in bits.extents().skip_while(|range| range.end <= start) {
            if !visit(range) {
                break;
            }
        }
        Ok(())
    }
}

/// Whether whole clusters become zeroes by their entries alone.
fn has_fast_zeroes(image: &Image) -> bool {
    image.top_qcow2().is_some_and(|top| top.header().version >= 3 && top.data_file().is_none())
}

impl NbdOrder {
    fn address(&mut self) -> napi::Result<Address> {
        match self.path.take() {
            Some(path) => Ok(Address::Unix(path.into_path()?)),
            None => Ok(Address::Tcp { host: self.host.take(), port: self.port as u16 }),
        }
    }

    fn options(&self) -> ServerOptions {
        let time = self.handshake_time.map(|time| std::time::Duration::from_millis(time as u64));
        ServerOptions {
            max_connections: self.max_connections as usize,
            persistent: self.persistent,
            handshake_time: time.unwrap_or(HANDSHAKE_TIME),
        }
    }
}

impl NbdExportOrder {
    /// The image as it is served.
    ///
    /// # Errors
    /// `NoBitmap`, `Corrupt` for bitmaps that cannot be told of; `InvalidArgument` for an offset behind the end.
    fn export(self, handle: &Arc<Handle>) -> Result<Export> {
        let (size, fast_zeroes) = handle.run(|image| Ok((image.virtual_size(), has_fast_zeroes(image))))?;
        let offset = self.offset as u64;
        if offset > size {
            let message = format!("the offset {offset} lies behind the end of the disk of {size} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("offset"));
        }
        for name in &self.bitmaps {
            handle.run(|image| image.bitmap_bits(name.as_bytes()).map(drop))?;
        }
        let bitmap = |name: Text| Bitmap {
            name: name.as_bytes().to_vec(),
            ranges: Arc::new(ServedBitmap { handle: Arc::clone(handle), name, turn: Mutex::new(()) }),
        };
        Ok(Export {
            name: self.export_name.into_bytes(),
            description: self.description.into_bytes(),
            disk: Arc::new(Served(Arc::clone(handle))),
            offset,
            read_only: self.read_only,
            fast_zeroes,
            allocation_depth: self.allocation_depth,
            bitmaps: self.bitmaps.into_iter().map(bitmap).collect(),
        })
    }
}

/// Serves images; tells where.
#[napi(catch_unwind)]
pub fn start_nbd(env: Env, request: u32, mut order: NbdOrder) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let served = std::mem::take(&mut order.exports).into_iter();
    let served: Vec<_> =
        served.map(|export| Ok((runtime.image(export.image)?, export))).collect::<napi::Result<_>>()?;
    let tls = order.tls.map(|tls| runtime.encrypting(tls)).transpose()?;
    let tls = tls.map(|tls| -> Arc<dyn Encrypt> { tls });
    let address = order.address()?;
    let options = order.options();
    let end = Arc::new(End { delivery: runtime.completions(), state: Mutex::default() });
    let work = move || {
        let exports = served.into_iter().map(|(handle, export)| export.export(&handle));
        let exports = exports.collect::<Result<Vec<_>>>()?;
        let ending = Arc::clone(&end);
        let on_end = Box::new(move || ending.comes());
        let server = Server::start_over(tls, &address, exports, options, on_end)?;
        Ok(Serving { server, end })
    };
    runtime.run(&env, request, work, |runtime, env, serving| {
        let (path, host, port) = match serving.server.address() {
            Address::Unix(path) => (Some(path_text(Some(path))), None, None),
            Address::Tcp { host, port } => (None, host.clone(), Some(u32::from(*port))),
        };
        let server = runtime.hold(Resource::Server(Box::new(serving)));
        // SAFETY: on the environment's thread, with its own env.
        unsafe { NbdStarted::to_napi_value(env.raw(), NbdStarted { server, path, host, port }) }
    })
}

/// Waits for the end of a server: it was closed, or its last client has gone.
#[napi(catch_unwind)]
pub fn await_nbd(env: Env, request: u32, server: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let end = runtime.with_server(server, |serving| Arc::clone(&serving.end))?;
    runtime.expect(&env, request, Ok(()));
    end.wait(request);
    Ok(())
}

/// Asks a server to end. Requests under way are answered.
#[napi(catch_unwind)]
pub fn end_nbd(env: Env, server: u32) -> napi::Result<()> {
    Runtime::of(&env)?.with_server(server, |serving| serving.server.ask_to_end())
}

/// How many clients a server has.
#[napi(catch_unwind)]
pub fn nbd_connections(env: Env, server: u32) -> napi::Result<u32> {
    Runtime::of(&env)?.with_server(server, |serving| serving.server.connections() as u32)
}

/// Whether a request that is awaited keeps the event loop alive: it does, until this says otherwise.
#[napi(catch_unwind)]
pub fn reference_request(env: Env, holds: bool) -> napi::Result<()> {
    Runtime::of(&env)?.reference(&env, holds);
    Ok(())
}

//! Panics on demand, for the tests that no panic crosses the boundary. In no addon that is shipped: only the
//! feature of the same name compiles it in.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use napi_derive::napi;
use parking_lot::Mutex;
use qcow2_engine::Storage;
use qcow2_testkit::storage::{Before, Hooked, Op};

/// Where the next panics are, and how many they were.
struct Armed {
    place: String,
    /// Part of the path that a file must have; all have the empty one.
    path: String,
    met: u32,
}

/// One for the process: the threads of all environments meet it.
static ARMED: Mutex<Option<Armed>> = Mutex::new(None);

/// From now on, panics at a place: `read`, `write` or `sync` of a file whose path contains `path`; `drop`, where such a file is
/// given up; `call`, where a function of the addon begins; `value`, where it makes a value of a result.
/// Without a place, no more panics. Returns how many there were since the last call.
#[napi(catch_unwind)]
pub fn arm_panics(place: Option<String>, path: Option<String>) -> u32 {
    let next = place.map(|place| Armed { place, path: path.unwrap_or_default(), met: 0 });
    std::mem::replace(&mut *ARMED.lock(), next).map_or(0, |armed| armed.met)
}

/// Panics if this place is armed.
#[allow(clippy::panic, reason = "what this module is for")]
pub(crate) fn at(place: &str, path: &str) {
    let mut armed = ARMED.lock();
    if let Some(armed) = armed.as_mut().filter(|armed| armed.place == place && path.contains(&armed.path)) {
        armed.met += 1;
        let number = armed.met;
        panic!("a test panic at {place}, number {number}");
    }
}

/// The same file, whose calls panic while they are armed.
pub(crate) fn hook(storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
    let path = storage.path().map_or_else(String::new, |path| path.to_string_lossy().into_owned());
    Arc::new(Hooked::with(storage, File { path }))
}

struct File {
    path: String,
}

impl Before for File {
    fn before(&self, op: Op, _range: Range<u64>) -> io::Result<()> {
        match op {
            Op::Read => at("read", &self.path),
            Op::Write => at("write", &self.path),
            Op::Sync => at("sync", &self.path),
            _ => {}
        }
        Ok(())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Where a panic is under way already, a second one ends the process: no code can contain that.
        if !std::thread::panicking() {
            at("drop", &self.path);
        }
    }
}

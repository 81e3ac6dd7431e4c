//! What every format that is written to must keep when the power fails, when calls fail, and when requests run side by side.

use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Discard, Layer, Result, Storage};
use qcow2_engine::Image;

use super::Open;
use crate::crash::{Durability, Scope, Session, Shape};
use crate::ops::{Menu, Op, Target, stamped};
use crate::recorder::RecordingStorage;
use crate::storage::{Fault, FaultStorage, Op as Call};
use crate::{Rng, Sparse};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// Operations of a sequence.
const OPERATIONS: usize = 30;
/// States of the files that are judged, of each sequence.
const STATES: usize = 60;

/// A format.
pub struct WriterContract<'a> {
    /// For messages.
    pub name: &'a str,
    /// The file of an image whose disk is at least 16 units long, and reads as zeroes unless there is one below.
    pub file: &'a [u8],
    /// The file of the image below, whose disk has zeroes and stamped sectors.
    pub below: Option<Arc<dyn Storage>>,
    /// Opens them.
    pub open: Open<'a>,
    /// Bytes in which the format allocates, small: the contract writes all over the disk.
    pub unit: u64,
    /// Whether the disk can grow.
    pub grows: bool,
    /// Whether it can be made smaller.
    pub shrinks: bool,
    /// Fails the test unless the file is an image in which nothing is damaged. Space may be lost.
    pub sound: &'a dyn Fn(Arc<dyn Storage>),
}

impl WriterContract<'_> {
    /// Fails the test unless the format keeps all of it.
    pub fn check(&self) {
        self.check_power_cuts();
        self.check_failing_calls();
        self.check_threads();
    }

    fn image(&self, storage: Arc<dyn Storage>, writable: bool) -> Result<Image> {
        let mut layer: Box<dyn Layer> = (self.open)(storage)?;
        if writable {
            layer.make_writable(DiskOptions { discard: Discard::Unmap, ..DiskOptions::default() })?;
        }
        let mut layers = vec![layer];
        if let Some(below) = &self.below {
            layers.push((self.open)(Arc::clone(below))?);
        }
        Image::new(layers)
    }

    fn sparse(&self) -> Sparse {
        let mut bytes = Sparse::new(self.file.len() as u64);
        bytes.write(0, self.file);
        bytes
    }

    fn menu(&self, size: u64) -> Menu {
        let mut menu = Menu::new(self.unit, size);
        menu.compression = false;
        menu.grow = self.grows;
        menu.shrink = self.shrinks;
        menu
    }

    fn plain(bytes: &Sparse) -> Arc<dyn Storage> {
        Arc::new(RecordingStorage::plain(bytes.clone()))
    }

    /// Whatever moment the power fails at: what was flushed is there, nothing is there that was never written, and the image goes on.
    fn check_power_cuts(&self) {
        let size = self.image(Self::plain(&self.sparse()), false).unwrap().virtual_size();
        for seed in 0..3 {
            self.cut(&self.menu(size).sequence(seed, OPERATIONS), seed, 4);
        }
        if self.shrinks {
            self.cut(&self.cut_off(size), 3, 1);
        }
    }

    /// The disk is cut off behind its first blocks, which came last or first, and grows again.
    fn cut_off(&self, size: u64) -> Vec<Op> {
        let unit = self.unit;
        let blocks = size / unit;
        let write = |block| Op::Write { offset: block * unit, len: unit };
        let mut ops: Vec<_> = (0..blocks / 2).map(write).collect();
        ops.extend([Op::Flush, write(blocks - 1), write(blocks - 3), Op::Flush]);
        ops.extend([Op::Shrink { size: blocks / 4 * unit + 512 }, write(1), Op::Flush]);
        ops.extend([Op::Grow { size }, Op::Read { offset: 0, len: size }, write(blocks - 2), Op::Flush]);
        ops.extend([Op::Shrink { size: 2 * unit }, Op::Reopen, Op::Grow { size }, Op::Flush]);
        ops
    }

    /// Cuts the power while operations run; of the states, one in `nth` is held against itself, and one in twice as many goes on.
    fn cut(&self, ops: &[Op], seed: u64, nth: usize) {
        let (mut session, files) = Session::new(vec![self.sparse()], Durability::Flush);
        let host: Arc<dyn Storage> = files[0].clone();
        session.start(&self.image(host.clone(), false).unwrap());
        let open = || self.image(host.clone(), true).map(|image| Box::new(image) as Box<dyn Target>);
        let image = session.play(&open, ops, false).unwrap();
        session.verify(&*image, 0, image.size()).unwrap();
        image.close().unwrap();
        drop(image);
        let history = session.history();
        for (number, state) in session.states(seed, STATES).enumerate() {
            let what = format!("{}, seed {seed}, cut {}, {:?}", self.name, state.cut, state.shape);
            let image = self.image(Self::plain(&state.files[0]), false);
            let image = image.unwrap_or_else(|e| panic!("{what}: {e}"));
            history.judge(&image, state.cut, &Scope::Whole).unwrap_or_else(|e| panic!("{what}: {e}"));
            if number % nth == 0 {
                (self.sound)(Self::plain(&state.files[0]));
            }
            if number % (2 * nth) == 0 {
                self.check_recovery(&state.files[0], number as u64, &what);
            }
        }
    }

    /// An image that a power cut left takes requests, and its disk is what they make of it.
    fn check_recovery(&self, file: &Sparse, seed: u64, what: &str) {
        let (session, files) = Session::new(vec![file.clone()], Durability::Flush);
        let host: Arc<dyn Storage> = files[0].clone();
        let before = self.image(host.clone(), false).unwrap();
        session.start(&before);
        let mut ops = self.menu(before.virtual_size()).sequence(seed, 8);
        ops.push(Op::Reopen);
        // What a disk had before it was cut off is gone when it grows.
        let whole = self.image(Self::plain(&self.sparse()), false).unwrap().virtual_size();
        if self.shrinks && before.virtual_size() < whole {
            ops.insert(0, Op::Grow { size: whole });
            ops.insert(1, Op::Read { offset: 0, len: whole });
        }
        drop(before);
        let open = || self.image(host.clone(), true).map(|image| Box::new(image) as Box<dyn Target>);
        let image = session.play(&open, &ops, false).unwrap_or_else(|| panic!("{what}: no image"));
        session.verify(&*image, 0, image.size()).unwrap();
        image.close().unwrap();
        (self.sound)(host);
    }

    /// Whichever call fails: nothing panics, what reads is right, and what was flushed is in the file.
    fn check_failing_calls(&self) {
        let mut failed = 0;
        for n in 0..24 {
            let n = if n < 16 { n } else { 16 + (n - 16) * 5 };
            failed += self.play_with(1 + n % 3, &Fault::nth(n, if n % 2 == 0 { EIO } else { ENOSPC }));
        }
        for n in [0, 2, 5, 11] {
            for call in [Call::Write, Call::SetLen, Call::Zero] {
                failed += self.play_with(2, &Fault::from(call, n, ENOSPC));
            }
            for call in [Call::Sync, Call::Read] {
                failed += self.play_with(3, &Fault::from(call, n, EIO));
            }
        }
        assert!(failed > 24, "{}: {failed} calls failed", self.name);
    }

    fn play_with(&self, seed: u64, fault: &Fault) -> u64 {
        let what = format!("{}, seed {seed}, {fault:?}", self.name);
        let (mut session, files) = Session::new(vec![self.sparse()], Durability::Flush);
        let start = self.image(files[0].clone(), false).unwrap();
        session.start(&start);
        let mut menu = self.menu(start.virtual_size());
        menu.reopen = false;
        drop(start);
        let faulty = Arc::new(FaultStorage::new(files[0].clone(), fault.clone()));
        let open = || self.image(faulty.clone(), true).map(|image| Box::new(image) as Box<dyn Target>);
        if let Some(image) = session.play(&open, &menu.sequence(seed, OPERATIONS), true) {
            let _ = session.verify(&*image, 0, image.size());
            let _ = image.close();
        }
        let history = session.history();
        // The process is gone, the system is not: every change is in the file.
        let state = session.states(0, 0).filter(|state| state.shape == Shape::All).last();
        let Some(state) = state else { return faulty.failed() };
        let image = self.image(Self::plain(&state.files[0]), false).unwrap_or_else(|e| panic!("{what}: {e}"));
        history.judge(&image, state.cut, &Scope::Whole).unwrap_or_else(|e| panic!("{what}: {e}"));
        (self.sound)(Self::plain(&state.files[0]));
        faulty.failed()
    }

    /// Threads that write to the same blocks, and never to the same sector, find what they wrote; so does who opens the image then.
    fn check_threads(&self) {
        const THREADS: u64 = 4;
        let host: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(self.file));
        let image = self.image(host.clone(), true).unwrap();
        let size = image.virtual_size() / 512 * 512;
        let mut expected = vec![0; size as usize];
        image.read_at(qcow2_core::MemMut::from(&mut expected[..]), 0).unwrap();
        std::thread::scope(|scope| {
            let workers = (0..THREADS).map(|thread| {
                let image = &image;
                scope.spawn(move || {
                    let mut rng = Rng::new(thread);
                    let mut written = Vec::new();
                    for step in 0..300 {
                        // Every fourth sector is this thread's.
                        let sector = rng.below(size / 512 / THREADS) * THREADS + thread;
                        let bytes = stamped(sector * 512, 512, step + 1);
                        image.write_at(qcow2_core::Mem::from(&bytes[..]), sector * 512).unwrap();
                        let mut found = [0; 512];
                        image.read_at(qcow2_core::MemMut::from(&mut found[..]), sector * 512).unwrap();
                        assert!(found[..] == bytes[..], "sector {sector} reads as something else");
                        if step % 40 == 0 {
                            image.flush().unwrap();
                        }
                        written.push((sector, bytes));
                    }
                    written
                })
            });
            for worker in workers.collect::<Vec<_>>() {
                for (sector, bytes) in worker.join().unwrap() {
                    expected[sector as usize * 512..][..512].copy_from_slice(&bytes);
                }
            }
        });
        image.close().unwrap();
        drop(image);
        let mut found = vec![0; expected.len()];
        let again = self.image(host.clone(), false).unwrap();
        again.read_at(qcow2_core::MemMut::from(&mut found[..]), 0).unwrap();
        assert!(found == expected, "{}: threads left other bytes", self.name);
        (self.sound)(host);
    }
}

//! What every disk that is written to must keep.

use qcow2_core::{Disk, Durability, ErrorKind, GuestSource, Job, Mem, MemMut};

use crate::Rng;

/// Steps of the random part.
const STEPS: usize = 400;
/// Most bytes of a request.
const LONGEST: u64 = 150_000;

/// A kind of disk.
pub struct DiskContract<'a> {
    /// For messages.
    pub name: &'a str,
    /// The disk, of whole sectors and at least 1 MiB, that reads as zeroes; discards give space up, or do nothing.
    pub disk: &'a dyn Disk,
    /// Opens the same disk anew from its files as they are now, for reading.
    pub reopen: &'a dyn Fn() -> Box<dyn GuestSource>,
}

impl DiskContract<'_> {
    /// Fails the test unless the disk keeps all of it.
    pub fn check(&self) {
        self.check_ends();
        let mut model: Vec<Option<u8>> = vec![Some(0); self.disk.virtual_size() as usize];
        for seed in 0..2 {
            self.check_random(seed, &mut model);
        }
        self.check_durable(&mut model);
        self.check_growth(&mut model);
    }

    /// Requests beyond the end change nothing, wherever they begin; those without length are none.
    fn check_ends(&self) {
        let size = self.disk.virtual_size();
        let bytes = [7; 1024];
        for (offset, length) in [(size - 512, 1024), (size, 1), (size + 512, 0), (u64::MAX - 3, 512)] {
            let mut buf = [0; 1024];
            let part = Mem::from(&bytes[..length as usize]);
            let results = [
                self.disk.write_at(part, offset, Durability::AtFlush),
                self.disk.write_zeroes(offset, length, true, Durability::AtFlush),
                self.disk.discard(offset, length, Durability::AtFlush),
                self.disk.read_at(MemMut::from(&mut buf[..length as usize]), offset),
            ];
            for result in results {
                let kind = result.expect_err(self.name).kind();
                assert_eq!(kind, ErrorKind::InvalidArgument, "{}: {length} at {offset}", self.name);
            }
        }
        for offset in [0, 512, size] {
            self.disk.write_at(Mem::from(&[][..]), offset, Durability::Now).unwrap();
            self.disk.write_zeroes(offset, 0, false, Durability::Now).unwrap();
            self.disk.discard(offset, 0, Durability::Now).unwrap();
        }
        assert_eq!(self.disk.virtual_size(), size, "{}", self.name);
    }

    /// Any sequence of requests leaves what an array of bytes would have.
    fn check_random(&self, seed: u64, model: &mut [Option<u8>]) {
        let size = model.len() as u64;
        let mut rng = Rng::new(seed);
        for step in 0..STEPS {
            let start = rng.below(size);
            let length = rng.below(LONGEST.min(size - start) + 1);
            let range = start as usize..(start + length) as usize;
            let durability = if rng.below(8) == 0 { Durability::Now } else { Durability::AtFlush };
            match rng.below(8) {
                0..=3 => {
                    let bytes: Vec<u8> = (0..length).map(|i| (i + step as u64) as u8).collect();
                    self.disk.write_at(Mem::from(&bytes[..]), start, durability).unwrap();
                    model[range].iter_mut().zip(&bytes).for_each(|(byte, new)| *byte = Some(*new));
                }
                4 | 5 => {
                    self.disk.write_zeroes(start, length, rng.below(2) == 0, durability).unwrap();
                    model[range].fill(Some(0));
                }
                6 => {
                    self.disk.discard(start, length, durability).unwrap();
                    model[range].fill(None);
                }
                _ => self.disk.flush().unwrap(),
            }
            if step % 20 == 0 {
                compare(self.disk, model, &format!("{}, seed {seed}, step {step}", self.name));
            }
        }
        compare(self.disk, model, &format!("{}, seed {seed}, at the end", self.name));
    }

    /// What was flushed, or was to be durable by itself, is in the files.
    fn check_durable(&self, model: &mut [Option<u8>]) {
        let put = |model: &mut [Option<u8>], start: usize, byte: u8, durability| {
            self.disk.write_at(Mem::from(&[byte; 5000][..]), start as u64, durability).unwrap();
            model[start..start + 5000].fill(Some(byte));
        };
        put(model, 70_000, 0xa1, Durability::AtFlush);
        self.disk.flush().unwrap();
        compare(&*(self.reopen)(), model, &format!("{}, opened anew after a flush", self.name));
        put(model, 470_000, 0xa2, Durability::Now);
        compare(&*(self.reopen)(), model, &format!("{}, opened anew after a durable write", self.name));
        self.disk.write_zeroes(71_000, 1000, true, Durability::Now).unwrap();
        model[71_000..72_000].fill(Some(0));
        compare(&*(self.reopen)(), model, &format!("{}, opened anew after durable zeroes", self.name));
    }

    /// The new part reads as zeroes, and takes requests.
    fn check_growth(&self, model: &mut Vec<Option<u8>>) {
        let size = self.disk.virtual_size();
        self.disk.grow(size + (1 << 20)).unwrap();
        model.resize((size + (1 << 20)) as usize, Some(0));
        compare(self.disk, model, &format!("{}, grown", self.name));
        self.disk.write_at(Mem::from(&[3; 1000][..]), size - 500, Durability::Now).unwrap();
        model[size as usize - 500..size as usize + 500].fill(Some(3));
        compare(self.disk, model, &format!("{}, written across the former end", self.name));
        compare(&*(self.reopen)(), model, &format!("{}, grown and opened anew", self.name));
    }
}

/// The disk's bytes are the model's, and its extents say nothing else.
fn compare(disk: &dyn GuestSource, model: &[Option<u8>], what: &str) {
    assert_eq!(disk.virtual_size(), model.len() as u64, "{what}");
    let mut found = vec![1; model.len()];
    disk.read_at(MemMut::from(&mut found[..]), 0).unwrap();
    let wrong = model.iter().zip(&found).position(|(want, have)| want.is_some_and(|want| want != *have));
    assert!(wrong.is_none(), "{what}: another byte at {}", wrong.unwrap_or_default());
    let mut extents = Vec::new();
    disk.extents(0, model.len() as u64, &Job::new(), &mut extents).unwrap();
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.start, at, "{what}: {extent:?}");
        at += extent.length;
        let bytes = &found[extent.start as usize..at as usize];
        assert!(!extent.zero || bytes.iter().all(|&byte| byte == 0), "{what}: data in {extent:?}");
    }
    assert_eq!(at, model.len() as u64, "{what}");
}

//! What every storage must keep.

use std::sync::Arc;

use qcow2_core::storage::{DirectStorage, ReadTransfer, WriteTransfer};
use qcow2_core::{Mem, MemMut, Storage, StorageExt};

use crate::Rng;

/// Bytes that the random part works on.
const SPAN: u64 = 300_000;
/// Steps of the random part.
const STEPS: usize = 300;
/// The largest offset, behind which no range ends.
const FAR: u64 = u64::MAX - 1;

/// A kind of storage.
pub struct StorageContract<'a> {
    /// For messages.
    pub name: &'a str,
    /// Makes an empty one; a device is as long as it is, and holds anything.
    pub make: &'a dyn Fn() -> Arc<dyn Storage>,
}

/// What a storage holds: `None` where that is unspecified.
struct Model {
    bytes: Vec<Option<u8>>,
    /// A device neither grows nor shrinks.
    fixed: bool,
}

impl Model {
    fn cover(&mut self, offset: u64, length: u64) -> &mut [Option<u8>] {
        let (start, end) = (offset as usize, (offset + length) as usize);
        if length > 0 && end > self.bytes.len() {
            self.bytes.resize(end, Some(0));
        }
        let end = end.min(self.bytes.len());
        &mut self.bytes[start.min(end)..end]
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, new) in self.cover(offset, data.len() as u64).iter_mut().zip(data) {
            *byte = Some(*new);
        }
    }

    fn check(&self, found: &[u8], offset: u64, what: &str) {
        let expected = &self.bytes[offset as usize..][..found.len()];
        let wrong =
            expected.iter().zip(found).position(|(want, have)| want.is_some_and(|want| want != *have));
        assert!(wrong.is_none(), "{what}: another byte at {}", offset + wrong.unwrap_or_default() as u64);
    }
}

impl StorageContract<'_> {
    /// Fails the test unless the storage keeps all of it.
    pub fn check(&self) {
        self.check_empty();
        self.check_far();
        for seed in 0..3 {
            self.check_random(seed);
        }
        self.check_threads();
    }

    /// As whoever uses a storage does: with any request.
    fn storage(&self) -> (Arc<dyn Storage>, Model) {
        let storage = DirectStorage::over((self.make)());
        assert_eq!(storage.identity(), storage.identity(), "{}: an identity that changes", self.name);
        assert!(storage.traits().writable, "{}: cannot be written to", self.name);
        let fixed = storage.traits().block_device;
        let len = storage.size().unwrap();
        assert!(if fixed { len >= 2 * SPAN } else { len == 0 }, "{}: {len} bytes", self.name);
        (storage, Model { bytes: vec![None; if fixed { len as usize } else { 0 }], fixed })
    }

    /// What has no length changes nothing, wherever it is.
    fn check_empty(&self) {
        let (storage, model) = self.storage();
        let len = model.bytes.len() as u64;
        for offset in [0, 1, 4096, SPAN] {
            assert_eq!(storage.write_at(Mem::from(&[][..]), offset).unwrap(), 0, "{}", self.name);
            assert_eq!(storage.write_vectored_at(&[], offset).unwrap(), 0, "{}", self.name);
            assert_eq!(storage.read_at(MemMut::from(&mut [][..]), offset).unwrap(), 0, "{}", self.name);
            storage.zero(offset, 0, true).unwrap();
            storage.free(offset, 0).unwrap();
            storage.reserve(offset, 0).unwrap();
            assert_eq!(storage.size().unwrap(), len, "{}: nothing at {offset}", self.name);
        }
    }

    /// Behind the end there is nothing; a range that has no end is an error, and no panic.
    fn check_far(&self) {
        let (storage, model) = self.storage();
        let len = model.bytes.len() as u64;
        let mut buf = [7; 16];
        for offset in [len, len + 1, len + (1 << 40)] {
            assert_eq!(storage.read_at(MemMut::from(&mut buf[..]), offset).unwrap(), 0, "{}", self.name);
            let run = storage.run(offset..offset + 1).unwrap();
            assert!(!run.data && run.end > offset, "{}: {run:?} at {offset}", self.name);
        }
        assert!(storage.write_at(Mem::from(&buf[..]), FAR).is_err(), "{}", self.name);
        assert!(storage.write_zeroes(FAR, 16, false).is_err(), "{}", self.name);
        assert!(storage.write_zeroes(FAR, 16, true).is_err(), "{}", self.name);
        assert!(storage.allocate(FAR, 16).is_err(), "{}", self.name);
        // Nothing there: whether that is an error is the system's choice.
        let _ = storage.discard(FAR, 16);
        let _ = storage.read_at(MemMut::from(&mut buf[..]), FAR);
        let _ = storage.run_in(FAR..u64::MAX);
        storage.forget(FAR..u64::MAX);
        assert_eq!(storage.size().unwrap(), len, "{}", self.name);
    }

    /// Any sequence of calls leaves what an array of bytes would have.
    fn check_random(&self, seed: u64) {
        let (storage, mut model) = self.storage();
        let mut rng = Rng::new(seed);
        for step in 0..STEPS {
            let (offset, length) = (rng.below(SPAN), rng.below(20_000));
            let what = format!("{}, seed {seed}, step {step}, {length} at {offset}", self.name);
            let data: Vec<u8> = (0..length).map(|_| rng.below(256) as u8).collect();
            match rng.below(10) {
                0 | 1 => {
                    storage.write_all_at(Mem::from(&data[..]), offset).unwrap();
                    model.write(offset, &data);
                }
                2 => {
                    let (a, rest) = data.split_at(data.len() / 3);
                    let mut bufs = [Mem::from(a), Mem::from(&[][..]), Mem::from(rest)];
                    storage.write_all_vectored_at(&mut bufs, offset).unwrap();
                    model.write(offset, &data);
                }
                3 => self.write_batch(&*storage, &mut model, offset, &data),
                4 => {
                    storage.zero(offset, length, rng.below(2) == 0).unwrap();
                    model.cover(offset, length).fill(Some(0));
                }
                5 => {
                    let inside = (model.bytes.len() as u64).saturating_sub(offset).min(length);
                    storage.free(offset, length).unwrap();
                    model.cover(offset, inside).fill(None);
                }
                6 => {
                    storage.reserve(offset, length).unwrap();
                    model.cover(offset, length);
                }
                7 if !model.fixed => {
                    storage.resize(offset).unwrap();
                    model.bytes.resize(offset as usize, Some(0));
                }
                7 => storage.resize(model.bytes.len() as u64 / 2).unwrap(),
                8 => storage.flush().unwrap(),
                _ => self.check_runs(&*storage, &model, &what),
            }
            assert_eq!(storage.size().unwrap(), model.bytes.len() as u64, "{what}");
            if step % 10 == 0 {
                storage.begin_sync();
                storage.forget(offset..offset + length);
                self.check_bytes(&*storage, &model, &what);
            }
        }
        storage.report_close().unwrap();
        let _ = storage.space_in_use().unwrap();
    }

    fn write_batch(&self, storage: &dyn Storage, model: &mut Model, offset: u64, data: &[u8]) {
        let pieces: Vec<[Mem<'_>; 2]> = data
            .chunks(3_001)
            .map(|piece| piece.split_at(piece.len() / 2))
            .map(|(a, b)| [Mem::from(a), Mem::from(b)])
            .collect();
        let mut at = offset;
        let mut batch = Vec::new();
        for piece in &pieces {
            batch.push(WriteTransfer::new(piece, at));
            at += (piece[0].len() + piece[1].len()) as u64;
        }
        // In any order.
        batch.reverse();
        storage.write_all_batch(&mut batch).unwrap();
        model.write(offset, data);
    }

    /// One read after the other, and a batch of them.
    fn check_bytes(&self, storage: &dyn Storage, model: &Model, what: &str) {
        let mut found = vec![1; model.bytes.len() + 100];
        let got = storage.read_up_to_at(MemMut::from(&mut found[..]), 0).unwrap();
        assert_eq!(got, model.bytes.len(), "{what}");
        model.check(&found[..got], 0, what);
        let mut parts: Vec<Vec<u8>> = model.bytes.chunks(70_001).map(|part| vec![1; part.len()]).collect();
        let offsets = (0..).step_by(70_001);
        let mut batch: Vec<ReadTransfer<'_>> = parts
            .iter_mut()
            .zip(offsets.clone())
            .map(|(part, at)| ReadTransfer::new(MemMut::from(&mut part[..]), at))
            .collect();
        storage.read_padded_batch(&mut batch).unwrap();
        for (part, at) in parts.iter().zip(offsets) {
            model.check(part, at, what);
        }
    }

    /// Runs get on, and holes read as zeroes.
    fn check_runs(&self, storage: &dyn Storage, model: &Model, what: &str) {
        let len = model.bytes.len() as u64;
        let mut at = 0;
        while at < len {
            let run = storage.run(at..len).unwrap();
            assert!(run.end > at, "{what}: {run:?} at {at}");
            let hole = &model.bytes[at as usize..run.end.min(len) as usize];
            let holds = hole.iter().any(|byte| byte.is_some_and(|byte| byte != 0));
            assert!(run.data || !holds, "{what}: data in the hole {at}..{}", run.end);
            at = run.end;
        }
    }

    /// Neighbours that are written at once keep their own bytes.
    fn check_threads(&self) {
        let (storage, _) = self.storage();
        const PIECE: u64 = 700;
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let storage = &storage;
                scope.spawn(move || {
                    for n in (thread..200).step_by(4) {
                        let data = vec![n as u8 | 1; PIECE as usize];
                        storage.write_all_at(Mem::from(&data[..]), n * PIECE).unwrap();
                    }
                });
            }
        });
        for n in 0..200 {
            let mut found = vec![0; PIECE as usize];
            storage.read_exact_at(MemMut::from(&mut found[..]), n * PIECE).unwrap();
            assert!(found.iter().all(|&byte| byte == n as u8 | 1), "{}: piece {n}", self.name);
        }
    }
}

/// Fails the test unless `storage`, which holds `bytes` and cannot be written to, says so and keeps them.
pub fn check_read_only(storage: &dyn Storage, bytes: &[u8]) {
    assert!(!storage.traits().writable);
    let data = [1; 10];
    assert!(storage.write_at(Mem::from(&data[..]), 0).is_err());
    assert!(storage.write_vectored_at(&[Mem::from(&data[..])], 0).is_err());
    let mut batch = [WriteTransfer { bufs: &[Mem::from(&data[..])], offset: 0, done: Ok(0) }];
    storage.write_batch(&mut batch);
    assert!(batch[0].done.is_err());
    assert!(storage.set_len(0).is_err());
    assert!(storage.write_zeroes(0, 1, false).is_err());
    assert!(storage.write_zeroes(0, 1, true).is_err());
    assert!(storage.discard(0, 1).is_err());
    assert!(storage.allocate(0, bytes.len() as u64 + 1).is_err());
    storage.sync_data().unwrap();
    storage.check_close().unwrap();
    let mut found = vec![0; bytes.len() + 1];
    assert_eq!(storage.read_up_to_at(MemMut::from(&mut found[..]), 0).unwrap(), bytes.len());
    assert!(&found[..bytes.len()] == bytes);
}

//! Flights, what is kept, and what is not, with a storage that answers when it is told to.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::single_range_in_vec_init, reason = "tests")]

use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;
use crate::storage::MemoryStorage;

const BLOCK: u64 = 16;

/// Answers when it is told to.
#[derive(Default)]
struct Manual {
    memory: MemoryStorage,
    state: Mutex<Vec<(Range<u64>, Option<Fetched>)>>,
    forgotten: Mutex<Vec<u64>>,
    given_up: AtomicBool,
}

impl fmt::Debug for Manual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Manual")
    }
}

impl Manual {
    fn asked(&self) -> Vec<Range<u64>> {
        self.state.lock().iter().map(|(range, _)| range.clone()).collect()
    }

    /// Waits until so many were asked for.
    fn wait_for(&self, count: usize) {
        while self.state.lock().len() < count {
            thread::yield_now();
        }
    }

    /// Answers a fetch with what is in memory now.
    fn answer(&self, fetch: usize) {
        let (range, done) = {
            let mut state = self.state.lock();
            (state[fetch].0.clone(), state[fetch].1.take().unwrap())
        };
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.memory.read_at(MemMut::from(&mut bytes[..]), range.start).unwrap();
        done(Ok(Mem::from(&bytes[..])));
    }

    fn fail(&self, fetch: usize) {
        let done = self.state.lock()[fetch].1.take().unwrap();
        done(Err(io::Error::new(io::ErrorKind::TimedOut, GivenUpBy("server"))));
    }
}

#[derive(Debug, PartialEq)]
struct GivenUpBy(&'static str);
impl fmt::Display for GivenUpBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
impl std::error::Error for GivenUpBy {}

impl ReadStorage for Manual {
    forward_storage!(memory: read_at len);
}

impl Storage for Manual {
    forward_storage!(memory: write_at set_len sync_data);
}

impl Fetch for Manual {
    fn fetch(&self, range: Range<u64>, done: Fetched) -> u64 {
        let mut state = self.state.lock();
        state.push((range, Some(done)));
        state.len() as u64 - 1
    }
    fn give_up(&self, fetch: u64) {
        self.forgotten.lock().push(fetch);
    }
    fn given_up(&self) -> Option<io::Error> {
        self.given_up.load(Ordering::SeqCst).then(|| GivenUp.into())
    }
}

fn cache(bytes: usize) -> (Arc<Manual>, BlockCache<Manual>) {
    let content: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
    let manual = Arc::new(Manual { memory: MemoryStorage::from_bytes(&content), ..Manual::default() });
    let shape = BlockCacheShape { block: BLOCK, size: 4 * BLOCK, ahead: 0 };
    (Arc::clone(&manual), BlockCache::new(manual, shape))
}

fn read(cache: &BlockCache<Manual>, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = cache.read_at(MemMut::from(&mut bytes[..]), offset)?;
    bytes.truncate(got);
    Ok(bytes)
}

#[test]
fn a_block_is_asked_for_once_and_neighbours_together() {
    let (manual, cache) = cache(200);
    let (one, other) = thread::scope(|scope| {
        let one = scope.spawn(|| read(&cache, 20, 30));
        manual.wait_for(1);
        let other = scope.spawn(|| read(&cache, 17, 1));
        thread::sleep(2 * LOOK);
        assert_eq!(manual.asked(), vec![16..64]);
        manual.answer(0);
        (one.join().unwrap().unwrap(), other.join().unwrap().unwrap())
    });
    assert_eq!(one, (20..50).collect::<Vec<u8>>());
    assert_eq!(other, [17]);
    // What is here needs nobody; the end is where the file's is.
    assert_eq!(read(&cache, 16, 48).unwrap().len(), 48);
    assert_eq!(read(&cache, 200, 5).unwrap(), []);
    thread::scope(|scope| {
        let tail = scope.spawn(|| read(&cache, 195, 50));
        manual.wait_for(2);
        manual.answer(1);
        assert_eq!(tail.join().unwrap().unwrap(), [195, 196, 197, 198, 199]);
    });
    assert_eq!(manual.asked(), [16..64, 192..200]);
}

#[test]
fn no_more_is_kept_than_there_is_room_for() {
    let (manual, cache) = cache(4096);
    for (fetch, offset) in (0..4096).step_by(64).enumerate() {
        thread::scope(|scope| {
            let reader = scope.spawn(|| read(&cache, offset, 64));
            manual.wait_for(fetch + 1);
            manual.answer(fetch);
            assert_eq!(reader.join().unwrap().unwrap().len(), 64);
        });
        let table = cache.shared.table.lock();
        assert_eq!((table.here, table.blocks.len()), (4, 4));
    }
}

#[test]
fn what_was_written_while_a_block_was_on_its_way_is_not_what_is_kept() {
    let (manual, cache) = cache(64);
    thread::scope(|scope| {
        let early = scope.spawn(|| read(&cache, 0, 4));
        manual.wait_for(1);
        cache.write_at(Mem::from(&[99; 4][..]), 0).unwrap();
        // A reader that comes later does not wait for the old answer.
        let late = scope.spawn(|| read(&cache, 0, 4));
        manual.wait_for(2);
        manual.answer(1);
        assert_eq!(late.join().unwrap().unwrap(), [99; 4]);
        manual.answer(0);
        early.join().unwrap().unwrap();
    });
    assert_eq!(read(&cache, 0, 4).unwrap(), [99; 4]);
    assert_eq!(manual.asked().len(), 2);
}

#[test]
fn a_file_that_grows_has_another_last_block() {
    let (manual, cache) = cache(20);
    let fetched = |fetch, offset, length| {
        thread::scope(|scope| {
            let reader = scope.spawn(|| read(&cache, offset, length));
            manual.wait_for(fetch + 1);
            manual.answer(fetch);
            reader.join().unwrap().unwrap()
        })
    };
    assert_eq!(fetched(0, 16, 16), [16, 17, 18, 19]);
    cache.write_at(Mem::from(&[7][..]), 30).unwrap();
    assert_eq!(fetched(1, 16, 16)[..5], [16, 17, 18, 19, 0]);
    cache.set_len(17).unwrap();
    assert_eq!(fetched(2, 16, 16), [16]);
}

#[test]
fn a_failure_is_that_of_all_who_wait_and_of_nobody_later() {
    let (manual, cache) = cache(64);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| read(&cache, 3, 3))).collect();
        manual.wait_for(1);
        thread::sleep(2 * LOOK);
        manual.fail(0);
        for reader in readers {
            let error = reader.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(carried::<GivenUpBy>(&error), Some(&GivenUpBy("server")));
            assert_eq!(error.to_string(), "server");
        }
        let later = scope.spawn(|| read(&cache, 3, 3));
        manual.wait_for(2);
        manual.answer(1);
        assert_eq!(later.join().unwrap().unwrap(), [3, 4, 5]);
    });
}

#[test]
fn what_the_last_one_gives_up_is_forgotten_and_asked_for_anew() {
    let (manual, cache) = cache(64);
    manual.given_up.store(true, Ordering::SeqCst);
    let error = read(&cache, 0, 4).unwrap_err();
    assert!(carried::<GivenUp>(&error).is_some(), "{error:?}");
    assert_eq!(*manual.forgotten.lock(), [0]);
    manual.given_up.store(false, Ordering::SeqCst);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&cache, 0, 4));
        manual.wait_for(2);
        // An answer that comes late is nobody's.
        manual.answer(0);
        manual.answer(1);
        assert_eq!(reader.join().unwrap().unwrap(), [0, 1, 2, 3]);
    });
}

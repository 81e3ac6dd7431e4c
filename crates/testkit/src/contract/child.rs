//! What every differencing format that is written to must keep: the parent shows through what a child does not have, and through nothing else.

use std::sync::Arc;

use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Discard, DiskOptions, Mem, MemMut, Storage};
use qcow2_engine::Image;

use super::{Open, WriterContract};
use crate::Rng;

/// Steps of the random part.
const STEPS: usize = 400;

/// A format, by a child and its parent.
pub struct ChildContract<'a> {
    /// For messages.
    pub name: &'a str,
    /// The file of a child with nothing of its own, whose disk is at least 16 units long.
    pub child: &'a [u8],
    /// The file of its parent, whose disk has zeroes and stamped sectors.
    pub parent: &'a [u8],
    /// Opens them.
    pub open: Open<'a>,
    /// Bytes in which the format allocates.
    pub unit: u64,
    /// Fails the test unless the file is an image in which nothing is damaged. Space may be lost.
    pub sound: &'a dyn Fn(Arc<dyn Storage>),
}

impl ChildContract<'_> {
    /// Fails the test unless the format keeps all of it.
    pub fn check(&self) {
        let Self { name, child, open, unit, sound, .. } = *self;
        let [_, parent] = self.files();
        WriterContract {
            name,
            file: child,
            below: Some(parent),
            open,
            unit,
            grows: false,
            shrinks: false,
            sound,
        }
        .check();
        for seed in 0..3 {
            self.check_requests(seed);
        }
        self.check_neighbours();
    }

    fn image(&self, child: &Arc<dyn Storage>, parent: &Arc<dyn Storage>, writable: bool) -> Image {
        let mut top = (self.open)(Arc::clone(child)).unwrap();
        if writable {
            top.make_writable(DiskOptions { discard: Discard::Unmap, ..DiskOptions::default() }).unwrap();
        }
        Image::new(vec![top, (self.open)(Arc::clone(parent)).unwrap()]).unwrap()
    }

    fn files(&self) -> [Arc<dyn Storage>; 2] {
        [self.child, self.parent].map(|bytes| Arc::new(MemoryStorage::from_bytes(bytes)) as Arc<dyn Storage>)
    }

    fn read(image: &Image) -> Vec<u8> {
        let mut bytes = vec![0; image.virtual_size() as usize];
        image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
        bytes
    }

    /// Requests of any shape leave what a plain disk would have; the parent stays as it is.
    fn check_requests(&self, seed: u64) {
        let [child, parent] = self.files();
        let mut image = self.image(&child, &parent, true);
        let (mut model, mut rng) = (Self::read(&image), Rng::new(seed));
        let size = model.len() as u64;
        for step in 0..STEPS {
            let offset = rng.below(size);
            let most = if rng.below(4) == 0 { 3 * self.unit } else { 1500 };
            let length = (1 + rng.below(most)).min(size - offset);
            let range = offset as usize..(offset + length) as usize;
            match rng.below(10) {
                0..6 => {
                    let bytes = rng.bytes(length as usize);
                    image.write_at(Mem::from(&bytes[..]), offset).unwrap();
                    model[range].copy_from_slice(&bytes);
                }
                6..8 => {
                    image.write_zeroes(offset, length, rng.below(2) == 0).unwrap();
                    model[range].fill(0);
                }
                8 if seed > 0 => {
                    // What is left is not said: zeroes, the old bytes, or the parent's.
                    image.discard(offset, length).unwrap();
                    let now = Self::read(&image);
                    let mut others = now.clone();
                    others[range.clone()].copy_from_slice(&model[range]);
                    assert!(others == model, "{}: a discard changed other bytes", self.name);
                    model = now;
                }
                _ => image.flush().unwrap(),
            }
            if step % 50 == 49 {
                assert!(Self::read(&image) == model, "{}, seed {seed}, step {step}", self.name);
                image.close().unwrap();
                drop(image);
                (self.sound)(Arc::clone(&child));
                image = self.image(&child, &parent, true);
            }
        }
        assert!(Self::read(&image) == model, "{}, seed {seed}", self.name);
        let found = crate::disks::bytes_of(&*parent);
        assert!(found == self.parent, "{}: the parent was written to", self.name);
    }

    /// Threads that write to parts of the same sectors lose nothing of each other.
    fn check_neighbours(&self) {
        const THREADS: u64 = 4;
        let [child, parent] = self.files();
        let image = self.image(&child, &parent, true);
        let mut expected = Self::read(&image);
        let sectors = image.virtual_size() / 512;
        // All over the disk, and as many as take little time.
        let step = (sectors / 256).max(1) as usize;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &image;
                scope.spawn(move || {
                    for sector in (0..sectors).step_by(step) {
                        let bytes = [thread as u8 + 1; 100];
                        image.write_at(Mem::from(&bytes[..]), sector * 512 + thread * 128).unwrap();
                    }
                });
            }
        });
        for (sector, bytes) in expected.chunks_exact_mut(512).enumerate().step_by(step) {
            for thread in 0..THREADS as usize {
                bytes[thread * 128..][..100].fill(thread as u8 + 1);
            }
            let mut found = [0; 512];
            image.read_at(MemMut::from(&mut found[..]), sector as u64 * 512).unwrap();
            assert!(found[..] == *bytes, "{}: sector {sector} lost bytes", self.name);
        }
        image.close().unwrap();
        drop(image);
        assert!(Self::read(&self.image(&child, &parent, false)) == expected, "{}", self.name);
        (self.sound)(child);
    }
}

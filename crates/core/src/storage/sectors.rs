//! Bytes that are stored sector by sector as something else: what a disk cipher does.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use super::{ReadStorage, Run, Storage, Traits};
use crate::{Mem, MemMut, forward_storage};

/// Bytes that sector numbers count, and of most codecs' sectors.
const SECTOR: usize = 512;
/// Most bytes of one request to the host: whole sectors of any codec.
const PIECE: usize = 1 << 20;

thread_local! {
    /// Memory for one request. Whoever needs it takes it, so that a storage behind another one finds none and makes its own.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Turns sectors into what is stored of them, and back, in place. What it does depends on a sector's bytes and number alone.
pub trait SectorCodec: fmt::Debug + Send + Sync {
    /// Bytes of a sector, which is turned as a whole: a power of two of 512 to 4096.
    fn sector_size(&self) -> usize {
        SECTOR
    }
    /// Turns what is read into what is stored. `data` is whole sectors, of which the first begins at `sector` times 512 bytes.
    fn encode(&self, sector: u64, data: &mut [u8]);
    /// Turns what is stored into what is read.
    fn decode(&self, sector: u64, data: &mut [u8]);
}

/// A storage whose bytes are kept in `host` behind a codec, each at its own offset. It has no holes: what reads as zeroes was
/// written. Requests need not be whole sectors.
#[derive(Debug)]
pub struct Sectors {
    host: Arc<dyn Storage>,
    codec: Arc<dyn SectorCodec>,
    /// Added to the number of a sector of the host before the codec gets it.
    shift: u64,
    /// Bytes of a sector of the codec.
    sector: usize,
    /// Exclusive for a write of a part of a sector, which writes the rest of it as it was.
    parts: Arc<RwLock<()>>,
}

impl Sectors {
    /// What is kept in `host` behind `codec`.
    pub fn new(host: Arc<dyn Storage>, codec: Arc<dyn SectorCodec>) -> Self {
        let sector = codec.sector_size();
        Self { host, codec, shift: 0, sector, parts: Arc::default() }
    }

    /// What it is kept in.
    pub fn host(&self) -> &Arc<dyn Storage> {
        &self.host
    }

    /// The same bytes for a codec that counts other sectors: the one at `host` has the number of the one at `guest`. Both begin a
    /// sector, or lie as far in one. Writes of parts of sectors exclude each other through both.
    #[must_use]
    pub fn counted(&self, guest: u64, host: u64) -> Self {
        let sector = |offset: u64| offset / SECTOR as u64;
        Self {
            host: Arc::clone(&self.host),
            codec: Arc::clone(&self.codec),
            shift: sector(guest).wrapping_sub(sector(host)),
            sector: self.sector,
            parts: Arc::clone(&self.parts),
        }
    }

    /// The number of the sector at `start` of the host.
    fn number(&self, start: u64) -> u64 {
        (start / SECTOR as u64).wrapping_add(self.shift)
    }

    /// Reads whole sectors as they are stored, as many as there are, and decodes them; returns how many bytes there were. Of a
    /// sector that the file has in part nothing can be told: it is what its stored bytes and zeroes make.
    fn fill(&self, sectors: &mut [u8], start: u64) -> io::Result<usize> {
        let mut got = 0;
        while let Some(rest) = sectors.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.host.read_at(MemMut::from(rest), start + got as u64)? {
                0 => break,
                n => got += n,
            }
        }
        let whole = got.next_multiple_of(self.sector);
        if let Some(missing) = sectors.get_mut(got..whole) {
            missing.fill(0);
        }
        if let Some(read) = sectors.get_mut(..whole) {
            self.codec.decode(self.number(start), read);
        }
        Ok(got)
    }

    /// Encodes whole sectors and writes them.
    fn put(&self, sectors: &mut [u8], start: u64) -> io::Result<()> {
        self.codec.encode(self.number(start), sectors);
        let mut done = 0;
        while let Some(rest) = sectors.get(done..).filter(|rest| !rest.is_empty()) {
            match self.host.write_at(Mem::from(rest), start + done as u64)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Writes `length` bytes at `offset`, which `source` copies piece by piece into memory that it gets.
    fn write_pieces(&self, offset: u64, length: u64, mut source: impl FnMut(&mut [u8])) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        let parted = !self.is_whole(offset) || !self.is_whole(end);
        let (_shared, _alone) = match parted {
            true => (None, Some(self.parts.write())),
            false => (Some(self.parts.read()), None),
        };
        with_scratch(|scratch| {
            let mut at = offset;
            while at < end {
                let start = at - at % self.sector as u64;
                let stop = end.min(start + PIECE as u64);
                let sectors = take_front(scratch, stop.next_multiple_of(self.sector as u64) - start);
                self.keep_edges(sectors, start, at..stop)?;
                let front = (at - start) as usize;
                if let Some(piece) = sectors.get_mut(front..front + (stop - at) as usize) {
                    source(piece);
                }
                self.put(sectors, start)?;
                at = stop;
            }
            Ok(())
        })
    }

    /// Reads the first and the last of the sectors at `start` where `range` covers a part of them only; zeroes behind the end.
    fn keep_edges(&self, sectors: &mut [u8], start: u64, range: Range<u64>) -> io::Result<()> {
        let last = sectors.len() - self.sector;
        let edges = [(0, self.is_whole(range.start)), (last, self.is_whole(range.end))];
        for (at, _) in edges.into_iter().filter(|(_, whole)| !whole) {
            let Some(edge) = sectors.get_mut(at..at + self.sector) else { continue };
            if self.fill(edge, start + at as u64)? < self.sector {
                edge.fill(0);
            }
        }
        Ok(())
    }

    fn is_whole(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.sector as u64)
    }
}

/// The first `length` bytes, at most [`PIECE`] and a sector, of memory that is made as long as that.
fn take_front(scratch: &mut Vec<u8>, length: u64) -> &mut [u8] {
    let length = length as usize;
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
    scratch.get_mut(..length).unwrap_or_default()
}

fn with_scratch<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut scratch = SCRATCH.take();
    let done = work(&mut scratch);
    SCRATCH.set(scratch);
    done
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for Sectors {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let _shared = self.parts.read();
        if self.is_whole(offset)
            && let Some(own) = buf.exclusive().filter(|own| own.len().is_multiple_of(self.sector))
        {
            return self.fill(own, offset);
        }
        with_scratch(|scratch| {
            let mut done = 0;
            while !buf.is_empty() {
                let at = offset + done as u64;
                let start = at - at % self.sector as u64;
                let front = (at - start) as usize;
                let wanted = buf.len().min(PIECE - front);
                let sectors = take_front(scratch, (front + wanted).next_multiple_of(self.sector) as u64);
                let got = self.fill(sectors, start)?.saturating_sub(front).min(wanted);
                buf.take_front(got).copy_from(sectors.get(front..front + got).unwrap_or_default());
                done += got;
                if got < wanted {
                    break;
                }
            }
            Ok(done)
        })
    }
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        Ok(Run::new(self.len()?.max(range.start + 1), true))
    }
    fn traits(&self) -> Traits {
        Traits { alignment: 1, memory_alignment: 1, ..self.host.traits() }
    }
    forward_storage!(host: len is_empty allocated_bytes identity io_limits path operation is_transient lock forget no_arriving no_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for Sectors {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at(&[buf], offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let length = bufs.iter().map(Mem::len).sum::<usize>();
        let mut bufs = bufs.iter().copied();
        let mut current = Mem::from(&[][..]);
        self.write_pieces(offset, length as u64, |mut piece| {
            while !piece.is_empty() {
                if current.is_empty() {
                    let Some(next) = bufs.next() else { return };
                    current = next;
                }
                let copied = current.copy_to(piece);
                current = current.split_at(copied).1;
                piece = piece.get_mut(copied..).unwrap_or_default();
            }
        })?;
        Ok(length)
    }
    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.write_pieces(offset, length, |piece| piece.fill(0))
    }
    forward_storage!(host: set_len sync_data begin_sync check_close discard allocate never_ahead never_clone write_each);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    /// Each byte is stored as the sum of it and its sector's number and place. Its sectors have so many bytes.
    #[derive(Debug)]
    struct Sums(usize);

    impl Sums {
        fn each(&self, sector: u64, data: &mut [u8], change: impl Fn(u8, u8) -> u8) {
            assert!(data.len().is_multiple_of(self.0) && sector.is_multiple_of(self.0 as u64 / 512));
            for (number, sector) in (sector..).step_by(self.0 / SECTOR).zip(data.chunks_exact_mut(self.0)) {
                let mut key = number as u8 ^ 0xa5;
                for byte in sector {
                    *byte = change(*byte, key);
                    key = key.wrapping_add(1);
                }
            }
        }
    }

    impl SectorCodec for Sums {
        fn sector_size(&self) -> usize {
            self.0
        }
        fn encode(&self, sector: u64, data: &mut [u8]) {
            self.each(sector, data, u8::wrapping_add);
        }
        fn decode(&self, sector: u64, data: &mut [u8]) {
            self.each(sector, data, u8::wrapping_sub);
        }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n / 7) as u8).collect()
    }

    #[test]
    fn requests_of_any_shape_are_as_without_a_codec() {
        [512, 1024, 4096].into_iter().for_each(requests_of_any_shape);
    }

    fn requests_of_any_shape(sector: usize) {
        let host = Arc::new(MemoryStorage::new());
        let door = Sectors::new(host.clone(), Arc::new(Sums(sector)));
        let mut plain = vec![0; 3 * PIECE];
        // The whole of it first: nothing is a hole.
        door.write_zeroes(0, plain.len() as u64, true).unwrap();
        let requests = [
            (0, 512),
            (1, 1),
            (511, 2),
            (1000, 700),
            (PIECE - 3, 7),
            (4096, 2 * PIECE + 100),
            (PIECE, PIECE),
            (100, 2 * PIECE),
        ];
        for (at, length) in requests {
            let bytes = pattern(length);
            let (a, b) = bytes.split_at(length / 3);
            let wrote = door.write_vectored_at(&[Mem::from(a), Mem::from(&[][..]), Mem::from(b)], at as u64);
            assert_eq!(wrote.unwrap(), length);
            plain[at..at + length].copy_from_slice(&bytes);
            door.write_zeroes(at as u64 + 5, length as u64 / 5, false).unwrap();
            plain[at + 5..at + 5 + length / 5].fill(0);
            for (from, length) in [(at, length), (at / 512 * 512, 1024), (at.saturating_sub(1), length + 3)] {
                let mut read = vec![1; length];
                assert_eq!(door.read_at(MemMut::from(&mut read[..]), from as u64).unwrap(), length);
                assert!(read == plain[from..from + length], "{from} {length}");
            }
        }
        let mut stored = host.to_vec();
        assert!(stored != plain);
        Sums(sector).decode(0, &mut stored);
        assert!(stored == plain);
    }

    #[test]
    fn a_sector_is_counted_where_the_guest_has_it() {
        let host = Arc::new(MemoryStorage::new());
        let door = Sectors::new(host.clone(), Arc::new(Sums(512)));
        let (guest, place) = (7 * 512, 3 * 512);
        door.counted(guest + 100, place + 100).write_at(Mem::from(&pattern(900)[..]), place + 100).unwrap();
        // Moved as it is stored: the guest's sectors are the same at another place.
        let stored = host.to_vec();
        host.write_at(Mem::from(&stored[place as usize..]), 64 * 512).unwrap();
        for place in [place, 64 * 512] {
            let mut read = vec![1; 900];
            door.counted(guest, place).read_at(MemMut::from(&mut read[..]), place + 100).unwrap();
            assert!(read == pattern(900));
        }
        assert!(stored[place as usize + 100..][..900] != pattern(900));
    }

    #[test]
    fn a_read_ends_with_the_file_and_a_part_of_a_sector_behind_it_brings_zeroes() {
        let host = Arc::new(MemoryStorage::new());
        let door = Sectors::new(host.clone(), Arc::new(Sums(512)));
        door.write_at(Mem::from(&pattern(10)[..]), 600).unwrap();
        assert_eq!(host.len().unwrap(), 1024);
        let mut read = vec![1; 2000];
        assert_eq!(door.read_at(MemMut::from(&mut read[..]), 512).unwrap(), 512);
        assert!(read[..88].iter().all(|byte| *byte == 0));
        assert_eq!(read[88..98], pattern(10));
        assert!(read[98..512].iter().all(|byte| *byte == 0));
        assert_eq!(door.read_at(MemMut::from(&mut read[..5]), 1022).unwrap(), 2);
        assert_eq!(door.read_at(MemMut::from(&mut read[..512]), 1024).unwrap(), 0);
    }
}

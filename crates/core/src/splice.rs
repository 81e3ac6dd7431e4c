//! Disks made of parts of other disks: a range of one, or several one behind the other.

use crate::source::{Extent, ExtentKind, GuestSource};
use crate::{Error, ErrorKind, Job, MemMut, Result};

/// A disk is whole sectors: what a part lacks of its last one reads as zeroes, as QEMU has it.
const SECTOR: u64 = 512;

/// A disk that consists of parts of others.
pub struct Splice<'a> {
    parts: Vec<Part<'a>>,
    size: u64,
}

struct Part<'a> {
    source: &'a dyn GuestSource,
    /// First byte in the source.
    from: u64,
    length: u64,
    /// Where it begins in the new disk.
    at: u64,
}

impl<'a> Splice<'a> {
    /// The disks one behind the other.
    ///
    /// # Errors
    /// `Limit` where they come to more than a number of 63 bits.
    pub fn concatenation(sources: &[&'a dyn GuestSource]) -> Result<Self> {
        let mut splice = Self { parts: Vec::new(), size: 0 };
        sources.iter().try_for_each(|source| splice.push(*source, 0, source.virtual_size()))?;
        Ok(splice)
    }

    /// `length` bytes of a disk from `start` on.
    ///
    /// # Errors
    /// `InvalidArgument` for a range that is not inside the disk.
    pub fn window(source: &'a dyn GuestSource, start: u64, length: u64) -> Result<Self> {
        let size = source.virtual_size();
        if start.checked_add(length).is_none_or(|end| end > size) {
            let message = format!("{length} bytes from {start} on are not inside the disk of {size} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("length"));
        }
        let mut splice = Self { parts: Vec::new(), size: 0 };
        splice.push(source, start, length)?;
        Ok(splice)
    }

    fn push(&mut self, source: &'a dyn GuestSource, from: u64, length: u64) -> Result<()> {
        let at = self.size;
        let room = length.checked_next_multiple_of(SECTOR);
        let end = room.and_then(|room| at.checked_add(room)).filter(|end| *end <= i64::MAX as u64);
        let Some(end) = end else {
            return Err(Error::new(ErrorKind::Limit, "the disks together are too large").with_field("size"));
        };
        self.size = end;
        self.parts.push(Part { source, from, length, at });
        Ok(())
    }

    /// The parts from the one at `offset` on, which is inside the disk.
    fn parts_from(&self, offset: u64) -> &[Part<'a>] {
        let index = self.parts.partition_point(|part| part.at <= offset);
        // Of parts that begin at one place, all but the last are empty.
        self.parts.get(index.saturating_sub(1)..).unwrap_or_default()
    }
}

impl Part<'_> {
    fn room(&self) -> u64 {
        self.length.next_multiple_of(SECTOR)
    }
}

impl GuestSource for Splice<'_> {
    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        self.parts.iter().map(|part| part.source.cluster_size()).max().unwrap_or(64 << 10)
    }

    fn is_sequential(&self) -> bool {
        self.parts.iter().any(|part| part.source.is_sequential())
    }

    fn is_arriving(&self) -> bool {
        self.parts.iter().any(|part| part.source.is_arriving())
    }

    fn settle(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.source.settle())
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        let end = start.saturating_add(length).min(self.size);
        let first = out.len();
        let mut at = start;
        for part in self.parts_from(start) {
            if at >= end || (out.len() > first && out.len() - first >= most) {
                break;
            }
            let inside = at - part.at;
            let wanted = end.min(part.at + part.room()) - at;
            if inside < part.length {
                let from = part.from + inside;
                let wanted = wanted.min(part.length - inside);
                let before = out.len();
                let covered = part.source.extents_up_to(from, wanted, most, job, out)?;
                for extent in out.iter_mut().skip(before) {
                    extent.start = extent.start - part.from + part.at;
                }
                at += covered - from;
                if covered < from + wanted {
                    break;
                }
            }
            let room_end = end.min(part.at + part.room());
            if at < room_end {
                let (kind, length) = (ExtentKind::Unallocated, room_end - at);
                out.push(Extent { start: at, length, kind, depth: 0, zero: true, host: None });
                at = room_end;
            }
        }
        Ok(at)
    }

    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        let mut at = offset;
        for part in self.parts_from(offset) {
            if buf.is_empty() {
                break;
            }
            let inside = at - part.at;
            let stored = part.length.saturating_sub(inside).min(buf.len() as u64);
            if stored > 0 {
                part.source.read_at(buf.take_front(stored as usize), part.from + inside)?;
            }
            let padding = (part.room() - inside - stored).min(buf.len() as u64);
            buf.take_front(padding as usize).fill_zero();
            at += stored + padding;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::*;

    /// A disk whose bytes tell where they are, with holes.
    struct Disk {
        size: u64,
        first: u8,
    }

    impl Disk {
        fn byte(&self, at: u64) -> u8 {
            if at / 700 % 2 == 1 { 0 } else { self.first.wrapping_add((at / 100) as u8).max(1) }
        }
    }

    impl GuestSource for Disk {
        fn virtual_size(&self) -> u64 {
            self.size
        }
        fn cluster_size(&self) -> u64 {
            512
        }
        fn extents_up_to(
            &self,
            start: u64,
            length: u64,
            most: usize,
            _: &Job,
            out: &mut Vec<Extent>,
        ) -> Result<u64> {
            let (mut at, end, first) = (start, (start + length).min(self.size), out.len());
            while at < end && out.len() - first < most {
                let next = (at / 700 * 700 + 700).min(end);
                let zero = at / 700 % 2 == 1;
                let kind = if zero { ExtentKind::Unallocated } else { ExtentKind::Data };
                out.push(Extent { start: at, length: next - at, kind, depth: 0, zero, host: None });
                at = next;
            }
            Ok(at)
        }
        fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
            assert!(offset + buf.len() as u64 <= self.size);
            let bytes: Vec<u8> = (offset..offset + buf.len() as u64).map(|at| self.byte(at)).collect();
            buf.copy_from(&bytes);
            Ok(())
        }
    }

    fn bytes(disk: &dyn GuestSource, start: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![9; length as usize];
        disk.read_at(MemMut::from(&mut bytes[..]), start).unwrap();
        bytes
    }

    fn check(splice: &Splice<'_>, want: &[u8]) {
        assert_eq!(splice.virtual_size(), want.len() as u64);
        assert!(bytes(splice, 0, splice.virtual_size()) == want);
        for (start, length) in [(0, 1), (511, 2), (1023, 700), (want.len() as u64 - 1, 1), (600, 900)] {
            let end = (start + length).min(want.len() as u64);
            assert!(bytes(splice, start, end - start) == want[start as usize..end as usize], "{start}");
        }
        for most in [1, 2, 1000] {
            let (mut at, mut extents) = (0, Vec::new());
            while at < splice.virtual_size() {
                let covered = splice.extents_up_to(at, u64::MAX, most, &Job::new(), &mut extents).unwrap();
                assert!(covered > at);
                at = covered;
            }
            let mut end = 0;
            for extent in extents {
                assert_eq!(extent.start, end);
                end += extent.length;
                let zero = want[extent.start as usize..end as usize].iter().all(|byte| *byte == 0);
                assert!(!extent.zero || zero);
            }
            assert_eq!(end, splice.virtual_size());
        }
    }

    #[test]
    fn disks_follow_each_other() {
        let disks = [(1000, 1), (0, 5), (512, 7), (3001, 90)].map(|(size, first)| Disk { size, first });
        let all: Vec<&dyn GuestSource> = disks.iter().map(|disk| disk as &dyn GuestSource).collect();
        let mut want = Vec::new();
        for disk in &disks {
            want.extend(bytes(disk, 0, disk.size));
            want.resize(want.len().next_multiple_of(512), 0);
        }
        check(&Splice::concatenation(&all).unwrap(), &want);
    }

    #[test]
    fn a_window_is_a_part() {
        let disk = Disk { size: 5000, first: 3 };
        for (start, length) in [(0, 5000), (100, 2000), (1400, 700), (3000, 1999)] {
            let mut want = bytes(&disk, start, length);
            want.resize(want.len().next_multiple_of(512), 0);
            check(&Splice::window(&disk, start, length).unwrap(), &want);
        }
        assert_eq!(Splice::window(&disk, 5000, 0).unwrap().virtual_size(), 0);
        let beyond = Splice::window(&disk, 4000, 1001).map(drop).unwrap_err();
        assert_eq!(beyond.kind(), ErrorKind::InvalidArgument);
    }
}

//! Who reads forward, and how far ahead it is worth to read for them.

use std::ops::Range;

/// Readers that are told apart: a convert has some, and reads tables between its data.
const STREAMS: usize = 4;

/// Workers of one convert are not in step: so many blocks behind the front is still the same reader.
const BEHIND: u64 = 16;

/// A reader may leave so many blocks out: what it knows to be zero.
const SKIPPED: u64 = 2;

/// Steps forward before anything is read ahead: opening an image reads neighbouring blocks, too.
const STEPS: u32 = 2;

/// One reader.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// Behind the last block that was read.
    next: u64,
    /// Steps forward.
    steps: u32,
    /// Blocks to read ahead.
    window: u64,
    used: u64,
}

/// The readers of one storage.
#[derive(Debug)]
pub(super) struct ReadAhead {
    streams: [Stream; STREAMS],
    clock: u64,
    most: u64,
}

impl ReadAhead {
    /// At most `most` blocks ahead.
    pub(super) fn new(most: u64) -> Self {
        Self { streams: [Stream::default(); STREAMS], clock: 0, most }
    }

    /// Blocks `first` to `last` are read; which ones to read ahead, if any.
    pub(super) fn read(&mut self, first: u64, last: u64) -> Range<u64> {
        self.clock += 1;
        let (clock, behind) = (self.clock, last.saturating_add(1));
        let near = |stream: &&mut Stream| {
            stream.used > 0
                && first <= stream.next.saturating_add(SKIPPED)
                && behind.saturating_add(BEHIND) >= stream.next
        };
        let Some(stream) = self.streams.iter_mut().find(near) else {
            if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
                *oldest = Stream { next: behind, steps: 0, window: 0, used: clock };
            }
            return 0..0;
        };
        stream.used = clock;
        if behind <= stream.next {
            return 0..0;
        }
        stream.next = behind;
        stream.steps = stream.steps.saturating_add(1);
        if stream.steps >= STEPS {
            stream.window = (stream.window * 2).clamp(1, self.most.max(1)).min(self.most);
        }
        behind..behind.saturating_add(stream.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_goes_on_is_read_for_further_and_further_ahead() {
        let mut ahead = ReadAhead::new(8);
        let windows: Vec<u64> = (0..8)
            .map(|block| {
                let range = ahead.read(block, block);
                range.end - range.start
            })
            .collect();
        assert_eq!(windows, [0, 0, 1, 2, 4, 8, 8, 8]);
        // The same block again is no step.
        assert!(ahead.read(7, 7).is_empty());
        // Elsewhere it begins anew.
        assert!(ahead.read(1000, 1000).is_empty());
        assert!(ahead.read(1001, 1001).is_empty());
        // And the first one goes on.
        assert_eq!(ahead.read(8, 8), 9..17);
    }

    #[test]
    fn jumps_are_never_read_ahead_for() {
        let mut ahead = ReadAhead::new(8);
        for n in 0..100u64 {
            let block = n.wrapping_mul(7919) % 100_000;
            assert!(ahead.read(block, block).is_empty(), "{block}");
        }
    }

    #[test]
    fn workers_out_of_step_are_one_reader_and_numbers_end() {
        let mut ahead = ReadAhead::new(4);
        let read: u64 = [1, 0, 3, 2, 5, 4, 7, 6].into_iter().map(|n| ahead.read(n, n).count() as u64).sum();
        assert!(read > 0);
        let _ = ahead.read(u64::MAX - 1, u64::MAX);
        let _ = ahead.read(u64::MAX, u64::MAX);
        assert!(ReadAhead::new(0).read(0, 9).is_empty());
    }
}

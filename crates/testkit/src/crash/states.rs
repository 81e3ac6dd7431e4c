//! The files that a power cut can leave.
//!
//! The changes to one file before the last completed sync are there. Of the others, up to the cut, any part can be: in
//! [`Shape::Torn`] every sector of every write is there or not, in the other shapes whole changes are. A sector that
//! was written several times thus keeps any one of its versions, which is all that a disk that reorders could do.

use std::collections::VecDeque;

use crate::recorder::{Change, Entry, apply};
use crate::{Rng, Sparse};

/// Which of the changes that no sync covers are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// All: the process was killed, the system lived on.
    All,
    /// None.
    None,
    /// All but this one, counted from the oldest.
    AllBut(usize),
    /// This one only.
    Only(usize),
    /// Those whose bit is set.
    Subset(u64),
    /// A random part of a seed.
    Random(u64),
    /// A random part of a seed, torn at sectors.
    Torn(u64),
}

/// One possible state after a power cut.
#[derive(Debug, Clone)]
pub struct State {
    /// Position of the journal at which the power went.
    pub cut: usize,
    /// Which changes are there.
    pub shape: Shape,
    /// The files.
    pub files: Vec<Sparse>,
}

/// What every cut has in common: files with all that is durable by then, and the changes that are not.
#[derive(Debug)]
pub struct States<'a> {
    first: usize,
    seen: usize,
    entries: &'a [Entry],
    durable: Vec<Sparse>,
    /// Per file: the position up to which it is durable.
    covered: Vec<usize>,
    /// Positions of the changes before `cut` that are not durable.
    loose: VecDeque<usize>,
    cut: usize,
    planned: VecDeque<Shape>,
    per_cut: f64,
    /// Without the simple shapes.
    sample: bool,
    rng: Rng,
}

/// The journal's positions that every file's syncs cover, as far as `entries` go.
fn cover(covered: &mut [usize], entry: &Entry) -> bool {
    let Change::Sync { covers } = entry.change else { return false };
    covered[entry.file] = covered[entry.file].max(covers);
    true
}

/// Applies what is durable to `base` and gives the rest. Entries in front of the first loose one are consumed.
pub(super) fn settle(base: &mut [Sparse], first: usize, entries: &[Entry]) -> Vec<Entry> {
    let mut covered = vec![0; base.len()];
    for entry in entries {
        cover(&mut covered, entry);
    }
    // A common front for all files, so that the journal stays one.
    let front = entries
        .iter()
        .enumerate()
        .position(|(i, e)| !matches!(e.change, Change::Sync { .. }) && first + i >= covered[e.file])
        .unwrap_or(entries.len());
    for entry in &entries[..front] {
        apply(&mut base[entry.file], &entry.change);
    }
    entries[front..].to_vec()
}

impl<'a> States<'a> {
    /// All states of the simple shapes at every cut from `seen` on, and about `random` more, spread evenly.
    pub(super) fn new(
        base: &[Sparse],
        (first, seen): (usize, usize),
        entries: &'a [Entry],
        seed: u64,
        random: usize,
    ) -> Self {
        let planned = if first == seen { VecDeque::from([Shape::All]) } else { VecDeque::new() };
        let cuts = first + entries.len() + 1 - seen;
        Self {
            first,
            seen,
            entries,
            durable: base.to_vec(),
            covered: vec![0; base.len()],
            loose: VecDeque::new(),
            cut: first,
            planned,
            per_cut: random as f64 / cuts as f64,
            sample: false,
            rng: Rng::new(seed),
        }
    }

    /// Without the states of the simple shapes.
    pub(super) fn sample(mut self) -> Self {
        self.sample = true;
        self.planned.clear();
        self
    }

    fn entry(&self, position: usize) -> &'a Entry {
        &self.entries[position - self.first]
    }

    /// Moves the cut behind the next change.
    fn advance(&mut self) -> bool {
        let Some(entry) = self.entries.get(self.cut - self.first) else { return false };
        if cover(&mut self.covered, entry) {
            let covered = &self.covered;
            let (durable, entries, first) = (&mut self.durable, self.entries, self.first);
            self.loose.retain(|position| {
                let entry = &entries[position - first];
                let keep = *position >= covered[entry.file];
                if !keep {
                    apply(&mut durable[entry.file], &entry.change);
                }
                keep
            });
        } else {
            self.loose.push_back(self.cut);
        }
        self.cut += 1;
        if self.cut >= self.seen {
            self.plan();
        }
        true
    }

    fn plan(&mut self) {
        if !self.sample {
            self.plan_simple();
        }
        let mut more = self.per_cut.floor() as usize;
        more += usize::from((self.rng.below(1 << 20) as f64) < self.per_cut.fract() * f64::from(1 << 20));
        for _ in 0..more {
            let seed = self.rng.next_u64();
            self.planned.push_back(if seed.is_multiple_of(4) {
                Shape::Random(seed)
            } else {
                Shape::Torn(seed)
            });
        }
    }

    fn plan_simple(&mut self) {
        let loose = self.loose.len();
        self.planned.push_back(Shape::All);
        match loose {
            0 => {}
            1 => self.planned.push_back(Shape::None),
            // Few enough for all of them.
            2..=3 => self.planned.extend((0..(1 << loose) - 1).map(Shape::Subset)),
            // The newest change without one of the others, or alone.
            _ => {
                let one = self.rng.below(loose as u64) as usize;
                self.planned.extend([Shape::None, Shape::Only(loose - 1), Shape::AllBut(one)]);
            }
        }
    }

    fn build(&self, shape: Shape) -> Vec<Sparse> {
        let mut files = self.durable.clone();
        let mut rng = match shape {
            Shape::Random(seed) | Shape::Torn(seed) => Rng::new(seed),
            _ => Rng::new(0),
        };
        // Not always one half: nearly everything, or nearly nothing, is likelier to break a rule.
        let share = [1, 4, 8, 12, 15][rng.below(5) as usize];
        for (i, position) in self.loose.iter().enumerate() {
            let Entry { file, change } = self.entry(*position);
            let there = match shape {
                Shape::All => true,
                Shape::None => false,
                Shape::AllBut(n) => n != i,
                Shape::Only(n) => n == i,
                Shape::Subset(bits) => bits >> i & 1 == 1,
                Shape::Random(_) => rng.below(16) < share,
                Shape::Torn(_) => {
                    tear(&mut files[*file], change, &mut rng, share);
                    false
                }
            };
            if there {
                apply(&mut files[*file], change);
            }
        }
        files
    }
}

/// Applies the sectors of a change that the draw leaves.
fn tear(bytes: &mut Sparse, change: &Change, rng: &mut Rng, share: u64) {
    const SECTOR: u64 = crate::ops::SECTOR;
    let (offset, length) = match change {
        Change::Write { offset, data } => (*offset, data.len() as u64),
        Change::Zero { offset, length } | Change::Discard { offset, length } => (*offset, *length),
        _ => {
            if rng.below(16) < share {
                apply(bytes, change);
            }
            return;
        }
    };
    let mut at = offset;
    while at < offset + length {
        // Runs of sectors, of very different lengths.
        let run = 1u64 << rng.below(12);
        let end = ((at / SECTOR + run) * SECTOR).min(offset + length);
        if rng.below(16) < share {
            let part = match change {
                Change::Write { data, .. } => {
                    let range = (at - offset) as usize..(end - offset) as usize;
                    Change::Write { offset: at, data: data[range].into() }
                }
                Change::Zero { .. } => Change::Zero { offset: at, length: end - at },
                _ => Change::Discard { offset: at, length: end - at },
            };
            apply(bytes, &part);
        } else if matches!(change, Change::Write { .. }) && rng.below(4) == 0 {
            // The file got longer, the bytes did not arrive.
            bytes.set_len(bytes.len().max(end));
        }
        at = end;
    }
}

impl Iterator for States<'_> {
    type Item = State;

    fn next(&mut self) -> Option<State> {
        loop {
            if let Some(shape) = self.planned.pop_front() {
                return Some(State { cut: self.cut, shape, files: self.build(shape) });
            }
            if !self.advance() {
                return None;
            }
        }
    }
}

//! A change of the snapshots as symbolic steps.

/// A set of L2 tables and clusters: what one L1 table refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tree {
    /// The active disk, as it is before the plan.
    Active,
    /// The snapshot with this index in the table that the plan was made for.
    Snapshot(usize),
}

/// A snapshot to add to the table. It gets the tables that the active disk had before `Step::Share` gave it others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Unique id.
    pub id: Vec<u8>,
    /// Name.
    pub name: Vec<u8>,
    /// Seconds since the Epoch.
    pub date_sec: u32,
    /// Nanoseconds.
    pub date_nsec: u32,
    /// Time that the guest was running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the VM state in bytes.
    pub vm_state_size: u64,
    /// Record/replay instruction count.
    pub icount: Option<u64>,
}

/// One entry of a new snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// The entry with this index, with all it has, perhaps under a new name.
    Keep {
        /// Index in the table that the plan was made for.
        index: usize,
        /// The new name, if it changes.
        rename: Option<Vec<u8>>,
    },
    /// A new entry.
    New(NewSnapshot),
}

/// One step. Nothing of the image changes before `Switch`, which changes all that the steps before it made at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Refuses, before anything is written, a tree whose references cannot all be counted once more.
    CheckReferences(Tree),
    /// From here on refcounts change beside those in the file.
    Fork,
    /// Writes new tables for the active disk that share everything with a tree, counted once more. After `Fork`.
    Share(Tree),
    /// Counts everything that a tree refers to once less. After `Fork`.
    Drop(Tree),
    /// Writes new tables for the active disk where a COPIED flag does not fit its refcount any more. After `Drop`.
    RestoreCopied,
    /// Writes a new snapshot table.
    WriteTable(Vec<Record>),
    /// Makes all that was written durable.
    Barrier,
    /// Makes the new tables and refcounts the image's, in one write. After a barrier; durable with the next one, which
    /// frees what they replace.
    Switch,
    /// Gives the space of what was dropped back to the file system. After the barrier behind `Switch`.
    Free,
}

/// Steps in order, made for one generation of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Generation of the snapshot table that the plan was made for: see `Qcow2::generation`.
    pub generation: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The snapshot that the plan deletes, where it does nothing else.
    pub(super) fn removed(&self) -> Option<usize> {
        let mut removed = None;
        let mut kept = None;
        for step in &self.steps {
            match step {
                Step::Fork | Step::RestoreCopied | Step::Barrier | Step::Switch | Step::Free => {}
                Step::Drop(Tree::Snapshot(index)) if removed.is_none() => removed = Some(*index),
                Step::WriteTable(records) if kept.is_none() => kept = Some(records),
                _ => return None,
            }
        }
        let (removed, kept) = (removed?, kept?);
        // In their order, and under their names.
        let as_before = |(place, record): (usize, &Record)| {
            let index = if place < removed { place } else { place + 1 };
            *record == Record::Keep { index, rename: None }
        };
        let whole = self.steps.contains(&Step::Switch) && kept.iter().enumerate().all(as_before);
        whole.then_some(removed)
    }
}

//! A change of the snapshots as symbolic steps.

/// A set of L2 tables and clusters: what one L1 table refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tree {
    /// The active disk, as it is when the step runs.
    Active,
    /// The active disk as it was before `Step::SetActiveL1`.
    FormerActive,
    /// The snapshot with this index in the table that the plan was made for.
    Snapshot(usize),
}

/// What a new L1 table is a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L1Source {
    /// The active L1 table.
    Active,
    /// A snapshot's.
    Snapshot(usize),
}

/// A snapshot to add to the table. Its L1 table is the plan's new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Unique id.
    pub id: String,
    /// Name.
    pub name: String,
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
        rename: Option<String>,
    },
    /// A new entry.
    New(NewSnapshot),
}

/// One step. See each variant for what must have happened before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Refuses, before anything is written, a tree whose references cannot all be counted once more.
    CheckReferences(Tree),
    /// Clears the COPIED flags of a tree.
    ClearCopied(Tree),
    /// Allocates an L1 table and copies another one into it, without COPIED flags.
    CopyL1(L1Source),
    /// Counts every reference of a tree once more.
    AddReferences(Tree),
    /// Makes all that was written durable.
    Barrier,
    /// Writes a new snapshot table. Nothing refers to it yet.
    WriteTable(Vec<Record>),
    /// Makes the table that was written the image's. After a barrier; durable with the next one.
    SetTable,
    /// Makes the L1 table that was copied the active one, with the source's disk size. After a barrier; durable with the
    /// next one.
    SetActiveL1,
    /// Drops every reference of a tree. After the barrier that made the loss of its L1 table durable.
    DropReferences(Tree),
    /// Frees the L1 table of a tree. As `DropReferences`.
    FreeL1(Tree),
    /// Frees the former snapshot table. After the barrier behind `SetTable`.
    FreeTable,
    /// Sets the COPIED flags of the active disk where a refcount is one. After the barrier behind `DropReferences`.
    RestoreCopied,
}

/// Steps in order, made for one generation of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Generation of the snapshot table that the plan was made for: see `Qcow2::generation`.
    pub generation: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

//! The plans of snapshot operations as the facade makes them, for tests of the engine alone. A golden text, which the
//! facade's own tests compare with as well, ties the two together.

use qcow2_engine::maintenance::{L1Source, NewSnapshot, Plan, Record, Step, Tree};

/// A table of `count` snapshots in this generation.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// See `Qcow2::generation`.
    pub generation: u64,
    /// Number of snapshots.
    pub count: usize,
}

impl Table {
    /// The snapshot table of an open image.
    pub fn of(image: &qcow2_engine::Image) -> Self {
        let top = image.layers()[0].as_qcow2().unwrap();
        Self { generation: top.generation(), count: top.snapshots().len() }
    }

    fn kept(self) -> impl Iterator<Item = Record> {
        (0..self.count).map(|index| Record::Keep { index, rename: None })
    }

    fn plan(self, steps: Vec<Step>) -> Plan {
        Plan { generation: self.generation, steps }
    }

    /// A snapshot of the active disk.
    pub fn create(self, id: &str, name: &str) -> Plan {
        let new = NewSnapshot {
            id: id.into(),
            name: name.into(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            icount: None,
        };
        let mut steps = vec![
            Step::CheckReferences(Tree::Active),
            Step::ClearCopied(Tree::Active),
            Step::Barrier,
            Step::CopyL1(L1Source::Active),
            Step::AddReferences(Tree::Active),
        ];
        steps.extend(swap_table(self.kept().chain([Record::New(new)]).collect()));
        steps.extend([Step::FreeTable, Step::Barrier]);
        self.plan(steps)
    }

    /// The active disk becomes what a snapshot holds.
    pub fn apply(self, index: usize) -> Plan {
        let tree = Tree::Snapshot(index);
        self.plan(vec![
            Step::CheckReferences(tree),
            Step::ClearCopied(tree),
            Step::CopyL1(L1Source::Snapshot(index)),
            Step::AddReferences(tree),
            Step::Barrier,
            Step::SetActiveL1,
            Step::Barrier,
            Step::DropReferences(Tree::FormerActive),
            Step::FreeL1(Tree::FormerActive),
            Step::Barrier,
            Step::RestoreCopied,
            Step::Barrier,
        ])
    }

    /// A snapshot goes.
    pub fn delete(self, index: usize) -> Plan {
        let tree = Tree::Snapshot(index);
        let others = self.kept().enumerate().filter(|(i, _)| *i != index).map(|(_, r)| r).collect();
        let mut steps = swap_table(others);
        steps.extend([
            Step::DropReferences(tree),
            Step::FreeL1(tree),
            Step::FreeTable,
            Step::Barrier,
            Step::RestoreCopied,
            Step::Barrier,
        ]);
        self.plan(steps)
    }

    /// A snapshot gets another name.
    pub fn rename(self, index: usize, name: &str) -> Plan {
        let named = |i: usize| (i == index).then(|| name.to_owned());
        let entries = (0..self.count).map(|i| Record::Keep { index: i, rename: named(i) }).collect();
        let mut steps = swap_table(entries);
        steps.extend([Step::FreeTable, Step::Barrier]);
        self.plan(steps)
    }
}

/// Swaps the snapshot table. The former one is free afterwards.
fn swap_table(entries: Vec<Record>) -> Vec<Step> {
    vec![Step::WriteTable(entries), Step::Barrier, Step::SetTable, Step::Barrier]
}

/// A plan as text, one line a step.
pub fn text(plan: &Plan) -> String {
    let tree = |tree: &Tree| match tree {
        Tree::Active => "active".to_owned(),
        Tree::FormerActive => "former-active".to_owned(),
        Tree::Snapshot(index) => index.to_string(),
    };
    let record = |record: &Record| match record {
        Record::Keep { index, rename: None } => format!(" {index}"),
        Record::Keep { index, rename: Some(name) } => format!(" {index}={name}"),
        Record::New(new) => format!(" +{}", new.id),
    };
    let line = |step: &Step| match step {
        Step::CheckReferences(t) => format!("check-references {}", tree(t)),
        Step::ClearCopied(t) => format!("clear-copied {}", tree(t)),
        Step::CopyL1(L1Source::Active) => "copy-l1 active".to_owned(),
        Step::CopyL1(L1Source::Snapshot(index)) => format!("copy-l1 {index}"),
        Step::AddReferences(t) => format!("add-references {}", tree(t)),
        Step::Barrier => "barrier".to_owned(),
        Step::WriteTable(records) => {
            format!("write-table{}", records.iter().map(record).collect::<String>())
        }
        Step::SetTable => "set-table".to_owned(),
        Step::SetActiveL1 => "set-active-l1".to_owned(),
        Step::DropReferences(t) => format!("drop-references {}", tree(t)),
        Step::FreeL1(t) => format!("free-l1 {}", tree(t)),
        Step::FreeTable => "free-table".to_owned(),
        Step::RestoreCopied => "restore-copied".to_owned(),
    };
    plan.steps.iter().map(|step| line(step) + "\n").collect()
}

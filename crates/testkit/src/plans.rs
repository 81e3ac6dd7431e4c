//! The plans of snapshot operations as the facade makes them, for tests of the engine alone. A golden text, which the
//! facade's own tests compare with as well, ties the two together.

use qcow2_engine::maintenance::{NewSnapshot, Plan, Record, Step, Tree};

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
        let top = image.top_qcow2().unwrap();
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
        let table = Step::WriteTable(self.kept().chain([Record::New(new)]).collect());
        let shared = [Step::CheckReferences(Tree::Active), Step::Fork, table, Step::Share(Tree::Active)];
        self.plan(shared.into_iter().chain(switch()).collect())
    }

    /// The active disk becomes what a snapshot holds.
    pub fn apply(self, index: usize) -> Plan {
        let tree = Tree::Snapshot(index);
        let shared = [Step::CheckReferences(tree), Step::Fork, Step::Share(tree), Step::Drop(Tree::Active)];
        self.plan(shared.into_iter().chain(switch()).chain([Step::Free]).collect())
    }

    /// A snapshot goes.
    pub fn delete(self, index: usize) -> Plan {
        let others = self.kept().enumerate().filter(|(i, _)| *i != index).map(|(_, r)| r).collect();
        let dropped =
            [Step::Fork, Step::WriteTable(others), Step::Drop(Tree::Snapshot(index)), Step::RestoreCopied];
        self.plan(dropped.into_iter().chain(switch()).chain([Step::Free]).collect())
    }

    /// A snapshot gets another name.
    pub fn rename(self, index: usize, name: &str) -> Plan {
        let named = |i: usize| (i == index).then(|| name.into());
        let entries = (0..self.count).map(|i| Record::Keep { index: i, rename: named(i) }).collect();
        self.plan([Step::WriteTable(entries)].into_iter().chain(switch()).collect())
    }
}

/// Makes what was written the image's.
fn switch() -> [Step; 3] {
    [Step::Barrier, Step::Switch, Step::Barrier]
}

/// A plan as text, one line a step.
pub fn text(plan: &Plan) -> String {
    let tree = |tree: &Tree| match tree {
        Tree::Active => "active".to_owned(),
        Tree::Snapshot(index) => index.to_string(),
    };
    let shown = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    let record = |record: &Record| match record {
        Record::Keep { index, rename: None } => format!(" {index}"),
        Record::Keep { index, rename: Some(name) } => format!(" {index}={}", shown(name)),
        Record::New(new) => format!(" +{}", shown(&new.id)),
    };
    let line = |step: &Step| match step {
        Step::CheckReferences(t) => format!("check-references {}", tree(t)),
        Step::Fork => "fork".to_owned(),
        Step::Share(t) => format!("share {}", tree(t)),
        Step::Drop(t) => format!("drop {}", tree(t)),
        Step::RestoreCopied => "restore-copied".to_owned(),
        Step::Barrier => "barrier".to_owned(),
        Step::WriteTable(records) => {
            format!("write-table{}", records.iter().map(record).collect::<String>())
        }
        Step::Switch => "switch".to_owned(),
        Step::Free => "free".to_owned(),
    };
    plan.steps.iter().map(|step| line(step) + "\n").collect()
}

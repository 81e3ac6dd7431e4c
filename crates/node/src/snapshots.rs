//! Snapshot plans: made in TypeScript, executed by the engine.

use napi::bindgen_prelude::{Either, Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::format::SnapshotRecord;
use qcow2_engine::maintenance::{NewSnapshot, Plan, Record, Step, Tree};
use qcow2_engine::{Error, ErrorKind, Image, LayerExt, Qcow2, Result};

use crate::runtime::Runtime;
use crate::text::Text;

/// The table that a plan is made for.
#[napi(object, object_from_js = false)]
pub struct Table {
    /// Changes with every change of the table.
    pub generation: f64,
    /// The snapshots, in order.
    pub records: Vec<TableRecord>,
}

/// One snapshot of a table.
#[napi(object, object_from_js = false)]
pub struct TableRecord {
    /// Unique id.
    pub id: Text,
    /// Name.
    pub name: Text,
}

/// A plan: see `src/snapshot/types.ts`.
#[napi(object, object_to_js = false)]
pub struct PlanInput {
    /// Generation of the table it was made for.
    pub generation: f64,
    /// The steps.
    pub steps: Vec<StepInput>,
}

/// One step.
#[napi(object, object_to_js = false)]
pub struct StepInput {
    /// Its name.
    pub op: String,
    /// A tree, by name or by index.
    pub tree: Option<Either<String, u32>>,
    /// Entries of a new table.
    pub entries: Option<Vec<EntryInput>>,
}

/// One entry of a new table.
#[napi(object, object_to_js = false)]
pub struct EntryInput {
    /// Index of an old entry.
    pub keep: Option<u32>,
    /// Its new name.
    pub rename: Option<Text>,
    /// A new entry.
    pub create: Option<CreateInput>,
}

/// A snapshot to add.
#[napi(object, object_to_js = false)]
pub struct CreateInput {
    /// Unique id.
    pub id: Text,
    /// Name.
    pub name: Text,
    /// Seconds since 1970.
    pub date_sec: f64,
    /// Nanoseconds.
    pub date_nsec: f64,
}

/// Tells the snapshot table of an image: `{ generation, records }`.
#[napi(catch_unwind)]
pub fn snapshot_table(env: Env, request: u32, image: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let work = move || {
        handle.run(|image| {
            let top = top(image)?;
            Ok(Table { generation: top.generation() as f64, records: records(top) })
        })
    };
    runtime.run(&env, request, work, |_, env, table| {
        // SAFETY: on the environment's thread, with its own env.
        unsafe { Table::to_napi_value(env.raw(), table) }
    })
}

/// Tells the snapshots of a layer, as `snapshot_table` does those of an image.
#[napi(catch_unwind)]
pub fn layer_snapshots(env: Env, request: u32, layer: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let found = runtime.with_layer(layer, |layer| layer.as_qcow2().map(records).unwrap_or_default())?;
    runtime.run(
        &env,
        request,
        move || Ok(found),
        |_, env, found| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Vec::to_napi_value(env.raw(), found) }
        },
    )
}

fn records(qcow2: &Qcow2) -> Vec<TableRecord> {
    let record = |r: &SnapshotRecord| TableRecord { id: r.id_text().into(), name: r.name_text().into() };
    qcow2.snapshots().iter().map(record).collect()
}

/// Executes a plan on an image that is open for writing; tells the disk's size afterwards.
#[napi(catch_unwind)]
pub fn execute_plan(
    env: Env,
    request: u32,
    image: u32,
    plan: PlanInput,
    watch: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let job = runtime.watched().begin(watch).unwrap_or_default();
    let work = move || {
        let plan = plan.read()?;
        handle.run(|image| {
            job.during(|| image.execute_as(&job, &plan))?;
            Ok(image.virtual_size() as f64)
        })
    };
    runtime.run(&env, request, work, |_, env, size| {
        // SAFETY: on the environment's thread, with its own env.
        unsafe { f64::to_napi_value(env.raw(), size) }
    })
}

fn top(image: &Image) -> Result<&Qcow2> {
    let top = image.top_qcow2();
    top.ok_or_else(|| Error::new(ErrorKind::UnsupportedFeature, "a raw image has no internal snapshots"))
}

impl PlanInput {
    fn read(self) -> Result<Plan> {
        let steps = self.steps.into_iter().map(StepInput::read).collect::<Result<_>>()?;
        Ok(Plan { generation: self.generation as u64, steps })
    }
}

impl StepInput {
    fn read(self) -> Result<Step> {
        let tree = |tree: Option<Either<String, u32>>| match tree {
            Some(Either::A(name)) if name == "active" => Ok(Tree::Active),
            Some(Either::B(index)) => Ok(Tree::Snapshot(index as usize)),
            _ => Err(unknown("a step without a tree")),
        };
        Ok(match self.op.as_str() {
            "check-references" => Step::CheckReferences(tree(self.tree)?),
            "fork" => Step::Fork,
            "share" => Step::Share(tree(self.tree)?),
            "drop" => Step::Drop(tree(self.tree)?),
            "restore-copied" => Step::RestoreCopied,
            "write-table" => {
                let entries = self.entries.ok_or_else(|| unknown("a table without entries"))?;
                Step::WriteTable(entries.into_iter().map(EntryInput::read).collect::<Result<_>>()?)
            }
            "barrier" => Step::Barrier,
            "switch" => Step::Switch,
            "free" => Step::Free,
            other => return Err(unknown(&format!("the step '{other}'"))),
        })
    }
}

impl EntryInput {
    fn read(self) -> Result<Record> {
        match (self.keep, self.create) {
            (Some(index), None) => {
                Ok(Record::Keep { index: index as usize, rename: self.rename.map(Text::into_bytes) })
            }
            (None, Some(new)) => Ok(Record::New(NewSnapshot {
                id: new.id.into_bytes(),
                name: new.name.into_bytes(),
                date_sec: new.date_sec as u32,
                date_nsec: new.date_nsec as u32,
                vm_clock_nsec: 0,
                vm_state_size: 0,
                // As qemu-img has it.
                icount: Some(0),
            })),
            _ => Err(unknown("a table entry that is neither old nor new")),
        }
    }
}

fn unknown(what: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("the plan has {what}, which the engine does not know"))
}

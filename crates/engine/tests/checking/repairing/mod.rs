//! Checking and repairing image files, and what their disks read as before and after.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::check::{CheckOptions, CheckReport, Finding, FindingCode, Repair, Severity, check, repair};
use qcow2_engine::image::read_header_for_check;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, Image, Job, MemMut, OpenOptions, Qcow2, Result, Storage};
use qcow2_testkit::Sparse;
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::recorder::RecordingStorage;

pub(crate) fn look(storage: &dyn Storage) -> Result<CheckReport> {
    check(storage, &read_header_for_check(storage)?, &CheckOptions::default(), &Job::new())
}

pub(crate) fn fix(storage: &dyn Storage, what: Repair) -> Result<CheckReport> {
    repair(storage, what, &CheckOptions::default(), &Job::new())
}

pub(crate) fn open(path: &Path) -> FileStorage {
    FileStorage::open(path, Access::ReadWrite).unwrap()
}

/// What the active disk and every snapshot read as; errors for those that cannot be read.
pub(crate) fn disks(storage: &Arc<dyn Storage>, data: Option<&Path>) -> Vec<Result<Vec<u8>>> {
    let Ok(image) = Qcow2::open(storage.clone(), &OpenOptions::default()) else {
        return vec![Err(qcow2_engine::Error::new(ErrorKind::Corrupt, "cannot be opened"))];
    };
    let ids =
        image.snapshots().iter().map(|s| Some(String::from_utf8_lossy(s.id_text()).into_owned())).collect();
    [vec![None], ids]
        .concat()
        .into_iter()
        .map(|snapshot| {
            let options = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
            let mut layer = Qcow2::open(storage.clone(), &options)?;
            if let Some(data) = data {
                layer.set_data_file(Arc::new(FileStorage::open(data, Access::ReadOnly)?));
            }
            let image = Image::new(vec![Box::new(layer)])?;
            let size = image.layers()[0].virtual_size();
            let mut bytes = vec![0; size.min(64 << 20) as usize];
            image.read_at(MemMut::from(&mut bytes[..]), 0)?;
            Ok(bytes)
        })
        .collect()
}

pub(crate) fn disks_of(path: &Path) -> Vec<Result<Vec<u8>>> {
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    let data = path.with_extension("data");
    disks(&storage, data.exists().then_some(&*data))
}

/// The active disk reads as before, and every snapshot that could be read is still there, in its order: a repair may give
/// up others.
#[track_caller]
pub(crate) fn assert_kept(before: &[Result<Vec<u8>>], after: &[Result<Vec<u8>>], what: &str) {
    let mut next = 0;
    for (i, old) in before.iter().enumerate() {
        let Ok(old) = old else { continue };
        // Only the active disk has its place.
        let last = if i == 0 { 1 } else { after.len() };
        let found = (next..last).find(|&j| matches!(&after[j], Ok(new) if new == old));
        let Some(found) = found else {
            let differ = |new: &Vec<u8>| old.iter().zip(new).position(|(old, new)| old != new);
            let now: Vec<_> =
                after.iter().map(|new| new.as_ref().map(differ).map_err(ToString::to_string)).collect();
            panic!("{what}: disk {i} is not there any more; disks differ from it at {now:x?}");
        };
        next = found + 1;
    }
}

/// Repairs `file` and cuts the power everywhere: each state reads as before, is not worse, and can be repaired.
pub(crate) fn crash(file: &Sparse, what: &str) -> u32 {
    let (mut session, storages) = Session::new(vec![file.clone()], Durability::Flush);
    let storage: Arc<dyn Storage> = storages[0].clone();
    let before = disks(&storage, None);
    let found = look(&*storage).unwrap();
    fix(&*storage, Repair::All).unwrap();
    let mut count = 0;
    for state in session.states(7, 60) {
        let storage: Arc<dyn Storage> = Arc::new(RecordingStorage::plain(state.files[0].clone()));
        let text = format!("{what}: cut {} {:?}", state.cut, state.shape);
        assert_kept(&before, &disks(&storage, None), &text);
        let then = look(&*storage).unwrap();
        // While flags and refcounts change, the same damage can count in another place; never is there more of it.
        let lost = |r: &CheckReport| {
            let real = |f: &&Finding| {
                f.severity == Severity::Corruption
                    && !matches!(f.code, FindingCode::L1Copied | FindingCode::L2Copied)
            };
            r.findings.iter().filter(real).count()
        };
        assert!(lost(&then) <= lost(&found), "{text}\n{found:#?}\n{then:#?}");
        fix(&*storage, Repair::All).unwrap();
        let left = look(&*storage).unwrap();
        assert!(left.is_clean(), "{text}\n{then:#?}\n{left:#?}");
        assert_kept(&before, &disks(&storage, None), &text);
        count += 1;
    }
    count
}

//! What has its name for good: power cuts while a file gets it, simulated, and behind it, on real file systems.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, NewTarget};
use qcow2_engine::storage::naming::{Place, give_name};
use qcow2_engine::storage::{MemoryStorage, NewFile, Overwrite};
use qcow2_engine::{Image, Job, Mem, OpenOptions, Qcow2, Raw, StorageExt};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::folder::{Folder, Names};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Sparse, skipped};

const SIZE: usize = 1 << 20;

fn disk() -> Vec<u8> {
    (0..SIZE).map(|at| if at % 3000 < 1000 { 0 } else { (at / 7) as u8 | 1 }).collect()
}

/// Whether the file is an image of the disk; `None` if it is none.
fn whole(file: &Sparse) -> Option<bool> {
    let qcow2 = Qcow2::open(Arc::new(RecordingStorage::plain(file.clone())), &OpenOptions::default()).ok()?;
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let mut bytes = vec![0; SIZE];
    Some(image.read_at((&mut bytes[..]).into(), 0).is_ok() && bytes == disk())
}

const OLD: u64 = 1;
const NEW: u64 = 2;

/// Converts into a file and names it; gives what is wrong with the states that power cuts leave.
fn play(place: Place, forgetful: bool, durable: bool) -> Vec<String> {
    let before = match place {
        Place::Unnamed => Names::default(),
        Place::UnnamedOver => Names { target: OLD, hidden: 0 },
        Place::Beside => Names { target: OLD, hidden: NEW },
        Place::Named | Place::InPlace => Names { target: NEW, hidden: 0 },
    };
    let mut old = Sparse::new(512);
    old.put_u64(0, 7);
    let files = vec![before.to_file(), old, Sparse::new(0)];
    let (mut session, storages) = Session::new(files, Durability::Flush);
    let [names, _, file] = storages.try_into().unwrap();
    let source = Image::new(vec![Box::new(Raw::new(Arc::new(MemoryStorage::from_bytes(&disk()))).unwrap())]);
    let visible = matches!(place, Place::Named | Place::InPlace);
    let target = ConvertTarget::New(NewTarget::Qcow2 {
        storage: file.clone(),
        data_file: None,
        create: Box::new(CreateOptions { cluster_size: 4096, ..CreateOptions::default() }),
    });
    let options = ConvertOptions { durable: durable && visible, ..ConvertOptions::default() };
    convert(&source.unwrap(), target, &options, &Job::new()).unwrap();
    give_name(&mut Folder { names, file, number: NEW, forgetful }, place, durable).unwrap();

    let states: Vec<_> = session.states(11, 300).collect();
    let end = states.iter().map(|state| state.cut).max().unwrap();
    let mut wrong = Vec::new();
    for state in states {
        let target = Names::of(&state.files[0]).target;
        let fine = match target {
            // Until it is said to be there, what was there, or nothing, or all of it.
            NEW if state.cut == end || !(forgetful || visible) => whole(&state.files[2]) == Some(true),
            NEW => forgetful || whole(&state.files[2]) != Some(false),
            other => state.cut < end && other == before.target,
        };
        if !fine {
            wrong.push(format!("{place:?}: cut {} of {end}, {:?}: name of {target}", state.cut, state.shape));
        }
    }
    wrong
}

#[test]
fn a_power_cut_leaves_the_old_file_or_all_of_the_new_one() {
    for place in [Place::Unnamed, Place::UnnamedOver, Place::Beside, Place::Named, Place::InPlace] {
        for forgetful in [false, true] {
            let wrong = play(place, forgetful, true);
            assert!(wrong.is_empty(), "forgetful {forgetful}: {wrong:#?}");
        }
        // The simulator sees what is missing.
        assert!(!play(place, false, false).is_empty(), "{place:?}");
    }
}

/// A mounted file system; it goes when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(file: &Path, at: PathBuf, options: &str) -> Result<Self, String> {
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(["-o", options]).arg(file).arg(&at)).map(|()| Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _unmounted = Command::new("umount").arg(&self.0).status();
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// Makes a file, new or over another one; gives what a power cut right behind that leaves of it.
fn cut(dir: &Path, system: &str, over: bool) -> Result<Option<Vec<u8>>, String> {
    let (file, copy) = (dir.join("disk"), dir.join("cut"));
    fs::File::create(&file).unwrap().set_len(400 << 20).unwrap();
    run(Command::new(format!("mkfs.{system}")).arg("-q").arg(&file))?;
    {
        let mounted = Mounted::new(&file, dir.join("mounted"), "loop")?;
        let target = mounted.0.join("target");
        if over {
            fs::write(&target, b"old").unwrap();
        }
        run(Command::new("sync").arg("-f").arg(&mounted.0))?;
        let new = NewFile::create(&target, Overwrite::Replace, &[]).unwrap();
        new.storage().write_all_at(Mem::from(&disk()[..]), 0).unwrap();
        new.commit().unwrap();
        // What the disk has by now, and not what the file system still holds in memory.
        run(Command::new("cp").arg("--sparse=always").arg(&file).arg(&copy))?;
    }
    let options = if system == "xfs" { "loop,nouuid" } else { "loop" };
    let after = Mounted::new(&copy, dir.join("after"), options)?;
    let found = fs::read(after.0.join("target")).ok();
    drop(after);
    fs::remove_file(file).and_then(|()| fs::remove_file(copy)).unwrap();
    Ok(found)
}

#[test]
fn what_was_committed_outlives_a_power_cut() {
    for system in ["ext4", "xfs", "btrfs"] {
        for over in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            match cut(dir.path(), system, over) {
                Ok(found) => {
                    assert!(found == Some(disk()), "{system}, over {over}: {:?}", found.map(|f| f.len()))
                }
                Err(why) => skipped(format!("{system}: {why}")),
            }
        }
    }
}

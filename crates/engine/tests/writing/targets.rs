//! Targets that exist: what is kept of them, what is written in place, and what is neither.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2_engine::storage::{Access, CacheMode, FileStorage, Identity, NewFile, Overwrite, Room};
use qcow2_engine::{ErrorKind, Mem, ReadStorage, StorageExt};
use qcow2_testkit::skipped;
use rustix::fs::{XattrFlags, getxattr, setxattr};

const CONTENT: &[u8] = b"what the target becomes";

/// A folder that everybody may search.
fn scratch() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn old(path: &Path) -> PathBuf {
    fs::write(path, [7; 5000]).unwrap();
    path.to_owned()
}

fn fill(new: &NewFile) {
    // As every target is begun.
    new.storage().resize(0).unwrap();
    new.storage().write_all_at(Mem::from(CONTENT), 0).unwrap();
}

/// Makes the target; whether it was written in place.
fn replace(path: &Path) -> bool {
    let inode = fs::metadata(path).unwrap().ino();
    let new = NewFile::create(path, Overwrite::Replace, &[]).unwrap();
    fill(&new);
    new.commit().unwrap();
    assert_eq!(fs::read(path).unwrap(), CONTENT, "{path:?}");
    fs::metadata(path).unwrap().ino() == inode
}

fn is_root() -> bool {
    let root = rustix_euid() == 0;
    if !root {
        skipped("needs root");
    }
    root
}

fn rustix_euid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Runs `work` in a thread for which the file system sees a user without rights.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: both calls take a number, and concern this thread alone.
            unsafe {
                libc::setfsgid(65534);
                libc::setfsuid(65534);
            }
            work()
        });
        thread.join().unwrap()
    })
}

/// A POSIX access list: owner and others as given, and user 4321 to read.
fn access_list(owner: u16, other: u16) -> Vec<u8> {
    let none = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(1, owner, none), (2, 4, 4321), (4, 4, none), (0x10, 6, none), (0x20, other, none)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = getxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

#[test]
fn a_file_that_is_replaced_keeps_what_it_has_beside_its_bytes() {
    let dir = scratch();
    let path = old(&dir.path().join("disk"));
    let set = |path: &Path, name: &str, value: &[u8]| {
        setxattr(path, name, value, XattrFlags::empty()).map_err(|e| skipped(format!("{name}: {e}"))).is_ok()
    };
    let mut kept = vec![("user.note", b"by hand".to_vec()), ("system.posix_acl_access", access_list(6, 4))];
    if is_root() {
        chown(&path, Some(1234), Some(2345)).unwrap();
        kept.push(("trusted.note", b"by root".to_vec()));
        kept.push(("security.note", b"a label".to_vec()));
    }
    kept.retain(|(name, value)| set(&path, name, value));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let wanted: Vec<_> = kept.iter().map(|(name, _)| attribute(&path, name)).collect();
    assert!(wanted.iter().all(Option::is_some));
    let before = fs::metadata(&path).unwrap();
    assert!(!replace(&path));
    let after = fs::metadata(&path).unwrap();
    let of = |m: &fs::Metadata| (m.uid(), m.gid(), m.mode());
    assert_eq!(of(&before), of(&after));
    let found: Vec<_> = kept.iter().map(|(name, _)| attribute(&path, name)).collect();
    assert_eq!(found, wanted);

    // A list that the folder gives to new files is not the old file's.
    let path = old(&dir.path().join("plain"));
    if set(dir.path(), "system.posix_acl_default", &access_list(7, 7)) {
        assert!(!replace(&path));
        assert_eq!(attribute(&path, "system.posix_acl_access"), None);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    }
}

#[test]
fn a_file_with_several_names_stays_one() {
    let dir = scratch();
    let path = old(&dir.path().join("disk"));
    let other = dir.path().join("other");
    fs::hard_link(&path, &other).unwrap();
    assert!(replace(&path));
    assert_eq!(fs::read(&other).unwrap(), CONTENT);
    // Given up before anything was written, it has what it had.
    drop(NewFile::create(&path, Overwrite::Replace, &[]).unwrap());
    assert_eq!(fs::read(&other).unwrap(), CONTENT);
}

#[test]
fn a_mount_point_is_written_in_place() {
    let dir = scratch();
    let (inside, outside) = (old(&dir.path().join("inside")), old(&dir.path().join("outside")));
    let bound = Command::new("mount").arg("--bind").arg(&outside).arg(&inside).output();
    if !bound.as_ref().is_ok_and(|out| out.status.success()) {
        return skipped(format!("mount --bind: {bound:?}"));
    }
    let in_place = std::panic::catch_unwind(|| replace(&inside));
    assert!(Command::new("umount").arg(&inside).status().unwrap().success());
    assert!(in_place.unwrap());
    assert_eq!(fs::read(&outside).unwrap(), CONTENT);
    assert_eq!(fs::read(&inside).unwrap(), [7; 5000]);
}

#[test]
fn where_a_user_may_not_replace_the_file_is_written_in_place() {
    if !is_root() {
        return;
    }
    let dir = scratch();
    let make = |name: &str, mode: u32, owner: u32| {
        let folder = dir.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        let path = old(&folder.join("disk"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    };
    // The folder takes no file; the new file cannot have the old one's owner; and where the old one's name stays whoever tries.
    for path in [make("closed", 0o755, 65534), make("open", 0o777, 1234)] {
        let owner = fs::metadata(&path).unwrap().uid();
        assert!(as_nobody(|| replace(&path)), "{path:?}");
        assert_eq!(fs::metadata(&path).unwrap().uid(), owner);
        let entries = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(entries, 1, "{path:?}");
    }
    let free = make("free", 0o777, 65534);
    assert!(!as_nobody(|| replace(&free)));
    let append = make("append", 0o777, 0);
    let folder = append.parent().unwrap();
    match Command::new("chattr").arg("+a").arg(folder).status() {
        Ok(status) if status.success() => {
            let in_place = std::panic::catch_unwind(|| replace(&append));
            assert!(Command::new("chattr").arg("-a").arg(folder).status().unwrap().success());
            assert!(in_place.unwrap());
        }
        other => skipped(format!("chattr +a: {other:?}")),
    }
}

#[test]
fn without_room_for_both_the_file_is_written_in_place() {
    let dir = scratch();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "none"]).arg(dir.path()).output();
    if !mounted.as_ref().is_ok_and(|out| out.status.success()) {
        return skipped(format!("mount -t tmpfs: {mounted:?}"));
    }
    let played = std::panic::catch_unwind(|| {
        let path = dir.path().join("disk");
        fs::write(&path, vec![7; 2 << 20]).unwrap();
        let make = |most: u64, closer: u64| {
            let inode = fs::metadata(&path).unwrap().ino();
            let closer = || Ok(closer);
            let room = Room { most, closer: &closer };
            let new = NewFile::create_with_room(&path, Overwrite::Replace, &[], &room).unwrap();
            let before = fs::metadata(&path).unwrap();
            let own = Identity::of_file(before.dev(), inode);
            before.ino() == inode && new.storage().identity() == Some(own)
        };
        // It fits beside the old one; it does without that; it does not even then.
        assert!(!make(1 << 19, u64::MAX));
        assert!(!make(u64::MAX, 1 << 19));
        assert!(make(u64::MAX, 2 << 20));
        assert!(!make(u64::MAX, 4 << 20));
    });
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    played.unwrap();
}

#[test]
fn the_longest_names_are_replaced() {
    let dir = scratch();
    for name in ["n".repeat(250), "n".repeat(255), format!("{}z", "ü".repeat(127)), "€".repeat(85)] {
        let path = dir.path().join(&name);
        let new = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap();
        fill(&new);
        new.commit().unwrap();
        assert!(!replace(&path), "{} bytes", name.len());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}

#[test]
fn an_open_file_is_written_through_its_descriptor() {
    let dir = scratch();
    for (name, gone) in [("kept", false), ("gone", true)] {
        let path = old(&dir.path().join(name));
        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        if gone {
            fs::remove_file(&path).unwrap();
        }
        let link = dir.path().join(format!("link to {name}"));
        std::os::unix::fs::symlink(format!("/proc/self/fd/{}", file.as_raw_fd()), &link).unwrap();
        let others = fs::read_dir(dir.path()).unwrap().count();
        for target in [PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd())), link] {
            file.set_len(5000).unwrap();
            let error = NewFile::create(&target, Overwrite::Refuse, &[]).unwrap_err();
            assert_eq!(error.errno(), Some(libc::EEXIST));
            let new = NewFile::create(&target, Overwrite::Replace, &[]).unwrap();
            fill(&new);
            new.commit().unwrap();
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, CONTENT, "{target:?}");
            file.rewind().unwrap();
        }
        assert_eq!(path.exists(), !gone);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), others);
    }
    let error = NewFile::create("/proc/self/fd/9999", Overwrite::Replace, &[]).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT));
}

#[test]
fn a_slash_at_the_end_is_a_folder() {
    let dir = scratch();
    old(&dir.path().join("file"));
    fs::create_dir(dir.path().join("folder")).unwrap();
    for name in ["absent/", "absent//", "file/", "folder/", "folder/.", "absent/.", "nowhere/absent/"] {
        let path = format!("{}/{name}", dir.path().display());
        // The system's answer to the same wish.
        let system = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        for overwrite in [Overwrite::Replace, Overwrite::Refuse] {
            let error = NewFile::create(&path, overwrite, &[]).unwrap_err();
            assert_eq!(error.errno(), system.as_ref().unwrap_err().raw_os_error(), "{name}");
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Runs `work` in a thread that has no /proc; `None` where that cannot be.
fn without_proc<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (none, proc, tmpfs) = (c"none".as_ptr(), c"/proc".as_ptr(), c"tmpfs".as_ptr());
            // SAFETY: the strings end with a null; the mounts are seen by this thread alone.
            let alone = unsafe {
                libc::unshare(libc::CLONE_NEWNS) == 0
                    && libc::mount(
                        none,
                        c"/".as_ptr(),
                        std::ptr::null(),
                        libc::MS_REC | libc::MS_PRIVATE,
                        std::ptr::null(),
                    ) == 0
                    && libc::mount(none, proc, tmpfs, 0, std::ptr::null()) == 0
            };
            if !alone {
                skipped(format!("no namespace without /proc: {}", std::io::Error::last_os_error()));
            }
            alone.then(work)
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_descriptor_that_only_appends_is_opened_anew_or_refused() {
    let dir = scratch();
    let path = old(&dir.path().join("disk"));
    let open = |file: &File, access| {
        FileStorage::from_borrowed_cached(file.as_fd(), Some(access), CacheMode::Writeback)
    };
    let appending = File::options().read(true).append(true).open(&path).unwrap();
    open(&appending, Access::ReadWrite).unwrap().write_all_at(Mem::from(&[9][..]), 0).unwrap();
    assert_eq!(fs::read(&path).unwrap()[..2], [9, 7]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
    let writing = File::options().write(true).open(&path).unwrap();
    let error = open(&writing, Access::ReadWrite).unwrap_err();
    assert!(error.message().contains("for writing only"), "{error}");

    without_proc(|| {
        let error = open(&appending, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.message().contains("for appending") && error.message().contains("'r+'"), "{error}");
        open(&appending, Access::ReadOnly).unwrap();
        let both = File::options().read(true).write(true).open(&path).unwrap();
        open(&both, Access::ReadWrite).unwrap().write_all_at(Mem::from(&[8][..]), 0).unwrap();
        assert_eq!(fs::read(&path).unwrap()[..2], [8, 7]);
        // One that bypasses the cache takes whole blocks only.
        match File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path) {
            Ok(direct) => {
                let storage = open(&direct, Access::ReadWrite).unwrap();
                assert!(storage.traits().alignment > 1);
                storage.into_storage().write_all_at(Mem::from(&[6][..]), 1).unwrap();
                assert_eq!(fs::read(&path).unwrap()[..3], [8, 6, 7]);
            }
            Err(e) => skipped(format!("O_DIRECT: {e}")),
        }
        // No file can be linked by its descriptor; targets appear all the same.
        assert!(!replace(&path));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    });
}

//! Files as storage: transfers, holes, kernel copies, and targets that appear only when complete.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
#[cfg(unix)]
use std::os::{
    fd::AsFd,
    unix::fs::{MetadataExt, PermissionsExt, symlink},
};
use std::path::Path;
use std::sync::Arc;

use qcow2_core::forward_storage;
use qcow2_engine::storage::{
    Access, BlockCache, BlockCacheShape, CacheMode, Fetch, Fetched, FileStorage, Identity, MemoryStorage,
    NewFile, Operation, Overwrite, Part, ReadOnly, Run, Tail, Traits,
};
use qcow2_engine::{ErrorKind, Mem, MemMut, ReadStorage, Storage, StorageExt};
use qcow2_testkit::contract::{StorageContract, check_read_only};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{AlignedOnly, CountingStorage, Device, Hooked, Op, ShortIo};
#[cfg(unix)]
use qcow2_testkit::storage::{Fault, FaultStorage};
use qcow2_testkit::{Sparse, skipped};

/// `EEXIST`, as Node has it.
const EXISTS: Option<i32> = Some(if cfg!(windows) { 4075 } else { 17 });

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn read_write(path: &Path) -> FileStorage {
    File::create_new(path).unwrap();
    FileStorage::open(path, Access::ReadWrite).unwrap()
}

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![1; usize::try_from(storage.size().unwrap()).unwrap()];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8 | 1).collect()
}

/// Whole transfers, with errors that say where.
#[test]
fn what_lies_behind_the_end_is_padded_or_an_error() {
    let storage = MemoryStorage::from_bytes(&[1; 130_000]);
    let mut padded = vec![9; 1000];
    storage.read_padded_at(MemMut::from(&mut padded[..]), 129_500).unwrap();
    assert!(padded[..500] == [1; 500] && padded[500..] == [0; 500]);
    let short = storage.read_exact_at(MemMut::from(&mut padded[..]), 129_500).unwrap_err();
    assert_eq!((short.kind(), short.offset()), (ErrorKind::Corrupt, Some(129_500)));
}

/// What only reads, with all else left to the defaults; its operations have names of their own.
#[derive(Debug)]
struct Remote(Vec<u8>);

impl ReadStorage for Remote {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        if offset == 13 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        // As much as one request brings.
        Ok(buf.copy_from(&self.0[start..self.0.len().min(start.saturating_add(1000))]))
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
    fn identity(&self) -> Option<Identity> {
        Some(Identity::new("url", "x:y"))
    }
    fn operation(&self, operation: Operation) -> &'static str {
        if operation == Operation::Read { "GET" } else { operation.system_call() }
    }
}

/// As a file that is written to, with all else left to the defaults.
#[derive(Debug, Default)]
struct Least(MemoryStorage);

impl ReadStorage for Least {
    fn traits(&self) -> Traits {
        Traits { writable: true, ..Traits::default() }
    }
    forward_storage!(0: read_at len);
}

impl Storage for Least {
    forward_storage!(0: write_at set_len sync_data);
}

/// As what is behind a cache of blocks: fetches are answered at once.
#[derive(Debug, Default)]
struct Fetching(MemoryStorage);

impl ReadStorage for Fetching {
    fn traits(&self) -> Traits {
        Traits { writable: true, ..Traits::default() }
    }
    forward_storage!(0: read_at len);
}

impl Storage for Fetching {
    forward_storage!(0: write_at set_len sync_data);
}

impl Fetch for Fetching {
    fn fetch(&self, range: Range<u64>, done: Fetched) -> u64 {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        let got = self.0.read_at(MemMut::from(&mut bytes[..]), range.start);
        done(got.map(|got| Mem::from(&bytes[..got])));
        0
    }
    fn give_up(&self, _: u64) {}
    fn given_up(&self) -> Option<io::Error> {
        None
    }
}

/// Blocks and room for them that the contract's requests do not fit into.
fn cached() -> Arc<dyn Storage> {
    let shape = BlockCacheShape { block: 5000, size: 15_000, ahead: 10_000 };
    Arc::new(BlockCache::new(Arc::new(Fetching::default()), shape))
}

#[test]
fn every_storage_keeps_the_contract() {
    let dir = scratch();
    let memory = || Arc::new(MemoryStorage::new()) as Arc<dyn Storage>;
    let file = |name: &str| {
        let path = dir.path().join(name);
        let _ = fs::remove_file(&path);
        Arc::new(read_write(&path)) as Arc<dyn Storage>
    };
    let direct = || {
        let path = dir.path().join("direct");
        let _ = fs::remove_file(&path);
        File::create_new(&path).unwrap();
        FileStorage::open_cached(&path, Access::ReadWrite, CacheMode::None).map(FileStorage::into_storage)
    };
    let direct_works = direct().is_ok();
    type Make<'a> = &'a dyn Fn() -> Arc<dyn Storage>;
    let kinds: [(&str, Make<'_>); 12] = [
        ("memory", &memory),
        ("cached blocks", &cached),
        ("the least", &|| Arc::new(Least::default())),
        ("file", &|| file("plain")),
        ("file, short transfers", &|| Arc::new(ShortIo::new(file("short"), 4099))),
        ("memory, short transfers", &|| Arc::new(ShortIo::new(memory(), 777))),
        ("aligned requests", &|| Arc::new(AlignedOnly::new(memory(), 512, 512))),
        ("counted", &|| Arc::new(CountingStorage::new(memory()))),
        ("hooked", &|| Arc::new(Hooked::with(memory(), |_: Op, _: Range<u64>| Ok(())))),
        ("recorded", &|| Arc::new(RecordingStorage::plain(Sparse::new(0)))),
        ("device", &|| Device::new(1 << 20)),
        ("the rest of another one", &|| Arc::new(Tail::new(memory(), 5000))),
    ];
    for (name, make) in kinds {
        StorageContract { name, make }.check();
    }
    match direct_works {
        true => StorageContract { name: "direct", make: &|| direct().unwrap() }.check(),
        false => skipped("no direct I/O in the temporary folder"),
    }
}

#[test]
fn a_part_of_a_file_is_a_file_that_refuses_writes() {
    let bytes = pattern(70_000);
    let around = [&[1; 5000][..], &bytes, &[2; 5000]].concat();
    let part = ReadOnly(Part::new(Arc::new(MemoryStorage::from_bytes(&around)), 5000, 70_000));
    check_read_only(&part, &bytes);
    // The host ends inside it, or in front of it.
    for (start, left) in [(5000, 75_000), (79_999, 1), (80_000, 0), (90_000, 0), (u64::MAX, 0)] {
        let part = Part::new(Arc::new(MemoryStorage::from_bytes(&around)), start, u64::MAX);
        assert_eq!(part.len().unwrap(), left);
        assert_eq!(part.read_at(MemMut::from(&mut [0; 4][..]), left).unwrap(), 0);
    }
}

#[test]
fn what_only_reads_is_a_storage_that_refuses_writes() {
    let bytes = pattern(70_000);
    let remote = ReadOnly(Remote(bytes.clone()));
    check_read_only(&remote, &bytes);
    assert_eq!(remote.identity().map(|identity| identity.to_string()).as_deref(), Some("url:x:y"));
    assert_eq!(Identity::from_text("url:x:y"), Identity::new("url", "x:y"));
    let error = remote.read_exact_at(MemMut::from(&mut [0; 4][..]), 13).unwrap_err();
    assert_eq!((error.syscall(), error.is_transient()), (Some("GET"), true));
    let error = remote.write_all_at(Mem::from(&b"x"[..]), 0).unwrap_err();
    assert_eq!((error.syscall(), error.is_transient()), (Some("pwrite"), false));

    let dir = scratch();
    fs::write(dir.path().join("f"), &bytes).unwrap();
    check_read_only(&FileStorage::open(dir.path().join("f"), Access::ReadOnly).unwrap(), &bytes);
}

#[test]
fn holes_are_found() {
    let dir = scratch();
    let path = dir.path().join("a");
    for storage in [Arc::new(read_write(&path)) as Arc<dyn Storage>, Arc::new(MemoryStorage::new())] {
        storage.write_all_at(Mem::from(&[1; 65536][..]), 1 << 20).unwrap();
        storage.resize(4 << 20).unwrap();
        if !cfg!(target_os = "linux") && storage.run_in(0..u64::MAX).unwrap() == Run::new(4 << 20, true) {
            skipped("the file system of the temporary folder tells no holes");
            continue;
        }
        assert_eq!(storage.run_in(0..u64::MAX).unwrap(), Run::new(1 << 20, false));
        assert_eq!(storage.run_in(4096..u64::MAX).unwrap(), Run::new(1 << 20, false));
        assert_eq!(storage.run_in((1 << 20)..u64::MAX).unwrap(), Run::new((1 << 20) + 65536, true));
        assert_eq!(storage.run_in((2 << 20)..u64::MAX).unwrap(), Run::new(4 << 20, false));
        assert_eq!(storage.run_in((4 << 20)..u64::MAX).unwrap(), Run::new(u64::MAX, false));
        assert!(storage.allocated_bytes().unwrap() < 1 << 20);
        storage.discard(1 << 20, 65536).unwrap();
        assert_eq!(storage.run_in(0..u64::MAX).unwrap(), Run::new(4 << 20, false));
    }
}

/// Also where holes cannot be told from data.
#[test]
fn what_is_reserved_has_space_and_reads_as_before() {
    let dir = scratch();
    let storage = read_write(&dir.path().join("a"));
    storage.write_all_at(Mem::from(&[1; 4096][..]), 1 << 20).unwrap();
    storage.resize(2 << 20).unwrap();
    storage.reserve(1 << 20, 3 << 20).unwrap();
    let bytes = bytes_of(&storage);
    assert_eq!(bytes.len(), 4 << 20);
    assert_eq!(bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>(), 4096);
    assert!(bytes[1 << 20..][..4096].iter().all(|&byte| byte == 1));
    // What lay in front of the range may have none, and where no holes are told, the hole behind the data as well.
    let space = if cfg!(target_os = "linux") { 3 << 20 } else { 2 << 20 };
    assert!(storage.allocated_bytes().unwrap() >= space, "{:?}", storage.allocated_bytes());
}

#[test]
fn space_is_shared_or_the_answer_is_unsupported() {
    let dir = scratch();
    let from = read_write(&dir.path().join("from"));
    let to = CountingStorage::new(Arc::new(read_write(&dir.path().join("to"))));
    let data = pattern(1 << 20);
    from.write_all_at(Mem::from(&data[..]), 0).unwrap();
    match to.clone_range(&from, 0, 0, 1 << 20) {
        Ok(()) => assert!(bytes_of(&to) == data),
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::Unsupported),
    }
    let memory = MemoryStorage::new();
    let none = to.clone_range(&memory, 0, 0, 1).unwrap_err();
    assert_eq!(none.kind(), std::io::ErrorKind::Unsupported);
}

#[cfg(unix)]
#[test]
fn what_is_no_disk_is_refused_at_once() {
    let dir = scratch();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = FileStorage::open(&fifo, access).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("a FIFO"), "{error}");
        let error = FileStorage::open(dir.path(), access).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(21)));
        assert_eq!(error.path(), Some(dir.path()));
    }
    let error = FileStorage::open("/dev/null", Access::ReadOnly).unwrap_err();
    assert!(error.to_string().contains("a character device"), "{error}");
    let error = FileStorage::open(dir.path().join("absent"), Access::ReadOnly).unwrap_err();
    assert_eq!((error.errno(), error.syscall()), (Some(2), Some("open")));
    let error = NewFile::create(&fifo, Overwrite::Replace, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[cfg(unix)]
#[test]
fn a_borrowed_descriptor_keeps_its_cursor() {
    use std::io::{Read, Seek};
    let dir = scratch();
    fs::write(dir.path().join("f"), b"0123456789").unwrap();
    let mut owner = File::open(dir.path().join("f")).unwrap();
    owner.read_exact(&mut [0; 3]).unwrap();
    let storage = FileStorage::from_borrowed(owner.as_fd()).unwrap();
    assert!(!storage.traits().writable);
    assert_eq!(storage.run_in(0..u64::MAX).unwrap(), Run::new(10, true));
    assert_eq!(bytes_of(&storage), b"0123456789");
    assert_eq!(owner.stream_position().unwrap(), 3);
    assert_eq!(storage.path().unwrap().file_name().unwrap(), "f");
    drop(owner);
    assert_eq!(bytes_of(&storage), b"0123456789");
    let error = storage.write_all_at(Mem::from(&b"x"[..]), 0).unwrap_err();
    assert_eq!(error.errno(), Some(9));
}

#[cfg(unix)]
#[test]
fn a_borrowed_descriptor_gives_no_more_than_it_has() {
    use qcow2_engine::storage::CacheMode;
    let dir = scratch();
    let path = dir.path().join("f");
    fs::write(&path, b"0123456789").unwrap();
    let cached =
        |file: &File, access| FileStorage::from_borrowed_cached(file.as_fd(), access, CacheMode::Writeback);
    let reading = File::open(&path).unwrap();
    let error = cached(&reading, Some(Access::ReadWrite)).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::ReadOnly, Some(&*path)));
    let writing = File::options().read(true).write(true).open(&path).unwrap();
    assert!(cached(&writing, None).unwrap().traits().writable);
    let less = cached(&writing, Some(Access::ReadOnly)).unwrap();
    assert!(!less.traits().writable);
    assert_eq!(less.write_all_at(Mem::from(&b"x"[..]), 0).unwrap_err().errno(), Some(9));
}

#[test]
fn a_new_file_appears_complete_or_never() {
    let dir = scratch();
    let path = dir.path().join("new");
    let new = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap();
    new.storage().write_all_at(Mem::from(&b"content"[..]), 0).unwrap();
    assert!(!path.exists());
    drop(new);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    let new = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap();
    new.storage().write_all_at(Mem::from(&b"content"[..]), 0).unwrap();
    new.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"content");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let error = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, EXISTS));
}

#[test]
fn a_name_taken_meanwhile_is_not_overwritten() {
    let dir = scratch();
    let path = dir.path().join("new");
    let new = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap();
    fs::write(&path, b"other").unwrap();
    assert_eq!(new.commit().unwrap_err().errno(), EXISTS);
    assert_eq!(fs::read(&path).unwrap(), b"other");
}

/// Whether the one that has it open stands in the way is the system's choice.
#[test]
fn replacing_leaves_the_old_file_or_the_new_one() {
    let dir = scratch();
    let path = dir.path().join("real");
    fs::write(&path, b"old").unwrap();
    let replace = || {
        let new = NewFile::create(&path, Overwrite::Replace, &[]).unwrap();
        new.storage().write_all_at(Mem::from(&b"whole"[..]), 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        new
    };
    drop(replace());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    let reader = File::open(&path).unwrap();
    match replace().commit() {
        Ok(()) => assert_eq!(fs::read(&path).unwrap(), b"whole"),
        Err(e) => {
            if !cfg!(windows) {
                panic!("{e}");
            }
            assert_eq!((e.kind(), e.syscall()), (ErrorKind::Io, Some("rename")));
            assert_eq!(fs::read(&path).unwrap(), b"old");
        }
    }
    drop(reader);
    fs::write(&path, b"old").unwrap();
    replace().commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Windows has a limit of 260 characters for those who do not ask for more.
#[test]
fn a_path_can_be_long() {
    let dir = scratch();
    let folder = (0..8).fold(dir.path().to_owned(), |path, _| path.join("f".repeat(50)));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("disk");
    for overwrite in [Overwrite::Refuse, Overwrite::Replace] {
        let new = NewFile::create(&path, overwrite, &[]).unwrap();
        new.storage().write_all_at(Mem::from(&b"content"[..]), 0).unwrap();
        new.commit().unwrap();
    }
    let opened = FileStorage::open(&path, Access::ReadOnly).unwrap();
    assert_eq!(bytes_of(&opened), b"content");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
}

/// As QEMU for Windows opens an image.
#[cfg(windows)]
#[test]
fn who_shares_nothing_is_who_uses_the_image() {
    use std::os::windows::fs::OpenOptionsExt;
    let dir = scratch();
    let path = dir.path().join("disk");
    fs::write(&path, b"content").unwrap();
    let other = File::options().read(true).write(true).share_mode(1).open(&path).unwrap();
    FileStorage::open(&path, Access::ReadOnly).unwrap();
    for error in [
        FileStorage::open(&path, Access::ReadWrite).unwrap_err(),
        NewFile::create(&path, Overwrite::Replace, &[]).unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.path()), (ErrorKind::Locked, Some(&*path)));
    }
    drop(other);
    FileStorage::open(&path, Access::ReadWrite).unwrap();
}

#[cfg(unix)]
#[test]
fn replacing_is_one_step_and_keeps_permissions() {
    let dir = scratch();
    let path = dir.path().join("real");
    fs::write(&path, b"old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let link = dir.path().join("link");
    symlink("real", &link).unwrap();

    let new = NewFile::create(&link, Overwrite::Replace, &[]).unwrap();
    new.storage().write_all_at(Mem::from(&b"half"[..]), 0).unwrap();
    drop(new);
    assert_eq!(fs::read(&path).unwrap(), b"old");

    let new = NewFile::create(&link, Overwrite::Replace, &[]).unwrap();
    new.storage().write_all_at(Mem::from(&b"whole"[..]), 0).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    new.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn a_source_is_no_target() {
    let dir = scratch();
    let path = dir.path().join("disk");
    fs::write(&path, b"precious").unwrap();
    let hard = dir.path().join("hard");
    fs::hard_link(&path, &hard).unwrap();
    let identity = FileStorage::open(&path, Access::ReadOnly).unwrap().identity().unwrap();
    let error = NewFile::create(&hard, Overwrite::Replace, &[identity]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_loops_refused() {
    let dir = scratch();
    symlink("absent", dir.path().join("dangling")).unwrap();
    let new = NewFile::create(dir.path().join("dangling"), Overwrite::Refuse, &[]).unwrap();
    new.commit().unwrap();
    assert!(dir.path().join("absent").exists());
    symlink("b", dir.path().join("a")).unwrap();
    symlink("a", dir.path().join("b")).unwrap();
    let error = NewFile::create(dir.path().join("a"), Overwrite::Replace, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[cfg(unix)]
#[test]
fn faults_name_call_file_and_offset() {
    let dir = scratch();
    let file: Arc<dyn Storage> = Arc::new(read_write(&dir.path().join("f")));
    let full = FaultStorage::new(file.clone(), Fault::from(Op::Write, 1, 28));
    full.write_all_at(Mem::from(&b"fits"[..]), 0).unwrap();
    let error = full.write_all_at(Mem::from(&b"does not"[..]), 4).unwrap_err();
    assert_eq!((error.errno(), error.syscall(), error.offset()), (Some(28), Some("pwrite"), Some(4)));
    assert_eq!(error.path(), Some(dir.path().join("f").as_path()));
    let broken = FaultStorage::new(file, Fault::nth(1, 5));
    bytes_of(&broken);
    assert_eq!(broken.read_exact_at(MemMut::from(&mut [0; 4][..]), 0).unwrap_err().errno(), Some(5));
    bytes_of(&broken);
    assert_eq!(broken.failed(), 1);
}

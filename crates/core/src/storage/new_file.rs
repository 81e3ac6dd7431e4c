//! A file that is being made: it has its name only when it is complete.
//!
//! Where the file system can, the file has no name until `commit` (`O_TMPFILE`), so that nothing is left of
//! it however the process ends. Elsewhere it is created exclusively and removed on drop: under its name on Linux, beside it on
//! systems that know no files without a name.
//!
//! **A file that exists** is replaced by a rename at `commit` and untouched before, where that is the same to everybody who knows
//! the file. The new one has its owner, group, permissions, access list, security label, other extended attributes and
//! flags. It is written in place instead, and what it held is lost with the first change, where a rename
//! cannot be right: a file with several names (hard links); a mount point; a folder that takes no new file or keeps the old one;
//! attributes that the new file cannot have; a file system without room for both, but for the new one alone; and a name that leads to
//! an open file (`/dev/fd/8`), whatever it is called. Devices are written in place, too, there is no other way.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::naming::{self, Place, Steps};
use super::platform::{self, FileKind};
use super::{Access, Claim, FileStorage, Identity, Locking, ReadStorage, Storage};
use crate::{Error, ErrorKind, Result};

/// What to do about a target that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    /// Refuse with `EEXIST` before anything happens.
    Refuse,
    /// Replace a file, write over a device.
    Replace,
    /// Write into what is there, which must be.
    Keep,
}

/// The space that a new file will take, for one that replaces another.
pub struct Room<'a> {
    /// Bytes that it cannot exceed by much.
    pub most: u64,
    /// A closer bound, in bytes; asked for only where `most` is not free.
    pub closer: &'a dyn Fn() -> Result<u64>,
}

impl Room<'static> {
    /// Next to nothing.
    pub const LITTLE: Self = Self { most: 0, closer: &|| Ok(0) };
}

/// Links that are followed before a path counts as a loop, as the kernel does.
const MAX_LINKS: usize = 40;

/// Characters of the target's name that a hidden name has at most: with the rest it is shorter than file systems allow.
const MOST_OF_NAME: usize = 25;

/// The target of a create or convert. Dropped without `commit`, it never existed; of one that is written in place, what was written
/// stays.
#[derive(Debug)]
pub struct NewFile {
    storage: Arc<FileStorage>,
    /// Final name, behind all symbolic links.
    path: PathBuf,
    finish: Finish,
    /// The file that is replaced, claimed until then: nobody may be using it.
    replaced: Option<FileStorage>,
}

/// What `commit` has to do, and what drop has to undo.
#[derive(Debug)]
enum Finish {
    /// The file has no name: link it.
    Link,
    /// The file has no name, its target has: link it beside and rename.
    LinkOver,
    /// The file was created under its final name.
    Keep,
    /// The file was created under this name beside the target: rename.
    Rename(PathBuf),
    /// As `Rename`, to a name that nothing has.
    RenameNew(PathBuf),
    /// Written in place, or already finished: nothing to do or undo.
    Nothing,
}

/// Where a path leads.
enum Resolved {
    /// To this name, which is no symbolic link.
    Name(PathBuf),
    /// To an open file, by way of this name.
    OpenFile(PathBuf),
}

impl NewFile {
    /// Starts a file at `path`, of next to no size. `in_use` are the identities of files that the job reads: the target must be
    /// none of them.
    ///
    /// # Errors
    /// `Io` with `EEXIST` if the target exists and is not to be replaced, `ENOENT` if one that is to be kept does not, `EISDIR` for a directory, or what
    /// the system reports; `InvalidArgument` for a target that is one of `in_use` or is no disk; `Locked` for one
    /// that another process is using.
    pub fn create(path: impl AsRef<Path>, overwrite: Overwrite, in_use: &[Identity]) -> Result<Self> {
        Self::create_with_room(path, overwrite, in_use, &Room::LITTLE)
    }

    /// As `create`, for a file that takes `room`.
    ///
    /// # Errors
    /// As `create`, and those of `room`.
    pub fn create_with_room(
        path: impl AsRef<Path>,
        overwrite: Overwrite,
        in_use: &[Identity],
        room: &Room<'_>,
    ) -> Result<Self> {
        let given = path.as_ref();
        refuse_folder(given).map_err(|e| Error::io(e, "open").with_path(given))?;
        let resolved = resolve(given).map_err(|e| Error::io(e, "readlink").with_path(given))?;
        let (path, open_file) = match resolved {
            Resolved::Name(path) => (path, false),
            Resolved::OpenFile(path) => (path, true),
        };
        let metadata = match std::fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !open_file && overwrite != Overwrite::Keep => {
                return Self::create_absent(path);
            }
            metadata => metadata.map_err(|e| Error::io(e, "stat").with_path(&path))?,
        };
        let kind = check_existing(&path, &metadata, overwrite, in_use)?;
        // A file that may not be written must not be replaced by way of its directory.
        let storage = FileStorage::open(&path, Access::ReadWrite)?;
        storage.lock(Claim::CREATOR, Locking::Auto)?;
        let renamed = kind == FileKind::Regular && !open_file && overwrite != Overwrite::Keep;
        if let Some((file, finish)) =
            renamed.then(|| start_over(&path, &storage, room)).transpose()?.flatten()
        {
            let mut new = Self::new(file, path, finish)?;
            new.replaced = Some(storage);
            return Ok(new);
        }
        Ok(Self { storage: Arc::new(storage), path, finish: Finish::Nothing, replaced: None })
    }

    fn create_absent(path: PathBuf) -> Result<Self> {
        match platform::open_unnamed(parent(&path)) {
            Ok(file) => Self::new(file, path, Finish::Link),
            Err(e) if e.kind() == io::ErrorKind::Unsupported && platform::HIDES_NEW_FILES => {
                let made = with_sibling(&path, platform::create);
                let (file, beside) = made.map_err(|e| Error::io(e, "open").with_path(&path))?;
                Self::new(file, path, Finish::RenameNew(beside))
            }
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                let file = platform::create(&path).map_err(|e| Error::io(e, "open").with_path(&path))?;
                Self::new(file, path, Finish::Keep)
            }
            Err(e) => Err(Error::io(e, "open").with_path(path)),
        }
    }

    fn new(file: File, path: PathBuf, finish: Finish) -> Result<Self> {
        let storage = Arc::new(FileStorage::from_file(file, Some(path.clone()), true)?);
        Ok(Self { storage, path, finish, replaced: None })
    }

    /// Where the content goes.
    pub fn storage(&self) -> Arc<dyn Storage> {
        self.storage.clone()
    }

    /// The target's name, behind all symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is where `other` goes: two names of one file, or of none that is there yet.
    pub fn is_where(&self, other: &Self) -> bool {
        let identity = |path: &Path| platform::identity_at(path, &std::fs::metadata(path).ok()?);
        let same = |a: &Path, b: &Path| identity(a).is_some_and(|id| identity(b) == Some(id));
        let (a, b) = (self.path(), other.path());
        a == b || same(a, b) || (a.file_name() == b.file_name() && same(parent(a), parent(b)))
    }

    /// Whether others see the content before `commit`: it then should become an image with its last bytes, durably.
    pub fn is_visible(&self) -> bool {
        matches!(self.place(), Place::Named | Place::InPlace)
    }

    fn place(&self) -> Place {
        match self.finish {
            Finish::Link => Place::Unnamed,
            Finish::LinkOver => Place::UnnamedOver,
            Finish::Rename(_) | Finish::RenameNew(_) => Place::Beside,
            Finish::Keep => Place::Named,
            Finish::Nothing => Place::InPlace,
        }
    }

    /// The content is complete: gives the file its name. Returns when both are on stable storage.
    ///
    /// # Errors
    /// `Io`, with `EEXIST` if something took the name meanwhile, and whatever syncing and closing the file report. A new file is then
    /// gone. One that was replaced is as it was, unless it is the sync behind the rename that failed.
    pub fn commit(self) -> Result<()> {
        self.finish(true)
    }

    /// As `commit`, without waiting for stable storage: a power cut can take the file, and what it replaced.
    ///
    /// # Errors
    /// As `commit`.
    pub fn commit_unsynced(self) -> Result<()> {
        self.finish(false)
    }

    fn finish(mut self, durable: bool) -> Result<()> {
        let place = self.place();
        naming::give_name(&mut self, place, durable).map_err(|e| e.with_path(&self.path))?;
        self.finish = Finish::Nothing;
        Ok(())
    }
}

/// `finish` always says what is left to undo.
impl Steps for NewFile {
    fn sync_file(&mut self) -> io::Result<()> {
        platform::sync_all(self.storage.file())
    }

    fn close(&mut self) -> io::Result<()> {
        self.storage.check_close()
    }

    fn link(&mut self) -> io::Result<()> {
        platform::link_unnamed(self.storage.file(), &self.path)?;
        self.finish = Finish::Keep;
        Ok(())
    }

    fn link_beside(&mut self) -> io::Result<()> {
        let link = |sibling: &Path| platform::link_unnamed(self.storage.file(), sibling);
        let ((), sibling) = with_sibling(&self.path, link)?;
        self.finish = Finish::Rename(sibling);
        Ok(())
    }

    fn rename(&mut self) -> io::Result<()> {
        match &self.finish {
            Finish::Rename(beside) => {
                let renamed = std::fs::rename(beside, &self.path);
                match renamed {
                    Err(e) if platform::may_be_open(&e) && self.replaced.take().is_some() => {
                        std::fs::rename(beside, &self.path)?;
                    }
                    renamed => renamed?,
                }
            }
            Finish::RenameNew(beside) => platform::rename_new(beside, &self.path)?,
            Finish::Link | Finish::LinkOver | Finish::Keep | Finish::Nothing => return Ok(()),
        }
        self.finish = Finish::Nothing;
        Ok(())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        platform::sync_folder(parent(&self.path), self.storage.file())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let unfinished = match &self.finish {
            Finish::Keep => &self.path,
            Finish::Rename(beside) | Finish::RenameNew(beside) => beside,
            Finish::Link | Finish::LinkOver | Finish::Nothing => return,
        };
        // The error that led here is the one to report; the file may also be gone already.
        let _removed = std::fs::remove_file(unfinished);
    }
}

/// Whether a file that exists may be a target; what it is.
fn check_existing(
    path: &Path,
    metadata: &Metadata,
    overwrite: Overwrite,
    in_use: &[Identity],
) -> Result<FileKind> {
    let identity =
        platform::identity_at(path, metadata).map(|(device, inode)| Identity::of_file(device, inode));
    if identity.is_some_and(|identity| in_use.contains(&identity)) {
        let message = "the target is also a source of this operation";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
    }
    let kind = platform::kind(metadata);
    if kind == FileKind::Directory {
        return Err(Error::io(platform::is_a_directory(), "open").with_path(path));
    }
    if let FileKind::Other(what) = kind {
        let message = format!("{what}: a target must be a regular file or a block device");
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
    }
    match overwrite {
        Overwrite::Refuse => Err(Error::io(platform::already_exists(), "open").with_path(path)),
        Overwrite::Replace | Overwrite::Keep => Ok(kind),
    }
}

/// Starts the file that takes the place of `old` at `path`; `None` where a rename cannot be right.
fn start_over(path: &Path, old: &FileStorage, room: &Room<'_>) -> Result<Option<(File, Finish)>> {
    let folder = parent(path);
    let replaceable = platform::is_replaceable(old.file(), folder);
    if !replaceable.map_err(|e| Error::io(e, "stat").with_path(path))? || !has_room(old, room)? {
        return Ok(None);
    }
    let started = match platform::open_unnamed(folder) {
        Ok(file) => Ok((file, Finish::LinkOver)),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            with_sibling(path, platform::create).map(|(file, beside)| (file, Finish::Rename(beside)))
        }
        Err(e) => Err(e),
    };
    let (file, finish) = match started {
        Ok(started) => started,
        Err(e) if takes_no_file(&e) => return Ok(None),
        Err(e) => return Err(Error::io(e, "open").with_path(path)),
    };
    if platform::copy_attributes(old.file(), &file).is_ok() {
        return Ok(Some((file, finish)));
    }
    if let Finish::Rename(beside) = finish {
        std::fs::remove_file(&beside).map_err(|e| Error::io(e, "unlink").with_path(beside))?;
    }
    Ok(None)
}

/// Whether the error of a new file is one that an existing file does not meet.
fn takes_no_file(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(
        error.kind(),
        PermissionDenied | ReadOnlyFilesystem | InvalidFilename | StorageFull | QuotaExceeded
    )
}

/// Whether old and new file fit beside each other, or not even the new one alone does: then the old one had better stay.
fn has_room(old: &FileStorage, room: &Room<'_>) -> Result<bool> {
    let Some(free) = platform::free_bytes(old.file()).filter(|&free| free < room.most) else {
        return Ok(true);
    };
    let needed = (room.closer)()?;
    let given_back = old.allocated_bytes().map_err(|e| Error::io(e, "fstat"))?;
    Ok(needed <= free || needed > free.saturating_add(given_back))
}

/// A name with a slash at its end is that of a folder, and one with a dot behind it leads through one; std forgets both.
fn refuse_folder(path: &Path) -> io::Result<()> {
    let separator = |byte: &u8| std::path::is_separator((*byte).into());
    match path.as_os_str().as_encoded_bytes() {
        [.., last] if separator(last) => {
            if !std::fs::metadata(parent(path))?.is_dir() {
                std::fs::metadata(path)?;
            }
            Err(platform::is_a_directory())
        }
        [.., last, b'.'] if separator(last) => std::fs::metadata(path).map(drop),
        _ => Ok(()),
    }
}

/// Where `path` leads behind all symbolic links of its last component, which need not exist.
fn resolve(path: &Path) -> io::Result<Resolved> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::symlink_metadata(&path) {
            Ok(m) if m.file_type().is_symlink() => {
                if platform::is_magic_link(&path)? {
                    return Ok(Resolved::OpenFile(path));
                }
                path = parent(&path).join(std::fs::read_link(&path)?);
            }
            _ => return Ok(Resolved::Name(path)),
        }
    }
    Err(platform::too_many_links())
}

/// The directory of `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file in `folder` that never has a name, or has lost it: it goes with its last descriptor.
pub(super) fn temporary(folder: &Path) -> io::Result<File> {
    match platform::open_unnamed(folder) {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
        opened => return opened,
    }
    let (file, _) = with_sibling(&folder.join("spool"), platform::create_vanishing)?;
    Ok(file)
}

/// Runs `make` with hidden names beside `path` until one was free.
fn with_sibling<T>(path: &Path, mut make: impl FnMut(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let name: String = name.chars().take(MOST_OF_NAME).collect();
    loop {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let sibling = parent(path).join(format!(".{name}.{}-{serial}.part", std::process::id()));
        match make(&sibling) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(value) => return Ok((value, sibling)),
        }
    }
}

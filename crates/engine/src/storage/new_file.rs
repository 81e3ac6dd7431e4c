//! A file that is being made: it has its name only when it is complete.
//!
//! Where the file system can, the file has no name until `commit` (`O_TMPFILE`), so that nothing is left of
//! it however the process ends. Elsewhere it is created exclusively and removed on drop. An existing file is
//! replaced in one step at `commit` and untouched before; a device is written in place, there is no other way.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::platform::{self, FileKind};
use super::{Access, Claim, FileStorage, Locking, Storage};
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

/// Links that are followed before a path counts as a loop, as the kernel does.
const MAX_LINKS: usize = 40;

/// The target of a create or convert. Dropped without `commit`, it never existed.
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
    /// Written in place, or already finished: nothing to do or undo.
    Nothing,
}

impl NewFile {
    /// Starts a file at `path`. `in_use` are the identities of files that the job reads: the target must be
    /// none of them.
    ///
    /// # Errors
    /// `Io` with `EEXIST` if the target exists and is not to be replaced, `ENOENT` if one that is to be kept does not, `EISDIR` for a directory, or what
    /// the system reports; `InvalidArgument` for a target that is one of `in_use` or is no disk; `Locked` for one
    /// that another process is using.
    pub fn create(path: impl AsRef<Path>, overwrite: Overwrite, in_use: &[(u64, u64)]) -> Result<Self> {
        let given = path.as_ref();
        let path = resolve(given).map_err(|e| Error::io(e, "readlink").with_path(given))?;
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && overwrite != Overwrite::Keep => {
                Self::create_absent(path)
            }
            Err(e) => Err(Error::io(e, "stat").with_path(path)),
            Ok(metadata) => {
                if platform::identity(&metadata).is_some_and(|id| in_use.contains(&id)) {
                    let message = "the target is also a source of this operation";
                    return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
                }
                let kind = platform::kind(&metadata);
                if kind == FileKind::Directory {
                    return Err(Error::io(platform::is_a_directory(), "open").with_path(path));
                }
                if let FileKind::Other(what) = kind {
                    let message = format!("{what}: a target must be a regular file or a block device");
                    return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
                }
                if overwrite == Overwrite::Refuse {
                    return Err(Error::io(platform::already_exists(), "open").with_path(path));
                }
                match kind {
                    _ if overwrite == Overwrite::Keep => Self::in_place(path),
                    FileKind::BlockDevice => Self::in_place(path),
                    _ => Self::create_over(path, &metadata),
                }
            }
        }
    }

    fn create_absent(path: PathBuf) -> Result<Self> {
        match platform::open_unnamed(parent(&path)) {
            Ok(file) => Self::new(file, path, Finish::Link),
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                let file = create_exclusive(&path).map_err(|e| Error::io(e, "open").with_path(&path))?;
                Self::new(file, path, Finish::Keep)
            }
            Err(e) => Err(Error::io(e, "open").with_path(path)),
        }
    }

    /// The new file gets the permissions of the one that it replaces.
    fn create_over(path: PathBuf, old: &std::fs::Metadata) -> Result<Self> {
        // A file that may not be written must not be replaced by way of its directory.
        let replaced = FileStorage::open(&path, Access::ReadWrite)?;
        replaced.lock(Claim::CREATOR, Locking::Auto)?;
        let (file, finish) = match platform::open_unnamed(parent(&path)) {
            Ok(file) => (file, Finish::LinkOver),
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                let (file, beside) =
                    create_beside(&path).map_err(|e| Error::io(e, "open").with_path(&path))?;
                (file, Finish::Rename(beside))
            }
            Err(e) => return Err(Error::io(e, "open").with_path(path)),
        };
        let permissions = file.set_permissions(old.permissions());
        let mut new = Self::new(file, path, finish)?;
        new.replaced = Some(replaced);
        permissions.map_err(|e| Error::io(e, "fchmod").with_path(&new.path))?;
        Ok(new)
    }

    fn in_place(path: PathBuf) -> Result<Self> {
        let storage = Arc::new(FileStorage::open(&path, Access::ReadWrite)?);
        storage.lock(Claim::CREATOR, Locking::Auto)?;
        Ok(Self { storage, path, finish: Finish::Nothing, replaced: None })
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

    /// The content is complete: gives the file its name.
    ///
    /// # Errors
    /// `Io`, with `EEXIST` if something took the name meanwhile. The file is then gone.
    pub fn commit(mut self) -> Result<()> {
        let done = match &self.finish {
            Finish::Link => platform::link_unnamed(self.storage.file(), &self.path),
            Finish::LinkOver => with_sibling(&self.path, |sibling| {
                platform::replace_by_link(self.storage.file(), sibling, &self.path)
            })
            .map(drop),
            Finish::Rename(beside) => std::fs::rename(beside, &self.path),
            Finish::Keep | Finish::Nothing => Ok(()),
        };
        let syscall = if matches!(self.finish, Finish::Link) { "link" } else { "rename" };
        done.map_err(|e| Error::io(e, syscall).with_path(&self.path))?;
        self.finish = Finish::Nothing;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let unfinished = match &self.finish {
            Finish::Keep => &self.path,
            Finish::Rename(beside) => beside,
            Finish::Link | Finish::LinkOver | Finish::Nothing => return,
        };
        // The error that led here is the one to report; the file may also be gone already.
        let _removed = std::fs::remove_file(unfinished);
    }
}

/// `path` behind all symbolic links of its last component, which need not exist.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::symlink_metadata(&path) {
            Ok(m) if m.file_type().is_symlink() => path = parent(&path).join(std::fs::read_link(&path)?),
            _ => return Ok(path),
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

fn create_exclusive(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    with_sibling(path, create_exclusive)
}

/// Runs `make` with hidden names beside `path` until one was free.
fn with_sibling<T>(path: &Path, mut make: impl FnMut(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{serial}.part", std::process::id()));
        let sibling = parent(path).join(hidden);
        match make(&sibling) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(value) => return Ok((value, sibling)),
        }
    }
}

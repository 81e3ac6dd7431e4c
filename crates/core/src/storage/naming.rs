//! How a complete file gets its name: in which order, so that a power cut at any moment leaves what was there, or nothing, or
//! the whole file; and that it has its name for good when that has been said.

use std::io;

use crate::{Error, Result};

/// Where the file is, and what lies between it and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It has no name, and nothing has the one that it gets.
    Unnamed,
    /// It has no name; another file has the one that it gets.
    UnnamedOver,
    /// It has a hidden name; another file has the one that it gets.
    Beside,
    /// It has had its name from the beginning.
    Named,
    /// It was there before, and so was its name.
    InPlace,
}

/// The steps. A simulator can stand in for the system.
pub trait Steps {
    /// Makes the file durable (`fsync`).
    fn sync_file(&mut self) -> io::Result<()>;
    /// What the system reports when a descriptor of the file is closed.
    fn close(&mut self) -> io::Result<()>;
    /// Gives the unnamed file its name; `AlreadyExists` if something took it.
    fn link(&mut self) -> io::Result<()>;
    /// Gives the unnamed file a hidden name.
    fn link_beside(&mut self) -> io::Result<()>;
    /// Gives the file with the hidden name the name of the other one, in one step for every observer.
    fn rename(&mut self) -> io::Result<()>;
    /// Makes the names of the folder durable.
    fn sync_folder(&mut self) -> io::Result<()>;
}

/// Gives the file its name, and with `durable` returns when both are on stable storage.
///
/// Content comes before the name: a name that is durable leads to all of it. Behind the name the file is synced once more if it had
/// none: btrfs does nothing for a file without a name. Both syncs of the file cost about as much as one, the other finds nothing to do.
///
/// # Errors
/// `Io`, with the step's call. The file then has its name at most if the error is that of a later sync.
pub fn give_name(steps: &mut dyn Steps, place: Place, durable: bool) -> Result<()> {
    let failed = |syscall| move |e| Error::io(e, syscall);
    if durable {
        steps.sync_file().map_err(failed("fsync"))?;
    }
    steps.close().map_err(failed("close"))?;
    match place {
        Place::Unnamed => steps.link().map_err(failed("link"))?,
        Place::UnnamedOver => {
            steps.link_beside().map_err(failed("link"))?;
            steps.rename().map_err(failed("rename"))?;
        }
        Place::Beside => steps.rename().map_err(failed("rename"))?,
        Place::Named | Place::InPlace => {}
    }
    if durable && matches!(place, Place::Unnamed | Place::UnnamedOver) {
        steps.sync_file().map_err(failed("fsync"))?;
    }
    if durable && place != Place::InPlace {
        steps.sync_folder().map_err(failed("fsync"))?;
    }
    Ok(())
}

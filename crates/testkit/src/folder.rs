//! A folder whose names a power cut can take: a file of a crash session. Its first sector says which file has which name; a
//! change of names is one write inside it, so that none is ever torn, and they reach the disk in any order.

use std::io;
use std::sync::Arc;

use qcow2_engine::storage::naming::Steps;
use qcow2_engine::{Mem, Storage};

use crate::Sparse;
use crate::recorder::RecordingStorage;

/// The file behind each name; 0 for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Names {
    /// Of the target.
    pub target: u64,
    /// Of the hidden name beside it.
    pub hidden: u64,
}

impl Names {
    /// As a folder's file.
    pub fn to_file(self) -> Sparse {
        let mut file = Sparse::new(512);
        file.put_u64(0, self.target);
        file.put_u64(8, self.hidden);
        file
    }

    /// What a folder's file says.
    pub fn of(file: &Sparse) -> Self {
        Self { target: file.u64(0), hidden: file.u64(8) }
    }
}

/// Names one file in a recorded folder.
#[derive(Debug)]
pub struct Folder {
    /// The folder's own file.
    pub names: Arc<RecordingStorage>,
    /// The file that gets a name.
    pub file: Arc<RecordingStorage>,
    /// Its number, which is not 0.
    pub number: u64,
    /// A sync of a file without a name does nothing.
    pub forgetful: bool,
}

impl Folder {
    fn change(&self, change: impl FnOnce(&mut Names)) -> io::Result<()> {
        let mut names = Names::of(&self.names.snapshot());
        change(&mut names);
        let bytes = names.to_file().get(0, 16);
        self.names.write_at(Mem::from(&bytes[..]), 0).map(drop)
    }
}

impl Steps for Folder {
    fn sync_file(&mut self) -> io::Result<()> {
        let Names { target, hidden } = Names::of(&self.names.snapshot());
        let named = target == self.number || hidden == self.number;
        if named || !self.forgetful { self.file.sync_data() } else { Ok(()) }
    }
    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn link(&mut self) -> io::Result<()> {
        self.change(|names| names.target = self.number)
    }
    fn link_beside(&mut self) -> io::Result<()> {
        self.change(|names| names.hidden = self.number)
    }
    fn rename(&mut self) -> io::Result<()> {
        self.change(|names| *names = Names { target: self.number, hidden: 0 })
    }
    fn sync_folder(&mut self) -> io::Result<()> {
        self.names.sync_data()
    }
}

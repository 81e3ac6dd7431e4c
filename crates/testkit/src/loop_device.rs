//! Real block devices, on files; they need root.

use std::path::Path;
use std::process::Command;

/// A loop device on a file. It goes when this is dropped.
#[derive(Debug)]
pub struct LoopDevice(String);

impl LoopDevice {
    /// A device on `file` with sectors of `sector` bytes.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn new(file: &Path, sector: u32) -> Result<Self, String> {
        Self::with(&["--sector-size", &sector.to_string()], file)
    }

    /// As `new`, for reading only.
    ///
    /// # Errors
    /// As `new`.
    pub fn read_only(file: &Path) -> Result<Self, String> {
        Self::with(&["--read-only"], file)
    }

    /// The file is longer or shorter now, and so is the device.
    pub fn follow(&self) {
        let followed = Command::new("losetup").args(["--set-capacity", &self.0]).status();
        assert!(followed.is_ok_and(|status| status.success()), "losetup --set-capacity");
    }

    fn with(options: &[&str], file: &Path) -> Result<Self, String> {
        let out = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output()
            .map_err(|e| format!("losetup: {e}"))?;
        match out.status.success() {
            true => Ok(Self(String::from_utf8_lossy(&out.stdout).trim().to_owned())),
            false => Err(format!("losetup: {}", String::from_utf8_lossy(&out.stderr).trim())),
        }
    }

    /// Path of the device.
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _detached = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

//! How a qcow2 layer is opened.

use std::sync::Arc;

use qcow2_format::Limits;

use crate::door::DataDoor;

/// How to open a qcow2 layer.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Safety limits.
    pub limits: Limits,
    /// Id or name of the internal snapshot to view instead of the active disk.
    pub snapshot: Option<Vec<u8>>,
    /// Most bytes of L2 table slices to cache. Default: enough for the whole disk, at most 32 MiB.
    pub l2_cache_bytes: Option<u64>,
    /// Most bytes of inflated clusters to cache. Default: 16 MiB, but at least four clusters.
    pub inflated_cache_bytes: Option<u64>,
    /// Open an image whose active L1 table is not whole, for a check or to read what can be read: entries that are not
    /// in the file are taken for damaged ones, so that reading what they map is an error of that part of the disk.
    pub salvage: bool,
    /// What stands between the guest's bytes and the file's: guest bytes are the file's without it.
    pub data_door: Option<Arc<dyn DataDoor>>,
    /// Write guest data also where its encryption is weak: legacy AES.
    pub allow_weak: bool,
}

impl OpenOptions {
    /// How another image is opened in the same way: with its active disk, and with a door of its own.
    #[must_use]
    pub fn for_another(&self) -> Self {
        Self { snapshot: None, data_door: None, allow_weak: false, ..self.clone() }
    }
}

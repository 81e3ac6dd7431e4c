//! Where compressed data goes that moves.

use std::collections::HashMap;

use qcow2_format::{CompressedDescriptor, HostOffset};

use crate::Result;
use crate::image::Qcow2;

/// Where compressed data went, and goes next.
pub(super) struct Packing {
    /// Where compressed data behind the bound begins, in order.
    pub(super) starts: Vec<u64>,
    /// New places by old ones, where several tables may refer to them.
    pub(super) moved: HashMap<HostOffset, CompressedDescriptor>,
    pub(super) shared: bool,
    /// Next byte, and the end of the clusters that are taken.
    pub(super) next: Option<(u64, u64)>,
    pub(super) data: Vec<u8>,
    pub(super) cluster: Vec<u8>,
}

impl Packing {
    pub(super) fn new(image: &Qcow2) -> Result<Self> {
        Ok(Self {
            starts: Vec::new(),
            moved: HashMap::new(),
            shared: !image.snapshots().is_empty(),
            next: None,
            data: Vec::new(),
            cluster: vec![0; image.geometry().cluster_len()],
        })
    }
}

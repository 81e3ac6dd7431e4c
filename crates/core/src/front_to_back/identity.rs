//! What an image that stores an identity of its own gets in a stream: one that depends on the disk alone, since a stream is the same in
//! each run.

use std::ops::ControlFlow;

use sha2::{Digest, Sha256};

use super::{Planning, read_padded};
use crate::walk::{Steps, for_each_extent};
use crate::{MemMut, Result};

/// First bytes of the disk that count: boot sectors and partition tables have identities of their own there.
const HEAD: u64 = 1 << 20;

const STEPS: Steps = Steps::growing(1 << 30, 1 << 40, 16 << 10);

impl Planning<'_> {
    /// A UUID, its fields in network byte order, of the disk's size, its map, and its first MiB (RFC 9562, version 8).
    ///
    /// # Errors
    /// What reading the disk gives; `Aborted`.
    pub fn uuid(&self) -> Result<[u8; 16]> {
        let size = self.source.virtual_size();
        let mut hash = Sha256::new();
        hash.update(size.to_be_bytes());
        // Neighbours count as one, however the map lists them.
        let mut run = (0u64, 0u64);
        for_each_extent(self.source, 0..size, STEPS, self.job, |extent| {
            if !extent.zero && extent.start == run.1 {
                run.1 += extent.length;
            } else if !extent.zero {
                hash.update([run.0.to_be_bytes(), run.1.to_be_bytes()].concat());
                run = (extent.start, extent.start + extent.length);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        hash.update([run.0.to_be_bytes(), run.1.to_be_bytes()].concat());
        let mut head = vec![0; HEAD.min(size) as usize];
        read_padded(self.source, MemMut::from(&mut head[..]), 0)?;
        hash.update(&head);
        let mut uuid = [0; 16];
        uuid.iter_mut().zip(hash.finalize()).for_each(|(byte, hashed)| *byte = hashed);
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut uuid;
        *version = *version & 0x0f | 0x80;
        *variant = *variant & 0x3f | 0x80;
        Ok(uuid)
    }
}

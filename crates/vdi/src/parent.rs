//! How a differencing image knows its parent again.

use std::fmt;

use crate::structures::{Header, Uuid};

/// What a child keeps of its parent: its UUIDs, and the size that both disks have. As text, with spaces between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParentId {
    /// Its own UUID.
    pub image: Uuid,
    /// The one of its last change.
    pub last_snap: Uuid,
    /// Bytes of its disk.
    pub size: u64,
}

impl ParentId {
    /// That of the image with this header.
    #[must_use]
    pub fn of(header: &Header) -> Self {
        Self { image: header.uuid_image, last_snap: header.uuid_last_snap, size: header.virtual_size() }
    }

    /// The one of this text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let uuid = |part: Option<&str>| Some(u128::from_str_radix(part?, 16).ok()?.to_be_bytes());
        Some(Self {
            image: uuid(parts.next())?,
            last_snap: uuid(parts.next())?,
            size: parts.next()?.parse().ok()?,
        })
    }
}

impl fmt::Display for ParentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [image, last_snap] = [self.image, self.last_snap].map(u128::from_be_bytes);
        write!(f, "{image:032x} {last_snap:032x} {}", self.size)
    }
}

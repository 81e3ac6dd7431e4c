//! Cache modes: how written data goes to the disk, by QEMU's names.

use std::fmt;

/// How the host caches an image.
///
/// | mode | page cache | a write is durable |
/// |---|---|---|
/// | `writeback` | used | at the next flush |
/// | `none` | bypassed (`O_DIRECT`) | at the next flush |
/// | `writethrough` | used | when it returns |
/// | `directsync` | bypassed (`O_DIRECT`) | when it returns |
/// | `unsafe` | used | never for sure: flushes are ignored, at close too |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Through the page cache; durable at a flush.
    #[default]
    Writeback,
    /// Past the page cache; durable at a flush.
    None,
    /// Through the page cache; every write is followed by a flush.
    Writethrough,
    /// Past the page cache; every write is followed by a flush.
    Directsync,
    /// Through the page cache; flushes do nothing. For images that are thrown away after a crash.
    Unsafe,
}

impl CacheMode {
    /// Every mode.
    pub const ALL: [Self; 5] =
        [Self::Writeback, Self::None, Self::Writethrough, Self::Directsync, Self::Unsafe];

    /// The mode of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether files are opened past the page cache.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether every write is to be followed by a flush of the image. The storage does not do that: the image
    /// flushes once for all the writes that one request made.
    pub fn flushes_every_write(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Whether the storage's `sync_data` does nothing.
    pub fn ignores_flush(self) -> bool {
        self == Self::Unsafe
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for mode in CacheMode::ALL {
            assert_eq!(CacheMode::from_name(mode.name()), Some(mode));
        }
        assert_eq!(CacheMode::from_name("off"), None);
        assert_eq!(CacheMode::default(), CacheMode::Writeback);
    }

    #[test]
    fn each_mode_is_what_its_row_says() {
        let row = |m: CacheMode| (m.is_direct(), m.flushes_every_write(), m.ignores_flush());
        assert_eq!(
            CacheMode::ALL.map(row),
            [
                (false, false, false),
                (true, false, false),
                (false, true, false),
                (true, true, false),
                (false, false, true),
            ]
        );
    }
}

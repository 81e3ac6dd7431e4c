//! What can stand between the guest's bytes and those of the file.

use std::sync::Arc;

use qcow2_engine::storage::{SectorCodec, Sectors};
use qcow2_engine::{DataDoor, Storage};
use qcow2_luks::{CipherSpec, SectorCipher, legacy_aes};

use super::Scrambling;

/// Bytes that are encrypted as a whole.
const SECTOR: u64 = 512;

/// How guest bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Door {
    /// As they are.
    #[default]
    None,
    /// Scrambled, without a key: [`Scrambling`].
    Scrambling,
    /// Encrypted as by default in LUKS: aes-256-xts-plain64, by sectors of the file.
    Xts,
    /// Encrypted as by `crypt_method` 1: by sectors of the guest, with the key [`Door::SECRET`].
    LegacyAes,
}

impl Door {
    /// What opens images behind [`Door::LegacyAes`].
    pub const SECRET: &str = "legacy secret";

    /// Whether something stands there.
    pub fn is_some(self) -> bool {
        self != Self::None
    }

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "plain",
            Self::Scrambling => "door",
            Self::Xts => "xts",
            Self::LegacyAes => "aes",
        }
    }

    /// The door, as options have it.
    pub fn open(self) -> Option<Arc<dyn DataDoor>> {
        match self {
            Self::None => None,
            Self::Scrambling => Scrambling::door(),
            Self::Xts | Self::LegacyAes => {
                Some(Arc::new(Encrypting { codec: self.codec()?, by_guest: self == Self::LegacyAes }))
            }
        }
    }

    fn codec(self) -> Option<Arc<dyn SectorCodec>> {
        let cipher = match self {
            Self::None => return None,
            Self::Scrambling => return Some(Arc::new(Scrambling)),
            // Two keys, which must differ.
            Self::Xts => {
                SectorCipher::new(&CipherSpec::default(), &std::array::from_fn::<u8, 64, _>(|n| n as u8))
            }
            Self::LegacyAes => legacy_aes(Self::SECRET.as_bytes()),
        };
        Some(Arc::new(cipher.expect("a key of the right length")))
    }

    fn sector(self, guest: u64, host: u64) -> u64 {
        let offset = if self == Self::LegacyAes { guest } else { host };
        assert!(offset.is_multiple_of(SECTOR), "whole sectors");
        offset / SECTOR
    }

    /// Turns the guest's bytes at `guest`, whole sectors, into those of the file at `host`.
    pub fn store(self, guest: u64, host: u64, bytes: &mut [u8]) {
        if let Some(codec) = self.codec() {
            codec.encode(self.sector(guest, host), bytes);
        }
    }

    /// As `store`, the other way.
    pub fn read(self, guest: u64, host: u64, bytes: &mut [u8]) {
        if let Some(codec) = self.codec() {
            codec.decode(self.sector(guest, host), bytes);
        }
    }
}

/// A door with a cipher.
#[derive(Debug)]
struct Encrypting {
    codec: Arc<dyn SectorCodec>,
    by_guest: bool,
}

impl DataDoor for Encrypting {
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(host, Arc::clone(&self.codec)))
    }

    fn by_guest(&self) -> Option<&Arc<dyn SectorCodec>> {
        self.by_guest.then_some(&self.codec)
    }
}

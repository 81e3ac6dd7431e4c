//! What a new image can be made with: the options of `qemu-img create -f vmdk`.

use qcow2_core::{ErrorKind, Result, check_limit};

use crate::fields::{SECTOR, invalid};

/// Sectors that the entries of an extent reach.
const MAX_SECTORS: u64 = 1 << 32;
/// The tools' version that QEMU writes.
const TOOLS_VERSION: &str = "2147483647";

/// Of what kind a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Subformat {
    /// One file that grows.
    #[default]
    MonolithicSparse,
    /// A descriptor and one file that is the disk.
    MonolithicFlat,
    /// A descriptor and files of 2 GiB that grow.
    TwoGbMaxExtentSparse,
    /// A descriptor and files of 2 GiB.
    TwoGbMaxExtentFlat,
    /// One file of compressed grains, written once.
    StreamOptimized,
}

impl Subformat {
    /// Every one.
    pub const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
    ];

    /// The one of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|subformat| subformat.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    /// Whether the disk lies in files as it is.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the disk is in files of 2 GiB.
    pub fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the image is one file.
    pub fn is_embedded(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }
}

/// The controller that a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AdapterType {
    /// `ide`
    #[default]
    Ide,
    /// `buslogic`
    BusLogic,
    /// `lsilogic`
    LsiLogic,
    /// `legacyESX`
    LegacyEsx,
}

impl AdapterType {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Ide, Self::BusLogic, Self::LsiLogic, Self::LegacyEsx];

    /// The one of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|adapter| adapter.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::BusLogic => "buslogic",
            Self::LsiLogic => "lsilogic",
            Self::LegacyEsx => "legacyESX",
        }
    }

    /// Heads of the geometry.
    pub fn heads(self) -> u64 {
        if self == Self::Ide { 16 } else { 255 }
    }
}

/// The disk that a new one is made on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// The file name that is stored.
    pub filename: Vec<u8>,
    /// Its CID now.
    pub cid: u32,
}

/// What a new image is made with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// Size of the disk in bytes; it gets whole sectors.
    pub size: u64,
    /// Of what kind it is.
    pub subformat: Subformat,
    /// The controller that a guest sees.
    pub adapter_type: AdapterType,
    /// The version of the virtual hardware. Default: 4.
    pub hardware_version: Option<String>,
    /// The version of the guest tools.
    pub tools_version: Option<String>,
    /// Version 6 of the virtual hardware.
    pub compat6: bool,
    /// Grains of zeroes have entries of their own.
    pub zeroed_grain: bool,
    /// The disk that it is made on.
    pub parent: Option<Parent>,
}

impl CreateOptions {
    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.size.div_ceil(SECTOR)
    }

    /// The version of the virtual hardware that is written.
    pub fn hardware_version(&self) -> &str {
        self.hardware_version.as_deref().unwrap_or(if self.compat6 { "6" } else { "4" })
    }

    /// The version of the guest tools that is written.
    pub fn tools_version(&self) -> &str {
        self.tools_version.as_deref().unwrap_or(TOOLS_VERSION)
    }

    /// Checks what options demand of each other.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse =
            |field, value: &str, reason| Err(invalid(ErrorKind::InvalidArgument, field, value, reason));
        if self.compat6 && self.hardware_version.is_some() {
            return refuse("compat6", "true", "the hardware version is given, too");
        }
        let flat = self.subformat.is_flat();
        if flat && self.parent.is_some() {
            return refuse("backing_file", "of a flat image", "it has all of its disk itself");
        }
        if flat && self.zeroed_grain {
            return refuse("zeroed_grain", "true", "a flat image has no grains");
        }
        for (field, text) in [("hwversion", &self.hardware_version), ("toolsversion", &self.tools_version)] {
            if let Some(text) = text.as_deref().filter(|text| text.contains(['"', '\n', '\r', '\0'])) {
                return refuse(field, &format!("'{text}'"), "it has a quote or a line end in it");
            }
        }
        if let Some(parent) = &self.parent
            && (parent.filename.is_empty()
                || parent.filename.iter().any(|byte| matches!(byte, b'"' | b'\n' | b'\r' | 0)))
        {
            let shown = String::from_utf8_lossy(&parent.filename).into_owned();
            return refuse("backing_file", &format!("'{shown}'"), "a descriptor cannot name such a file");
        }
        if self.subformat.is_embedded() {
            // All of it, and its tables, must be in reach of its entries.
            let most = MAX_SECTORS - MAX_SECTORS / 512;
            return check_limit("size", self.size, most * SECTOR);
        }
        check_limit("size", self.size, i64::MAX as u64)
    }
}

//! New images.

use qcow2_core::blocks::{Blueprint, NewBlocks};
use qcow2_core::space::Preallocation;
use qcow2_core::{Error, ErrorKind, Mem, Result, Storage, StorageExt, random};

use crate::layer::VdiScheme;
use crate::parent::ParentId;
use crate::structures::{HEADER_LENGTH, Header, ImageType};

/// The blueprint of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVdi {
    header: Header,
    preallocation: Preallocation,
}

impl NewVdi {
    /// An image with a disk of `size` bytes. It is static where `is_static` says so, and with every `preallocation`: then all blocks have
    /// their place.
    ///
    /// # Errors
    /// `Limit` for a disk that is too large; `InvalidArgument` for one that is not whole sectors; `Io` without random numbers.
    pub fn new(size: u64, is_static: bool, preallocation: Preallocation) -> Result<NewBlocks<Self>> {
        if !size.is_multiple_of(512) {
            let message = format!("the size of a disk is a multiple of 512 bytes, not {size}");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("size"));
        }
        let is_static = is_static || preallocation != Preallocation::Off;
        let image_type = if is_static { ImageType::Static } else { ImageType::Dynamic };
        let header = Header::new(size, image_type, [random::guid()?, random::guid()?])?;
        Ok(NewBlocks::new(Self { header, preallocation }))
    }

    /// A differencing image with a disk of `size` bytes, the parent's. Its blocks are those of the parent until they are written to.
    ///
    /// # Errors
    /// `InvalidArgument` for another size, and what a child does not have; `Io` without random numbers.
    pub fn child(
        size: u64,
        is_static: bool,
        preallocation: Preallocation,
        parent: ParentId,
    ) -> Result<NewBlocks<Self>> {
        let refuse =
            |field, message: String| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
        if is_static {
            return refuse("static", "a static VDI image has no parent".to_owned());
        }
        if preallocation != Preallocation::Off {
            let message = "what a differencing VDI image takes is not known before it is written to";
            return refuse("preallocation", message.to_owned());
        }
        if size != parent.size {
            let message =
                format!("a differencing VDI image has the size of its parent, {} bytes", parent.size);
            return refuse("size", message);
        }
        let header = Header {
            uuid_link: parent.image,
            uuid_parent: parent.last_snap,
            ..Header::new(size, ImageType::Differencing, [random::guid()?, random::guid()?])?
        };
        Ok(NewBlocks::new(Self { header, preallocation }))
    }
}

impl Blueprint for NewVdi {
    type Scheme = VdiScheme;

    fn scheme(&self) -> VdiScheme {
        VdiScheme::new(self.header.clone())
    }

    fn is_preallocated(&self) -> bool {
        self.header.image_type == ImageType::Static
    }

    fn preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        }
    }

    fn head(&self) -> u64 {
        HEADER_LENGTH as u64
    }

    /// The rest of the header's sector is the number of blocks and the signature: all of it is written at once.
    fn publish(&self, storage: &dyn Storage, end: u64, durable: bool) -> Result<()> {
        let layout = self.header.layout();
        let blocks = u32::try_from((end - layout.origin) / layout.stride()).unwrap_or(u32::MAX);
        let header = Header { blocks_allocated: blocks, ..self.header.clone() };
        let sync = || if durable { storage.flush() } else { Ok(()) };
        sync()?;
        storage.write_all_at(Mem::from(&header.to_bytes()[..]), 0)?;
        sync()
    }
}

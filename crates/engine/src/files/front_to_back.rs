//! New disks as streams.

use qcow2_core::front_to_back::{Flat, FrontToBack, Planning};

use super::NewDisk;
use crate::create::{Preallocation, Streamed};
use crate::{Error, ErrorKind, Result};

impl NewDisk {
    /// Plans the disk's only file for the disk that goes into it.
    ///
    /// # Errors
    /// Those of its format; `InvalidArgument` for what a stream does not have.
    pub fn front_to_back(&self, planning: &Planning<'_>) -> Result<Box<dyn FrontToBack>> {
        let compresses = match self {
            Self::Qcow2 { .. } => true,
            Self::Raw { .. } => false,
            Self::Format(image) => image.compresses(),
        };
        if planning.compression.is_some() && !compresses {
            return refuse("compress", "a stream of this format cannot be compressed");
        }
        match self {
            Self::Raw { preallocation: Preallocation::Off, .. } => Ok(Box::new(Flat::raw(planning)?)),
            Self::Raw { .. } => refuse("preallocation", "a stream has no room that is not used"),
            Self::Qcow2 { create, .. } => Ok(Box::new(Streamed::plan(create, planning)?)),
            Self::Format(image) => image.front_to_back(planning),
        }
    }
}

fn refuse<T>(field: &'static str, message: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field))
}

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
        match self {
            Self::Raw { preallocation: Preallocation::Off, .. } => Ok(Box::new(Flat::raw(planning)?)),
            Self::Raw { .. } => {
                let message = "a stream has no room that is not used";
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("preallocation"))
            }
            Self::Qcow2 { create, .. } => Ok(Box::new(Streamed::plan(create, planning)?)),
            Self::Format(image) => image.front_to_back(planning),
        }
    }
}

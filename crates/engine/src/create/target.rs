//! Where a new disk is made.

use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_core::new_image::Hosts;

use super::{CreateOptions, Preallocation};
use crate::Storage;

/// Where a new disk is made, and as what. What the target held is lost.
#[derive(Debug, Clone)]
pub enum NewTarget {
    /// A raw disk.
    Raw {
        /// File or device.
        storage: Arc<dyn Storage>,
        /// Space to take for a file.
        preallocation: Preallocation,
        /// Keep the file's length and zero it explicitly, as a device's: it must be large enough.
        keep: bool,
    },
    /// A new image of any other format.
    Format {
        /// The image; its size is that of the disk that goes into it.
        image: Arc<dyn NewImage>,
        /// Files or device.
        hosts: Hosts,
    },
    /// A new qcow2 image.
    Qcow2 {
        /// File or device.
        storage: Arc<dyn Storage>,
        /// The external data file that `create` names.
        data_file: Option<Arc<dyn Storage>>,
        /// Options of the image; its size is that of the disk that goes into it.
        create: Box<CreateOptions>,
    },
}

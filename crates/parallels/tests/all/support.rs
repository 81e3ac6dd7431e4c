//! What the tests share.

use std::sync::Arc;

use qcow2_core::{Layer, Result, Storage};
use qcow2_engine::Image;
use qcow2_parallels::structures::Header;
use qcow2_parallels::{NewParallels, OpenOptions};
pub(crate) use qcow2_testkit::disks::{bytes_of, file, memory, noisy as disk, read};
use qcow2_testkit::disks::{image_of, made};

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(qcow2_parallels::open(storage, &OpenOptions::default())?))
}

/// A new image, as bytes.
pub(crate) fn new(size: u64, cluster_size: u64) -> Vec<u8> {
    made(&NewParallels::new(size, cluster_size).unwrap())
}

/// An empty image whose BAT counts sectors, and says nothing of where the data begins.
pub(crate) fn forged(clusters: u32, tracks: u32) -> Vec<u8> {
    let header = Header {
        counts_clusters: false,
        tracks,
        bat_entries: clusters,
        nb_sectors: u64::from(clusters) * u64::from(tracks),
        in_use: 0,
        data_off: 0,
        ext_off: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.resize((header.bat_end() as usize).next_multiple_of(512), 0);
    bytes
}

pub(crate) fn image(storage: Arc<dyn Storage>, write: bool) -> Image {
    image_of(open(storage).unwrap(), write)
}

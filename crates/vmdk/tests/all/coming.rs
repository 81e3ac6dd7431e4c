//! streamOptimized extents that are read while they come: as from a file, and damaged anywhere.

use std::num::NonZeroUsize;
use std::sync::Arc;

use qcow2_core::storage::{Expected, Spool};
use qcow2_core::{ErrorKind, Job, Mem, MemMut, Result, Storage};
use qcow2_engine::convert::ConvertOptions;
use qcow2_testkit::{Fixture, Rng};
use qcow2_vmdk::{CreateOptions, OpenOptions, Subformat, Vmdk};

use crate::new::{convert, raw};
use crate::support::{chain, disk, guest};

const SIZE: usize = 3 << 20;

/// What came, and that was all.
fn came(folder: &std::path::Path, bytes: &[u8]) -> Arc<dyn Storage> {
    let spool = Spool::new(folder, Expected::default(), Arc::new(Job::new())).unwrap();
    spool.append(Mem::from(bytes)).unwrap();
    spool.end();
    Arc::new(spool)
}

/// The disk, to the end of its image.
fn read(storage: Arc<dyn Storage>) -> Result<Vec<u8>> {
    let vmdk = Vmdk::open(storage, &OpenOptions { max_virtual_size: 1 << 30, ..OpenOptions::default() })?;
    let chain = chain(vmdk);
    let mut bytes = vec![1; chain.virtual_size() as usize];
    chain.read_at(MemMut::from(&mut bytes[..]), 0)?;
    chain.layers().iter().try_for_each(|layer| layer.complete())?;
    Ok(bytes)
}

#[test]
fn damage_anywhere_is_an_error_of_the_image_or_a_disk_and_always_an_end() {
    let fixture = Fixture::new();
    let (source, image) = (fixture.path("disk.raw"), fixture.path("disk.vmdk"));
    let whole = disk(5, SIZE);
    std::fs::write(&source, &whole).unwrap();
    let options = CreateOptions {
        size: SIZE as u64,
        subformat: Subformat::StreamOptimized,
        ..CreateOptions::default()
    };
    let how = ConvertOptions { concurrency: NonZeroUsize::new(1), ..ConvertOptions::default() };
    convert(&raw(&source), options, &image, how);
    let bytes = std::fs::read(&image).unwrap();
    let folder = image.parent().unwrap();
    assert!(read(came(folder, &bytes)).unwrap() == whole);
    assert!(guest(&chain(Vmdk::open(came(folder, &bytes), &OpenOptions::default()).unwrap())) == whole);

    // Where markers and structures are: bytes in between are those of deflate.
    let sectors: Vec<usize> = (0..bytes.len()).step_by(512).collect();
    let mut rng = Rng::new(9);
    let mut refused = 0;
    for _ in 0..400 {
        let mut damaged = bytes.clone();
        for _ in 0..=rng.below(2) {
            let sector = sectors[rng.below(sectors.len() as u64) as usize];
            let at = (sector + rng.below(20) as usize).min(bytes.len() - 1);
            damaged[at] = [0, 1, 0x80, 0xff, damaged[at] ^ 4][rng.below(5) as usize];
        }
        if rng.below(4) == 0 {
            damaged.truncate(rng.below(bytes.len() as u64) as usize);
        }
        match read(came(folder, &damaged)) {
            Ok(_) => {}
            Err(error) => {
                refused += 1;
                assert!(!matches!(error.kind(), ErrorKind::Internal | ErrorKind::Aborted), "{error}");
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

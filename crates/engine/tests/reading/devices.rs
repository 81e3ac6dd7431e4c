//! Clones and images on block devices: too small, just large enough, and larger; and what is written there until they
//! are full.

use std::sync::Arc;

use qcow2_engine::clone::CloneTarget;
use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, DataFile, NewTarget, Preallocation};
use qcow2_engine::measure::{MeasureTarget, Qcow2Target, measure};
use qcow2_engine::storage::{Access, CacheMode, FileStorage, MemoryStorage};
use qcow2_engine::{
    Discard, ErrorKind, Image, Job, MemMut, OpenOptions, Qcow2, Raw, ResizeOptions, Storage, StorageExt,
    WriteOptions,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::loop_device::LoopDevice;
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::storage::Device;
use qcow2_testkit::{Rng, Sparse, skipped};

const SIZE: u64 = 4 << 20;

fn options() -> WriteOptions {
    WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }
}

/// A disk with data here and there, and its bytes.
fn source() -> (Image, Vec<u8>) {
    let raw = Raw::new(Arc::new(MemoryStorage::from_bytes(&[0; SIZE as usize]))).unwrap();
    let image = Image::new(vec![Box::new(raw.with_write_options(&options()))]).unwrap();
    let mut rng = Rng::new(7);
    for generation in 0..40 {
        let at = rng.below(SIZE / 512 - 200) * 512;
        image.write(at, &stamped(at, 512 * (1 + rng.below(200)), generation)).unwrap();
    }
    let bytes = read_all(&image);
    (image, bytes)
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> qcow2_engine::Result<Image> {
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default())?;
    if writable {
        qcow2.enable_writing(options())?;
    }
    Image::new(vec![Box::new(qcow2)])
}

fn on(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.size().unwrap() as usize];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

fn clean(storage: &dyn Storage, what: &str) {
    let bytes = on(storage);
    let mut file = Sparse::new(bytes.len() as u64);
    file.write(0, &bytes);
    let findings = audit(&file);
    assert!(findings.is_clean(), "{what}: {findings:#?}");
}

fn layouts() -> Vec<CreateOptions> {
    let sized = |cluster_size| CreateOptions { size: SIZE, cluster_size, ..CreateOptions::default() };
    vec![
        sized(512),
        sized(4096),
        sized(65536),
        CreateOptions { extended_l2: true, ..sized(16384) },
        CreateOptions { refcount_bits: 64, ..sized(1024) },
    ]
}

/// Bytes that an image of the disk takes.
fn required(image: &Image, create: &CreateOptions) -> u64 {
    let target = MeasureTarget::Qcow2(Qcow2Target::from_options(create).unwrap());
    measure(image, &target, &Job::new()).unwrap().required
}

fn clone_to(image: &Image, target: CloneTarget) -> qcow2_engine::Result<()> {
    image.begin_clone(target, &Job::new())?.run(image, None, &Job::new()).map(drop)
}

fn qcow2(storage: &Arc<dyn Storage>, create: &CreateOptions, compress: bool) -> CloneTarget {
    let compression = compress.then(Compression::default);
    CloneTarget {
        disk: NewTarget::Qcow2 {
            storage: storage.clone(),
            data_file: None,
            create: Box::new(create.clone()),
        },
        compression,
    }
}

/// All that is tried on a device of `length` bytes that `device` gives, full of old bytes.
fn clones(device: impl Fn(u64) -> Option<Arc<dyn Storage>>) {
    let (image, bytes) = source();
    for length in [SIZE - 512, SIZE, SIZE + 4096] {
        let Some(storage) = device(length) else { return };
        let before = on(&*storage);
        let target = CloneTarget::from(NewTarget::Raw {
            storage: storage.clone(),
            preallocation: Preallocation::Off,
            keep: false,
        });
        let cloned = clone_to(&image, target);
        let after = on(&*storage);
        if length < SIZE {
            assert_eq!(cloned.unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert!(after == before, "a device that is too small is left alone");
        } else {
            cloned.unwrap();
            assert!(after[..SIZE as usize] == bytes, "a device of {length} bytes");
            assert!(
                after[SIZE as usize..] == before[SIZE as usize..],
                "what is behind the disk is left alone"
            );
        }
    }
    for create in layouts() {
        let exact = required(&image, &create);
        // An image that grows has its refcount blocks where it came to need them, and one table for each.
        for (length, fits) in [(exact / 2, false), (exact, true), (exact + (3 << 20), true)] {
            for compress in [false, true] {
                let what =
                    format!("clusters of {}, {length} bytes, compress {compress}", create.cluster_size);
                let length = length.next_multiple_of(4096);
                let Some(storage) = device(length) else { return };
                match clone_to(&image, qcow2(&storage, &create, compress)) {
                    Ok(()) => {
                        clean(&*storage, &what);
                        let clone = open(storage.clone(), false).unwrap();
                        assert!(read_all(&clone) == bytes, "{what}");
                    }
                    Err(error) => {
                        assert!(!fits, "{what}: {error}");
                        assert!(error.is_no_space(), "{what}: {error}");
                        let error = open(storage.clone(), false).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::InvalidHeader, "{what}: half a clone");
                    }
                }
                let target = ConvertTarget::New(NewTarget::Qcow2 {
                    storage: storage.clone(),
                    data_file: None,
                    create: Box::new(create.clone()),
                });
                let compression = compress.then(Compression::default);
                let options = ConvertOptions { compression, ..ConvertOptions::default() };
                match convert(&image, target, &options, &Job::new()) {
                    Ok(_) => assert!(read_all(&open(storage, false).unwrap()) == bytes, "{what}: converted"),
                    Err(error) => {
                        assert!(!fits && error.is_no_space(), "{what}: converted: {error}");
                        assert!(open(storage, false).is_err(), "{what}: half an image");
                    }
                }
            }
        }
    }
}

#[test]
fn clones_fit_where_they_do() {
    clones(|length| Some(Device::new(length as usize)));
}

/// An image on a device takes what there is room for, and goes on when it is full.
#[test]
fn a_full_device_refuses_what_has_no_room_and_nothing_else() {
    for create in layouts() {
        let what = format!("clusters of {}", create.cluster_size);
        let device = Device::new(2 << 20);
        let storage: Arc<dyn Storage> = device.clone();
        qcow2_engine::create::create(storage.clone(), None, &create, &Job::new()).unwrap();
        let image = open(storage.clone(), true).unwrap();
        let unit = create.cluster_size;
        let mut model = vec![0; SIZE as usize];
        let mut written = 0;
        for at in (0..SIZE).step_by(unit as usize) {
            let bytes = stamped(at, unit, 5);
            match image.write(at, &bytes) {
                Ok(()) => {
                    model[at as usize..(at + unit) as usize].copy_from_slice(&bytes);
                    written += unit;
                }
                Err(error) => assert!(error.is_no_space(), "{what}: {error:?}"),
            }
            if at % (64 * unit) == 0 {
                image.flush().unwrap_or_else(|e| panic!("{what}: {e:?}"));
            }
        }
        assert!(written > (2 << 20) * 8 / 10, "{what}: only {written} bytes were had");
        let error = image.execute(&Table::of(&image).create("1", "full")).unwrap_err();
        assert!(error.is_no_space(), "{what}: {error:?}");
        // What is there can be written, what is given up can be had again.
        image.write(0, &stamped(0, unit, 6)).unwrap();
        model[..unit as usize].copy_from_slice(&stamped(0, unit, 6));
        image.discard(unit, 8 * unit).unwrap();
        model[unit as usize..9 * unit as usize].fill(0);
        image.flush().unwrap();
        image.write(4 * unit, &stamped(4 * unit, 4 * unit, 7)).unwrap();
        model[4 * unit as usize..8 * unit as usize].copy_from_slice(&stamped(4 * unit, 4 * unit, 7));
        assert!(read_all(&image) == model, "{what}");
        image.close().unwrap();
        clean(&*device, &what);
        assert!(read_all(&open(storage, false).unwrap()) == model, "{what}: opened again");
    }
}

#[test]
fn clones_fit_on_real_devices() {
    let devices = std::cell::RefCell::new(Vec::new());
    clones(|length| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0xee; length as usize]).unwrap();
        match LoopDevice::new(file.path(), 512) {
            Ok(device) => {
                let storage =
                    FileStorage::open_cached(device.path(), Access::ReadWrite, CacheMode::None).unwrap();
                let storage = storage.into_storage();
                assert_eq!(storage.size().unwrap(), length);
                // One at a time: the one before is not used any more.
                *devices.borrow_mut() = vec![(device, file)];
                Some(storage)
            }
            Err(why) => {
                skipped(why);
                None
            }
        }
    });
}

/// What a discard gave up is free for the next write, without a flush between.
#[test]
fn a_full_device_takes_again_what_was_just_given_up() {
    for create in layouts() {
        let what = format!("clusters of {}", create.cluster_size);
        let (full, _) = source();
        let target = MeasureTarget::Qcow2(Qcow2Target::from_options(&create).unwrap());
        let length = measure(&full, &target, &Job::new()).unwrap().fully_allocated;
        let storage: Arc<dyn Storage> = Device::new(length as usize);
        qcow2_engine::create::create(storage.clone(), None, &create, &Job::new()).unwrap();
        let image = open(storage.clone(), true).unwrap();
        let mut model = stamped(0, SIZE, 1);
        image.write(0, &model).unwrap();
        image.flush().unwrap();
        image.discard(0, SIZE / 2).unwrap();
        model[..SIZE as usize / 2].fill(0);
        let again = stamped(0, SIZE / 4, 2);
        image.write(0, &again).unwrap_or_else(|e| panic!("{what}: {e}"));
        model[..again.len()].copy_from_slice(&again);
        assert!(read_all(&image) == model, "{what}");
        image.close().unwrap();
        clean(&*storage, &what);
        assert!(read_all(&open(storage, false).unwrap()) == model, "{what}: opened again");
    }
}

/// Thin provisioning: the error says that there is no space, the owner extends the device, and the image goes on.
#[test]
fn a_device_that_grows_is_noticed() {
    let create = CreateOptions { size: SIZE, ..CreateOptions::default() };
    let device = Device::new(2 << 20);
    let storage: Arc<dyn Storage> = device.clone();
    qcow2_engine::create::create(storage.clone(), None, &create, &Job::new()).unwrap();
    let image = open(storage.clone(), true).unwrap();
    let model = stamped(0, SIZE, 3);
    let error = image.write(0, &model).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(28)), "{error}");
    device.extend(8 << 20);
    image.write(0, &model).unwrap();
    assert!(read_all(&image) == model);
    image.close().unwrap();
    clean(&*device, "extended");
}

#[test]
fn a_real_device_that_grows_is_noticed_and_a_read_only_one_is_not_opened_to_write() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xee; 1 << 20]).unwrap();
    let read_only = match LoopDevice::read_only(file.path()) {
        Ok(device) => device,
        Err(why) => return skipped(why),
    };
    let error = FileStorage::open(read_only.path(), Access::ReadWrite).unwrap_err();
    assert_eq!((error.errno(), error.syscall()), (Some(13), Some("open")), "{error}");
    assert!(error.message().contains("the device is read-only"), "{error}");
    FileStorage::open(read_only.path(), Access::ReadOnly).unwrap();
    drop(read_only);
    let device = LoopDevice::new(file.path(), 512).unwrap();
    let storage = FileStorage::open(device.path(), Access::ReadWrite).unwrap();
    assert_eq!(storage.size().unwrap(), 1 << 20);
    assert_eq!(storage.set_len(2 << 20).unwrap_err().raw_os_error(), Some(28));
    file.as_file().set_len(2 << 20).unwrap();
    device.follow();
    assert_eq!(storage.size().unwrap(), 2 << 20);
    storage.set_len(2 << 20).unwrap();
}

/// A raw disk on a device has its length, and what a longer device held there is not the disk's.
#[test]
fn a_device_is_resized_by_its_owner_alone() {
    let device = Device::new(1 << 20);
    let raw = Raw::new(device.clone()).unwrap();
    let image = Image::new(vec![Box::new(raw)]).unwrap();
    let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
    for size in [512, 2 << 20] {
        let error = image.resize_with(size, shrink).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.message().contains("change the device itself"), "{error}");
        assert_eq!(image.virtual_size(), 1 << 20);
    }
    image.resize_with(1 << 20, shrink).unwrap();
    for preallocation in [Preallocation::Off, Preallocation::Falloc, Preallocation::Full] {
        let old = image.virtual_size();
        device.extend(old + (1 << 20));
        image.resize_with(old + (1 << 20), ResizeOptions { shrink: false, preallocation }).unwrap();
        let bytes = read_all(&image);
        assert!(bytes[..1 << 20].iter().all(|&b| b == 0xee), "{preallocation:?}");
        assert!(bytes[old as usize..].iter().all(|&b| b == 0), "{preallocation:?}");
    }
}

/// A data file on a device that was in use: no mode lets the guest read what was there.
#[test]
fn a_data_file_on_a_used_device_reads_as_zeroes() {
    let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (raw, extended_l2, preallocation) in
        [false, true].into_iter().flat_map(|raw| modes.into_iter().map(move |mode| (raw, !raw, mode)))
    {
        let what = format!("raw {raw}, {preallocation:?}");
        let create = CreateOptions {
            size: 1 << 20,
            preallocation,
            extended_l2,
            data_file: Some(DataFile { filename: b"data".to_vec(), raw }),
            ..CreateOptions::default()
        };
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let device = Device::new(4 << 20);
        let data: Arc<dyn Storage> = device.clone();
        qcow2_engine::create::create(file.clone(), Some(data.clone()), &create, &Job::new()).unwrap();
        let open = || {
            let mut qcow2 = Qcow2::open(file.clone(), &OpenOptions::default()).unwrap();
            qcow2.set_data_file(data.clone());
            qcow2.enable_writing(options()).unwrap();
            Image::new(vec![Box::new(qcow2)]).unwrap()
        };
        let image = open();
        assert!(read_all(&image).iter().all(|&b| b == 0), "{what}");
        for mode in modes {
            let size = image.virtual_size() + (512 << 10);
            image.resize_with(size, ResizeOptions { shrink: false, preallocation: mode }).unwrap();
            assert!(read_all(&image).iter().all(|&b| b == 0), "{what}, grown with {mode:?}");
        }
        // Behind the end of the device there is nothing.
        let error = image.resize(5 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{what}: {error}");
        assert!(error.message().contains("extend the device"), "{what}: {error}");
        assert_eq!(image.virtual_size(), 3 << 20, "{what}");
        image.close().unwrap();
        // What is behind the disk is left alone.
        assert!(device.to_vec()[3 << 20..].iter().all(|&b| b == 0xee), "{what}");
        device.extend(5 << 20);
        let image = open();
        image.resize(5 << 20).unwrap();
        assert!(read_all(&image).iter().all(|&b| b == 0), "{what}: on a longer device");
        image.close().unwrap();
    }
}

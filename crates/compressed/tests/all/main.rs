//! Compressed files of the tools' own and forged ones, held against the contract of layers, and converted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lzma_rust2::{CheckType, XzOptions, XzWriter};
use qcow2_compressed::{Codec, Compressed, OpenOptions, inspect};
use qcow2_core::convert::{ConvertOptions, RawSink, copy_disk};
use qcow2_core::space::Preallocation;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, Error, ErrorKind, Job, Layer, MemMut, Result, Storage, StorageExt};
use qcow2_testkit::Rng;
use qcow2_testkit::contract::LayerContract;

const SIZE: usize = (3 << 20) + 700;

fn disk(size: usize) -> Vec<u8> {
    let mut rng = Rng::new(5);
    let mut bytes = vec![0; size];
    bytes[..70_000].copy_from_slice(&rng.text(70_000));
    bytes[400_000..500_000].copy_from_slice(&rng.bytes(100_000));
    let end = size - 300;
    bytes[end..].copy_from_slice(&rng.bytes(300));
    bytes
}

/// What is decompressed, and what else the disk has of its last sector.
fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(1));
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// In blocks of 1 MiB, with a small dictionary.
fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(0);
    options.set_check_sum_type(CheckType::Crc32);
    options.set_block_size(Some((1 << 20).try_into().unwrap()));
    let mut writer = XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut context = zstd_safe::CCtx::create();
    context.set_parameter(zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(bytes.len()));
    context.compress2(&mut out, bytes).unwrap();
    out
}

fn compressed(codec: Codec, bytes: &[u8]) -> Vec<u8> {
    match codec {
        Codec::Gzip => gzip(bytes),
        Codec::Xz => xz(bytes),
        Codec::Zstd => zstd(bytes),
    }
}

fn storage(file: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(file))
}

fn open_with(file: &[u8], codec: Codec, options: &OpenOptions) -> Result<Compressed> {
    Compressed::open(storage(file), codec, options, &Job::new())
}

/// All of a file's disk, or why there is no more of it.
fn read(file: &[u8], codec: Codec) -> Result<Vec<u8>> {
    let layer = open_with(file, codec, &OpenOptions::default())?;
    let mut bytes = vec![0; layer.virtual_size() as usize];
    Chain::new(vec![Box::new(layer)])?.read_at(MemMut::from(&mut bytes[..]), 0)?;
    Ok(bytes)
}

fn refused(file: &[u8], codec: Codec) -> Error {
    match read(file, codec) {
        Ok(bytes) => panic!("{}: read {} bytes", codec.name(), bytes.len()),
        Err(error) => error,
    }
}

#[test]
fn compressed_files_keep_the_contract_of_layers() {
    let data = disk(520_000);
    for codec in Codec::ALL {
        let open = |storage: Arc<dyn Storage>| -> Result<Box<dyn Layer>> {
            Ok(Box::new(Compressed::open(storage, codec, &OpenOptions::default(), &Job::new())?))
        };
        let (file, expected) = (compressed(codec, &data), padded(&data));
        LayerContract { name: codec.name(), file: &file, open: &open, expected: &expected, below: None }
            .check();
    }
}

#[test]
fn several_members_streams_and_frames_are_one_disk() {
    let data = disk(SIZE);
    let (front, back) = data.split_at(1_000_001);
    for codec in Codec::ALL {
        let whole = [compressed(codec, front), compressed(codec, &[]), compressed(codec, back)].concat();
        assert!(read(&whole, codec).unwrap() == padded(&data), "{}", codec.name());
        assert!(read(&compressed(codec, &[]), codec).unwrap().is_empty());
    }
    // Padding: of a tape, of streams in groups of four, of frames in skippable ones.
    for (codec, padding) in [
        (Codec::Gzip, vec![0; 10_000]),
        (Codec::Xz, vec![0; 100_000]),
        (Codec::Zstd, b"\x50\x2a\x4d\x18\x05\0\0\0hello".to_vec()),
    ] {
        let file = [compressed(codec, &data), padding.clone()].concat();
        assert!(read(&file, codec).unwrap() == padded(&data), "{}", codec.name());
        if codec != Codec::Gzip {
            let file = [compressed(codec, front), padding, compressed(codec, back)].concat();
            assert!(read(&file, codec).unwrap() == padded(&data), "{}", codec.name());
        }
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    let data = disk(600_000);
    for codec in Codec::ALL {
        let file = compressed(codec, &data);
        let mut rng = Rng::new(9);
        let lengths = (0..20).map(|_| rng.below(file.len() as u64) as usize);
        for length in lengths.chain(file.len() - 20..file.len()).chain(1..8) {
            let error = refused(&file[..length], codec);
            let kind = error.kind();
            assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::InvalidHeader), "{length}: {error}");
        }
    }
}

#[test]
fn a_byte_that_changed_is_found() {
    let data = disk(600_000);
    for codec in Codec::ALL {
        let file = compressed(codec, &data);
        let mut rng = Rng::new(2);
        // The middle is data that does not shrink: nothing but the checksum tells.
        for at in (0..30).map(|_| 30 + rng.below(file.len() as u64 - 60) as usize) {
            let mut damaged = file.clone();
            damaged[at] ^= 4;
            match read(&damaged, codec) {
                Ok(bytes) => assert!(bytes == padded(&data), "{}: {at} was not found", codec.name()),
                Err(error) => assert_ne!(error.kind(), ErrorKind::Internal, "{}: {error}", codec.name()),
            }
        }
        // The last bytes of the first checksum.
        let mut damaged = file.clone();
        let at = if codec == Codec::Gzip { file.len() - 8 } else { file.len() - 1 };
        damaged[at] ^= 1;
        let error = refused(&damaged, codec);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        // What follows is none of it.
        let error = refused(&[&file[..], b"abcdefgh"].concat(), codec);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    let padded_garbage = [&gzip(&data)[..], &[0; 512], b"x"].concat();
    assert!(refused(&padded_garbage, Codec::Gzip).to_string().contains("no padding"));
    assert_eq!(refused(b"not compressed", Codec::Gzip).kind(), ErrorKind::InvalidHeader);
}

#[test]
fn what_is_larger_than_the_limits_is_refused_before_it_takes_memory() {
    let bomb = vec![0; 8 << 20];
    for codec in Codec::ALL {
        let file = compressed(codec, &bomb);
        let options = OpenOptions { max_virtual_size: 1 << 20, ..OpenOptions::default() };
        let error = open_with(&file, codec, &options).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Limit, Some("size")), "{error}");
    }
    // A dictionary of 1.5 GiB in an honest header: byte 0x1f where a block header has its LZMA2 properties.
    let mut file = xz(&bomb);
    let header = &mut file[12..12 + 12];
    assert_eq!(header[2..4], [0x21, 1], "{header:?}");
    header[4] = 37;
    let sum = {
        let mut crc = flate2::Crc::new();
        crc.update(&header[..8]);
        crc.sum()
    };
    header[8..].copy_from_slice(&sum.to_le_bytes());
    let error = open_with(&file, Codec::Xz, &OpenOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Limit, Some("maxMetadataBytes")), "{error}");
    // A window of 8 MiB, and a limit of 1 MiB.
    let mut context = zstd_safe::CCtx::create();
    context.set_parameter(zstd_safe::CParameter::WindowLog(23)).unwrap();
    let mut file = Vec::with_capacity(zstd_safe::compress_bound(9 << 20));
    context.compress2(&mut file, &disk(9 << 20)).unwrap();
    let options = OpenOptions { max_window: 1 << 20, ..OpenOptions::default() };
    let error = open_with(&file, Codec::Zstd, &options).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Limit, Some("maxMetadataBytes")), "{error}");
}

#[test]
fn the_size_is_known_where_the_file_says_it_and_counted_elsewhere() {
    let data = disk(SIZE);
    for codec in Codec::ALL {
        let file = compressed(codec, &data);
        let found = inspect(&storage(&file), codec, &OpenOptions::default()).unwrap();
        let stated = (codec != Codec::Gzip).then_some(SIZE as u64);
        assert_eq!(found.virtual_size, stated, "{}", codec.name());
        assert_eq!(found.findings.len(), usize::from(stated.is_none()));
        let job = Job::new();
        Compressed::open(storage(&file), codec, &OpenOptions::default(), &job).unwrap();
        let all = if stated.is_none() { file.len() as u64 } else { 0 };
        assert_eq!(job.progress(), (all, all), "{}", codec.name());
        let cancelled = Job::new();
        cancelled.cancel();
        let error = Compressed::open(storage(&file), codec, &OpenOptions::default(), &cancelled).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Aborted);
    }
}

#[test]
fn an_index_that_lies_is_found() {
    // The first stream's index says that its block has a byte more.
    let mut file = xz(&disk(600_000));
    let footer = file.len() - 12;
    let length = (u32::from_le_bytes(file[footer + 4..footer + 8].try_into().unwrap()) as usize + 1) * 4;
    let index = footer - length;
    // The last byte of the size is in front of the padding and the checksum.
    let last = (index..footer - 4).rfind(|at| file[*at] != 0).unwrap();
    file[last] += 1;
    let mut crc = flate2::Crc::new();
    crc.update(&file[index..footer - 4]);
    file[footer - 4..footer].copy_from_slice(&crc.sum().to_le_bytes());
    let error = refused(&file, Codec::Xz);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn a_convert_reads_it_once_whatever_the_workers() {
    let data = padded(&disk(16 << 20));
    for codec in Codec::ALL {
        let file = compressed(codec, &data);
        let layer = open_with(&file, codec, &OpenOptions::default()).unwrap();
        let chain = Chain::new(vec![Box::new(layer)]).unwrap();
        let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        target.resize(data.len() as u64).unwrap();
        let options = ConvertOptions { concurrency: 8.try_into().ok(), ..ConvertOptions::default() };
        let begun = std::time::Instant::now();
        let done = copy_disk(&chain, &options, &Job::new(), |context, _| {
            Ok(Box::new(RawSink::new(context, Arc::clone(&target), Preallocation::Off, false)?))
        })
        .unwrap();
        assert_eq!(done.bytes_read, data.len() as u64);
        assert!(done.bytes_written < 1 << 20, "{} bytes written", done.bytes_written);
        let mut bytes = vec![0; data.len()];
        target.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
        assert!(bytes == data, "{} in {:?}", codec.name(), begun.elapsed());
    }
}

/// What the tools themselves write; skipped, and said so, where one is missing.
#[test]
fn files_of_the_tools_are_read() {
    let data = disk(SIZE);
    for (codec, arguments) in [
        (Codec::Gzip, &["-9c"][..]),
        (Codec::Xz, &["-c", "-T2", "--block-size=700000"]),
        (Codec::Xz, &["-c", "--x86", "--lzma2=preset=1", "--check=sha256"]),
        (Codec::Zstd, &["-c", "-T2"]),
        (Codec::Zstd, &["-c", "--long=27"]),
    ] {
        let tool =
            Command::new(codec.name()).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut tool) = tool else {
            eprintln!("skipped: there is no {}", codec.name());
            continue;
        };
        let mut input = tool.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                input.write_all(&data).unwrap();
                drop(input);
            });
            tool.wait_with_output().unwrap()
        });
        assert!(output.status.success());
        assert!(read(&output.stdout, codec).unwrap() == padded(&data), "{} {arguments:?}", codec.name());
    }
}

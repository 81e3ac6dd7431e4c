//! Converts one image and prints what it took: for profiles, and for comparison with other tools.
//!
//! `convert SOURCE SOURCE_FORMAT TARGET TARGET_FORMAT [zlib|zstd] [LEVEL] [WORKERS]`

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, Window, convert};
use qcow2_engine::create::{CreateOptions, NewTarget, Preallocation};
use qcow2_engine::format::CompressionType;
use qcow2_engine::storage::{Access, FileStorage, NewFile, Overwrite};
use qcow2_engine::{Error, ErrorKind, Image, Job, Layer, OpenOptions, Qcow2, Raw, Result};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |n: usize| arguments.get(n).map(String::as_str);
    let (Some(from), Some(from_format), Some(to), Some(to_format)) =
        (argument(0), argument(1), argument(2), argument(3))
    else {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "SOURCE FORMAT TARGET FORMAT [zlib|zstd] [LEVEL] [WORKERS]",
        ));
    };
    let file = Arc::new(FileStorage::open(from, Access::ReadOnly)?);
    let layer = match from_format {
        "raw" => Box::new(Raw::new(file)?) as Box<dyn Layer>,
        _ => Box::new(Qcow2::open(file, &OpenOptions::default())?) as Box<dyn Layer>,
    };
    let image = Image::new(vec![layer])?;
    let new = NewFile::create(to, Overwrite::Replace, &[])?;
    let compression_type = match argument(4) {
        Some("zstd") => CompressionType::Zstd,
        _ => CompressionType::Zlib,
    };
    let level = argument(5).and_then(|l| l.parse().ok()).filter(|l| *l > 0);
    let target = match to_format {
        "raw" => ConvertTarget::New(NewTarget::Raw {
            storage: new.storage(),
            preallocation: Preallocation::Off,
            keep: false,
        }),
        _ => ConvertTarget::New(NewTarget::Qcow2 {
            storage: new.storage(),
            data_file: None,
            create: Box::new(CreateOptions { compression_type, ..Default::default() }),
        }),
    };
    let options = ConvertOptions {
        compression: matches!(argument(4), Some("zlib" | "zstd"))
            .then_some(Compression { level, window: Window::Full }),
        concurrency: argument(6).and_then(|w| w.parse().ok()).and_then(NonZeroUsize::new),
        ..Default::default()
    };
    let start = Instant::now();
    let result = convert(&image, target, &options, &Job::new())?;
    new.commit()?;
    println!(
        "{:.3} s, {} bytes read, {} bytes written",
        start.elapsed().as_secs_f64(),
        result.bytes_read,
        result.bytes_written
    );
    Ok(())
}

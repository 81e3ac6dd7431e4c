//! Prints the extents of an image and writes its guest bytes to a raw file: `dump IMAGE [BACKING...] RAW`.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{GuestSource, Image, Job, Layer, MemMut, OpenOptions, Qcow2, Raw};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    let target = names.pop().ok_or("usage: dump IMAGE [BACKING...] RAW")?;
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    for name in &names {
        let storage = Arc::new(FileStorage::open(Path::new(name), Access::ReadOnly)?);
        layers.push(match Qcow2::open(storage.clone(), &OpenOptions::default()) {
            Ok(q) => Box::new(q) as Box<dyn Layer>,
            Err(e) if e.field() == Some("magic") => Box::new(Raw::new(storage)?) as Box<dyn Layer>,
            Err(e) => return Err(e.into()),
        });
    }
    let image = Image::new(layers)?;
    let mut extents = Vec::new();
    image.extents(0, u64::MAX, &Job::new(), &mut extents)?;
    for e in &extents {
        println!(
            "{:>12} {:>12} {} {:?} zero={} {:?}",
            e.start,
            e.length,
            e.depth,
            e.kind,
            e.zero,
            e.host.as_ref().map(|h| h.1)
        );
    }
    let mut out = std::fs::File::create(target)?;
    let mut buf = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < image.virtual_size() {
        let n = buf.len().min((image.virtual_size() - at) as usize);
        let part = buf.get_mut(..n).ok_or("chunk")?;
        image.read_at(MemMut::from(&mut *part), at)?;
        out.write_all(part)?;
        at += n as u64;
    }
    Ok(())
}

//! Opening images of test fixtures with the engine, with everything that they name.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Image, Layer, OpenOptions, Qcow2, Raw, Result, Storage};

/// A file, read-only.
pub fn file(path: &Path) -> Result<Arc<dyn Storage>> {
    Ok(Arc::new(FileStorage::open(path, Access::ReadOnly)?))
}

/// Opens a chain from `path` down: names are taken relative to the file that has them, a missing backing format as raw.
pub fn open(path: &Path, format: &str, options: &OpenOptions) -> Result<Image> {
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    let mut next = Some((path.to_owned(), format.to_owned()));
    while let Some((path, format)) = next.take() {
        if format == "raw" {
            layers.push(Box::new(Raw::new(file(&path)?)?));
            break;
        }
        // A snapshot is asked of the top layer only.
        let snapshot = options.snapshot.clone().filter(|_| layers.is_empty());
        let mut qcow2 = Qcow2::open(file(&path)?, &OpenOptions { snapshot, ..options.clone() })?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let references = qcow2.references();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if let Some(name) = references.data_file.and_then(|d| d.filename) {
            qcow2.set_data_file(file(&folder.join(text(&name)))?);
        }
        next = references
            .backing
            .map(|b| (folder.join(text(&b.filename)), b.format.map_or_else(|| "raw".into(), |f| text(&f))));
        layers.push(Box::new(qcow2));
    }
    Image::new(layers)
}

/// `len` guest bytes from `offset`.
pub fn read(image: &Image, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0xa5; len];
    image.read_at(out.as_mut_slice().into(), offset)?;
    Ok(out)
}

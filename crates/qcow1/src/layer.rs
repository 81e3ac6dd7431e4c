//! An open image: a layer of a chain. What it names is opened by nobody here.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::layer::{
    BackingReference, Layer, Place, PlanBuilder, References, Segment, SegmentKind, Token,
};
use qcow2_core::storage::Sectors;
use qcow2_core::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt, check_limit};
use qcow2_luks::legacy_aes;
use quick_cache::sync::{Cache, GuardResult};

use crate::format::{CryptMethod, HEADER_LENGTH, Header, L2Entry};
use crate::inflate::{self, Inflated, Stream};

/// L2 tables that are kept unless the caller says otherwise, in bytes.
const DEFAULT_L2_CACHE_BYTES: u64 = 32 << 20;

/// How to open an image. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest virtual size.
    pub max_virtual_size: u64,
    /// Largest L1 table, which is loaded as a whole.
    pub max_metadata_bytes: u64,
    /// Most bytes of L2 tables to cache. Default: enough for the whole disk, at most 32 MiB.
    pub l2_cache_bytes: Option<u64>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, max_metadata_bytes: 128 << 20, l2_cache_bytes: None }
    }
}

/// An image of version 1, without its backing file. Of an encrypted one everything but guest data can be read before its secret is
/// given.
#[derive(Debug)]
pub struct Qcow1 {
    storage: Arc<dyn Storage>,
    /// Through which the data of an encrypted image is read, once there is a secret. Sectors are those of the guest; compressed
    /// clusters are stored in clear.
    unlocked: Option<Arc<Sectors>>,
    header: Header,
    backing_file: Option<Vec<u8>>,
    l1: Vec<u64>,
    /// L2 tables in the machine's byte order, by their offsets.
    tables: Cache<u64, Arc<[u64]>>,
    inflated: Inflated,
    options: OpenOptions,
}

impl Qcow1 {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// As [`Header::parse`]; `Limit`; `Corrupt` for an L1 table or a name that is not in the file; `Io`.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let mut bytes = [0u8; HEADER_LENGTH];
        let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), 0)?;
        let located = |e| storage.located(e);
        let header = Header::parse(bytes.get(..got).unwrap_or_default()).map_err(located)?;
        let l1_bytes = header.l1_entries() * 8;
        check_limit("size", header.virtual_size(), options.max_virtual_size).map_err(located)?;
        check_limit("L1 table", l1_bytes, options.max_metadata_bytes).map_err(located)?;
        let l1 = read_part(&*storage, "l1_table_offset", header.l1_table_offset, l1_bytes)?;
        let name_length = u64::from(header.backing_file_size);
        let name = read_part(&*storage, "backing_file_offset", header.backing_file_offset, name_length)?;
        let table_bytes = header.l2_entries() * 8;
        let limit = options.l2_cache_bytes.unwrap_or(DEFAULT_L2_CACHE_BYTES);
        let kept = (limit / table_bytes).min(header.l1_entries()).max(2);
        Ok(Self {
            tables: Cache::new(kept as usize),
            inflated: Inflated::new(header.cluster_size()),
            l1: decode_words(&l1),
            backing_file: (!name.is_empty()).then_some(name),
            header,
            storage,
            unlocked: None,
            options: options.clone(),
        })
    }

    /// The header as it was read.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The name of the backing file as the image has it, in bytes.
    pub fn backing_file(&self) -> Option<&[u8]> {
        self.backing_file.as_deref()
    }

    fn is_encrypted(&self) -> bool {
        self.header.crypt_method != CryptMethod::None
    }

    fn is_locked(&self) -> bool {
        self.is_encrypted() && self.unlocked.is_none()
    }

    /// Fills `buf` with the guest bytes at `start`, which are stored from `host` on.
    fn read_data(&self, start: u64, host: u64, buf: MemMut<'_>) -> Result<()> {
        match &self.unlocked {
            Some(sectors) => sectors.counted(start, host).read_padded_at(buf, host),
            None => self.storage.read_padded_at(buf, host),
        }
    }

    /// The L2 table that maps the guest byte `at`, if there is one. One thread reads it, others that want it wait.
    fn table(&self, at: u64) -> Result<Option<Arc<[u64]>>> {
        let index = at / self.header.l2_coverage();
        let Some(&offset) = self.l1.get(index as usize).filter(|offset| **offset != 0) else {
            return Ok(None);
        };
        let load = || {
            let bytes = read_part(&*self.storage, "L1 table entry", offset, self.header.l2_entries() * 8)?;
            Ok(Arc::from(decode_words(&bytes)))
        };
        match self.tables.get_value_or_guard(&offset, None) {
            GuardResult::Value(table) => Ok(Some(table)),
            GuardResult::Guard(guard) => {
                let table: Arc<[u64]> = load()?;
                let _ = guard.insert(Arc::clone(&table));
                Ok(Some(table))
            }
            GuardResult::Timeout => load().map(Some),
        }
    }

    /// Plans `start..end`, which one L2 table maps.
    fn plan_table(&self, start: u64, end: u64, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let Some(table) = self.table(start)? else {
            plan.push(start, end - start, SegmentKind::Unallocated(None));
            return Ok(());
        };
        let cluster_size = self.header.cluster_size();
        let mut at = start;
        while at < end {
            let index = at % self.header.l2_coverage() / cluster_size;
            let inside = at % cluster_size;
            let length = (cluster_size - inside).min(end - at);
            let entry = table.get(index as usize).copied().unwrap_or(0);
            let decoded = self.header.l2_entry(entry).map_err(|e| {
                let guest = format!("guest offset {:#x}", at - inside);
                self.storage.located(
                    Error::new(e.kind(), format!("{guest}: {}", e.message())).with_field("L2 table entry"),
                )
            })?;
            let kind = match decoded {
                L2Entry::Unallocated => SegmentKind::Unallocated(None),
                L2Entry::Data(offset) => SegmentKind::Data(Place { file: 0, host: offset + inside }),
                L2Entry::Compressed { .. } => SegmentKind::Opaque(Token(entry)),
            };
            plan.push(at, length, kind);
            at += length;
        }
        Ok(())
    }

    fn read_compressed(&self, start: u64, entry: u64, mut buf: MemMut<'_>) -> Result<()> {
        let L2Entry::Compressed { offset, length } = self.header.l2_entry(entry)? else {
            return Err(Error::new(ErrorKind::Internal, "a compressed cluster is none"));
        };
        let (stream, cluster_size) = (Stream { offset, length }, self.header.cluster_size());
        let mut inside = (start % cluster_size) as usize;
        // Neighbours that are the same stream make one segment.
        while !buf.is_empty() {
            let mut part = buf.take_front(cluster_size as usize - inside);
            let whole = part.len() as u64 == cluster_size;
            match part.exclusive() {
                Some(cluster) if whole => inflate::run(&*self.storage, stream, cluster)?,
                _ => {
                    let cluster = self.inflated.get(&*self.storage, stream)?;
                    part.copy_from(cluster.get(inside..).unwrap_or_default());
                }
            }
            inside = 0;
        }
        Ok(())
    }
}

impl Layer for Qcow1 {
    fn format(&self) -> &'static str {
        "qcow"
    }

    fn virtual_size(&self) -> u64 {
        self.header.virtual_size()
    }

    fn unit(&self) -> Option<u64> {
        Some(self.header.cluster_size())
    }

    fn takes_backing(&self) -> bool {
        true
    }

    fn references(&self) -> References {
        let backing = self.backing_file.clone().map(|filename| BackingReference { filename, format: None });
        References { backing, ..References::default() }
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0 && !self.is_encrypted()).then_some(&self.storage)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let mut plan = PlanBuilder::new(segments);
        let coverage = self.header.l2_coverage();
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % coverage + coverage).min(range.end);
            self.plan_table(at, end, &mut plan)?;
            at = end;
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        if self.is_locked() {
            let message = "the guest data is encrypted (AES): give the image's secret";
            let error = Error::new(ErrorKind::BadSecret, message).with_field("secret");
            return Err(self.storage.located(error));
        }
        match segment.kind {
            SegmentKind::Data(place) => self.read_data(segment.start, place.host, buf),
            SegmentKind::Opaque(token) => self.read_compressed(segment.start, token.0, buf),
            SegmentKind::Zero(_) | SegmentKind::Unallocated(_) => {
                Err(Error::new(ErrorKind::Internal, "a segment without bytes was read"))
            }
        }
    }

    fn encryption(&self) -> Option<&'static str> {
        self.is_encrypted().then_some("aes")
    }

    /// Any secret opens it: nothing in the file tells a wrong one.
    fn unlock(&mut self, secret: &[u8], _job: &Job) -> Result<()> {
        if self.is_encrypted() {
            let codec = Arc::new(legacy_aes(secret)?);
            self.unlocked = Some(Arc::new(Sectors::new(Arc::clone(&self.storage), codec)));
        }
        Ok(())
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        let again = Self::open(Arc::clone(&self.storage), &self.options)?;
        Ok(Box::new(Self { unlocked: self.unlocked.clone(), ..again }))
    }

    fn absent_from(&self, at: u64) -> u64 {
        let coverage = self.header.l2_coverage();
        let rest = self.l1.get((at / coverage) as usize..).unwrap_or_default();
        let run = rest.iter().take_while(|offset| **offset == 0).count() as u64;
        // The disk can end inside the last table.
        (run * coverage)
            .min(self.virtual_size().saturating_sub(at - at % coverage))
            .saturating_sub(at % coverage)
    }
}

/// `length` bytes at `offset`, which must be in the file: checked before they are allocated.
fn read_part(storage: &dyn Storage, field: &'static str, offset: u64, length: u64) -> Result<Vec<u8>> {
    let file_size = storage.size()?;
    if length != 0 && offset.checked_add(length).is_none_or(|end| end > file_size) {
        let message =
            format!("invalid {field} {offset:#x}: {length} bytes lie outside the file ({file_size} bytes)");
        let error = Error::new(ErrorKind::Corrupt, message).with_field(field).with_offset(offset);
        return Err(storage.located(error));
    }
    let mut bytes = vec![0; length as usize];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), offset).map_err(|e| e.with_field(field))?;
    Ok(bytes)
}

/// Big-endian words to the machine's.
fn decode_words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

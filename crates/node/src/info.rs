//! What the layers of an image say about themselves, as plain objects in QAPI's terms.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::format::bitmap::BitmapFlags;
use qcow2_engine::format::header::feature::{Compatible, Incompatible};
use qcow2_engine::format::header::{CompressionType, CryptMethod};
use qcow2_engine::format::{Header, SnapshotRecord};
use qcow2_engine::image::BitmapRecord;
use qcow2_engine::storage::IoLimits;
use qcow2_engine::{ErrorKind, Layer, LayerExt, Qcow2, Result, StorageExt};
use qcow2_luks::{Details, Header as LuksHeader, Luks, SlotDetails};
use qcow2_nbd::client::PROTOCOL;
use qcow2_vmdk::Vmdk;

use crate::bytes::Bytes;
use crate::failure::Failure;
use crate::formats::{luks, vmdk};
use crate::open::NamedFile;
use crate::runtime::Runtime;
use crate::text::{Text, path_text};

/// One layer.
#[napi(object, object_from_js = false)]
pub struct LayerInfo {
    /// Its file.
    pub filename: Text,
    /// QEMU's name of its format.
    pub format: String,
    /// Bytes.
    pub virtual_size: f64,
    /// Bytes that the file takes.
    pub actual_size: Option<f64>,
    /// Bytes of the file.
    #[napi(ts_type = "number | bigint")]
    pub file_length: Bytes,
    /// What requests on its file should look like.
    pub limits: FileLimits,
    /// QEMU's name of what reads the file: `file` or `host_device`.
    pub protocol: String,
    /// Bytes, of a layer that has clusters.
    pub cluster_size: Option<f64>,
    /// `aes` or `luks`.
    pub encryption: Option<String>,
    /// The backing file that it names.
    pub backing: Option<NamedFile>,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
    /// What only LUKS files have.
    pub luks: Option<LuksInfo>,
    /// What only VMDK images have.
    pub vmdk: Option<VmdkInfo>,
}

/// What a VMDK image says, as QAPI's `ImageInfoSpecificVmdk`.
#[napi(object, object_from_js = false)]
pub struct VmdkInfo {
    /// As the descriptor has it.
    pub create_type: Text,
    /// Content identifier.
    pub cid: u32,
    /// That of the parent.
    pub parent_cid: u32,
    /// In guest order.
    pub extents: Vec<VmdkExtentInfo>,
}

/// An extent of a VMDK image.
#[napi(object, object_from_js = false)]
pub struct VmdkExtentInfo {
    /// Its file: as it was opened, else as the descriptor names it.
    pub filename: Option<Text>,
    /// Whether it was opened.
    pub opened: bool,
    /// The type in the descriptor; absent of one in the image's own file.
    pub format: Option<String>,
    /// Bytes of the disk.
    pub virtual_size: f64,
    /// Bytes of the file, of one in a file of its own that was opened.
    pub file_length: Option<f64>,
    /// Bytes that the file takes, of one in a file of its own that was opened.
    pub actual_size: Option<f64>,
    /// Grains are compressed.
    pub compressed: bool,
    /// Bytes of a grain.
    pub cluster_size: Option<f64>,
}

/// What a LUKS header says, as QAPI's `QCryptoBlockInfoLUKS`.
#[napi(object, object_from_js = false)]
pub struct LuksInfo {
    /// 1 or 2.
    pub version: u32,
    /// Whether the header lies in a file of its own.
    pub detached_header: bool,
    /// QEMU's name.
    pub cipher_alg: String,
    /// QEMU's name.
    pub cipher_mode: String,
    /// QEMU's name.
    pub ivgen_alg: Option<String>,
    /// QEMU's name.
    pub ivgen_hash_alg: Option<String>,
    /// QEMU's name, of version 1.
    pub hash_alg: Option<String>,
    /// Text.
    pub uuid: Text,
    /// Bytes.
    pub payload_offset: f64,
    /// Of version 1.
    pub master_key_iters: Option<u32>,
    /// Bytes.
    pub sector_size: u32,
    /// In the order of their numbers.
    pub slots: Vec<LuksSlotInfo>,
}

/// A key slot.
#[napi(object, object_from_js = false)]
pub struct LuksSlotInfo {
    /// Its number, from 0 on.
    pub slot: u32,
    /// In use.
    pub active: bool,
    /// Of one in use.
    pub iters: Option<u32>,
    /// Of one in use.
    pub stripes: Option<u32>,
    /// Bytes.
    pub key_offset: f64,
}

/// What requests on a file should look like, in bytes.
#[napi(object, object_from_js = false)]
pub struct FileLimits {
    /// Of offsets and lengths.
    pub request_alignment: u32,
    /// Of addresses.
    pub memory_alignment: u32,
    /// Of memory.
    pub page_size: u32,
    /// A device's.
    pub max_transfer: Option<u32>,
    /// A device's: a number, not bytes.
    pub max_segments: Option<u32>,
    /// A device's.
    pub discard_alignment: Option<u32>,
    /// A device's.
    pub zeroes_alignment: Option<u32>,
}

impl From<IoLimits> for FileLimits {
    fn from(limits: IoLimits) -> Self {
        let IoLimits { request_alignment, memory_alignment, page_size, device } = limits;
        Self {
            request_alignment,
            memory_alignment,
            page_size,
            max_transfer: device.max_transfer,
            max_segments: device.max_segments,
            discard_alignment: device.discard_alignment,
            zeroes_alignment: device.zeroes_alignment,
        }
    }
}

/// What the header of a qcow2 layer says.
#[napi(object, object_from_js = false)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// Bits.
    pub refcount_bits: u32,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Feature bits.
    pub extended_l2: bool,
    /// Feature bits.
    pub lazy_refcounts: bool,
    /// Feature bits.
    pub corrupt: bool,
    /// Feature bits.
    pub dirty: bool,
    /// Whether there is an external data file.
    pub has_data_file: bool,
    /// The name that the image stores.
    pub data_file: Option<Text>,
    /// Feature bits.
    pub data_file_raw: bool,
    /// In the table's order.
    pub snapshots: Vec<SnapshotInfo>,
    /// In the directory's order.
    pub bitmaps: Vec<BitmapInfo>,
    /// Why there are no more snapshots, or no bitmaps: what is wrong with their tables.
    pub damaged: Vec<Failure>,
    /// What the LUKS header says.
    pub luks: Option<LuksInfo>,
    /// Why it cannot be read.
    pub luks_damage: Option<Failure>,
}

/// An internal snapshot.
#[napi(object, object_from_js = false)]
pub struct SnapshotInfo {
    /// Unique.
    pub id: Text,
    /// Not unique.
    pub name: Text,
    /// Bytes.
    #[napi(ts_type = "number | bigint")]
    pub vm_state_size: Bytes,
    /// Seconds since 1970.
    pub date_sec: f64,
    /// Nanoseconds.
    pub date_nsec: f64,
    /// Seconds.
    pub vm_clock_sec: f64,
    /// Nanoseconds.
    pub vm_clock_nsec: f64,
    /// Instructions.
    pub icount: Option<f64>,
}

/// A persistent bitmap.
#[napi(object, object_from_js = false)]
pub struct BitmapInfo {
    /// Unique.
    pub name: Text,
    /// Bytes.
    pub granularity: f64,
    /// `in-use`, `auto`.
    pub flags: Vec<String>,
}

/// Describes every layer of an image, top first.
#[napi(catch_unwind)]
pub fn layers_info(env: Env, request: u32, image: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let work = move || {
        handle.run(|image| {
            image.layers().iter().map(|layer| LayerInfo::new(&**layer)).collect::<Result<Vec<_>>>()
        })
    };
    runtime.run(&env, request, work, |_, env, layers| {
        // SAFETY: on the environment's thread, with its own env.
        unsafe { Vec::to_napi_value(env.raw(), layers) }
    })
}

impl LayerInfo {
    fn new(layer: &dyn Layer) -> Result<Self> {
        let storage = layer.storage();
        let exported = storage.identity().is_some_and(|identity| identity.kind() == PROTOCOL);
        // No server tells how much space an export takes.
        let actual = if exported { None } else { Some(storage.space_in_use()?) };
        let protocol = match storage.traits().block_device {
            _ if exported => PROTOCOL,
            true => "host_device",
            false => "file",
        };
        Ok(Self {
            filename: path_text(storage.path()),
            format: layer.format().to_owned(),
            virtual_size: layer.virtual_size() as f64,
            actual_size: actual.map(|bytes| bytes as f64),
            file_length: Bytes(storage.size()?),
            limits: storage.io_limits().into(),
            protocol: protocol.to_owned(),
            cluster_size: layer.unit().map(|unit| unit as f64),
            encryption: layer.encryption().map(str::to_owned),
            backing: layer.references().backing.map(NamedFile::from),
            qcow2: layer.as_qcow2().map(Qcow2Info::new).transpose()?,
            luks: luks(layer).map(LuksInfo::of).transpose()?,
            vmdk: vmdk(layer).map(VmdkInfo::of).transpose()?,
        })
    }
}

impl VmdkInfo {
    fn of(vmdk: &Vmdk) -> Result<Self> {
        let extents = vmdk.extents().map(|extent| {
            let path = extent.storage.map(|storage| path_text(storage.path()));
            let apart = extent.storage.filter(|_| !extent.own);
            let named = extent.line.filename.as_deref().map(Text::from);
            Ok(VmdkExtentInfo {
                opened: path.is_some(),
                filename: path.or(named),
                format: (!extent.own).then(|| extent.line.kind.name().to_owned()),
                virtual_size: extent.size as f64,
                file_length: apart.map(|storage| storage.size()).transpose()?.map(|bytes| bytes as f64),
                actual_size: apart
                    .map(|storage| storage.space_in_use())
                    .transpose()?
                    .map(|bytes| bytes as f64),
                compressed: extent.compressed,
                cluster_size: extent.grain.map(|bytes| bytes as f64),
            })
        });
        Ok(Self {
            create_type: Text::from(vmdk.create_type().as_bytes()),
            cid: vmdk.cid(),
            parent_cid: vmdk.descriptor().parent_cid,
            extents: extents.collect::<Result<_>>()?,
        })
    }
}

impl LuksInfo {
    /// Of a LUKS file.
    fn of(luks: &Luks) -> Result<Self> {
        // As it is now: key slots change while the image is open.
        let details = match luks.current_header()? {
            LuksHeader::Luks1(header) => Details::from(&*header),
            LuksHeader::Luks2(header) => Details::from(&header),
        };
        Ok(Self::new(&details, luks.is_detached()))
    }

    fn new(details: &Details, detached_header: bool) -> Self {
        let owned = |name: Option<&'static str>| name.map(str::to_owned);
        Self {
            version: details.version.into(),
            detached_header,
            cipher_alg: details.cipher_alg.to_owned(),
            cipher_mode: details.cipher_mode.to_owned(),
            ivgen_alg: owned(details.ivgen_alg),
            ivgen_hash_alg: owned(details.ivgen_hash_alg),
            hash_alg: owned(details.hash_alg),
            uuid: details.uuid.as_bytes().into(),
            payload_offset: details.payload_offset as f64,
            master_key_iters: details.master_key_iters,
            sector_size: details.sector_size,
            slots: details.slots.iter().map(LuksSlotInfo::from).collect(),
        }
    }
}

impl From<&SlotDetails> for LuksSlotInfo {
    fn from(slot: &SlotDetails) -> Self {
        Self {
            slot: slot.number as u32,
            active: slot.active,
            iters: slot.iters,
            stripes: slot.stripes,
            key_offset: slot.key_offset as f64,
        }
    }
}

impl Qcow2Info {
    fn new(qcow2: &Qcow2) -> Result<Self> {
        let header: &Header = qcow2.header();
        let (bitmaps, bitmap_error) = match qcow2.bitmaps() {
            Ok(bitmaps) => (bitmaps, None),
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => (Vec::new(), Some(error)),
        };
        let (luks, luks_damage) = match qcow2.luks_details() {
            Ok(luks) => (luks, None),
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => (None, Some(error)),
        };
        Ok(Self {
            version: header.version,
            refcount_bits: 1 << header.geometry.refcount_order(),
            compression_type: compression_name(header.compression_type).to_owned(),
            extended_l2: header.incompatible.contains(Incompatible::EXTENDED_L2),
            lazy_refcounts: header.compatible.contains(Compatible::LAZY_REFCOUNTS),
            corrupt: header.incompatible.contains(Incompatible::CORRUPT),
            dirty: header.incompatible.contains(Incompatible::DIRTY),
            has_data_file: header.has_data_file(),
            data_file: header.data_file().map(Text::from),
            data_file_raw: header.data_file_raw(),
            snapshots: qcow2.snapshots().iter().map(SnapshotInfo::new).collect(),
            damaged: qcow2.snapshot_error().into_iter().chain(&bitmap_error).map(Failure::from).collect(),
            bitmaps: bitmaps.iter().map(|record| BitmapInfo::new(qcow2, record)).collect(),
            luks: luks.map(|details| LuksInfo::new(&details, false)),
            luks_damage: luks_damage.as_ref().map(Failure::from),
        })
    }
}

/// QEMU's name of a compression type.
pub(crate) fn compression_name(kind: CompressionType) -> &'static str {
    match kind {
        CompressionType::Zlib => "zlib",
        CompressionType::Zstd => "zstd",
    }
}

/// QEMU's name of an encryption method.
pub(crate) fn encryption_name(method: CryptMethod) -> Option<&'static str> {
    match method {
        CryptMethod::None => None,
        CryptMethod::Aes => Some("aes"),
        CryptMethod::Luks => Some("luks"),
    }
}

const NANOSECONDS: u64 = 1_000_000_000;

impl SnapshotInfo {
    fn new(record: &SnapshotRecord) -> Self {
        Self {
            id: record.id_text().into(),
            name: record.name_text().into(),
            vm_state_size: Bytes(record.vm_state_size),
            date_sec: record.date_sec.into(),
            date_nsec: record.date_nsec.into(),
            vm_clock_sec: (record.vm_clock_nsec / NANOSECONDS) as f64,
            vm_clock_nsec: (record.vm_clock_nsec % NANOSECONDS) as f64,
            icount: record.icount.map(|count| count as f64),
        }
    }
}

impl BitmapInfo {
    fn new(qcow2: &Qcow2, record: &BitmapRecord) -> Self {
        let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
        let mut stored = record.entry.flags;
        if qcow2.tracks_bitmap(&record.entry.name) {
            // In use by this handle, which has it in memory: consistent.
            stored.remove(BitmapFlags::IN_USE);
        }
        let set = flags.iter().filter(|(flag, _)| stored.contains(*flag));
        Self {
            name: record.entry.name.as_slice().into(),
            granularity: (1u64 << record.entry.granularity_bits) as f64,
            flags: set.map(|(_, name)| (*name).to_owned()).collect(),
        }
    }
}

//! The image's fixed parameters and every shift and mask that follows from them. No other file shifts.

use crate::limits::{MAX_CLUSTER_BITS, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS};
use crate::{FormatError, FormatResult, GuestOffset, HostOffset};

/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS_PER_CLUSTER: u64 = 32;
/// Unit in which a compressed descriptor counts: 512 bytes.
pub const COMPRESSED_SECTOR_SIZE: u64 = 512;

/// Cluster size, refcount width and L2 entry form of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
}

impl Geometry {
    /// Validates the three parameters together.
    ///
    /// # Errors
    /// `Invalid` for `cluster_bits` outside 9..=21 (14..=21 with extended L2 entries) or a `refcount_order` above 6.
    pub fn new(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> FormatResult<Self> {
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(FormatError::invalid(
                "cluster_bits",
                cluster_bits.into(),
                "the cluster size must be between 512 bytes and 2 MiB",
            ));
        }
        if extended_l2 && cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(FormatError::invalid(
                "cluster_bits",
                cluster_bits.into(),
                "extended L2 entries need clusters of at least 16 KiB",
            ));
        }
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(FormatError::invalid(
                "refcount_order",
                refcount_order.into(),
                "refcounts may not exceed 64 bits",
            ));
        }
        Ok(Self { cluster_bits, refcount_order, extended_l2 })
    }

    /// `cluster_bits` of the header.
    pub const fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }
    /// `refcount_order` of the header.
    pub const fn refcount_order(&self) -> u32 {
        self.refcount_order
    }
    /// Whether L2 entries have a subcluster bitmap.
    pub const fn extended_l2(&self) -> bool {
        self.extended_l2
    }
    /// Cluster size in bytes.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Cluster size in bytes, for buffers.
    pub const fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }
    /// Offset inside its cluster.
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }
    /// Start of the cluster that holds `offset`.
    pub const fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }
    /// Index of the cluster that holds `offset`.
    pub const fn cluster_index(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }
    /// Byte offset of cluster `index`; `None` beyond 64 bits.
    pub fn cluster_offset(&self, index: u64) -> Option<u64> {
        index.checked_mul(self.cluster_size())
    }
    /// Clusters that `bytes` take, the last one perhaps in part.
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + (self.in_cluster(bytes) != 0) as u64
    }
    /// `offset` rounded up to a cluster boundary; `None` beyond 64 bits.
    pub fn round_up(&self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.cluster_size())
    }

    /// Bytes of one L2 entry: 8, or 16 with extended L2 entries.
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }
    /// log2 of the entries in an L2 table.
    pub const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }
    /// Entries in an L2 table.
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }
    /// Guest bytes that one L2 table maps.
    pub const fn l2_coverage(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }
    /// Index into the L1 table.
    pub const fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.0 >> (self.l2_bits() + self.cluster_bits)
    }
    /// Index into the L2 table.
    pub const fn l2_index(&self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }
    /// L1 entries that a disk of `size` bytes needs.
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Parts of a cluster that are allocated on their own: 32 with extended L2 entries, else 1.
    pub const fn subclusters_per_cluster(&self) -> u64 {
        if self.extended_l2 { SUBCLUSTERS_PER_CLUSTER } else { 1 }
    }
    /// Subcluster size in bytes; the cluster size without extended L2 entries.
    pub const fn subcluster_size(&self) -> u64 {
        self.cluster_size() / self.subclusters_per_cluster()
    }
    /// Index of the subcluster inside its cluster.
    pub const fn subcluster_index(&self, offset: u64) -> u64 {
        self.in_cluster(offset) / self.subcluster_size()
    }

    /// Refcount width in bits.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }
    /// Largest refcount that fits.
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }
    /// log2 of the entries in a refcount block.
    pub const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }
    /// Entries in a refcount block.
    pub const fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }
    /// Index into the refcount table of the block that counts cluster `index`.
    pub const fn refcount_table_index(&self, cluster_index: u64) -> u64 {
        cluster_index >> self.refcount_block_bits()
    }
    /// Index inside that block.
    pub const fn refcount_block_index(&self, cluster_index: u64) -> u64 {
        cluster_index & (self.refcount_block_entries() - 1)
    }

    /// Bits of a compressed descriptor's host offset (`x` in section "Compressed Clusters Descriptor").
    pub const fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
    /// Most additional sectors that a compressed descriptor can count.
    pub const fn compressed_max_sectors(&self) -> u64 {
        (1 << (self.cluster_bits - 8)) - 1
    }
    /// Exclusive upper end of host offsets at which compressed data can start.
    pub const fn compressed_offset_limit(&self) -> u64 {
        let bits = self.compressed_offset_bits();
        1 << if bits < 56 { bits } else { 56 }
    }

    /// The cluster at `host` as an aligned offset, or `None` when it is not aligned.
    pub const fn aligned_host(&self, host: u64) -> Option<HostOffset> {
        if self.in_cluster(host) == 0 { Some(HostOffset(host)) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_parameters() {
        assert!(Geometry::new(8, 4, false).is_err());
        assert!(Geometry::new(22, 4, false).is_err());
        assert!(Geometry::new(13, 4, true).is_err());
        assert!(Geometry::new(14, 4, true).is_ok());
        assert!(Geometry::new(16, 7, false).is_err());
    }

    #[test]
    fn default_geometry() {
        let g = Geometry::new(16, 4, false).unwrap();
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_coverage(), 512 << 20);
        assert_eq!(g.refcount_block_entries(), 32768);
        assert_eq!(g.refcount_max(), 65535);
        assert_eq!(g.l1_entries_for((512 << 20) + 1), 2);
        assert_eq!(g.compressed_offset_bits(), 54);
        assert_eq!(g.clusters_for(u64::MAX), 1 << 48);
    }

    #[test]
    fn extended_l2_halves_the_coverage() {
        let g = Geometry::new(16, 4, true).unwrap();
        assert_eq!(g.l2_entries(), 4096);
        assert_eq!(g.l2_coverage(), 256 << 20);
        assert_eq!(g.subcluster_size(), 2048);
        assert_eq!(g.subcluster_index(65536 + 4095), 1);
    }

    #[test]
    fn refcount_widths() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false).unwrap();
            assert_eq!(g.refcount_block_entries() * u64::from(g.refcount_bits()), 512 * 8);
        }
        assert_eq!(Geometry::new(9, 6, false).unwrap().refcount_max(), u64::MAX);
        assert_eq!(Geometry::new(9, 0, false).unwrap().refcount_max(), 1);
    }
}

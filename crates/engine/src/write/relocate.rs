//! Moving and dropping refcount structures: for whoever has the image to itself.
//!
//! Order of moving a block or the table: the new place is counted and durable, the copy is durable, then one write of
//! the word that refers to it (a table entry, or the header's field) switches. The old place is freed behind the sync.

use crate::alloc::{Unlinked, header_fields};
use crate::image::Qcow2;
use crate::patch::write_patch;
use crate::writer::Writer;
use crate::{Mem, Result, StorageExt};

impl Writer {
    /// Moves refcount blocks: each by its index, the old and the new host offset, which is counted durably.
    pub(crate) fn move_blocks(&self, image: &Qcow2, moves: &[(u64, u64, u64)]) -> Result<()> {
        let g = image.geometry();
        self.with_alloc(|alloc, metadata| {
            for &(index, _, to) in moves {
                alloc.refcounts.copy_block(index, to)?;
            }
            image.storage().flush()?;
            for &(index, _, to) in moves {
                alloc.refcounts.switch_block(index, to)?;
                metadata.add(g.cluster_index(to));
            }
            image.storage().flush()?;
            for &(_, from, _) in moves {
                metadata.remove(g.cluster_index(from));
                alloc.refcounts.set(g.cluster_index(from), 0)?;
            }
            Ok(())
        })
    }

    /// Gives up the blocks for clusters behind `from` that count nothing any more, and the space of their clusters. What lost its
    /// references is durable. Returns how many.
    ///
    /// A block goes in this order: the table loses its entry; sync; its cluster is free. A cut in between leaves it as a leak where
    /// another block counts it.
    pub(crate) fn drop_blocks(&self, image: &Qcow2, from: u64) -> Result<u64> {
        let g = image.geometry();
        self.with_alloc(|alloc, metadata| {
            let mut dropped = 0;
            loop {
                let mut empty = Vec::new();
                for (index, offset) in alloc.refcounts.blocks() {
                    let first = index * g.refcount_block_entries();
                    if first >= from.max(1) && alloc.refcounts.counts_nothing(index, offset)? {
                        empty.push((index, offset));
                    }
                }
                let mut gone = Vec::new();
                let switched = empty.iter().try_for_each(|&(index, offset)| {
                    alloc.refcounts.switch_block(index, 0)?;
                    gone.push(g.cluster_index(offset));
                    Ok(())
                });
                if gone.is_empty() {
                    return switched.map(|()| dropped);
                }
                image.storage().flush()?;
                dropped += gone.len() as u64;
                for cluster in gone {
                    metadata.remove(cluster);
                    // One that counted itself is counted nowhere now. What counts another one may be empty without it.
                    if alloc.refcounts.is_covered(cluster) {
                        alloc.refcounts.set(cluster, 0)?;
                    }
                    alloc.give_up(Unlinked { cluster, count: 1, punch: true });
                }
                switched?;
            }
        })
    }

    /// Bytes of the refcount table that are in use, and its place: first cluster and number of clusters.
    pub(crate) fn refcount_table(&self) -> Result<(u64, u64, u64)> {
        self.with_alloc(|alloc, _| {
            let (first, clusters) = alloc.refcounts.table_clusters();
            Ok((alloc.refcounts.used_table().len() as u64, first, clusters))
        })
    }

    /// Moves the refcount table to `to`, clusters that are counted durably and have room for what is used of it.
    pub(crate) fn move_refcount_table(&self, image: &Qcow2, to: u64) -> Result<()> {
        let g = *image.geometry();
        self.with_alloc(|alloc, metadata| {
            let refcounts = &mut alloc.refcounts;
            let old = refcounts.table_clusters();
            let mut bytes = refcounts.used_table();
            let clusters = g.clusters_for(bytes.len() as u64);
            bytes.resize((clusters * g.cluster_size()) as usize, 0);
            image.storage().write_all_at(Mem::from(bytes.as_slice()), to)?;
            image.storage().flush()?;
            write_patch(&**image.storage(), &image.header().steady(), &header_fields(to, clusters))?;
            image.storage().flush()?;
            refcounts.note_table(to, bytes.len());
            metadata.set_refcount_table(&g, to, clusters);
            (old.0..old.0 + old.1).try_for_each(|cluster| refcounts.set(cluster, 0))
        })
    }
}

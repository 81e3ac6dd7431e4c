//! Data of one request on its way to the file. Steps whose places follow each other are written in one call, and what
//! needs it is linked behind that.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use qcow2_format::{HostOffset, L2Mapping};

use super::cluster::Run;
use super::cow::plan_cow;
use super::link::Change;
use crate::alloc::Allocation;
use crate::door::GuestData;
use crate::image::Qcow2;
use crate::storage::WriteTransfer;
use crate::writer::Registration;
use crate::writer::Writer;
use crate::{Mem, Result, StorageExt};

/// Most pieces in one batch.
const PIECES: usize = 64;

impl Allocation {
    /// Whether the guest is known to read zeroes there: zero bytes of the file are none to it behind a door.
    pub(super) fn guest_zero(&self, image: &Qcow2) -> bool {
        self.host_zero && image.host_is_guest()
    }
}

/// Bytes for one place of the data file.
#[derive(Debug)]
pub(super) struct Piece<'a> {
    /// Where the guest has them.
    pub(super) guest: u64,
    /// Where the file gets them.
    pub(super) host: u64,
    pub(super) bytes: Bytes<'a>,
}

#[derive(Debug)]
pub(super) enum Bytes<'a> {
    Guest(Mem<'a>),
    Owned(Vec<u8>),
}

impl Piece<'_> {
    fn mem(&self) -> Mem<'_> {
        match &self.bytes {
            Bytes::Guest(mem) => *mem,
            Bytes::Owned(bytes) => Mem::from(bytes.as_slice()),
        }
    }

    /// Whether `next` lies right behind it in the file.
    fn precedes(&self, next: &Self) -> bool {
        self.host + self.mem().len() as u64 == next.host
    }
}

/// A run with its host clusters: linked when its bytes are written.
#[derive(Debug)]
pub(super) struct NewRun<'a> {
    pub(super) run: Run<'a>,
    pub(super) target: Allocation,
    /// It read as zeroes before.
    pub(super) was_zero: bool,
    /// Guest bytes that are written.
    pub(super) range: Range<u64>,
}

/// Steps that are planned and not written.
#[derive(Debug, Default)]
pub(super) struct Batch<'a> {
    /// Of the first step: it keeps the host offsets of all later ones out of other hands as well.
    pin: Option<Arc<()>>,
    pieces: Vec<Piece<'a>>,
    /// Behind the last piece.
    end: u64,
    pub(super) runs: VecDeque<NewRun<'a>>,
    /// Of steps that change no mapping.
    pub(super) registrations: Vec<Registration<'a>>,
}

impl Writer {
    /// Adds the pieces of one step, in the order of their places. What waits is written first unless they follow it.
    pub(super) fn add<'a>(
        &self,
        image: &Qcow2,
        batch: &mut Batch<'a>,
        pin: Option<Arc<()>>,
        pieces: Vec<Piece<'a>>,
    ) -> Result<()> {
        let follows = pieces.first().is_none_or(|piece| piece.host == batch.end);
        if !follows || batch.pieces.len() >= PIECES {
            self.issue(image, batch)?;
        }
        if batch.pieces.is_empty() && batch.runs.is_empty() {
            batch.pin = pin;
        }
        if let Some(piece) = pieces.last() {
            batch.end = piece.host + piece.mem().len() as u64;
        }
        batch.pieces.extend(pieces);
        Ok(())
    }

    /// Writes what waits, then links it.
    pub(super) fn issue(&self, image: &Qcow2, batch: &mut Batch<'_>) -> Result<()> {
        write_pieces(image, &batch.pieces)?;
        batch.pieces.clear();
        while let Some(new) = batch.runs.pop_front() {
            self.link_run(image, &new)?;
        }
        batch.registrations.clear();
        batch.pin = None;
        Ok(())
    }

    /// Gives back the host clusters of a batch that failed.
    pub(super) fn give_up(&self, image: &Qcow2, batch: &mut Batch<'_>) {
        for NewRun { run, target, .. } in batch.runs.drain(..) {
            if run.reuse.is_none() && !image.header().has_data_file() {
                self.alloc.lock().abandon(target);
            }
        }
    }

    fn link_run(&self, image: &Qcow2, new: &NewRun<'_>) -> Result<()> {
        let g = *image.geometry();
        let NewRun { run, target, was_zero, range } = new;
        let host = target.cluster * g.cluster_size();
        let barrier = !was_zero || !target.guest_zero(image) || !target.durable;
        let clusters = g.clusters_for(range.end) - g.cluster_index(run.guest);
        self.link(image, Change { guest: run.guest, clusters, barrier, punch: false }, |number, old| {
            let cluster = run.guest + number * g.cluster_size();
            let host = HostOffset(host + number * g.cluster_size());
            if !g.extended_l2() {
                return Some(L2Mapping::Data { host, copied: true });
            }
            let within =
                range.start.max(cluster) - cluster..range.end.min(cluster + g.cluster_size()) - cluster;
            let bitmap = plan_cow(&g, old, within, run.reuse.is_some()).bitmap;
            Some(L2Mapping::Subclusters { host: Some(host), copied: true, bitmap })
        })
    }
}

/// Writes pieces in as few calls as their places allow.
fn write_pieces(image: &Qcow2, pieces: &[Piece<'_>]) -> Result<()> {
    let Some(first) = pieces.first() else { return Ok(()) };
    let guest_data = image.guest_data()?;
    let GuestData::ByHost(data) = guest_data else { return write_by_guest(guest_data, pieces) };
    if pieces.iter().zip(pieces.iter().skip(1)).all(|(a, b)| a.precedes(b)) {
        let mut bufs: Vec<Mem<'_>> = pieces.iter().map(Piece::mem).collect();
        return data.write_all_vectored_at(&mut bufs, first.host);
    }
    let groups: Vec<(u64, Vec<Mem<'_>>)> = pieces
        .chunk_by(Piece::precedes)
        .filter_map(|group| Some((group.first()?.host, group.iter().map(Piece::mem).collect())))
        .collect();
    let transfers = groups.iter().map(|(start, bufs)| WriteTransfer::new(bufs, *start));
    data.write_all_batch(&mut transfers.collect::<Vec<_>>())
}

/// As [`write_pieces`], each with its guest offset: those together that lie so in both.
fn write_by_guest(data: &GuestData, pieces: &[Piece<'_>]) -> Result<()> {
    let apart = |piece: &Piece<'_>| piece.guest.wrapping_sub(piece.host);
    for group in pieces.chunk_by(|a, b| a.precedes(b) && apart(a) == apart(b)) {
        let Some(first) = group.first() else { continue };
        let mut bufs: Vec<Mem<'_>> = group.iter().map(Piece::mem).collect();
        data.at(first.guest, first.host).write_all_vectored_at(&mut bufs, first.host)?;
    }
    Ok(())
}

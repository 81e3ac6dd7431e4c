//! Whether header and BAT keep to the format, and their repair: QEMU's counters and words, in its order.

use qcow2_core::blocks::{Scheme, UsedPlaces};
use qcow2_core::check::{CheckReport, FindingCode, Repair, Severity, Tally};
use qcow2_core::space::lengthen;
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, StorageExt};

use crate::Parallels;
use crate::structures::{DATA_OFF, IN_USE_OFFSET, SECTOR};

/// What a look at the BAT found.
#[derive(Default)]
struct Found {
    /// Entries that name what is not in the file.
    outside: Vec<u32>,
    /// Entries that name another one's cluster, and that.
    shared: Vec<(u32, u64)>,
    /// Behind the last cluster.
    end: u64,
    /// Places of which a cluster has some bytes.
    taken: Option<UsedPlaces>,
}

pub(crate) fn check(
    layer: &Parallels,
    repair: Option<Repair>,
    max_findings: usize,
    job: &Job,
) -> Result<CheckReport> {
    let (scheme, storage) = (layer.scheme(), &**layer.storage());
    let (header, length) = (scheme.header(), storage.size()?);
    let repairs = repair == Some(Repair::All);
    if repair.is_some() && header.ext_off != 0 {
        let report = check(layer, None, max_findings, job)?;
        if report.is_clean() {
            return Ok(report);
        }
        // What was not closed, or is damaged, has bitmaps that say nothing.
        scheme.drop_extension(storage)?;
        return check(layer, repair, max_findings, job);
    }
    let mut tally = Tally::new(max_findings);
    let mut corruption = |code, offset: u64, message: &dyn Fn() -> String| match repairs {
        true => tally.fixed_corruption(code, offset, message),
        false => tally.corruption(code, offset, message),
    };
    if header.is_in_use() {
        corruption(FindingCode::NotClosed, IN_USE_OFFSET, &|| "image was not closed correctly".to_owned());
    }
    let moved = !header.has_data_start(length);
    if moved {
        corruption(FindingCode::Header, DATA_OFF as u64, &|| "data_off field has incorrect value".to_owned());
    }
    let table = scheme.layout().table;
    let (mut found, mut report) = look(layer, length, job)?;
    for index in &found.outside {
        corruption(FindingCode::BeyondEndOfFile, table + u64::from(*index) * 4, &|| {
            format!("cluster {index} is outside image")
        });
    }
    // Where the image was cut off, or its data lies elsewhere, nobody knows what is behind the last cluster.
    let end = extension_end(&header).max(found.end);
    // QEMU's files have whole sectors.
    let length = length.next_multiple_of(SECTOR);
    let lost = if storage.traits().block_device { 0 } else { length.saturating_sub(end) };
    report_leak(lost, end, header.cluster_size(), repair.is_some(), &mut tally);
    for (index, _) in &found.shared {
        let (offset, message) =
            (table + u64::from(*index) * 4, || format!("duplicate offset in BAT entry {index}"));
        match repairs {
            true => tally.fixed_corruption(FindingCode::BlockShared, offset, message),
            false => tally.corruption(FindingCode::BlockShared, offset, message),
        }
    }
    if repairs {
        end_of_repair(layer, &mut found, moved, &mut report)?;
    } else if repair.is_some() && lost > 0 {
        storage.resize(end)?;
        storage.flush()?;
    }
    report.take(tally);
    Ok(report)
}

/// Behind the cluster of a format extension.
fn extension_end(header: &crate::structures::Header) -> u64 {
    match header.ext_off {
        0 => 0,
        sectors => (sectors * SECTOR).saturating_add(header.cluster_size()),
    }
}

fn report_leak(lost: u64, end: u64, cluster_size: u64, repairs: bool, tally: &mut Tally) {
    if lost == 0 {
        return;
    }
    let clusters = lost.div_ceil(cluster_size);
    match repairs {
        true => tally.leaks_fixed += clusters,
        false => tally.leaks += clusters,
    }
    let message = || format!("space leaked at the end of the image {lost}");
    tally.announce(Severity::Leak, repairs, FindingCode::Leak, end, message);
}

/// Reads the BAT.
fn look(layer: &Parallels, length: u64, job: &Job) -> Result<(Found, CheckReport)> {
    let layout = layer.scheme().layout();
    let mut report = CheckReport { total_clusters: layout.entries.into(), ..CheckReport::default() };
    let mut found = Found { end: layout.data, ..Found::default() };
    let mut used = UsedPlaces::new(layout.data, layout.block, length);
    let mut taken = UsedPlaces::new(layout.data, layout.block, length);
    // The entry behind the last one that was good, and the place that would follow it.
    let mut next = (0, 0);
    layer.places(job, |index, place| {
        if place + layout.block > length || place < layout.data {
            found.outside.push(index);
            return Ok(());
        }
        report.allocated_clusters += 1;
        report.fragmented_clusters += u64::from(next.0 == index && next.1 != place && index > 0);
        next = (index + 1, place + layout.block);
        found.end = found.end.max(next.1);
        taken.note(place);
        taken.note(place + layout.block - 1);
        if !used.note(place) {
            found.shared.push((index, place));
        }
        Ok(())
    })?;
    found.taken = Some(taken);
    report.image_end_offset = Some(found.end);
    Ok((found, report))
}

/// Repairs what was found: shared clusters are copied to where nothing else is, and are durable before an entry names them.
fn end_of_repair(layer: &Parallels, found: &mut Found, moved: bool, report: &mut CheckReport) -> Result<()> {
    let (scheme, storage) = (layer.scheme(), &**layer.storage());
    let layout = scheme.layout();
    let mut entries: Vec<(u32, u32)> = found.outside.iter().map(|index| (*index, layout.absent)).collect();
    let mut end = found.end;
    let mut cluster = vec![0; usize::try_from(layout.block).unwrap_or(usize::MAX)];
    let mut place = layout.next_place(layout.data);
    for (index, shared) in &found.shared {
        while found.taken.as_mut().is_some_and(|taken| !taken.note(place)) {
            place += layout.block;
        }
        let Some(entry) = layout.entry_of(place) else {
            let message =
                format!("no BAT entry names {place:#x}: the file is as long as the format can have it");
            return Err(storage.located(Error::new(ErrorKind::Limit, message)));
        };
        storage.read_padded_at(MemMut::from(&mut cluster[..]), *shared)?;
        storage.write_all_at(Mem::from(&cluster[..]), place)?;
        entries.push((*index, entry));
        place += layout.block;
        end = end.max(place);
    }
    lengthen(storage, end)?;
    storage.flush()?;
    if moved {
        scheme.write_data_start(storage)?;
    }
    entries.sort_unstable();
    layer.write_entries(&entries)?;
    storage.flush()?;
    if !storage.traits().block_device {
        storage.resize(end)?;
    }
    scheme.clear_mark(storage)?;
    report.image_end_offset = Some(end);
    Ok(())
}

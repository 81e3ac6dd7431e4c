//! Power cuts: after any of them the image opens, has at worst leaks, and keeps what was flushed.
//!
//! A bounded sample of states by default. `QCOW2_CRASH_STATES=100000` judges about that many (`.ci/crash` does so).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::storage::DirectStorage;
use qcow2_engine::{Discard, Job, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{Durability, FIRST_GENERATION, History, Scope, Session, State};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Op, Target};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::Door;
use qcow2_testkit::{Fixture, Qemu, Sparse, trace};

fn writable(flush_each: bool) -> Opening {
    laid_out(flush_each, false)
}

fn laid_out(flush_each: bool, first_fit: bool) -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, flush_each, first_fit, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

/// Every kind of layout that changes what is written when.
fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    vec![
        plain(65536),
        Geometry { backing: Backing::ShorterRaw, ..plain(65536) },
        plain(512),
        plain(4096),
        Geometry { version: 2, backing: Backing::LongerQcow2, ..plain(4096) },
        Geometry { extended_l2: true, ..plain(16384) },
        Geometry { extended_l2: true, backing: Backing::EqualQcow2, ..plain(65536) },
        Geometry { zstd: true, refcount_bits: 64, ..plain(1024) },
        Geometry { refcount_bits: 1, ..plain(512) },
        Geometry { refcount_bits: 8, ..plain(512) },
        Geometry { data_file: DataFile::External, ..plain(65536) },
        Geometry { data_file: DataFile::External, backing: Backing::EqualQcow2, ..plain(4096) },
        Geometry { data_file: DataFile::ExternalRaw, ..plain(65536) },
        Geometry { data_file: DataFile::External, extended_l2: true, ..plain(16384) },
        Geometry { door: Door::Scrambling, ..plain(4096) },
        Geometry { door: Door::LegacyAes, extended_l2: true, backing: Backing::EqualQcow2, ..plain(16384) },
        Geometry { door: Door::Xts, data_file: DataFile::External, ..plain(65536) },
        Geometry { door: Door::Xts, version: 2, backing: Backing::LongerQcow2, ..plain(4096) },
    ]
}

fn wanted_states() -> Option<usize> {
    std::env::var("QCOW2_CRASH_STATES").ok().and_then(|n| n.parse().ok())
}

/// Judges states, the cheap way each, and a sample by slower judges.
struct Judge<'a> {
    rig: &'a Rig,
    history: &'a History,
    scope: Scope,
    qemu: Option<&'a Qemu>,
    /// Every so many states QEMU is asked.
    qemu_every: usize,
    what: String,
}

static JUDGED: AtomicUsize = AtomicUsize::new(0);

impl Judge<'_> {
    fn judge(&self, number: usize, state: &State) {
        JUDGED.fetch_add(1, Ordering::Relaxed);
        let verdict = std::panic::catch_unwind(AssertUnwindSafe(|| self.verdict(state, number)));
        if let Err(e) = verdict.unwrap_or_else(|_| Err(format!("panicked, number {number}"))) {
            if let Some(folder) = std::env::var_os("QCOW2_CRASH_KEEP") {
                for (n, file) in state.files.iter().enumerate() {
                    file.write_to(&std::path::Path::new(&folder).join(format!("state-{n}")));
                }
            }
            panic!("{}, cut {}, {:?}: {e}", self.what, state.cut, state.shape);
        }
    }

    fn verdict(&self, state: &State, number: usize) -> Result<(), String> {
        let findings = audit(&state.files[0]);
        if !findings.is_sound() {
            return Err(format!("{:#?}", findings.corruptions));
        }
        let image =
            self.rig.open_state(&state.files, &Opening::default()).map_err(|e| format!("opening: {e:?}"))?;
        self.history.judge(&image, state.cut, &self.scope)?;
        drop(image);
        if number.is_multiple_of(8) {
            self.engine_check(state)?;
        }
        if number.is_multiple_of(16) {
            self.recovers(state, number as u64)?;
        }
        if number.is_multiple_of(self.qemu_every)
            && let Some(qemu) = self.qemu
        {
            self.qemu_check(qemu, state)?;
        }
        Ok(())
    }

    fn engine_check(&self, state: &State) -> Result<(), String> {
        let storage = RecordingStorage::plain(state.files[0].clone());
        let header = qcow2_engine::image::read_header(&storage).map_err(|e| format!("{e:?}"))?;
        let options = CheckOptions { readers: 0, ..CheckOptions::default() };
        let report = check(&storage, &header, &options, &Job::new()).map_err(|e| format!("{e:?}"))?;
        if report.corruptions != 0 || report.check_errors != 0 {
            return Err(format!("check: {report:#?}"));
        }
        Ok(())
    }

    /// The image goes on: more operations on it, and then it is clean but for the leaks.
    fn recovers(&self, state: &State, seed: u64) -> Result<(), String> {
        let (session, files) = Session::new(state.files.clone(), Durability::Flush);
        let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|f| f as Arc<dyn Storage>).collect();
        let open = || self.rig.open(&files, &writable(false)).map(|i| Box::new(i) as Box<dyn Target>);
        if matches!(self.scope, Scope::Whole) {
            let image = self.rig.open(&files, &Opening::default()).map_err(|e| format!("opening: {e:?}"))?;
            session.start(&image);
            let mut menu = self.rig.menu();
            menu.size = image.virtual_size() / 512 * 512;
            let mut ops = menu.sequence(seed, 6);
            ops.push(Op::Reopen);
            if std::env::var_os("QCOW2_CRASH_SHOW").is_some() {
                eprintln!("number {seed}, size {}: {ops:?}", menu.size);
            }
            drop(image);
            let image = session.play(&open, &ops, false).ok_or("no image")?;
            session.verify(&*image, 0, image.size()).map_err(|e| format!("{e:?}"))?;
            drop(image);
        } else {
            open().and_then(|image| image.close()).map_err(|e| format!("opening and closing: {e:?}"))?;
        }
        let mut bytes = Sparse::new(0);
        let len = files[0].len().unwrap();
        copy(&*files[0], len, &mut bytes);
        let findings = audit(&bytes);
        if findings.is_sound() { Ok(()) } else { Err(format!("after going on: {:#?}", findings.corruptions)) }
    }

    fn qemu_check(&self, qemu: &Qemu, state: &State) -> Result<(), String> {
        let fixture = Fixture::new();
        let path = fixture.path("state.qcow2");
        state.files[0].write_to(&path);
        if let Some(data) = state.files.get(1) {
            data.write_to(&fixture.path("data.raw"));
        }
        if let Some((backing, _)) = &self.rig.backing {
            backing.write_to(&fixture.path("backing"));
        }
        // A relative name in the header would be taken relative to the working directory.
        let mut options = format!("driver=qcow2,file.driver=file,file.filename={}", path.display());
        if state.files.len() > 1 {
            options +=
                &format!(",data-file.driver=file,data-file.filename={}", fixture.path("data.raw").display());
        }
        let out = qemu.img(&["check", "--output=json", "--image-opts", &options]);
        let report: serde_json::Value =
            serde_json::from_str(&out.stdout).map_err(|e| format!("{e}: {out:?}"))?;
        let count = |name: &str| report.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        if count("corruptions") + count("check-errors") != 0 {
            return Err(format!("qemu-img check: {report}"));
        }
        Ok(())
    }
}

fn copy(storage: &dyn Storage, len: u64, out: &mut Sparse) {
    let mut buf = vec![0; 1 << 20];
    out.set_len(len);
    for at in (0..len).step_by(buf.len()) {
        let n = storage.read_at(qcow2_engine::MemMut::from(&mut buf[..]), at).unwrap();
        for (i, page) in buf[..n].chunks(4096).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
            out.write(at + i as u64 * 4096, page);
        }
    }
}

/// Lets QEMU take a snapshot, so that the active disk shares its L2 tables.
fn share_tables(rig: &mut Rig, qemu: &Qemu) {
    let fixture = Fixture::new();
    let path = fixture.path("image.qcow2");
    rig.image.write_to(&path);
    if let Some((backing, _)) = &rig.backing {
        backing.write_to(&fixture.path("backing"));
    }
    qemu.img(&["snapshot".as_ref(), "-c".as_ref(), "shared".as_ref(), path.as_os_str()]).ok();
    let bytes = std::fs::read(path).unwrap();
    rig.image = Sparse::new(bytes.len() as u64);
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
        rig.image.write(n as u64 * 4096, page);
    }
}

/// Plays a sequence on an image and judges about `random` states and all simple ones. `block`: bytes of what the file
/// takes as a whole, 1 with a page cache.
fn explore(geometry: &Geometry, seed: u64, (ops, random): (usize, usize), block: u32, qemu: Option<&Qemu>) {
    let flush_each = seed.is_multiple_of(5);
    let first_fit = seed.is_multiple_of(3);
    let mut rig = Rig::forge(geometry, seed);
    if let Some(qemu) = qemu.filter(|_| geometry.snapshots()) {
        share_tables(&mut rig, qemu);
    }
    let durability = if flush_each { Durability::Each } else { Durability::Flush };
    let (mut session, files) = Session::aligned(rig.files(), durability, block);
    let files: Vec<_> = files.into_iter().map(|f| DirectStorage::over(f as Arc<dyn Storage>)).collect();
    let what = format!(
        "{} seed {seed} flush_each {flush_each} first_fit {first_fit} block {block}",
        geometry.name()
    );
    let open = || {
        let opened = rig.open(&files, &laid_out(flush_each, first_fit));
        opened.map(|i| Box::new(i) as Box<dyn Target>)
    };
    session.start(&rig.open(&files, &Opening::default()).unwrap_or_else(|e| panic!("{what}: {e:?}")));
    let mut sequence = rig.menu().sequence(seed, ops);
    sequence.push(Op::Reopen);
    let image = session.play(&open, &sequence, false).unwrap();
    session.verify(&*image, 0, image.size()).unwrap();
    drop(image);
    let history = session.history();
    let judge = Judge { rig: &rig, history: &history, scope: Scope::Whole, qemu, qemu_every: 149, what };
    session.states(seed, random).enumerate().for_each(|(n, state)| judge.judge(n, &state));
}

/// Runs `f` for every item on all cores.
fn on_all_cores<T: Sync>(items: &[T], f: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    f(item);
                }
            });
        }
    });
}

#[test]
fn no_power_cut_loses_or_corrupts() {
    let qemu = Qemu::find();
    let wanted = wanted_states().unwrap_or(3000);
    let geometries = geometries();
    // About 250 states a sequence.
    let rounds = (wanted / (250 * geometries.len())).max(1) as u64;
    let only = std::env::var("QCOW2_CRASH_ONLY").unwrap_or_default();
    let cases: Vec<(Geometry, u64)> =
        (1..=rounds).flat_map(|seed| geometries.iter().map(move |g| (g.clone(), seed))).collect();
    let cases: Vec<_> = cases.into_iter().filter(|(g, _)| g.name().contains(&only)).collect();
    let before = JUDGED.load(Ordering::Relaxed);
    on_all_cores(&cases, |(geometry, seed)| explore(geometry, *seed, (30, 120), 1, qemu.as_ref()));
    let judged = JUDGED.load(Ordering::Relaxed) - before;
    eprintln!("{judged} crash states of {} sequences", cases.len());
    assert!(judged >= wanted / 2 || !only.is_empty(), "only {judged} states");
}

/// Past the page cache, a write of a part of a block rewrites the block, and one behind the end makes the file longer than
/// it is to be for a moment.
#[test]
fn no_power_cut_past_the_page_cache_loses_or_corrupts() {
    let wanted = wanted_states().unwrap_or(1500) / 2;
    let plain = Geometry::plain;
    let geometries = [
        plain(512),
        Geometry { refcount_bits: 1, ..plain(1024) },
        Geometry { backing: Backing::ShorterRaw, ..plain(4096) },
        Geometry { extended_l2: true, ..plain(16384) },
        plain(65536),
        Geometry { data_file: DataFile::ExternalRaw, ..plain(4096) },
        Geometry { door: Door::Scrambling, ..plain(4096) },
    ];
    let rounds = (wanted / (250 * geometries.len())).max(1) as u64;
    let cases: Vec<(&Geometry, u64, u32)> = (1..=rounds)
        .flat_map(|round| geometries.iter().map(move |g| (g, round)))
        .enumerate()
        // Seeds of their own, so that the modes that flush each request come, too.
        .map(|(n, (g, round))| (g, 1000 + round * 7 + n as u64, if n % 3 == 1 { 512 } else { 4096 }))
        .collect();
    let before = JUDGED.load(Ordering::Relaxed);
    on_all_cores(&cases, |(geometry, seed, block)| explore(geometry, *seed, (25, 60), *block, None));
    let judged = JUDGED.load(Ordering::Relaxed) - before;
    eprintln!("{judged} crash states of {} sequences past the page cache", cases.len());
    assert!(judged >= wanted / 2, "only {judged} states");
}

/// Keeps an operation inside the regions that belong to one of several threads: fine ones, several to a cluster, in
/// the first half of the disk, whole clusters in the second.
fn confine(op: Op, thread: u64, threads: u64, cluster: u64, size: u64) -> Op {
    let half = size / 2 / (4 * cluster) * (4 * cluster);
    let fit = |offset: u64, len: u64| {
        let (start, end, region) =
            if offset < half { (0, half, (cluster / 4).max(512)) } else { (half, size, 2 * cluster) };
        let mine = (offset - start) / region / threads * threads + thread;
        let mine = if start + (mine + 1) * region > end { thread } else { mine };
        let from = start + mine * region + (offset - start) % region;
        (from, len.min(start + (mine + 1) * region - from), offset >= half)
    };
    match op {
        Op::Write { offset, len } => {
            let (offset, len, _) = fit(offset, len);
            Op::Write { offset, len }
        }
        Op::Compressed { offset, len } => match fit(offset, len) {
            (offset, _, true) => Op::Compressed { offset: offset / cluster * cluster, len: cluster },
            (offset, len, false) => Op::Write { offset, len },
        },
        Op::Zero { offset, len, unmap } => {
            let (offset, len, _) = fit(offset, len);
            Op::Zero { offset, len, unmap }
        }
        Op::Discard { offset, len } => {
            let (offset, len, _) = fit(offset, len);
            Op::Discard { offset, len }
        }
        Op::Read { offset, len } => {
            let (offset, len, _) = fit(offset, len);
            Op::Read { offset, len }
        }
        Op::Flush | Op::Grow { .. } | Op::Shrink { .. } | Op::Reopen => Op::Flush,
    }
}

#[test]
fn no_power_cut_during_concurrent_requests_loses_or_corrupts() {
    let qemu = Qemu::find();
    let rounds = wanted_states().map_or(1, |n| (n / 20_000).max(1)) as u64;
    // All of them where many states are asked for.
    let step = if wanted_states().is_some() { 1 } else { 2 };
    for geometry in geometries().into_iter().step_by(step) {
        for seed in 1..=rounds {
            explore_concurrently(&geometry, seed, qemu.as_ref());
        }
    }
}

fn explore_concurrently(geometry: &Geometry, seed: u64, qemu: Option<&Qemu>) {
    const THREADS: u64 = 4;
    let mut rig = Rig::forge(geometry, seed);
    if let Some(qemu) = qemu.filter(|_| geometry.snapshots()) {
        share_tables(&mut rig, qemu);
    }
    let (mut session, files) = Session::new(rig.files(), Durability::Flush);
    let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|f| f as Arc<dyn Storage>).collect();
    let image = rig.open(&files, &writable(false)).unwrap();
    session.start(&image);
    let menu = rig.menu();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (image, session, menu) = (&image, &session, &menu);
            scope.spawn(move || {
                let ops = menu.sequence(seed * 100 + thread, 25);
                for (n, op) in (0u32..).zip(ops) {
                    let op = confine(op, thread, THREADS, menu.cluster, menu.size);
                    let generation = FIRST_GENERATION + n * THREADS as u32 + thread as u32;
                    session.run(image, op, generation).unwrap_or_else(|e| panic!("{op:?}: {e:?}"));
                }
            });
        }
    });
    session.verify(&image, 0, image.virtual_size()).unwrap();
    session.run(&image, Op::Reopen, 0).unwrap();
    let history = session.history();
    let what = format!("{} seed {seed}, {THREADS} threads", geometry.name());
    let judge =
        Judge { rig: &rig, history: &history, scope: Scope::Whole, qemu: None, qemu_every: 1 << 60, what };
    session.states(seed, 60).enumerate().for_each(|(n, state)| judge.judge(n, &state));
}

/// The recorded installation, in windows of requests, on the geometry that everyone has.
#[test]
fn no_power_cut_during_an_installation_loses_or_corrupts() {
    let Some(requests) = trace::load() else { return };
    let qemu = Qemu::find();
    // The last part of the recording rewrites and deletes; the first fills the disk.
    let (window, skip) = match wanted_states() {
        Some(_) => (400, 0),
        None => (150, requests.len() / 150 - 8),
    };
    let rig = Rig {
        geometry: Geometry { size: trace::DISK, ..Geometry::plain(65536) },
        image: qcow2_testkit::Forge::new(3, 16, trace::DISK).build().bytes,
        data_file: None,
        backing: None,
    };
    let (mut session, files) = Session::new(rig.files(), Durability::Flush);
    let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|f| f as Arc<dyn Storage>).collect();
    let image = rig.open(&files, &writable(false)).unwrap();
    session.start_empty(trace::DISK);
    let mut generation = FIRST_GENERATION;
    for (number, part) in requests.chunks(window).enumerate() {
        if wanted_states().is_none() && number > 8 && number < skip {
            continue;
        }
        for op in part {
            session.run(&image, *op, generation).unwrap_or_else(|e| panic!("{op:?}: {e:?}"));
            generation += 1;
        }
        if number % 4 == 0 {
            let history = session.history();
            let what = format!("installation, window {number}");
            let scope = Scope::Recent(number as u64, 200);
            let judge =
                Judge { rig: &rig, history: &history, scope, qemu: qemu.as_ref(), qemu_every: 997, what };
            // Simple states at every cut would be thousands of large ones: only the random ones.
            session
                .sample_states(number as u64, if wanted_states().is_some() { 25 } else { 15 })
                .enumerate()
                .for_each(|(n, state)| judge.judge(n, &state));
        }
        session.forget();
    }
    image.close().unwrap();
}

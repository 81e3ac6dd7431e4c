//! Commit and rebase: on chains that QEMU made, judged by QEMU, and after power cuts at any moment.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use qcow2_engine::backing::{Backing, CommitOptions, RebaseOptions, commit, rebase, set_backing};
use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::image::read_header;
use qcow2_engine::storage::{Access, FileStorage, MemoryStorage};
use qcow2_engine::{
    DataDoor, ErrorKind, Image, Job, Layer, LayerExt, Mem, MemMut, OpenOptions, Qcow2, Raw, Result, Storage,
    WriteOptions,
};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{CountingStorage, Fault, FaultStorage, Op, Scrambling, scrambled_image};
use qcow2_testkit::{Fixture, Qemu, Rng, Sparse};

/// A layer to make: its options, its size in KiB, whether it is raw.
#[derive(Clone, Copy)]
struct Recipe {
    options: &'static str,
    kib: u64,
    raw: bool,
}

const fn qcow2(options: &'static str, kib: u64) -> Recipe {
    Recipe { options, kib, raw: false }
}

const fn raw(kib: u64) -> Recipe {
    Recipe { options: "", kib, raw: true }
}

/// Layers, the base first: sizes that differ either way, every kind of table.
const CHAINS: &[&[Recipe]] = &[
    &[qcow2("", 4096), qcow2("", 4096), qcow2("", 4096)],
    &[raw(3000), qcow2("cluster_size=4k", 5000), qcow2("cluster_size=512", 4000)],
    &[
        qcow2("cluster_size=1k,compat=0.10", 2000),
        qcow2("compat=0.10", 1000),
        qcow2("compat=0.10,cluster_size=4k", 3000),
    ],
    &[
        qcow2("extended_l2=on", 4096),
        qcow2("extended_l2=on,cluster_size=16k", 6000),
        qcow2("extended_l2=on", 5001),
    ],
    &[
        qcow2("cluster_size=2M", 8192),
        qcow2("cluster_size=512,refcount_bits=1", 1500),
        qcow2("extended_l2=on,compression_type=zstd", 3000),
    ],
    &[qcow2("cluster_size=16k,refcount_bits=64", 5000), raw(0), qcow2("", 0)],
];

struct Chain {
    dir: Fixture,
    /// The base first.
    files: Vec<(PathBuf, bool)>,
}

impl Chain {
    fn make(qemu: &Qemu, recipes: &[Recipe], seed: u64) -> Self {
        let dir = Fixture::new();
        let mut rng = Rng::new(seed);
        let mut files: Vec<(PathBuf, bool)> = Vec::new();
        for (number, recipe) in recipes.iter().filter(|recipe| recipe.kib > 0).enumerate() {
            let path = dir.path(&format!("layer{number}"));
            if recipe.raw {
                std::fs::File::create(&path).unwrap().set_len(recipe.kib << 10).unwrap();
            } else {
                let backing = files.last().map(|(path, raw)| {
                    let format = if *raw { "raw" } else { "qcow2" };
                    format!("backing_file={},backing_fmt={format}", path.display())
                });
                let options: Vec<&str> = [Some(recipe.options), backing.as_deref()]
                    .into_iter()
                    .flatten()
                    .filter(|o| !o.is_empty())
                    .collect();
                qemu.create(&path, &options.join(","), Some(recipe.kib << 10));
            }
            scribble(qemu, &path, recipe, &mut rng, true);
            files.push((path, recipe.raw));
        }
        Self { dir, files }
    }

    fn top(&self) -> &Path {
        &self.files.last().unwrap().0
    }

    fn depth(&self) -> usize {
        self.files.len()
    }

    /// The layers with these indices from the top, the first of them open for writing if asked.
    fn image(&self, range: std::ops::Range<usize>, writable: bool) -> Image {
        let layers = self.files.iter().rev().enumerate().filter(|(n, _)| range.contains(n));
        let layers = layers.map(|(n, (path, raw))| {
            let access = if writable && n == range.start { Access::ReadWrite } else { Access::ReadOnly };
            layer(Arc::new(FileStorage::open(path, access).unwrap()), *raw, access == Access::ReadWrite)
        });
        Image::new(layers.collect()).unwrap()
    }
}

fn layer(storage: Arc<dyn Storage>, raw: bool, writable: bool) -> Box<dyn Layer> {
    layer_behind(None, storage, raw, writable)
}

fn layer_behind(
    data_door: Option<Arc<dyn DataDoor>>,
    storage: Arc<dyn Storage>,
    raw: bool,
    writable: bool,
) -> Box<dyn Layer> {
    let options = OpenOptions { data_door, ..OpenOptions::default() };
    let mut layer = if raw {
        Box::new(Raw::new(storage).unwrap()) as Box<dyn Layer>
    } else {
        Box::new(Qcow2::open(storage, &options).unwrap()) as Box<dyn Layer>
    };
    if writable {
        layer.enable_writing(WriteOptions::default()).unwrap();
    }
    layer
}

/// Random writes: data, zeroes, compressed clusters.
fn scribble(qemu: &Qemu, path: &Path, recipe: &Recipe, rng: &mut Rng, fresh: bool) {
    let size = recipe.kib << 10;
    let v3 = !recipe.raw && !recipe.options.contains("0.10");
    let mut commands = Vec::new();
    if fresh && !recipe.raw && !recipe.options.contains("refcount_bits=1") {
        let cluster = 2 << 20;
        let offset = rng.below(size.div_ceil(cluster)) * cluster;
        let length = cluster.min(size - offset);
        commands.push(format!("write -c -P {} {offset} {length}", 1 + rng.below(250)));
    }
    for _ in 0..12 {
        let length = [512, 3 << 10, 64 << 10, 200 << 10][rng.below(4) as usize].min(size);
        let offset = rng.below((size - length) / 512 + 1) * 512;
        commands.push(match rng.below(5) {
            0 if v3 => format!("write -z {offset} {length}"),
            1 if v3 => format!("write -zu {offset} {length}"),
            2 => format!("write -P 0 {offset} {length}"),
            _ => format!("write -P {} {offset} {length}", 1 + rng.below(250)),
        });
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu.io(path, if recipe.raw { "raw" } else { "qcow2" }, &commands);
}

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// The bytes of `a` and `b` as far as both reach; the rest of the longer one is zero.
fn assert_same(a: &[u8], b: &[u8], what: &str) {
    let length = a.len().min(b.len());
    if let Some(at) = a[..length].iter().zip(&b[..length]).position(|(a, b)| a != b) {
        panic!("{what}: {} instead of {} at {at:#x}", b[at], a[at]);
    }
    let rest = a.iter().skip(length).chain(b.iter().skip(length)).position(|byte| *byte != 0);
    assert_eq!(rest, None, "{what}: behind the end of the shorter one at {length:#x}");
}

#[test]
fn commit_moves_the_disk_into_the_base() {
    let Some(qemu) = Qemu::find() else { return };
    for (number, recipes) in CHAINS.iter().enumerate() {
        for seed in 0..2 {
            for depth in 1..recipes.iter().filter(|r| r.kib > 0).count() {
                let what = format!("chain {number} seed {seed} depth {depth}");
                let chain = Chain::make(&qemu, recipes, seed * 100 + number as u64);
                let want = qemu.guest_bytes(chain.top(), "qcow2", &[]);
                let below = read(&chain.image(depth..chain.depth(), false));
                let above = chain.image(0..depth, true);
                let base = chain.image(depth..chain.depth(), true);
                let options = CommitOptions { empty: depth == 1, workers: 3 };
                commit(&above, &base, &options, &Job::new()).unwrap_or_else(|e| panic!("{what}: {e}"));
                base.close().unwrap();
                above.close().unwrap();
                drop((above, base));
                assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), &format!("{what}, the top"));
                let (path, raw) = &chain.files[chain.depth() - 1 - depth];
                let got = qemu.guest_bytes(path, if *raw { "raw" } else { "qcow2" }, &[]);
                // Behind the end of the top, the base keeps what it had.
                let mut expected = want.clone();
                expected.extend_from_slice(below.get(want.len()..).unwrap_or_default());
                assert_same(&expected, &got, &format!("{what}, the base"));
                for (path, raw) in chain.files.iter().filter(|(_, raw)| !raw) {
                    assert!(!raw);
                    qemu.assert_clean(path);
                }
                if depth == 1 {
                    let top = Qcow2::open(
                        Arc::new(FileStorage::open(chain.top(), Access::ReadOnly).unwrap()),
                        &OpenOptions::default(),
                    );
                    assert!(top.unwrap().l1().iter().all(|entry| *entry == 0), "{what}");
                }
            }
        }
    }
}

/// Files outside the chain to rebase to.
const OTHERS: [Recipe; 3] = [qcow2("cluster_size=8k", 3500), raw(2500), qcow2("extended_l2=on", 9000)];

/// What the top is rebased to: nothing, a layer below it, another file.
fn target_of(qemu: &Qemu, chain: &Chain, number: usize, seed: u64) -> Option<(PathBuf, bool)> {
    let below = chain.depth() - 1;
    match number.checked_sub(1)? {
        layer if layer < below => Some(chain.files[layer].clone()),
        other => {
            let recipe = &OTHERS[other - below];
            let path = chain.dir.path("other");
            // Mostly what the old backing file has, so that there is something to leave out.
            let old = &chain.files[below.saturating_sub(1)];
            let format = |raw| if raw { "raw" } else { "qcow2" };
            let (from, to) = (format(old.1), format(recipe.raw));
            qemu.img(&["convert", "-f", from, "-O", to, old.0.to_str().unwrap(), path.to_str().unwrap()])
                .ok();
            let size = format!("{}k", recipe.kib);
            qemu.img(&["resize", "-q", "--shrink", "-f", to, path.to_str().unwrap(), &size]).ok();
            scribble(qemu, &path, recipe, &mut Rng::new(seed), false);
            Some((path, recipe.raw))
        }
    }
}

#[test]
fn rebase_keeps_the_disk_over_another_backing_file() {
    let Some(qemu) = Qemu::find() else { return };
    for (number, recipes) in CHAINS.iter().enumerate() {
        let depth = recipes.iter().filter(|r| r.kib > 0).count();
        let seed = number as u64;
        for target in 0..depth + OTHERS.len() {
            let compress = (target + number).is_multiple_of(2);
            let what = format!("chain {number} target {target}");
            let chain = Chain::make(&qemu, recipes, seed);
            let target = target_of(&qemu, &chain, target, seed);
            let want = qemu.guest_bytes(chain.top(), "qcow2", &[]);
            let top = chain.image(0..chain.depth(), true);
            let new = target.as_ref().map(|(path, raw)| open_chain(&chain, path, *raw));
            let backing = target.as_ref().map(|(path, raw)| Backing {
                filename: path.to_str().unwrap().as_bytes().to_vec(),
                format: Some(if *raw { b"raw".to_vec() } else { b"qcow2".to_vec() }),
            });
            let options = RebaseOptions { compress, detect_zeroes: number % 2 == 0, workers: 3 };
            rebase(&top, new.as_ref(), backing.as_ref(), &options, &Job::new())
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            drop((top, new));
            qemu.assert_clean(chain.top());
            let info = qemu.info_json(chain.top());
            let name = target.as_ref().map(|(path, _)| path.to_str().unwrap());
            assert_eq!(info["backing-filename"].as_str(), name, "{what}");
            assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), &what);
        }
    }
}

/// A file of the chain, or another one, with what is below it.
fn open_chain(chain: &Chain, path: &Path, raw: bool) -> Image {
    match chain.files.iter().rev().position(|(file, _)| file == path) {
        Some(depth) => chain.image(depth..chain.depth(), false),
        None => {
            let storage = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
            Image::new(vec![layer(storage, raw, false)]).unwrap()
        }
    }
}

fn sparse(path: &Path) -> Sparse {
    let bytes = std::fs::read(path).unwrap();
    let mut file = Sparse::new(bytes.len() as u64);
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        file.write(n as u64 * 4096, page);
    }
    file
}

/// Chains of two for power cuts: small, so that there are few states and each is read in full.
const SMALL: &[[Recipe; 2]] = &[
    [qcow2("cluster_size=4k", 600), qcow2("cluster_size=4k", 800)],
    [raw(500), qcow2("cluster_size=16k,extended_l2=on", 800)],
    [qcow2("cluster_size=512,refcount_bits=1", 400), qcow2("cluster_size=1k,compat=0.10", 300)],
];

/// Two layers, the base first; with a snapshot in the top where its refcounts can count it.
fn small(qemu: &Qemu, recipes: &[Recipe; 2], seed: u64) -> Chain {
    let chain = Chain::make(qemu, recipes, seed);
    if seed % 2 == 1 {
        qemu.img(&["snapshot", "-c", "one", chain.top().to_str().unwrap()]).ok();
        scribble(qemu, chain.top(), &recipes[1], &mut Rng::new(seed), false);
    }
    chain
}

fn assert_sound(file: &Sparse, what: &str) {
    let storage = RecordingStorage::plain(file.clone());
    let header = read_header(&storage).unwrap_or_else(|e| panic!("{what}: {e}"));
    let report = check(&storage, &header, &CheckOptions::default(), &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what} {report:#?}");
}

/// How qcow2 layers store their data: as it is, or behind a door.
#[derive(Clone, Copy)]
struct Stored(bool);

impl Stored {
    /// The file of a layer that QEMU made, as it is stored.
    fn file(self, path: &Path, raw: bool) -> Sparse {
        let file = sparse(path);
        if self.0 && !raw { scrambled_image(&file) } else { file }
    }

    fn layer(self, storage: Arc<dyn Storage>, raw: bool, writable: bool) -> Box<dyn Layer> {
        layer_behind(self.0.then_some(Arc::new(Scrambling)), storage, raw, writable)
    }

    fn disk(self, files: &[(&Sparse, bool)]) -> Vec<u8> {
        let layers = files
            .iter()
            .map(|(file, raw)| self.layer(Arc::new(RecordingStorage::plain((*file).clone())), *raw, false));
        read(&Image::new(layers.collect()).unwrap())
    }
}

/// Seeds, and how data is stored: behind a door with the first one.
const STORED: [(u64, Stored); 3] = [(0, Stored(false)), (1, Stored(false)), (0, Stored(true))];

#[test]
fn a_power_cut_during_a_commit_leaves_the_disk_as_it_was() {
    let Some(qemu) = Qemu::find() else { return };
    let mut states = 0;
    for (number, recipes) in SMALL.iter().enumerate() {
        for (seed, stored) in STORED {
            let chain = small(&qemu, recipes, seed);
            let want = read(&chain.image(0..2, false));
            let raw = recipes[0].raw;
            let files = vec![stored.file(chain.top(), false), stored.file(&chain.files[0].0, raw)];
            let (mut session, storages) = Session::new(files, Durability::Flush);
            let above = Image::new(vec![stored.layer(storages[0].clone(), false, true)]).unwrap();
            let base = Image::new(vec![stored.layer(storages[1].clone(), raw, true)]).unwrap();
            commit(&above, &base, &CommitOptions { empty: true, workers: 1 }, &Job::new()).unwrap();
            above.close().unwrap();
            base.close().unwrap();
            for state in session.states(seed, 150) {
                let what = format!("chain {number} seed {seed} cut {} {:?}", state.cut, state.shape);
                let got = stored.disk(&[(&state.files[0], false), (&state.files[1], raw)]);
                assert_same(&want, &got, &what);
                assert_sound(&state.files[0], &what);
                if !raw {
                    assert_sound(&state.files[1], &what);
                }
                states += 1;
            }
        }
    }
    assert!(states > 500, "{states}");
}

#[test]
fn a_power_cut_during_a_rebase_leaves_the_disk_over_the_old_or_the_new_backing_file() {
    let Some(qemu) = Qemu::find() else { return };
    let mut states = 0;
    let mut renamed = 0;
    for (number, recipes) in SMALL.iter().enumerate() {
        for (seed, stored) in STORED {
            let chain = small(&qemu, recipes, seed);
            let other = Chain::make(&qemu, &[qcow2("", 700)], seed + 9);
            let want = read(&chain.image(0..2, false));
            let (mut session, storages) =
                Session::new(vec![stored.file(chain.top(), false)], Durability::Flush);
            let old = stored.file(&chain.files[0].0, recipes[0].raw);
            let new = stored.file(other.top(), false);
            let below = |file: &Sparse, raw| {
                stored.layer(Arc::new(RecordingStorage::plain(file.clone())), raw, false)
            };
            let top = stored.layer(storages[0].clone(), false, true);
            let top = Image::new(vec![top, below(&old, recipes[0].raw)]).unwrap();
            let next = Image::new(vec![below(&new, false)]).unwrap();
            // Longer than a sector holds.
            let name = if seed == 0 { "new".to_owned() } else { "n".repeat(400) };
            let backing = Backing { filename: name.clone().into_bytes(), format: Some(b"qcow2".to_vec()) };
            let options = RebaseOptions { compress: seed == 1, detect_zeroes: seed == 0, workers: 1 };
            rebase(&top, Some(&next), Some(&backing), &options, &Job::new()).unwrap();
            for state in session.states(seed, 150) {
                let what = format!("chain {number} seed {seed} cut {} {:?}", state.cut, state.shape);
                let header = read_header(&RecordingStorage::plain(state.files[0].clone())).unwrap();
                let is_new = header.backing_file.as_deref() == Some(name.as_bytes());
                let below = if is_new { (&new, false) } else { (&old, recipes[0].raw) };
                assert_same(&want, &stored.disk(&[(&state.files[0], false), below]), &what);
                assert_sound(&state.files[0], &what);
                states += 1;
                renamed += usize::from(is_new);
            }
        }
    }
    assert!(states > 500 && renamed > 0, "{states} {renamed}");
}

/// Runs `work` with a job that stands still after its first chunk, and cancels it there.
fn cancelled(work: impl FnOnce(&Job) -> Result<()> + Send) {
    let job = Job::new();
    job.set_rate(1);
    let outcome = std::thread::scope(|scope| {
        let running = scope.spawn(|| work(&job));
        while job.progress().0 == 0 {
            std::thread::yield_now();
        }
        job.cancel();
        running.join().unwrap()
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Aborted);
}

#[test]
fn cancelled_half_way_nothing_is_lost() {
    let Some(qemu) = Qemu::find() else { return };
    let chain = Chain::make(&qemu, &[qcow2("", 8192), qcow2("", 8192)], 5);
    let want = qemu.guest_bytes(chain.top(), "qcow2", &[]);
    let (above, base) = (chain.image(0..1, true), chain.image(1..2, true));
    cancelled(|job| commit(&above, &base, &CommitOptions { workers: 1, ..CommitOptions::default() }, job));
    above.close().unwrap();
    base.close().unwrap();
    drop((above, base));
    qemu.assert_clean(chain.top());
    qemu.assert_clean(&chain.files[0].0);
    assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), "after a cancelled commit");

    let other = Chain::make(&qemu, &[qcow2("", 8192)], 6);
    let backing = Backing {
        filename: other.top().to_str().unwrap().as_bytes().to_vec(),
        format: Some(b"qcow2".to_vec()),
    };
    let rebased = |top: &Image, job: &Job| {
        let options = RebaseOptions { workers: 1, ..RebaseOptions::default() };
        rebase(top, Some(&other.image(0..1, false)), Some(&backing), &options, job)
    };
    let top = chain.image(0..2, true);
    cancelled(|job| rebased(&top, job));
    top.close().unwrap();
    drop(top);
    qemu.assert_clean(chain.top());
    assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), "after a cancelled rebase");

    let (above, base) = (chain.image(0..1, true), chain.image(1..2, true));
    commit(&above, &base, &CommitOptions::default(), &Job::new()).unwrap();
    base.close().unwrap();
    above.close().unwrap();
    drop((above, base));
    assert_same(&want, &qemu.guest_bytes(&chain.files[0].0, "qcow2", &[]), "after another commit");
    rebased(&chain.image(0..2, true), &Job::new()).unwrap();
    assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), "after another rebase");
}

#[test]
fn what_is_refused_changes_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let chain = Chain::make(&qemu, &[qcow2("", 1024), qcow2("", 1024), qcow2("cluster_size=512", 1024)], 1);
    let before: Vec<Vec<u8>> = chain.files.iter().map(|(path, _)| std::fs::read(path).unwrap()).collect();
    let job = Job::new();
    let refused = commit(&chain.image(0..2, true), &chain.image(2..3, true), &CommitOptions::default(), &job);
    assert_eq!(refused.unwrap_err().field(), Some("drop"));
    let twice = commit(&chain.image(0..1, true), &chain.image(0..3, true), &CommitOptions::default(), &job);
    assert_eq!(twice.unwrap_err().kind(), ErrorKind::Chain);
    let options = RebaseOptions::default();
    let own = chain.image(0..3, false);
    let backing =
        |name: &str| Backing { filename: name.as_bytes().to_vec(), format: Some(b"qcow2".to_vec()) };
    let looped =
        rebase(&chain.image(0..3, true), Some(&own), Some(&backing("top")), &options, &job).unwrap_err();
    assert_eq!(looped.kind(), ErrorKind::Chain);
    // The header of this image is one cluster of 512 bytes.
    let long =
        rebase(&chain.image(0..3, true), None, Some(&backing(&"n".repeat(400))), &options, &job).unwrap_err();
    assert_eq!((long.kind(), long.field()), (ErrorKind::Limit, Some("backing_file")));
    let storage = FileStorage::open(chain.top(), Access::ReadOnly).unwrap();
    let read_only = set_backing(&storage, None, &CheckOptions::default(), &job).unwrap_err();
    assert_eq!(read_only.kind(), ErrorKind::ReadOnly);
    for ((path, _), before) in chain.files.iter().zip(&before) {
        assert!(std::fs::read(path).unwrap() == *before, "{}", path.display());
    }
    let storage = FileStorage::open(chain.top(), Access::ReadWrite).unwrap();
    set_backing(&storage, Some(&backing("elsewhere")), &CheckOptions::default(), &job).unwrap();
    assert_eq!(read_header(&storage).unwrap().backing_file.as_deref(), Some(&b"elsewhere"[..]));
    set_backing(&storage, None, &CheckOptions::default(), &job).unwrap();
    let header = read_header(&storage).unwrap();
    assert_eq!((header.backing_file.as_deref(), header.backing_format()), (None, None));
}

/// An empty overlay for a disk of this size.
fn new_layer(size: u64) -> Box<dyn Layer> {
    new_layer_in(Arc::new(MemoryStorage::new()), size)
}

fn new_layer_in(storage: Arc<dyn Storage>, size: u64) -> Box<dyn Layer> {
    let options = CreateOptions {
        size,
        backing: Some(Backing { filename: b"below".to_vec(), format: Some(b"qcow2".to_vec()) }),
        ..CreateOptions::default()
    };
    create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
    layer(storage, false, true)
}

/// Data goes to the device while more of it is copied, and what is emptied afterwards makes room in memory for it.
#[test]
fn long_jobs_leave_little_to_the_sync_at_their_end() {
    const DATA: u64 = 32 << 20;
    let counting = || Arc::new(CountingStorage::new(Arc::new(MemoryStorage::new())));
    let calls = |storage: &CountingStorage, op| storage.of(op).calls;
    let (base, top) = (counting(), counting());
    let below = Image::new(vec![new_layer_in(base.clone(), DATA)]).unwrap();
    let above = Image::new(vec![new_layer_in(top.clone(), DATA)]).unwrap();
    above.write_at(Mem::from(&vec![1; DATA as usize][..]), 0).unwrap();
    base.reset();
    commit(&above, &below, &CommitOptions::default(), &Job::new()).unwrap();
    assert!(calls(&base, Op::BeginSync) >= 3, "{} times in a commit", calls(&base, Op::BeginSync));
    assert!(calls(&base, Op::Sync) <= 3, "{} syncs", calls(&base, Op::Sync));
    assert_eq!(top.of(Op::Forget).bytes, DATA);
    above.close().unwrap();
    below.close().unwrap();
    let layers = vec![layer(top.clone(), false, true), layer(base.clone(), false, false)];
    let disk = Image::new(layers).unwrap();
    top.reset();
    rebase(&disk, None, None, &RebaseOptions::default(), &Job::new()).unwrap();
    assert!(calls(&top, Op::BeginSync) >= 3, "{} times in a rebase", calls(&top, Op::BeginSync));
    assert_eq!(calls(&base, Op::Forget), 0, "a backing file is there for others");
}

#[test]
fn an_overlay_takes_over_or_nothing_changes() {
    let Some(qemu) = Qemu::find() else { return };
    let chain = Chain::make(&qemu, &[raw(1000), qcow2("cluster_size=4k", 1000)], 3);
    let image = chain.image(0..2, true);
    let mut want = read(&image);
    let write = |image: &Image, want: &mut Vec<u8>, at: usize, byte: u8| {
        image.write_at(Mem::from(&[byte; 3000][..]), at as u64).unwrap();
        want[at..at + 3000].fill(byte);
    };
    write(&image, &mut want, 5000, 1);
    let failed = || Err(qcow2_engine::Error::new(ErrorKind::Io, "no room"));
    let error = image.put_overlay(failed).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Io);
    write(&image, &mut want, 6000, 2);
    let below = image;
    let make = || {
        assert_same(&want, &read(&chain.image(0..2, false)), "in the file when the overlay is made");
        Ok(new_layer(1000 << 10))
    };
    let image = below.put_overlay(make).unwrap();
    let closed = std::fs::read(chain.top()).unwrap();
    assert_eq!(below.write_at(Mem::from(&[1; 512][..]), 0).unwrap_err().kind(), ErrorKind::Closed);
    assert_same(&want, &read(&image), "under the overlay");
    qemu.assert_clean(chain.top());
    assert_same(&want, &qemu.guest_bytes(chain.top(), "qcow2", &[]), "the former top");
    write(&image, &mut want, 6500, 3);
    image.write_zeroes(100_000, 50_000, true).unwrap();
    want[100_000..150_000].fill(0);
    assert_same(&want, &read(&image), "with the overlay");
    image.close().unwrap();
    assert!(closed == std::fs::read(chain.top()).unwrap(), "not touched since the overlay took over");
}

/// Runs `work` with the call number 0, 1, 2 … of one of two files failing, until it succeeds without a failure.
fn with_faults(
    mut work: impl FnMut(&str, &dyn Fn(usize, Arc<dyn Storage>) -> Arc<dyn Storage>) -> Result<()>,
) {
    for errno in [5, 28] {
        for failing in 0..2 {
            for n in 0.. {
                let fault = Mutex::new(None);
                let wrap = |file: usize, storage: Arc<dyn Storage>| -> Arc<dyn Storage> {
                    if file != failing {
                        return storage;
                    }
                    let faulty = Arc::new(FaultStorage::new(storage, Fault::nth(n, errno)));
                    *fault.lock().unwrap() = Some(Arc::clone(&faulty));
                    faulty
                };
                let what = format!("errno {errno}, call {n} of file {failing}");
                let outcome = work(&what, &wrap);
                let failed = fault.lock().unwrap().as_ref().map_or(0, |faulty| faulty.failed());
                if failed == 0 {
                    outcome.unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert!(n > 3, "{what}");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_failing_call_during_a_commit_loses_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let chain = small(&qemu, &SMALL[0], 1);
    let want = read(&chain.image(0..2, false));
    let files = [sparse(chain.top()), sparse(&chain.files[0].0)];
    with_faults(|what, wrap| {
        let plain = files.clone().map(|file| Arc::new(RecordingStorage::plain(file)));
        let run = || -> Result<()> {
            let open = |file: usize| -> Result<Image> {
                let storage = wrap(file, plain[file].clone());
                let mut layer = Box::new(Qcow2::open(storage, &OpenOptions::default())?) as Box<dyn Layer>;
                layer.enable_writing(WriteOptions::default())?;
                Image::new(vec![layer])
            };
            let (above, base) = (open(0)?, open(1)?);
            let committed = commit(&above, &base, &CommitOptions { empty: true, workers: 1 }, &Job::new());
            committed.and(above.close()).and(base.close())
        };
        let outcome = run();
        let layers = plain.iter().map(|storage| layer(storage.clone(), false, false));
        assert_same(&want, &read(&Image::new(layers.collect()).unwrap()), what);
        for storage in &plain {
            let header = read_header(&**storage).unwrap();
            let report = check(&**storage, &header, &CheckOptions::default(), &Job::new()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what} {report:#?}");
        }
        outcome
    });
}

#[test]
fn a_failing_call_during_a_rebase_loses_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let chain = small(&qemu, &SMALL[0], 0);
    let other = Chain::make(&qemu, &[qcow2("", 700)], 9);
    let want = read(&chain.image(0..2, false));
    let files = [sparse(chain.top()), sparse(other.top())];
    let old = sparse(&chain.files[0].0);
    let backing = Backing { filename: b"new".to_vec(), format: Some(b"qcow2".to_vec()) };
    with_faults(|what, wrap| {
        let plain = files.clone().map(|file| Arc::new(RecordingStorage::plain(file)));
        let below = || layer(Arc::new(RecordingStorage::plain(old.clone())), false, false);
        let run = || -> Result<()> {
            let open = |file: usize| Qcow2::open(wrap(file, plain[file].clone()), &OpenOptions::default());
            let mut top = Box::new(open(0)?) as Box<dyn Layer>;
            top.enable_writing(WriteOptions::default())?;
            let top = Image::new(vec![top, below()])?;
            let new = Image::new(vec![Box::new(open(1)?)])?;
            let options = RebaseOptions { workers: 1, ..RebaseOptions::default() };
            rebase(&top, Some(&new), Some(&backing), &options, &Job::new())
        };
        let outcome = run();
        let header = read_header(&*plain[0]).unwrap();
        let is_new = header.backing_file.as_deref() == Some(b"new");
        let under = if is_new { layer(plain[1].clone(), false, false) } else { below() };
        let disk = Image::new(vec![layer(plain[0].clone(), false, false), under]).unwrap();
        assert_same(&want, &read(&disk), what);
        let report = check(&*plain[0], &header, &CheckOptions::default(), &Job::new()).unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what} {report:#?}");
        outcome
    });
}

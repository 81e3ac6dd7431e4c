//! The time of one request on an image in memory: `cargo bench -p qcow2-engine --bench requests`. The same requests are counted in instructions.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use divan::Bencher;
use divan::counter::ItemsCount;

#[path = "../examples/instructions/work.rs"]
mod work;

fn main() {
    divan::main();
}

#[divan::bench]
fn lookup(bencher: Bencher) {
    let image = work::looked_up();
    let layer = image.top_qcow2().unwrap();
    let (mut segments, mut n) = (Vec::new(), 0);
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        work::lookup(layer, n, &mut segments);
        n += 1;
    });
}

#[divan::bench]
fn read(bencher: Bencher) {
    let image = work::written();
    let (mut buffer, mut n) = ([0; work::BLOCK as usize], 0);
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        work::read(&image, n, &mut buffer);
        n += 1;
    });
}

#[divan::bench]
fn rewrite(bencher: Bencher) {
    let image = work::written();
    let mut n = 0;
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        work::rewrite(&image, n);
        n += 1;
    });
}

/// A thousand new clusters of an empty image, flushes included: more would come to clusters that it has.
#[divan::bench(sample_size = 1, sample_count = 20)]
fn allocate(bencher: Bencher) {
    const REQUESTS: u64 = 1024;
    bencher.counter(ItemsCount::new(REQUESTS)).with_inputs(|| work::open(false)).bench_local_refs(|image| {
        (0..REQUESTS).for_each(|n| work::allocate(image, n));
    });
}

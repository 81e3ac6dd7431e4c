//! A number of requests of one kind: for a counter of instructions (`.ci/instructions`). Two runs of different lengths tell what a
//! request takes, without what making and opening the image took.
//!
//! `cargo run --release -p qcow2-engine --example instructions -- KIND COUNT`
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

mod work;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, count] = &arguments[..] else { panic!("usage: instructions KIND COUNT") };
    let count: u64 = count.parse().unwrap();
    match kind.as_str() {
        "lookup" => {
            let image = work::looked_up();
            let layer = image.top_qcow2().unwrap();
            let mut segments = Vec::new();
            (0..count).for_each(|n| work::lookup(layer, n, &mut segments));
        }
        "read" => {
            let image = work::written();
            let mut buffer = [0; work::BLOCK as usize];
            (0..count).for_each(|n| work::read(&image, n, &mut buffer));
        }
        "rewrite" => {
            let image = work::written();
            (0..count).for_each(|n| work::rewrite(&image, n));
        }
        "allocate" => {
            let image = work::open(false);
            (0..count).for_each(|n| work::allocate(&image, n));
        }
        other => panic!("no kind of request is called {other}"),
    }
}

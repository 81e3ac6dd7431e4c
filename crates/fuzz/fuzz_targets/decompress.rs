//! Any bytes decompress to exactly one cluster or give an error, and what was compressed comes back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2_transform::{Codec, CompressOptions, Compressor, Decompressor};

fuzz_target!(|data: &[u8]| {
    let [choice, input @ ..] = data else {
        return;
    };
    let codec = if choice & 1 == 0 { Codec::Zlib } else { Codec::Zstd };
    let mut cluster = vec![0u8; 512 << (choice >> 1 & 7)];
    let mut decompressor = Decompressor::new(codec).expect("a context");
    // The result of the first read must not depend on what the context read before.
    let first = decompressor.decompress(input, &mut cluster).is_ok();
    let bytes = first.then(|| cluster.clone());
    assert_eq!(decompressor.decompress(input, &mut cluster).is_ok(), first);
    assert!(bytes.is_none_or(|bytes| bytes == cluster));

    let mut plain = input.to_vec();
    plain.resize(cluster.len(), 0);
    let options = CompressOptions { codec, ..CompressOptions::default() };
    let mut compressor = Compressor::new(&options).expect("a context");
    let mut packed = vec![0u8; cluster.len()];
    if let Some(length) = compressor.compress(&plain, &mut packed).expect("compression") {
        assert!(length < cluster.len());
        decompressor.decompress(&packed[..length], &mut cluster).expect("what was compressed decompresses");
        assert!(plain == cluster);
    }
});

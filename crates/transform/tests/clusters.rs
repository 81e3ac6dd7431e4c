//! Whole clusters through both codecs: round trips, streams that other programs wrote, and bytes that nobody meant.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use proptest::prelude::*;
use qcow2_transform::{Codec, CompressOptions, Compressor, Decompressor, Error, Window};

/// The 2048 bytes that the streams below hold.
fn plain() -> Vec<u8> {
    let lines = (0..200u64)
        .flat_map(|i| format!("guest offset {:06} is mapped\n", i * i * 7919 % 999_983).into_bytes());
    lines.take(2048).collect()
}

/// Raw deflate with a 4 KiB window at level 9, as Python's zlib writes it.
const DEFLATE: &str = "7d954b6a1c510c45e759452fe1e92f2dc7e0b6f120c4d0cefea3f6cc905335bde8713fd2adf7bff7c7d7edcfdbdbe3fe\
     753bdfdfede371fbfdf2f9797ffdf5fe13ad9141d4242b112dd1124245b38e233a3515846ac7699cb5ee2546689c6c41\
     cee9e2867a9f5eb057132d83b3e2c7c290b3b56923e7507154542d358a2968e9343bd9a9e87364d4a0de8eae4145cfcd\
     08e4eca366fcf27ae1852ff728ef64e45a856e8c8f3ba71066cae9971dc3cdd1d3c13e67ccf4c52dd485a294cd105f96\
     b34b897a536d949d0c0f41b4ce19de494d93c11beccd80f5ba852aa6703cce41745b23b9374c74614c3fc7acf8f6d573\
     f842af9a61174379632bb2b9277d493167f51de6eb166b57eeab6af639662f1415b9d87ecccadbb137cef340837b322c\
     936f7f6d66453a1adcde365bc2dc0ce97ca1fb47b9ca68d78e59b98b38cf9a1c6b46b728198d36bbd89c284e3fbca7ff\
     37fb0f";

/// The same without a final block: the stream ends in the empty stored block of a sync flush.
const DEFLATE_UNFINISHED: &str = "7c954b6a1c510c45e759452fe1e92f2dc7e0b6f120c4d0cefea3f6cc905335bde8713fd2adf7bff7c7d7edcfdbdbe3fe\
     753bdfdfede371fbfdf2f9797ffdf5fe13ad9141d4242b112dd1124245b38e233a3515846ac7699cb5ee2546689c6c41\
     cee9e2867a9f5eb057132d83b3e2c7c290b3b56923e7507154542d358a2968e9343bd9a9e87364d4a0de8eae4145cfcd\
     08e4eca366fcf27ae1852ff728ef64e45a856e8c8f3ba71066cae9971dc3cdd1d3c13e67ccf4c52dd485a294cd105f96\
     b34b897a536d949d0c0f41b4ce19de494d93c11beccd80f5ba852aa6703cce41745b23b9374c74614c3fc7acf8f6d573\
     f842af9a61174379632bb2b9277d493167f51de6eb166b57eeab6af639662f1415b9d87ecccadbb137cef340837b322c\
     936f7f6d66453a1adcde365bc2dc0ce97ca1fb47b9ca68d78e59b98b38cf9a1c6b46b728198d36bbd89c284e3fbca7ff\
     37fb0f0000ffff";

/// What the `zstd` program writes from a pipe: a frame of 1000 bytes without its size, with a checksum, that asks for a
/// window of 128 MiB; a skippable frame of three bytes; a frame of 1048 bytes without a checksum.
const ZSTD_FRAMES: &str = "28b52ffd0488fd0400524d1f14a0a9d899fd86ad1d008ecf14d9bd9307359c1a013d2ff4556867afa4ff32bf2cb591b9\
     7b676a86e8f4926875f6e6913b96999e5876c6f9b92cbfb2aa9a5dbf57e98f3e125be58e67a646883f5d17397f1f2299\
     d126c5117bc8526eddef246725af3cc3ce38e70f2038108880c148140c311447623038188ac4b1200422a810468cde58\
     03e03703113404ef106e08ed077275c940ec3e0856022b055be507cc502a4d180300000061626328b52ffd0058150600\
     924d2016902769039c7d850a59ceff8f9b52d2ce146bb2ab3527f76bd5eae4556d6629c376a615f349dd6bd7d54fbbe8\
     64749667b3eaf5a14bf55a22c9e9cbf63abb518f2374ae12f9dace655632851df22ed546de170b0d2b16b348554854ec\
     1c4daf1f9a8e2e6253ad19c540100806a3208683010081a15008281804c1303ac9a318022220c0338a0db45e88ad2f7a\
     d1b6e80cd9e39419600116b080052cc10216b03c58d66c021605cbad4dc0029645070b58c002168b060b58c082c1e2b0\
     b427";
fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn inflate(codec: Codec, input: &[u8], length: usize) -> Result<Vec<u8>, Error> {
    let mut output = vec![0xa5; length];
    Decompressor::new(codec).unwrap().decompress(input, &mut output).map(|()| output)
}

fn deflate(options: CompressOptions, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut output = vec![0; cluster.len()];
    let length = Compressor::new(&options).unwrap().compress(cluster, &mut output).unwrap()?;
    output.truncate(length);
    Some(output)
}

/// Bytes that do not shrink.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn reads_streams_of_other_programs() {
    for stream in [DEFLATE, DEFLATE_UNFINISHED] {
        assert!(inflate(Codec::Zlib, &bytes(stream), 2048).unwrap() == plain());
    }
    assert!(inflate(Codec::Zstd, &bytes(ZSTD_FRAMES), 2048).unwrap() == plain());
}

#[test]
fn trailing_bytes_are_ignored() {
    for (codec, stream) in
        [(Codec::Zlib, DEFLATE), (Codec::Zlib, DEFLATE_UNFINISHED), (Codec::Zstd, ZSTD_FRAMES)]
    {
        for tail in [vec![0; 511], noise(700, 3)] {
            let mut input = bytes(stream);
            input.extend_from_slice(&tail);
            assert!(inflate(codec, &input, 2048).unwrap() == plain(), "{codec:?}");
        }
    }
}

#[test]
fn a_longer_deflate_stream_fills_the_cluster() {
    for length in [1, 512, 1024, 2047] {
        assert!(inflate(Codec::Zlib, &bytes(DEFLATE), length).unwrap() == plain()[..length]);
    }
}

#[test]
fn a_zstd_frame_beyond_the_cluster_is_refused() {
    assert!(inflate(Codec::Zstd, &bytes(ZSTD_FRAMES), 1000).unwrap() == plain()[..1000]);
    for length in [512, 1024] {
        let error = inflate(Codec::Zstd, &bytes(ZSTD_FRAMES), length).unwrap_err();
        assert!(matches!(error, Error::Corrupt { codec: "zstd", .. }), "{error}");
    }
}

#[test]
fn a_short_stream_is_refused() {
    let short = |codec| Error::Short { codec, actual: 2048, expected: 4096 };
    assert_eq!(inflate(Codec::Zlib, &bytes(DEFLATE), 4096).unwrap_err(), short("zlib"));
    assert_eq!(inflate(Codec::Zstd, &bytes(ZSTD_FRAMES), 4096).unwrap_err(), short("zstd"));
    for codec in [Codec::Zlib, Codec::Zstd] {
        assert!(inflate(codec, &[], 512).is_err());
    }
}

#[test]
fn every_truncation_is_an_error() {
    for (codec, stream) in [(Codec::Zlib, DEFLATE), (Codec::Zstd, ZSTD_FRAMES)] {
        let input = bytes(stream);
        for length in 0..input.len() - 1 {
            // The last byte of a deflate stream may hold no more than the end marker, which is not needed.
            if let Ok(output) = inflate(codec, &input[..length], 2048) {
                assert!(
                    codec == Codec::Zlib && length + 2 >= input.len() && output == plain(),
                    "{codec:?} {length}"
                );
            }
        }
    }
}

#[test]
fn what_does_not_shrink_is_left_alone() {
    for codec in [Codec::Zlib, Codec::Zstd] {
        for window in [Window::Full, Window::Qemu4KiB] {
            for length in [512, 4096, 65536, 2 << 20] {
                let options = CompressOptions { codec, level: None, window };
                assert!(deflate(options, &noise(length, 9)).is_none(), "{codec:?} {length}");
            }
        }
    }
}

#[test]
fn a_result_of_cluster_size_is_refused_and_one_byte_less_is_taken() {
    // The cluster ends in as many zeroes as make the stream just fit: walk over the edge and compare with an
    // unlimited buffer.
    for codec in [Codec::Zlib, Codec::Zstd] {
        let mut seen = [false; 2];
        for zeroes in 0..64 {
            let mut cluster = noise(512, 77);
            let start = 512 - zeroes;
            cluster[start..].fill(0);
            match deflate(CompressOptions { codec, ..Default::default() }, &cluster) {
                Some(stream) => {
                    assert!(stream.len() < 512);
                    assert!(inflate(codec, &stream, 512).unwrap() == cluster);
                    seen[0] = true;
                }
                None => seen[1] = true,
            }
        }
        assert_eq!(seen, [true; 2]);
    }
}

#[test]
fn the_4kib_window_refers_no_further() {
    // Noise that repeats after 20 KiB shrinks only for who can refer to it.
    let mut cluster = noise(20 << 10, 5);
    cluster.extend_from_within(..);
    cluster.resize(64 << 10, 0);
    for level in [1, 6, 9, 12] {
        let qemu = CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Qemu4KiB };
        let small = deflate(qemu, &cluster).unwrap();
        assert!(small.len() > 40 << 10);
        assert!(inflate(Codec::Zlib, &small, cluster.len()).unwrap() == cluster);
        let full = deflate(CompressOptions { window: Window::Full, ..qemu }, &cluster).unwrap();
        assert!(full.len() < 22 << 10);
    }
}

#[test]
fn levels_out_of_range_are_refused() {
    for (codec, level, max) in
        [(Codec::Zlib, 0, 12), (Codec::Zlib, 13, 12), (Codec::Zstd, 0, 22), (Codec::Zstd, 23, 22)]
    {
        for window in [Window::Full, Window::Qemu4KiB] {
            let error =
                Compressor::new(&CompressOptions { codec, level: Some(level), window }).err().unwrap();
            assert_eq!(error, Error::InvalidLevel { codec: codec.name(), level, max });
        }
    }
    assert_eq!(Codec::from_compression_type(2), Err(Error::UnknownCodec(2)));
    for codec in [Codec::Zlib, Codec::Zstd] {
        assert_eq!(Codec::from_compression_type(codec.compression_type()), Ok(codec));
    }
}

#[test]
fn contexts_survive_errors_and_reuse() {
    for codec in [Codec::Zlib, Codec::Zstd] {
        let mut compressor = Compressor::new(&CompressOptions { codec, ..Default::default() }).unwrap();
        let mut decompressor = Decompressor::new(codec).unwrap();
        let (mut stream, mut output) = (vec![0; 65536], vec![0; 65536]);
        for round in 0..20u8 {
            let mut cluster = vec![round; 65536];
            cluster[..512].copy_from_slice(&noise(512, round.into()));
            assert_eq!(compressor.compress(&noise(65536, round.into()), &mut stream), Ok(None));
            let length = compressor.compress(&cluster, &mut stream).unwrap().unwrap();
            assert!(decompressor.decompress(&stream[..length / 2], &mut output).is_err());
            decompressor.decompress(&stream[..length], &mut output).unwrap();
            assert!(output == cluster);
        }
    }
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    let cluster_size = (9u32..=21).prop_map(|bits| 1usize << bits);
    (cluster_size, 0..5u8, any::<u64>()).prop_map(|(length, class, seed)| {
        let random = noise(length, seed);
        match class {
            0 => vec![0; length],
            1 => vec![seed as u8; length],
            2 => random,
            3 => random.iter().map(|b| b"the cluster is mapped "[usize::from(*b) % 22]).collect(),
            _ => random
                .chunks(512)
                .flat_map(|c| if c[0] < 128 { vec![0; c.len()] } else { c.to_vec() })
                .collect(),
        }
    })
}

fn options() -> impl Strategy<Value = CompressOptions> {
    let zlib = (1..=12u32, any::<bool>()).prop_map(|(level, full)| CompressOptions {
        codec: Codec::Zlib,
        level: Some(level),
        window: if full { Window::Full } else { Window::Qemu4KiB },
    });
    let zstd = (1..=9u32).prop_map(|level| CompressOptions {
        codec: Codec::Zstd,
        level: Some(level),
        ..Default::default()
    });
    prop_oneof![zlib, zstd]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn round_trip(cluster in content(), options in options(), tail in 0..600usize) {
        if let Some(mut stream) = deflate(options, &cluster) {
            prop_assert!(stream.len() < cluster.len());
            stream.resize(stream.len() + tail, 0);
            prop_assert!(inflate(options.codec, &stream, cluster.len()).unwrap() == cluster);
        } else {
            prop_assert!(cluster.iter().any(|b| *b != cluster[0]), "a constant cluster shrinks");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes_give_a_value_or_an_error(input in proptest::collection::vec(any::<u8>(), 0..1024), bits in 9u32..=16) {
        for codec in [Codec::Zlib, Codec::Zstd] {
            let _ = inflate(codec, &input, 1 << bits);
        }
    }

    #[test]
    fn damaged_streams_give_a_value_or_an_error(place in 0..700usize, mask in 1..=255u8, bits in 9u32..=12) {
        for (codec, stream) in [(Codec::Zlib, DEFLATE), (Codec::Zstd, ZSTD_FRAMES)] {
            let mut input = bytes(stream);
            let place = place % input.len();
            input[place] ^= mask;
            let _ = inflate(codec, &input, 1 << bits);
        }
    }
}

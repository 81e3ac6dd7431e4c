//! Payloads of compressed clusters, in every shape that a reader must accept or refuse.

use std::io::{Read, Write};

use flate2::{Compress, Compression, FlushCompress, read::DeflateDecoder, write::DeflateEncoder};

/// Raw deflate (RFC 1951, no zlib header), full window, complete stream.
pub fn deflate(data: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Raw deflate of stored blocks only, as written by hand: each block a 5-byte header and up to 65535 bytes.
pub fn deflate_stored(data: &[u8]) -> Vec<u8> {
    let blocks: Vec<&[u8]> = data.chunks(0xffff).collect();
    let mut out = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        let len = block.len() as u16;
        out.push(u8::from(i + 1 == blocks.len()));
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&(!len).to_le_bytes());
        out.extend_from_slice(block);
    }
    out
}

/// Raw deflate that yields all of `data` but never ends: no final block. A complete cluster is enough.
pub fn deflate_without_end(data: &[u8]) -> Vec<u8> {
    let mut encoder = Compress::new(Compression::default(), false);
    let mut out = Vec::with_capacity(data.len() + 1024);
    encoder.compress_vec(data, &mut out, FlushCompress::Sync).unwrap();
    assert_eq!(encoder.total_in(), data.len() as u64);
    out
}

/// Inflates raw deflate up to `limit` bytes of output; whatever comes out before an error or the end.
pub fn inflate(payload: &[u8], limit: usize) -> Vec<u8> {
    let mut out = vec![0; limit];
    let mut decoder = DeflateDecoder::new(payload);
    let mut filled = 0;
    while filled < limit {
        match decoder.read(&mut out[filled..]) {
            Ok(0) | Err(_) => break,
            Ok(n) => filled += n,
        }
    }
    out.truncate(filled);
    out
}

/// zstd of `data` cut into `frames` frames, one behind the other.
pub fn zstd(data: &[u8], frames: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for part in data.chunks(data.len().div_ceil(frames)) {
        let mut frame = Vec::with_capacity(zstd_safe::compress_bound(part.len()));
        zstd_safe::compress(&mut frame, part, 3).unwrap();
        out.extend_from_slice(&frame);
    }
    out
}

/// zstd frames decoded up to `limit` bytes of output; whatever comes out before an error or the end.
pub fn unzstd(payload: &[u8], limit: usize) -> Vec<u8> {
    let mut context = zstd_safe::DCtx::create();
    let mut out = vec![0u8; limit];
    let mut input = zstd_safe::InBuffer::around(payload);
    let mut filled = 0;
    while filled < limit && input.pos() < payload.len() {
        let mut output = zstd_safe::OutBuffer::around(&mut out[filled..]);
        let result = context.decompress_stream(&mut output, &mut input);
        let produced = output.pos();
        filled += produced;
        // 0 is the end of a frame; another may follow.
        if result.is_err() || (produced == 0 && result != Ok(0)) {
            break;
        }
    }
    out.truncate(filled);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn every_shape_decodes_to_the_data() {
        let data = Rng::new(1).text(200_000);
        for payload in [deflate(&data), deflate_stored(&data), deflate_without_end(&data)] {
            assert!(inflate(&payload, data.len()) == data);
        }
        for frames in [1, 2, 7] {
            assert!(unzstd(&zstd(&data, frames), data.len()) == data, "{frames} frames");
        }
    }
}

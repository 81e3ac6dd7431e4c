//! Tables of 64-bit words: what L1, L2, refcount and bitmap tables are in the file.

/// The words of a table's bytes in the machine's byte order; a trailing part of a word is dropped.
pub fn iter(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}

/// As [`iter`], collected.
pub fn decode(bytes: &[u8]) -> Vec<u64> {
    iter(bytes).collect()
}

/// The bytes of a table.
pub fn encode(words: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    append(&mut bytes, words);
    bytes
}

/// Appends the bytes of a part of a table.
pub fn append(bytes: &mut Vec<u8>, words: &[u64]) {
    let start = bytes.len();
    bytes.resize(start + words.len() * 8, 0);
    let (slots, _) = bytes.get_mut(start..).unwrap_or_default().as_chunks_mut::<8>();
    slots.iter_mut().zip(words).for_each(|(slot, word)| *slot = word.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_big_endian() {
        let words = [1, 0x0102_0304_0506_0708];
        let bytes = [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(encode(&words), bytes);
        assert_eq!(decode(&bytes), words);
        let mut more = bytes.to_vec();
        append(&mut more, &words);
        assert_eq!(more, [bytes, bytes].concat());
        assert_eq!(decode(&bytes[..15]), [1]);
        assert_eq!(decode(&[]), [0u64; 0]);
    }
}

//! Any bytes give a header or an error, and a header that was read survives being written.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use qcow2_format::Header;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(header) = Header::parse(data) else {
        return Corpus::Keep;
    };
    // What was read from one cluster can need more once padding is written as the specification asks.
    let Ok(bytes) = header.encode() else {
        return Corpus::Keep;
    };
    let mut again = Header::parse(&bytes).expect("a written header parses");
    // Only its length may change: known fields are written in full.
    again.header_length = header.header_length;
    assert_eq!(again, header);
    Corpus::Keep
});

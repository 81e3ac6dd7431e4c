//! Every pair of words decodes to a mapping or an error, in every geometry, and a mapping encodes to itself.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qcow2_format::{Geometry, L2Entry, L2Mapping, SubclusterBitmap};

#[derive(Debug, Arbitrary)]
struct Input {
    cluster_bits: u8,
    refcount_order: u8,
    extended: bool,
    old: bool,
    external: bool,
    entries: Vec<(u64, u64)>,
}

fuzz_target!(|input: Input| {
    let Ok(geometry) =
        Geometry::new(u32::from(input.cluster_bits), u32::from(input.refcount_order), input.extended)
    else {
        return;
    };
    let version = if input.old && !input.extended { 2 } else { 3 };
    for (word, bitmap) in input.entries {
        let bitmap = SubclusterBitmap(if input.extended { bitmap } else { 0 });
        let Ok(mapping) = (L2Entry { word, bitmap }).decode(&geometry, version, input.external) else {
            continue;
        };
        if let L2Mapping::Compressed(descriptor) = mapping {
            assert!(descriptor.offset.0 >> geometry.compressed_offset_bits() == 0);
            assert!(descriptor.end() - descriptor.offset.0 == descriptor.max_length());
        }
        let again = mapping.encode(&geometry).decode(&geometry, version, input.external);
        assert_eq!(again.expect("an encoded mapping decodes"), mapping);
    }
});

//! Checking a damaged image ends with a report, whatever the damage, and says the same twice.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2_engine::Job;
use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::image::read_header;
use qcow2_engine::storage::MemoryStorage;
use qcow2_fuzz::Damaged;

fuzz_target!(|image: Damaged| {
    let storage = MemoryStorage::from_bytes(&image.file());
    let Ok(header) = read_header(&storage) else {
        return;
    };
    let run = |readers| {
        let options = CheckOptions { readers, max_findings: 100, ..CheckOptions::default() };
        check(&storage, &header, &options, &Job::new())
            .map(|report| (report.corruptions, report.leaks, report.check_errors))
            .map_err(|error| error.kind().code())
    };
    assert_eq!(run(0), run(2), "the result depends on the threads");
});

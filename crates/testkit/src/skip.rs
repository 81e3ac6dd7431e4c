//! Tests that cannot run here say so.

use std::fmt::Display;
use std::io::Write;

/// A line on standard error: the caller skips what it is about, and why.
#[track_caller]
pub fn skipped(why: impl Display) {
    let place = std::panic::Location::caller();
    let line = format!("SKIPPED {}:{}: {why}\n", place.file(), place.line());
    // Not eprintln: the test harness captures that.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

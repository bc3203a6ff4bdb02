//! ttrpc frames as `bulkhead agent record` sees them: a program, so its file is included.
#![no_main]

#[path = "../../crates/ctl/src/agent/frames.rs"]
mod frames;

libfuzzer_sys::fuzz_target!(|data: &[u8]| frames::fuzz(data));

//! The file that `bulkhead agent replay` reads: of a program, so its files are included.
#![no_main]
#![allow(dead_code)]

#[path = "../../crates/ctl/src/agent/api.rs"]
mod api;
#[path = "../../crates/ctl/src/agent/json.rs"]
mod json;
#[path = "../../crates/ctl/src/agent/trace.rs"]
mod trace;

libfuzzer_sys::fuzz_target!(|data: &[u8]| trace::fuzz(data));

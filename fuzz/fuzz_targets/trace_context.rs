#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bulkhead_agent::fuzz::trace_context(data));

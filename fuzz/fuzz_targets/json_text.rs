#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bulkhead_agent::fuzz::json_text(data));

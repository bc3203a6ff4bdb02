#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bulkhead_executor::fuzz::container_user(data));

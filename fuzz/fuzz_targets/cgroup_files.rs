#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bulkhead_executor::fuzz::cgroup_files(data));

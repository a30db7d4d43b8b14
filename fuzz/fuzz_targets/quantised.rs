#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| epsmoe_fuzz::quantised(bytes));

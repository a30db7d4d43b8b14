#![no_main]

use std::panic;

// Panics of the tokenizer's library are caught and become errors, so a panic must not end the process where it
// happens; one that comes out of the target still does.
libfuzzer_sys::fuzz_target!(
    init: panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| epsmoe_fuzz::tokenizer(bytes)
);

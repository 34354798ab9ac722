#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| node_image_pivot::import::fuzzing::plain(data));

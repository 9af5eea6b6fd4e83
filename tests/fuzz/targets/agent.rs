#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mayfly_agent_protocol::fuzz::agent(data));

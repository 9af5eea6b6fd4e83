//! Where a PC has its battery-backed clock: two ports of which every register reads as 0, and nothing else.
//!
//! Guests get the time from KVM's clock. There are some that look at this one all the same when they start, without
//! asking whether it is there, and wait until it says that no update is in progress (register A, bit 7): what is
//! not there reads as ones, and they would wait for ever. A clock of zeros is in the 12-hour mode, which Linux
//! refuses to drive, so that none is made of it.
//!
//! It has no state, is used on vCPU threads, and waits for nothing.

use crate::bus::{Registers, Written};

/// The two ports: which register, and what is in it.
#[derive(Debug)]
pub struct Cmos;

impl Registers for Cmos {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Written {
        Written::Done
    }
}

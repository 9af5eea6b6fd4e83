#!/usr/bin/env bash
# Finding: vm-superio 0.8.2, Serial: a write to the FIFO control register changes nothing, the receiver's clear included.
#
# Version:  vm-superio 0.8.2
# Expected: bit 1 of FCR empties the receiver's FIFO (a driver writes it while it sets the port up, to drop what came
#           before); bit 0 switches the FIFOs, and with them the top bits of IIR; a 16550's FIFO holds 16 bytes.
# Seen:     bytes queued before the clear are read after it; IIR reports FIFOs that were never enabled; the FIFO takes 64.
# So:       a driver that clears the FIFO to drop what came before it still gets those bytes, and one that reads only
#           until it believes the FIFO empty loses some of them. A monitor has to act on FCR itself, and to hold input
#           back until the driver listens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"
[dependencies]
vm-superio = "=0.8.2"
TOML
cat >"$work/src/main.rs" <<'RUST'
use std::io;
use vm_superio::{Serial, Trigger};

struct NoLine;
impl Trigger for NoLine {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

const DATA: u8 = 0;
const FCR_AND_IIR: u8 = 2;
const LSR: u8 = 5;

fn main() {
    let mut uart = Serial::new(NoLine, io::sink());
    println!("IIR before any write to FCR: {:#04x}", uart.read(FCR_AND_IIR));
    uart.enqueue_raw_bytes(b"old").unwrap();
    uart.write(FCR_AND_IIR, 0b0000_0111).unwrap();
    println!("data ready after the clear: {}", uart.read(LSR) & 1);
    println!("first byte after the clear: {}", uart.read(DATA) as char);
    println!("room: {}", uart.fifo_capacity());
}
RUST
seen=$(cd "$work" && cargo run --quiet)
expected="IIR before any write to FCR: 0xc1
data ready after the clear: 1
first byte after the clear: o
room: 62"
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "changed: this is no longer what the crate does" >&2; exit 1; }

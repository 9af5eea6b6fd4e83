#!/usr/bin/env bash
# Finding: vm-superio 0.8.2, Serial: the interrupt identification register is not what a 16550's data sheet says.
#
# Version:  vm-superio 0.8.2
# Expected: IIR tells the one pending source of the highest priority; reading it acknowledges the transmitter's
#           interrupt and nothing else; "received data available" stays until the data are read.
# Seen:     with both pending IIR reads 0xC6 (the code of "receiver line status" in the data sheet), and the next read
#           0xC1 (nothing pending) though a byte still waits.
# So:       a driver that serves one source for each read of IIR, and trusts its code, never learns of the byte until the
#           next one arrives. A monitor that wants the data sheet's register derives it in front of the crate.
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
const IER: u8 = 1;
const IIR: u8 = 2;
const LSR: u8 = 5;

fn main() {
    let mut uart = Serial::new(NoLine, io::sink());
    uart.write(IER, 0x03).unwrap();
    uart.enqueue_raw_bytes(b"x").unwrap();
    uart.write(DATA, b'y').unwrap();
    println!("IIR with both pending: {:#04x}", uart.read(IIR));
    println!("data ready: {}", uart.read(LSR) & 1);
    println!("IIR read again: {:#04x}", uart.read(IIR));
    println!("byte that waited: {}", uart.read(DATA) as char);
}
RUST
seen=$(cd "$work" && cargo run --quiet)
expected="IIR with both pending: 0xc6
data ready: 1
IIR read again: 0xc1
byte that waited: x"
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "changed: this is no longer what the crate does" >&2; exit 1; }

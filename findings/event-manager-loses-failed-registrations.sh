#!/usr/bin/env bash
# Finding: event-manager 0.4.2: a subscriber whose descriptors could not be registered is added as if they had been.
#
# Version:  event-manager 0.4.2, vmm-sys-util 0.15.0
# Expected: add_subscriber runs the subscriber's init, in which it registers its descriptors; if that fails, whoever adds
#           it learns of it, or the manager has no such subscriber.
# Seen:     EventOps::add returns the error to init, which returns nothing; add_subscriber returns an id all the same, and
#           the subscriber stays in the manager, never to be called.
# So:       a device whose descriptor cannot be watched (a regular file, here; in production a limit on epoll watches) is
#           silently deaf. The subscriber has to keep the error in itself, and its owner to ask for it after adding it.
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
event-manager = "=0.4.2"
vmm-sys-util = "=0.15.0"
TOML
cat >"$work/src/main.rs" <<'RUST'
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps,
};
use std::fs::File;

struct Device {
    file: File,
}

impl MutEventSubscriber for Device {
    fn init(&mut self, ops: &mut EventOps) {
        // epoll takes no regular files: EPERM.
        let added = ops.add(Events::new(&self.file, EventSet::IN));
        println!("registering failed in init: {}", added.is_err());
    }
    fn process(&mut self, _: Events, _: &mut EventOps) {
        println!("called");
    }
}

fn main() {
    let mut manager = EventManager::<Device>::new().unwrap();
    let id = manager.add_subscriber(Device { file: File::open("Cargo.toml").unwrap() });
    println!("the manager has the subscriber: {}", manager.subscriber_mut(id).is_ok());
    println!("events in 10 ms: {}", manager.run_with_timeout(10).unwrap());
}
RUST
seen=$(cd "$work" && cargo run --quiet)
expected="registering failed in init: true
the manager has the subscriber: true
events in 10 ms: 0"
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "changed: this is no longer what the crate does" >&2; exit 1; }

//! Linux with ACPI is told that its generation ID has changed, with the chips in either place.

use std::io::Read;
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::arch::generation;
use crate::arch::i8042::{I8042, I8042State};
use crate::arch::split::{Lines, SplitChipsState};
use crate::bus::{Bus, Written};
use crate::inbox::inbox;
use crate::serial::{self, SerialEvent, SerialMessage, Streams, UartState};
use crate::sys::fd;

/// What Linux says when it has taken new random numbers.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// Everything up to the first instruction of the Linux guest that has ACPI; its console is read
/// from the first file, and typed at by the second.
fn linux(kvm: &Kvm, chips: Chips) -> (Machine, Buses, [File; 2]) {
    let folder = needs::guest_folder();
    let open = |name: &str| File::open(folder.join(name)).unwrap();
    let mut memory = Memory::anonymous(128).unwrap();
    let kernel = Kernel::read(&open("stock-like/vmlinux"), "kernel").unwrap();
    let args = std::fs::read_to_string(folder.join("stock-like/cmdline")).unwrap();
    let args = args.replace("quiet", "loglevel=6 random.trust_bootloader=on");
    let line = command_line(
        &format!("{} mayfly.run=echo,reboot", args.trim()),
        None,
        &[],
    );
    let told = boot::Told {
        command_line: &line.unwrap(),
        vcpus: 1,
        devices: &[],
        seed: &[1; 32],
        generation_id: [1; 16],
    };
    let initrd = open("initramfs.cpio");
    // By this one it gets a seed, without which it has no random numbers to renew for long.
    let protocol = Some(Protocol::Linux64);
    let entry = boot::load(
        &mut memory,
        &kernel,
        Some((&initrd, "initrd")),
        protocol,
        &told,
    )
    .unwrap();
    let vm = Arc::new(Vm::new(kvm, &memory, false, chips).unwrap());
    let vcpu = vm.create_vcpu(0).unwrap();
    let table = cpuid::table(&cpuid::supported(kvm).unwrap(), 0, 1, false);
    let table = cpuid::with_rates(&table, vcpu.get_tsc_khz().unwrap());
    vcpu::prepare(&vcpu, &table).unwrap();
    vcpu::enter(&vcpu, &entry).unwrap();
    let (buses, files) = Buses::new(&vm, chips);
    let machine = Machine {
        entry,
        vcpus: vec![vcpu],
        vm,
        memory,
    };
    (machine, buses, files)
}

struct Buses {
    memory: Bus,
    ports: Bus,
    lines: Lines,
}

impl Buses {
    fn new(vm: &Arc<Vm>, chips: Chips) -> (Self, [File; 2]) {
        let (mut memory, mut ports) = (Bus::new(), Bus::new());
        let state = SplitChipsState::default();
        let lines = Lines::place(chips, &state, vm, &mut memory, &mut ports).unwrap();
        let line = |gsi| {
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            lines.connect(&line, gsi).unwrap();
            line
        };
        let (input, keyboard) = fd::pipe().unwrap();
        let (screen, output) = fd::pipe().unwrap();
        let (sender, messages) = inbox::<SerialMessage>(4).unwrap();
        let (events, _) = inbox::<SerialEvent>(4).unwrap();
        let streams = Streams {
            input: Some(input),
            output,
            limit: None,
            socket: None,
        };
        let (uart, console) = serial::console(
            &UartState::default(),
            line(layout::SERIAL_GSI),
            streams,
            messages,
            events.outbox(),
        )
        .unwrap();
        ports
            .insert(layout::SERIAL_PORT, serial::PORTS, uart)
            .unwrap();
        thread::spawn(move || {
            let _sender = sender;
            console.run()
        });
        let i8042 = I8042::new(&I8042State::default(), line(layout::I8042_GSI)).unwrap();
        let i8042 = Arc::new(i8042);
        for port in layout::I8042_PORTS {
            let offset = port - layout::I8042_PORTS[0];
            ports.insert_part(port, 1, offset, i8042.clone()).unwrap();
        }
        let buses = Buses {
            memory,
            ports,
            lines,
        };
        (buses, [screen, keyboard])
    }

    /// Runs the guest until it resets its machine.
    fn run(&self, vcpu: &Vcpu) {
        loop {
            match vcpu.run().unwrap() {
                Exit::PortRead(access) => {
                    for i in 0..access.count {
                        let mut data = [0; 4];
                        let data = &mut data[..access.unit];
                        self.ports.read(access.port.into(), data);
                        vcpu.answer_port(access, i, data);
                    }
                }
                Exit::PortWrite(access) => {
                    for i in 0..access.count {
                        let data = &vcpu.port_data(access, i)[..access.unit];
                        match self.ports.write(access.port.into(), data) {
                            Written::MachineReset => return,
                            written => assert!(matches!(written, Written::Done)),
                        }
                    }
                }
                Exit::MemoryRead { address, len } => {
                    let mut data = [0; 8];
                    self.memory.read(address, &mut data[..len]);
                    vcpu.answer_memory(&data[..len]);
                }
                Exit::MemoryWrite { address, data, len } => {
                    let written = self.memory.write(address, &data[..len]);
                    assert!(matches!(written, Written::Done));
                }
                Exit::Interrupted | Exit::EndOfInterrupt => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Adds to `seen` what the guest prints, until that has `text`.
fn expect(screen: &mut File, seen: &mut String, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(600);
    while !seen.contains(text) {
        assert!(Instant::now() < deadline, "no `{text}`: {seen}");
        let mut bytes = [0; 4096];
        match screen.read(&mut bytes) {
            Ok(count) => {
                let text = String::from_utf8_lossy(&bytes[..count]);
                print!("{text}");
                seen.push_str(&text);
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

#[test]
fn linux_when_notified_of_a_new_generation_id_takes_new_random_numbers() {
    needs!(kvm, guest);
    reseeds(Chips::Split);
}

#[test]
fn linux_when_notified_by_kvms_own_chips_takes_new_random_numbers() {
    needs!(kvm, guest);
    reseeds(Chips::Kernel);
}

fn reseeds(chips: Chips) {
    let kvm = Kvm::new().unwrap();
    let (mut machine, buses, [mut screen, mut keyboard]) = linux(&kvm, chips);
    let (vcpu, buses) = (machine.vcpus.remove(0), Arc::new(buses));
    let for_vcpu = Arc::clone(&buses);
    let running = thread::spawn(move || for_vcpu.run(&vcpu));
    let mut seen = String::new();
    expect(&mut screen, &mut seen, "mayfly-guest: echo ready");
    // Without a new ID a notification changes nothing.
    generation::notify(&buses.lines).unwrap();
    for count in 1..=2 {
        generation::renew(&machine.memory).unwrap();
        assert!(!seen.contains(RESEEDED), "{chips:?}, {count}: {seen}");
        generation::notify(&buses.lines).unwrap();
        expect(&mut screen, &mut seen, RESEEDED);
        seen.clear();
    }
    keyboard.write_all(b"over\n").unwrap();
    // What its first process said before may still be on its way when the kernel restarts.
    expect(&mut screen, &mut seen, "reboot: Restarting system");
    assert!(!seen.contains(RESEEDED), "{chips:?}: {seen}");
    running.join().unwrap();
}

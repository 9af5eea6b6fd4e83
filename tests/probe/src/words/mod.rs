//! The words of the command line, one function each.
//!
//! | word | what it does |
//! |---|---|
//! | `byte` | `!` on the serial port and nothing else: the end of a start measurement |
//! | `print:TEXT` | prints it |
//! | `bootinfo` | protocol, command line, memory map, initrd with its sum |
//! | `cpus` `acpi` | what the MP table and the ACPI tables hold |
//! | `cpuid[:LEAF:SUBLEAF]` | CPUID as ring 3 and ring 0 see it |
//! | `rdmsr:INDEX` `tsc` | a model-specific register; the counter's rate |
//! | `pit` `pic` | the counter's rate by the 8254; unmasks a line of the 8259 |
//! | `mem` | writes and checks both ends of every RAM region |
//! | `fill:MIB:SEED` `check:MIB:SEED` | writes a pattern to free memory; compares it (across a snapshot) |
//! | `touch` | writes to every page of free memory |
//! | `watch` | measures gaps of the counter, and does what single input bytes ask: see [`watch`] |
//! | `timer` | writes 123 to the boot timer at 0xc0000000 |
//! | `count[:N]` | a counter line every 20 ms, N of them or for ever |
//! | `spin` `hlt` `stay` | for ever: busy, halted, halted |
//! | `wait:MS` | busy for a while |
//! | `echo[:LINES]` `shell` | prints serial input lines; executes them as words until `end` |
//! | `kbd[:CODES[:MS]]` | prints scancodes from the keyboard controller |
//! | `smp[:CPUS]` | starts the other processors and lets them count |
//! | `reset` `acpireset` `triple` `poweroff` `fault` `panic` | ways for the machine to end |
//! | `tellpanic` | says that a kernel panicked |
//! | `exitcode:CODE[:SIZE[:COUNT]]` | writes its exit code in an access of SIZE bytes, COUNT times |
//! | `blkinfo:N` | features, capacity, id, read-only |
//! | `blkread:N:SECTOR:COUNT` | sum and first bytes |
//! | `blkwrite:N:SECTOR:COUNT:SEED` `blkverify:...` | the pattern of `crate::pattern` |
//! | `blkplain:N:SECTOR:COUNT:SEED` | `blkwrite` by a driver that accepts no features |
//! | `blksg:N:SECTOR:COUNT` | reads in one request of many small buffers, compares with a plain read |
//! | `blkflush:N` `blkdiscard:N:SECTOR:COUNT` `blkzero:N:SECTOR:COUNT` | those requests |
//! | `blkbench:N:SIZE:OPS:DEPTH[:MODE]` | MODE `read`, `write`, `randread`, `randwrite` |
//! | `blkload:N[+N...]:MODE:SIZE:DEPTH:MS[:pieces][:interrupts][:queues=K][:check]` | for a time, on K queues of all of the disks at once; MODE also `randrw`; `pieces`: buffers of a page each, apart; `check`: compares what is read with what was written: see [`load`] |
//! | `blkfuzz:N:SEED:OPS:DEPTH[:framed]` | random requests of all kinds in chains cut anywhere (`framed`: in the usual three buffers), compared with a model of the disk: see [`fuzz`] |
//! | `blkepochs:N:SEED:WRITES:DEPTH[:EPOCHS]` | epochs of writes, a flush and a line after each, for a host that kills the monitor: see [`epochs`] |
//! | `blktell:N:COUNT` | COUNT reads at once, and a line for each completion as it comes |
//! | `netinfo:N` | features, MAC, MTU |
//! | `netecho:N[:FRAMES]` | sends every frame back, addresses swapped |
//! | `netcount:N:FRAMES[:MS]` | counts what arrives |
//! | `netsend:N:COUNT:SIZE` | sends numbered broadcast frames |
//! | `netping:N:IP[:ECHOES]` | answers ARP and ICMP echo for an IPv4 address |
//! | `netload:N:MODE:SIZE:MS[:interrupts]` | for a time; MODE `tx`, `rx` (counts from the first frame on), `pingpong` (the host answers each frame); above 1514 bytes with segmentation by the host |
//! | `netpairs:N:PAIRS:FRAMES` | commands of all kinds to the control queue, then PAIRS pairs: sends by each, receives FRAMES |
//! | `ports[:SEED[:STEP]]` | reads and writes all ports (above 0x700 every STEPth), in all sizes |
//! | `chipnoise:SEED:COUNT` | accesses of any size to the I/O APIC |
//! | `routes:MS` | all processors that `smp` started change a route of the I/O APIC |
//! | `mmionoise:SEED:COUNT` | accesses of any size to the device windows |
//! | `attack:N[.QUEUE]:KIND[:ARG]` | see [`attack`]; `attack:N:all` for every kind |
//!
//! Numbers are decimal or `0x` hexadecimal, with `k` or `m` for 1024 and its square.

mod attack;
mod block;
mod chips;
mod console;
mod epochs;
mod firmware;
mod fuzz;
mod load;
mod machine;
mod memory;
mod net;
mod noise;
mod pairs;
pub mod power;
mod smp;
mod watch;

use crate::text::Text;
use crate::{boot, serial, text};

/// What a word has to say after `ok` or `FAILED`.
pub type Outcome = Result<Text, Text>;
type Word = fn(&mut Arguments) -> Outcome;

const WORDS: &[(&str, Word)] = &[
    ("byte", console::byte),
    ("print", console::print),
    ("echo", console::echo),
    ("shell", console::shell),
    ("kbd", console::keyboard),
    ("bootinfo", machine::bootinfo),
    ("cpuid", machine::cpuid),
    ("rdmsr", machine::rdmsr),
    ("tsc", machine::tsc),
    ("pit", machine::pit),
    ("pic", machine::pic),
    ("timer", machine::timer),
    ("count", machine::count),
    ("wait", machine::wait),
    ("spin", machine::spin),
    ("hlt", machine::halt),
    ("stay", machine::halt),
    ("cpus", firmware::cpus),
    ("acpi", firmware::acpi),
    ("mem", memory::mem),
    ("fill", memory::fill),
    ("check", memory::check),
    ("touch", memory::touch),
    ("watch", watch::watch),
    ("smp", smp::smp),
    ("reset", power::reset_word),
    ("triple", power::triple),
    ("poweroff", power::poweroff),
    ("acpireset", power::acpi_reset),
    ("tellpanic", power::tell_panic),
    ("exitcode", power::exit_code),
    ("fault", power::fault),
    ("panic", power::panic),
    ("blkinfo", block::info),
    ("blkread", block::read),
    ("blkwrite", block::write),
    ("blkplain", block::write_plainly),
    ("blkverify", block::verify),
    ("blksg", block::scatter),
    ("blkflush", block::flush),
    ("blkdiscard", block::discard),
    ("blkzero", block::zero),
    ("blkbench", block::bench),
    ("blkload", load::block),
    ("blkfuzz", fuzz::fuzz),
    ("blkepochs", epochs::epochs),
    ("blktell", epochs::tell),
    ("netinfo", net::info),
    ("netecho", net::echo),
    ("netcount", net::count),
    ("netsend", net::send),
    ("netping", net::ping),
    ("netload", load::net),
    ("netpairs", pairs::pairs),
    ("ports", noise::ports),
    ("mmionoise", noise::mmio),
    ("chipnoise", chips::noise),
    ("routes", chips::routes),
    ("attack", attack::attack),
];

/// What follows a word, separated by colons.
pub struct Arguments<'a>(core::str::Split<'a, char>);

impl<'a> Arguments<'a> {
    /// The next one, if there is one.
    pub fn text(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    /// The next one as a number.
    pub fn number(&mut self, name: &str) -> Result<u64, Text> {
        let word = self.text().ok_or_else(|| text!("{name} is missing"))?;
        number(word).ok_or_else(|| text!("{name} is no number: {word}"))
    }

    /// The same with a value for when it is not there.
    pub fn number_or(&mut self, name: &str, default: u64) -> Result<u64, Text> {
        match self.text() {
            None | Some("") => Ok(default),
            Some(word) => number(word).ok_or_else(|| text!("{name} is no number: {word}")),
        }
    }
}

fn number(word: &str) -> Option<u64> {
    if let Some(hex) = word.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (digits, unit) = match word.as_bytes().last()? {
        b'k' => (&word[..word.len() - 1], 1 << 10),
        b'm' => (&word[..word.len() - 1], 1 << 20),
        _ => (word, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Executes the words of `probe=`.
pub fn run_command_line() {
    let info = boot::info();
    match info.option("probe=") {
        Some(words) => run(words),
        None => serial::line(format_args!(
            "no probe= on the command line ({:?}, {} bytes)",
            info.protocol,
            info.command_line.len()
        )),
    }
}

/// Executes a comma-separated list.
pub fn run(words: &str) {
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let mut parts = word.split(':');
        let name = parts.next().unwrap_or("");
        let outcome = match WORDS.iter().find(|(known, _)| *known == name) {
            Some((_, function)) => function(&mut Arguments(parts)),
            None => Err("no such word".into()),
        };
        match outcome {
            // The start measurement must not pay for a line.
            Ok(_) if name == "byte" => {}
            Ok(text) => serial::line(format_args!("{word} ok {text}")),
            Err(text) => serial::line(format_args!("{word} FAILED {text}")),
        }
    }
}

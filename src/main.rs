//! The monitor: arguments in, control thread, exit code out.
use mayfly::vmm::{Settings, Vmm};
use mayfly::{exit, sys, timeline::Timeline};

fn main() {
    let timeline = Timeline::begin();
    sys::process::use_one_arena();
    let args: Vec<String> = std::env::args().collect();
    let settings = Settings {
        id: "anonymous-instance".into(),
        seccomp: !args.iter().any(|a| a == "--no-seccomp"),
        boot_timer: true,
        protocol: None,
    };
    let mut vmm = Vmm::new(settings, timeline).unwrap();
    let file = args
        .iter()
        .position(|a| a == "--config-file")
        .map(|i| args[i + 1].clone())
        .unwrap();
    if let Err(e) = vmm.start_from_file(&file) {
        eprintln!("mayfly: {e}");
        sys::process::exit(exit::ERROR);
    }
    vmm.run()
}

//! What the guest starts with: kernel, initrd, command line and tables. The files thread puts them
//! into guest memory.

use super::Host;
use crate::arch::boot::{self, GENERATION_ID_LEN, Root, Told};
use crate::arch::{Kernel, layout};
use crate::error::{ActionError, Context};
use crate::memory::Memory;
use crate::sys::fd;
use crate::vmm::configuration::{Boot, Configuration};

/// Work for the files thread: puts what the guest starts with into its memory, and tells where it is
/// entered.
pub(super) type Load =
    Box<dyn FnOnce(&mut Memory) -> Result<Option<boot::Entry>, ActionError> + Send>;

/// The work for a kernel: it puts kernel, initrd, command line and tables into guest memory.
pub(super) fn load(
    host: &Host<'_>,
    configuration: &Configuration,
    kernel: &Boot,
) -> Result<Load, ActionError> {
    let Some(images) = kernel.images.clone() else {
        return Err(ActionError("The kernel is not open any more.".into()));
    };
    let first = configuration.devices.drives.0.first();
    let root = first
        .map(|entry| &entry.config)
        .filter(|drive| drive.is_root_device)
        .map(|drive| (drive.partuuid.clone(), drive.read_only()));
    let slots = 0..configuration.devices.count();
    let devices: Vec<(u64, u32)> = slots.filter_map(layout::virtio_device).collect();
    let boot_args = kernel.source.boot_args.clone().unwrap_or_default();
    let (mut seed, mut generation_id) = ([0; 32], [0; GENERATION_ID_LEN]);
    for random in [seed.as_mut_slice(), &mut generation_id] {
        fd::random(random).context("Making the guest's random numbers failed")?;
    }
    let (vcpus, protocol) = (configuration.machine.vcpu_count, host.settings.protocol);
    Ok(Box::new(move |memory: &mut Memory| {
        const NO_FILE: &str = "A file cannot be used";
        let (image, initrd) = &*images;
        image.check_unchanged().context(NO_FILE)?;
        if let Some(initrd) = initrd {
            initrd.check_unchanged().context(NO_FILE)?;
        }
        image.may_wait();
        let parsed = Kernel::read(&image.file, &image.name);
        let parsed = parsed.context("The kernel cannot be booted")?;
        let initrd = initrd.as_ref();
        let initrd = initrd.map(|initrd| (&initrd.file, initrd.name.as_str()));
        let root = root.as_ref().map(|(partuuid, read_only)| Root {
            partuuid: partuuid.as_deref(),
            read_only: *read_only,
        });
        // The file is searched only where it matters.
        let finds_them =
            !devices.is_empty() && !boot::acpi_is_off(&boot_args) && parsed.reads_acpi();
        let announced = if finds_them { &[] } else { devices.as_slice() };
        let command_line = boot::command_line(&boot_args, root, announced)
            .context("The kernel command line does not fit")?;
        let told = Told {
            command_line: &command_line,
            vcpus,
            devices: &devices,
            seed: &seed,
            generation_id,
        };
        let entry = boot::load(memory, &parsed, initrd, protocol, &told);
        entry.map(Some).context("Loading the guest failed")
    }))
}

//! The files of a run: one private directory, removed at the end, however the end comes.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::failure::{Context, Result};
use crate::guest::{self, Size, Task};
use crate::sys;

/// Guest memory in every measurement, in MiB.
pub const MEMORY_MIB: u64 = 128;

/// The tap, in the network namespace of this program.
pub const TAP: &str = "mf0";
const DISK_LEN: u64 = 1 << 20;
/// The disk of probe guests.
const PROBED_LEN: u64 = 16 << 20;

/// A directory that exists as long as this value.
#[derive(Debug)]
pub struct Workspace {
    directory: PathBuf,
    devices: bool,
}

/// A guest that lies in the workspace.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The ELF file.
    pub path: PathBuf,
    /// A configuration file that boots it.
    pub config: PathBuf,
    /// Where its signature stands in guest memory.
    pub signature_at: u64,
}

impl Workspace {
    /// Makes the directory; with `devices`, also a disk, and a tap in a network namespace that this thread enters.
    pub fn new(devices: bool) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("mayfly-bench-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .cannot(|| format!("make the directory {}", directory.display()))?;
        let workspace = Self { directory, devices };
        fs::create_dir(workspace.sockets()).cannot(|| "make a directory for sockets".into())?;
        if devices {
            let disk = workspace.path("disk");
            fs::File::create(&disk)
                .and_then(|file| file.set_len(DISK_LEN))
                .cannot(|| format!("make the disk {}", disk.display()))?;
            sys::enter_own_network().cannot(|| {
                "enter a network namespace of its own (--devices needs root or CAP_SYS_ADMIN)"
                    .into()
            })?;
            sys::make_tap(TAP).cannot(|| format!("make the tap {TAP}"))?;
        }
        Ok(workspace)
    }

    /// Writes a file of text.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, text).cannot(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Writes a guest, and a configuration that boots it.
    pub fn kernel(&self, name: &str, size: Size, task: Task) -> Result<Kernel> {
        let image = guest::image(size, task);
        let path = self.path(&format!("{name}.elf"));
        fs::write(&path, &image.file).cannot(|| format!("write the guest {}", path.display()))?;
        let config = self.path(&format!("{name}.json"));
        let text = json!({
            "boot-source": boot_source(&path),
            "machine-config": machine_config(),
            "drives": if self.devices { vec![self.drive()] } else { vec![] },
            "network-interfaces": if self.devices { vec![network_interface()] } else { vec![] },
        });
        fs::write(&config, text.to_string())
            .cannot(|| format!("write the configuration {}", config.display()))?;
        Ok(Kernel {
            path,
            config,
            signature_at: image.signature_at,
        })
    }

    /// A configuration that boots the probe guest for `words`, with these limiters on the drive, on what is received
    /// and on what is sent; a network interface only where it has a limiter.
    pub fn probe(
        &self,
        name: &str,
        probe: &Path,
        words: &str,
        [drive, rx, tx]: [Option<Value>; 3],
    ) -> Result<PathBuf> {
        let config = self.path(&format!("{name}.json"));
        let disk = self.path("probed");
        fs::File::create(&disk)
            .and_then(|file| file.set_len(PROBED_LEN))
            .cannot(|| format!("make the disk {}", disk.display()))?;
        let mut net = network_interface();
        let networks = if rx.is_some() || tx.is_some() {
            net["rx_rate_limiter"] = rx.unwrap_or_default();
            net["tx_rate_limiter"] = tx.unwrap_or_default();
            vec![net]
        } else {
            vec![]
        };
        let text = json!({
            "boot-source": { "kernel_image_path": probe, "boot_args": format!("probe={words},stay") },
            "machine-config": machine_config(),
            "drives": [{
                "drive_id": "disk",
                "path_on_host": disk,
                "is_root_device": false,
                "is_read_only": false,
                "rate_limiter": drive,
            }],
            "network-interfaces": networks,
        });
        fs::write(&config, text.to_string())
            .cannot(|| format!("write the configuration {}", config.display()))?;
        Ok(config)
    }

    /// The requests that configure a VM for `kernel`, in order.
    pub fn requests(&self, kernel: &Kernel) -> Vec<(&'static str, Value)> {
        let mut requests = vec![
            ("/machine-config", machine_config()),
            ("/boot-source", boot_source(&kernel.path)),
        ];
        if self.devices {
            requests.push(("/drives/disk", self.drive()));
            requests.push(("/network-interfaces/eth0", network_interface()));
        }
        requests
    }

    /// The directory itself.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where API sockets go, and nothing else.
    pub fn sockets(&self) -> PathBuf {
        self.path("sockets")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn drive(&self) -> Value {
        json!({
            "drive_id": "disk",
            "path_on_host": self.path("disk"),
            "is_root_device": false,
            "is_read_only": false,
        })
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            let directory = self.directory.display();
            eprintln!("mayfly-measure: cannot remove {directory}: {error}.");
        }
    }
}

fn boot_source(kernel: &Path) -> Value {
    json!({ "kernel_image_path": kernel })
}

fn machine_config() -> Value {
    json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB })
}

fn network_interface() -> Value {
    json!({ "iface_id": "eth0", "host_dev_name": TAP })
}

//! The root file system of the guest's programs: from the root disk, with what they expect around it.

use core::ffi::CStr;

use mayfly_agent_protocol::archive::LINK_MAX;
use mayfly_agent_protocol::{Fields, Malformed, fields};

use crate::sys::{
    self, Errno, Fd, MOUNT_BIND, MOUNT_MOVE, MOUNT_NO_DEV, MOUNT_NO_EXEC, MOUNT_NO_SUID,
    MOUNT_READ_ONLY, MOUNT_REMOUNT,
};
use crate::text::Text;

const DISK: &CStr = c"/dev/vda";
/// What holds what is written to an overlay, where that is a disk.
const UPPER: &CStr = c"/dev/vdb";
const MEMORY: &CStr = c"/memory";

/// What the guest is to be.
pub struct Setup<'a> {
    hostname: &'a [u8],
    kind: &'a CStr,
    mode: u8,
    upper: Option<&'a CStr>,
    /// Whether no program writes to the root.
    pub is_sealed: bool,
    /// All that was said.
    pub fields: Fields<'a>,
}

impl<'a> Setup<'a> {
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut setup = Setup {
            hostname: b"",
            kind: c"",
            mode: fields::OVERLAY,
            upper: None,
            is_sealed: false,
            fields: Fields(body),
        };
        for field in Fields(body) {
            let field = field?;
            match field.tag {
                fields::HOSTNAME => setup.hostname = field.bytes(),
                fields::ROOT_TYPE => setup.kind = field.text()?,
                fields::UPPER_TYPE => setup.upper = Some(field.text()?),
                fields::SEALED => setup.is_sealed = true,
                fields::INTERFACE if field.bytes().len() == 10 => {}
                fields::ADDRESS if matches!(field.bytes().len(), 5 | 17) => {}
                fields::ROUTE if matches!(field.bytes().len(), 5 | 9 | 17 | 33) => {}
                fields::SEED if field.bytes().len() == fields::SEED_LEN => {}
                fields::SECTORS if field.bytes().len() == 8 => {}
                fields::FOUND_BY if field.bytes().len() == 6 => {}
                fields::MEMORY => drop(field.text()?),
                fields::MEMORY_OPTIONS if field.bytes().len() >= 4 => {}
                fields::ROOT_MODE => match field.bytes() {
                    [mode @ (fields::READ_ONLY | fields::READ_WRITE | fields::OVERLAY)] => {
                        setup.mode = *mode;
                    }
                    _ => return Err(Malformed::Field(field.tag)),
                },
                tag => return Err(Malformed::Field(tag)),
            }
        }
        Ok(setup)
    }

    /// Whether what programs write is on the root disk.
    pub fn is_written(&self) -> bool {
        self.mode == fields::READ_WRITE || self.upper.is_some()
    }

    /// Mounts everything, and makes it the root of this process. What is written is on the second disk, where that is
    /// given back.
    pub fn enter(&self) -> Result<Option<Fd>, Text> {
        let step =
            |what: &[u8], result: sys::Result<()>| result.map_err(|error| Text::of(what, error));
        self.begin_anew()?;
        self.mount_disk()?;
        step(b"enter the root", sys::change_folder(c"/root"))?;
        if self.mode != fields::READ_ONLY {
            for name in [c"dev", c"proc", c"sys", c"tmp", c"run"] {
                let mode = if name == c"tmp" { 0o1777 } else { 0o755 };
                let _ = sys::make_folder(name, mode);
            }
        }
        step(
            b"mount /dev in the root, which must have that folder",
            sys::mount(c"/dev", c"dev", c"", MOUNT_MOVE, c""),
        )?;
        step(
            b"mount /proc in the root, which must have that folder",
            sys::mount(c"/proc", c"proc", c"", MOUNT_MOVE, c""),
        )?;
        // Programs of a root without the folder do not expect it.
        let _ = sys::mount(c"/sys", c"sys", c"", MOUNT_MOVE, c"");
        let safe_memory = MOUNT_NO_SUID | MOUNT_NO_DEV;
        if self.mode == fields::READ_ONLY || self.is_sealed {
            let _ = sys::mount(c"tmp", c"tmp", c"tmpfs", safe_memory, c"mode=1777");
            let _ = sys::mount(c"run", c"run", c"tmpfs", safe_memory, c"mode=0755");
        }
        let upper = self.upper.map(|_| sys::open_folder(MEMORY)).transpose();
        let upper = upper.map_err(|error| Text::of(b"open the second disk", error))?;
        step(
            b"change the root",
            sys::mount(c".", c"/", c"", MOUNT_MOVE, c"")
                .and_then(|()| sys::change_root(c"."))
                .and_then(|()| sys::change_folder(c"/")),
        )?;
        step(b"name the host", sys::set_hostname(self.hostname))?;
        self.mount_memory()?;
        Ok(upper)
    }

    /// Gives the kernel what is new in this guest, where that was saved and copied before: random bytes, and its disks.
    fn begin_anew(&self) -> Result<(), Text> {
        let mut disk = b'a';
        for field in self.fields.flatten() {
            match field.tag {
                fields::SEED => {
                    sys::seed(field.bytes())
                        .map_err(|error| Text::of(b"give the kernel new random numbers", error))?;
                }
                fields::SECTORS => {
                    let sectors = field.bytes().first_chunk();
                    let sectors = sectors.map_or(0, |it| u64::from_le_bytes(*it));
                    wait_for_disk(disk, sectors)?;
                    disk = disk.saturating_add(1);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Mounts memory where it is asked for.
    fn mount_memory(&self) -> Result<(), Text> {
        let mut at = c"";
        for field in self.fields.flatten() {
            match (field.tag, field.bytes().split_at_checked(4)) {
                (fields::MEMORY, _) => at = field.text().unwrap_or_default(),
                (fields::MEMORY_OPTIONS, Some((flags, options))) => {
                    make_folders(at);
                    let flags = flags.first_chunk().map_or(0, |it| u32::from_le_bytes(*it));
                    let mut text = Text::new();
                    text.add(options);
                    let mounted = sys::mount(c"tmpfs", at, c"tmpfs", flags as usize, text.c_str());
                    mounted.map_err(|error| {
                        let mut text = Text::new();
                        text.add(b"mount memory at ").add(at.to_bytes());
                        Text::of(text.bytes(), error)
                    })?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn mount_disk(&self) -> Result<(), Text> {
        let mount = |at: &CStr, flags| {
            sys::mount(DISK, at, self.kind, flags, c"").map_err(|error| {
                let mut text = Text::new();
                text.add(b"mount the root disk ").add(DISK.to_bytes());
                text.add(b" as ").add(self.kind.to_bytes());
                Text::of(text.bytes(), error)
            })
        };
        match self.mode {
            fields::READ_ONLY => mount(c"/root", MOUNT_READ_ONLY),
            fields::READ_WRITE => mount(c"/root", 0),
            _ => {
                mount(c"/lower", MOUNT_READ_ONLY)?;
                let options = c"lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work";
                let memory = || sys::mount(c"memory", MEMORY, c"tmpfs", 0, c"mode=0755");
                let disk = |kind| sys::mount(UPPER, MEMORY, kind, 0, c"");
                self.upper.map_or_else(memory, disk).map_err(|error| {
                    Text::of(
                        b"mount what takes the writes (CONFIG_TMPFS, or the type of --upper)",
                        error,
                    )
                })?;
                sys::make_folder(c"/memory/upper", 0o755)
                    .and_then(|()| sys::make_folder(c"/memory/work", 0o755))
                    .and_then(|()| sys::mount(c"overlay", c"/root", c"overlay", 0, options))
                    .map_err(|error| {
                        Text::of(
                            b"mount the overlay (CONFIG_OVERLAY_FS, CONFIG_TMPFS)",
                            error,
                        )
                    })
            }
        }
    }
}

/// Waits until the kernel knows that the disk of this letter has so many sectors, and has it drop what it knows of
/// another in that place.
fn wait_for_disk(letter: u8, sectors: u64) -> Result<(), Text> {
    /// The kernel is told by an interrupt: so many milliseconds are far more than that takes.
    const TRIES: u32 = 10_000;
    let mut path = Text::new();
    path.add(b"/dev/vd").add(&[letter]);
    let failed = |error| {
        let mut text = Text::new();
        text.add(b"open the disk ").add(path.bytes());
        Text::of(text.bytes(), error)
    };
    let disk = sys::open(path.c_str(), sys::READ, 0).map_err(failed)?;
    for _ in 0..TRIES {
        if sys::disk_size(&disk).map_err(failed)? == sectors.saturating_mul(512) {
            return sys::drop_cached(&disk).map_err(failed);
        }
        let _ = sys::poll(&mut [], 1);
    }
    let mut text = Text::new();
    text.add(b"was not told of the size of ").add(path.bytes());
    Err(text)
}

/// Mounts what every root has, at places of the initial RAM disk: it is moved into the root then. A guest that is a
/// copy of this one finds it done.
pub fn prepare() -> Result<(), Text> {
    let no_exec = MOUNT_NO_SUID | MOUNT_NO_EXEC;
    let safe = no_exec | MOUNT_NO_DEV;
    let step = |what: &[u8], result: sys::Result<()>| result.map_err(|error| Text::of(what, error));
    step(
        b"mount /dev (CONFIG_DEVTMPFS)",
        sys::mount(c"dev", c"/dev", c"devtmpfs", no_exec, c""),
    )?;
    for folder in [c"/proc", c"/sys"] {
        let _ = sys::make_folder(folder, 0o755);
    }
    step(
        b"mount /proc (CONFIG_PROC_FS)",
        sys::mount(c"proc", c"/proc", c"proc", safe, c""),
    )?;
    let _ = sys::mount(c"sysfs", c"/sys", c"sysfs", safe, c"");
    let _ = sys::make_folder(c"/dev/pts", 0o755);
    let _ = sys::make_folder(c"/dev/shm", 0o1777);
    let options = c"ptmxmode=0666,mode=0620,gid=5";
    let _ = sys::mount(c"devpts", c"/dev/pts", c"devpts", no_exec, options);
    let safe_memory = MOUNT_NO_SUID | MOUNT_NO_DEV;
    let _ = sys::mount(c"shm", c"/dev/shm", c"tmpfs", safe_memory, c"mode=1777");
    make_links();
    Ok(())
}

/// What shells and programs look for in /dev, and the kernel does not make.
fn make_links() {
    let Ok(dev) = sys::open_folder(c"/dev") else {
        return;
    };
    for (name, to) in [
        (c"fd", c"/proc/self/fd"),
        (c"stdin", c"/proc/self/fd/0"),
        (c"stdout", c"/proc/self/fd/1"),
        (c"stderr", c"/proc/self/fd/2"),
    ] {
        let _ = sys::make_link_in(&dev, name, to);
    }
}

/// Makes the folders of a path that are not there. What cannot be made will be missed where it is used.
pub fn make_folders(path: &CStr) {
    let mut made = [0; LINK_MAX + 1];
    let bytes = path.to_bytes();
    if bytes.len() > LINK_MAX {
        return;
    }
    for end in 1..=bytes.len() {
        if bytes.get(end).is_none_or(|byte| *byte == b'/') {
            made[..end].copy_from_slice(&bytes[..end]);
            let folder = CStr::from_bytes_until_nul(&made).unwrap_or_default();
            let _ = sys::make_folder(folder, 0o755);
        }
    }
}

/// Writes all of `bytes` to a file that waits.
pub fn write_all(file: &Fd, mut bytes: &[u8]) -> sys::Result<()> {
    while !bytes.is_empty() {
        match sys::write(file, bytes) {
            Ok(count) => bytes = &bytes[count.min(bytes.len())..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// From here on no program writes to the root.
pub fn seal() -> Result<(), Text> {
    let flags = MOUNT_REMOUNT | MOUNT_BIND | MOUNT_READ_ONLY;
    let sealed = sys::mount(c"", c"/", c"", flags, c"");
    sealed.map_err(|error| Text::of(b"make the root read-only", error))
}

/// Ends all other processes and brings what they wrote to the disk.
pub fn leave(upper: Option<&Fd>) {
    let _ = sys::kill(-1, 9);
    while sys::wait(true).is_some() {}
    sys::sync();
    let read_only = |at: &CStr| sys::mount(c"", at, c"", MOUNT_REMOUNT | MOUNT_READ_ONLY, c"");
    let _ = read_only(c"/");
    if let Some(upper) = upper {
        let mut path = Text::new();
        path.add(b"/proc/self/fd/")
            .add_number(upper.number().unsigned_abs().into());
        let _ = read_only(path.c_str());
    }
}

/// Writes the exit code to the monitor's port for that (docs/guests.md), where the kernel lets programs
/// reach it: the report then has it even if the supervisor is killed.
pub fn tell_port(code: u8) {
    const PORT: usize = 0x610;
    if let Ok(port) = sys::open(c"/dev/port", sys::READ_WRITE, 0) {
        let _ = sys::write_at(&port, code, PORT);
    }
}

//! What boots a disk: the kernel and initrd in it, where they can be read without mounting (ext2 to
//! ext4, by debugfs), and the command line that starts it.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::contents::filesystem::FileSystem;
use crate::contents::{Contents, Partition, Table};
use crate::failure::{Context, Failure, Result, clean, printable};
use crate::progress::Progress;
use crate::sparse;
use crate::tool::Tool;

/// A kernel or an initrd is at most this long.
const BOOT_FILE_MAX: u64 = 1 << 30;
/// Where systems have their init.
pub const INIT: &str = "/sbin/init";

/// A file in the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    pub partition: u32,
    start: u64,
    pub path: String,
}

#[derive(Debug, Default)]
pub struct Boot {
    pub kernel: Option<Inside>,
    pub initrd: Option<Inside>,
    /// The root file system: the number of its partition, 0 the whole disk.
    pub root: Option<u32>,
    pub root_is_read_only: bool,
    /// /init, as in disks of tools/guest, and no folder for another.
    has_init_at_top: bool,
    pub notes: Vec<String>,
}

/// Looks into the disk `name` in the folder `folder`.
pub fn find(contents: &Contents, folder: &Path, name: &str) -> Boot {
    let mut boot = Boot::default();
    let whole = contents.whole.as_ref().map(|whole| Partition {
        number: 0,
        start: 0,
        len: 0,
        name: String::new(),
        content: Some(whole.clone()),
    });
    let places: Vec<Partition> = whole
        .into_iter()
        .chain(contents.partitions.iter().cloned())
        .collect();
    let debugfs = Tool::find("debugfs", "e2fsprogs");
    if let Err(why) = &debugfs {
        boot.notes
            .push(format!("not looked for a kernel inside: {why}"));
    }
    let mut unread = Vec::new();
    for place in &places {
        let Some(content) = &place.content else {
            continue;
        };
        if content.is_ext() {
            if let Ok(tool) = &debugfs {
                look_into(tool, place, folder, name, &mut boot);
            }
        } else if content.may_be_root() {
            unread.push(format!("{} ({})", device(place.number), content.kind));
        }
    }
    if boot.root.is_none() {
        // The largest that could be it.
        let candidates = places.iter().filter(|place| {
            place
                .content
                .as_ref()
                .is_some_and(|content| content.may_be_root())
        });
        boot.root = candidates
            .max_by_key(|place| place.len)
            .map(|place| place.number);
    }
    let root = places.iter().find(|place| Some(place.number) == boot.root);
    boot.root_is_read_only = root
        .and_then(|root| root.content.as_ref())
        .is_some_and(|content| content.is_read_only());
    if boot.kernel.is_none() && !unread.is_empty() {
        let list = unread.join(", ");
        boot.notes.push(format!(
            "a kernel inside {list} cannot be seen without mounting it"
        ));
    }
    boot
}

/// Linux's name of a partition of the first disk.
pub fn device(number: u32) -> String {
    match number {
        0 => "/dev/vda".into(),
        number => format!("/dev/vda{number}"),
    }
}

/// A kernel, an initrd and the signs of a root file system on an ext file system.
fn look_into(tool: &Tool, place: &Partition, folder: &Path, name: &str, boot: &mut Boot) {
    let top = list(tool, folder, name, place.start, "/");
    let has = |what: &str| top.iter().any(|(name, _)| name == what);
    let is_root = has("etc") && (has("sbin") || has("usr") || has("bin"));
    boot.has_init_at_top |= has("init") && !has("sbin");
    if is_root && boot.root.is_none() {
        boot.root = Some(place.number);
    }
    let mut files = top;
    if is_root {
        let below = list(tool, folder, name, place.start, "/boot");
        files = below
            .into_iter()
            .map(|(name, file)| (format!("boot/{name}"), file))
            .collect();
    }
    let files: Vec<String> = files
        .into_iter()
        .filter(|(_, file)| *file)
        .map(|(name, _)| name)
        .collect();
    let of = |path: &str| Inside {
        partition: place.number,
        start: place.start,
        path: format!("/{path}"),
    };
    if boot.kernel.is_some() {
        return;
    }
    let Some(kernel) = newest(
        &files,
        &["vmlinuz", "vmlinux", "bzImage", "kernel", "Image"],
    ) else {
        return;
    };
    boot.kernel = Some(of(kernel));
    let version = kernel.split_once('-').map_or("", |(_, version)| version);
    let fitting: Vec<String> = files
        .iter()
        .filter(|name| name.contains(version))
        .cloned()
        .collect();
    boot.initrd = newest(&fitting, &["initrd", "initramfs"]).map(of);
}

/// The file with the highest version among those whose name begins so.
fn newest<'a>(files: &'a [String], begins: &[&str]) -> Option<&'a str> {
    let is_it = |path: &&String| {
        let name = path.rsplit('/').next().unwrap_or(path);
        begins.iter().any(|begin| name.starts_with(begin)) && !name.contains("rescue")
    };
    files
        .iter()
        .filter(is_it)
        .max_by_key(|path| version(path))
        .map(String::as_str)
}

/// Numbers compared as numbers.
fn version(name: &str) -> Vec<(u64, String)> {
    let mut parts = Vec::new();
    for part in name.split(|c: char| !c.is_ascii_alphanumeric()) {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        parts.push((
            part[..digits].parse().unwrap_or(0),
            part[digits..].to_owned(),
        ));
    }
    parts
}

/// Names that are safe to give to debugfs, which splits its commands at spaces, and in a message.
fn is_plain(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-~@".contains(&b);
    !name.is_empty() && name.bytes().all(is_plain) && name != "." && name != ".."
}

/// Names in a folder of the file system, and whether each is a regular file.
fn list(tool: &Tool, folder: &Path, disk: &str, start: u64, path: &str) -> Vec<(String, bool)> {
    let mut command = tool.command();
    command.current_dir(folder);
    command.args(["-c", "-R", &format!("ls -p {path}")]);
    command.arg(format!("{disk}?offset={start}"));
    let ended = tool.finish(command, |out| {
        let mut output = Vec::new();
        out.take(16 << 20).read_to_end(&mut output)?;
        Ok(output)
    });
    let Ok(ended) = ended else { return Vec::new() };
    let text = String::from_utf8_lossy(&ended.output);
    // /inode/mode/uid/gid/name/size/
    let entry = |line: &str| {
        let fields: Vec<&str> = line.split('/').collect();
        let [_, _, mode, _, _, name, ..] = fields[..] else {
            return None;
        };
        is_plain(name).then(|| (name.to_owned(), mode.starts_with("10")))
    };
    text.lines().filter_map(entry).collect()
}

/// Copies a file out of the disk into `to`, in the same folder. debugfs would write holes of any length.
pub fn extract(inside: &Inside, folder: &Path, disk: &str, to: &str) -> Result<()> {
    let cannot = |why: &str| {
        Failure::plain(format!(
            "{} cannot be taken out of the disk ({why}); check the free space, and the disk with e2fsck",
            inside.path
        ))
    };
    let tool = Tool::find("debugfs", "e2fsprogs")?;
    let mut command = tool.command();
    command.current_dir(folder);
    command.args(["-c", "-R", &format!("cat {}", inside.path)]);
    command.arg(format!("{disk}?offset={}", inside.start));
    let path = folder.join(to);
    let file = File::create_new(&path).cannot("create", &path)?;
    let mut problem = None;
    let ended = tool.finish(command, |out| {
        let mut progress = Progress::quiet();
        let copied = sparse::from_stream(out, &file, BOOT_FILE_MAX, &mut progress);
        problem = copied.as_ref().err().map(std::string::ToString::to_string);
        copied.map(|_| Vec::new())
    });
    if let Some(why) = problem {
        return Err(cannot(&why));
    }
    let len = file.metadata().cannot("open", &path)?.len();
    if ended?.code != Some(0) || len == 0 {
        return Err(cannot("it is empty or damaged"));
    }
    file.sync_all().cannot("write", &path)
}

/// A word as a shell takes it.
fn quoted(path: &Path) -> String {
    let is_plain = |&b: &u8| b.is_ascii_alphanumeric() || b"._+-/=:@%".contains(&b);
    let bytes = path.as_os_str().as_bytes();
    if bytes.iter().all(is_plain) {
        return printable(path);
    }
    format!("'{}'", printable(path).replace('\'', r"'\''"))
}

/// The begin of the command: root gives the monitor another user.
fn run() -> String {
    let user = match rustix::process::geteuid().is_root() {
        true => " --uid 1000 --gid 1000",
        false => "",
    };
    format!("mayfly-jailer run{user}")
}

/// A word as a shell takes it, whatever is in it.
fn single(word: &str) -> String {
    format!("'{}'", clean(word).replace('\'', r"'\''"))
}

/// Kernel and kernel command line for `words`. Without a kernel of its own the disk gets the one of
/// tools/guest, with the command line that this kernel needs on its host; a later init= counts.
fn kernel_options(files: [Option<&Path>; 2], words: &str, init: &str) -> String {
    if let [Some(kernel), initrd] = files {
        let initrd = initrd.map(|initrd| format!(" --initrd {}", quoted(initrd)));
        return format!(
            "--kernel {}{} --cmdline {}",
            quoted(kernel),
            initrd.unwrap_or_default(),
            single(&format!("console=ttyS0 reboot=k panic=1{words}"))
        );
    }
    let folder = std::env::var_os("MAYFLY_GUEST_DIR").unwrap_or("target/guest".into());
    let folder = Path::new(&folder);
    format!(
        "--kernel {} --cmdline \"$(cat {})\"{}",
        quoted(&folder.join("vmlinux")),
        quoted(&folder.join("cmdline")),
        single(&format!("{words} init={init}"))
    )
}

/// The command that starts a root disk without partitions. `end` may be `:ro`.
pub fn root_command(disk: &Path, init: &str, end: &str) -> String {
    let options = kernel_options([None; 2], "", init);
    format!("{} {options} --drive {}{end}", run(), quoted(disk))
}

/// The command that starts the disk; `kernel` and `initrd` are files of this host.
pub fn command(boot: &Boot, disk: &Path, kernel: Option<&Path>, initrd: Option<&Path>) -> String {
    let mut words = String::new();
    if let Some(root) = boot.root {
        let mode = if boot.root_is_read_only { "ro" } else { "rw" };
        words = format!(" root={} {mode}", device(root));
    }
    let read_only = if boot.root_is_read_only && boot.root == Some(0) {
        ":ro"
    } else {
        ""
    };
    let init = if boot.has_init_at_top { "/init" } else { INIT };
    let options = kernel_options([kernel, initrd], &words, init);
    let disk = quoted(disk);
    format!("{} {options} --memory 512 --drive {disk}{read_only}", run())
}

/// What to say where the kernel of tools/guest does not find the root: it is small
/// (resources/guest/kernel.config).
pub const SMALL_KERNEL: &str = "the kernel of tools/guest knows MBR, ext2 to ext4 and uncompressed EROFS only; take the \
     distribution's (tools/guest --distro-kernel, with its initramfs) or the disk's own (--boot-files)";

/// Whether that is so.
pub fn is_beyond_small_kernel(contents: &Contents, boot: &Boot) -> bool {
    let is_gpt = matches!(contents.table, Table::Gpt(_)) && boot.root.is_some_and(|root| root > 0);
    let partition = |it: &&Partition| Some(it.number) == boot.root;
    let root = match boot.root {
        Some(0) => contents.whole.as_ref(),
        _ => (contents.partitions.iter().find(partition)).and_then(|it| it.content.as_ref()),
    };
    let is_known = |root: &FileSystem| root.is_ext() || root.kind == "erofs" && !root.is_compressed;
    is_gpt || root.is_some_and(|root| !is_known(root))
}

/// What to say of a kernel out of the disk where KVM emulates kernel mode.
pub fn host_note() -> Option<&'static str> {
    Path::new("/sys/module/kvm_pvm").exists().then_some(
        "this kernel does not start on this host, whose KVM is software (kvm_pvm); docs/guests.md says why",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_kernel_is_that_of_the_highest_version() {
        let names = [
            "boot/vmlinuz-6.1.0-9-amd64",
            "boot/vmlinuz-6.1.0-18-amd64",
            "boot/config-7",
        ];
        let names = names.map(str::to_owned);
        assert_eq!(
            newest(&names, &["vmlinuz"]),
            Some("boot/vmlinuz-6.1.0-18-amd64")
        );
        assert_eq!(newest(&names, &["initrd"]), None);
    }

    #[test]
    fn small_kernel_is_taken_for_what_its_configuration_has() {
        let config = include_str!("../../../resources/guest/kernel.config");
        let has = |option: &str| {
            config
                .lines()
                .any(|line| line == format!("CONFIG_{option}=y"))
        };
        assert!(has("MSDOS_PARTITION") && has("EXT4_FS") && has("EROFS_FS"));
        assert!(!has("EFI_PARTITION") && !has("EROFS_FS_ZIP"));
        let whole = |kind, is_compressed| Contents {
            table: Table::None,
            partitions: Vec::new(),
            whole: Some(FileSystem {
                kind,
                label: String::new(),
                begins_at_0: false,
                size: None,
                is_cut: false,
                is_compressed,
            }),
            notes: Vec::new(),
        };
        let boot = Boot {
            root: Some(0),
            ..Boot::default()
        };
        for (contents, expected) in [
            (whole("ext2", false), false),
            (whole("ext4", false), false),
            (whole("erofs", false), false),
            (whole("erofs", true), true),
            (whole("xfs", false), true),
        ] {
            let is_beyond = is_beyond_small_kernel(&contents, &boot);
            assert_eq!(is_beyond, expected, "{contents:?}");
        }
    }

    #[test]
    fn names_with_what_debugfs_or_a_shell_would_read_are_not_used() {
        assert!(is_plain("vmlinuz-6.1.0-18-amd64"));
        for name in ["a b", "a\"b", "a\nb", "", "..", "a/b", "vmlinuz;x"] {
            assert!(!is_plain(name), "{name}");
        }
        assert_eq!(quoted(Path::new("/a b")), "'/a b'");
        let line = root_command(Path::new("disk"), "/a'b\u{1b}[31m $(c)", "");
        let end = r#"cmdline)"' init=/a'\''b?[31m $(c)' --drive disk"#;
        assert!(line.ends_with(end), "{line}");
        assert_eq!(quoted(Path::new("it's")), r"'it'\''s'");
    }
}

//! The image of a tree, where another program makes it (an uncompressed EROFS is written by
//! `mayfly_images::erofs`). Its files are laid out in the working folder, where all of them are the
//! caller's own and none is a device; owners, modes and devices are what fakeroot tells mke2fs and
//! mkfs.erofs. So the result is the same for root and for an ordinary user, whom neither system nor
//! tool lets make files of others. (mke2fs reads archives itself from 1.47.1 on; Debian 12 has
//! 1.47.0.)

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

use mayfly_images::content::Place;
use mayfly_images::tree::{CAPABILITY, Id, Node, ROOT, Tree};

use crate::copy::copy_part;
use crate::failure::{Context, Failure, Result};
use crate::tool::Tool;

const BLOCK: u64 = 4096;
const INODE: u64 = 256;
/// What a file system has beside files: journal, tables, reserve.
const SMALLEST: u64 = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FileSystem {
    Ext4,
    Erofs,
}

/// The laid out tree.
#[derive(Debug)]
pub struct Staged {
    folder: PathBuf,
    state: PathBuf,
    inodes: u64,
    bytes: u64,
    /// Files whose capability could not be kept.
    pub capabilities_lost: u64,
}

/// Puts all files of the tree into `folder`, and what is to be said of them into `state`.
pub fn stage(tree: &Tree, folder: PathBuf, state: PathBuf) -> Result<Staged> {
    fs::create_dir(&folder).cannot("create", &folder)?;
    let mut staged = Staged {
        folder,
        state,
        inodes: 0,
        bytes: 0,
        capabilities_lost: 0,
    };
    let mut places: Vec<Option<PathBuf>> = Vec::new();
    let mut all = vec![(staged.folder.clone(), ROOT)];
    let too_deep = |why| {
        Failure::plain(format!(
            "the root file system cannot be laid out: {why}; shorten its names"
        ))
    };
    for (path, id) in tree.paths().map_err(too_deep)? {
        let place = staged.folder.join(OsStr::from_bytes(&path));
        if places.len() <= id {
            places.resize(id + 1, None);
        }
        if let Some(first) = &places[id] {
            fs::hard_link(first, &place).cannot("create", &place)?;
            continue;
        }
        lay_out(tree, id, &place, &mut staged)?;
        places[id] = Some(place.clone());
        all.push((place, id));
    }
    let mut text = String::new();
    // What is in a folder comes first: its time would change the folder's.
    for (place, id) in all.iter().rev() {
        let meta = tree.meta(*id);
        let time = Timespec {
            // What ext4 can have.
            tv_sec: meta.mtime.clamp(0, 1 << 33),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, place, &times, AtFlags::SYMLINK_NOFOLLOW)
            .cannot("write", place)?;
        let it = fs::symlink_metadata(place).cannot("open", place)?;
        let (kind, device) = match tree.node(*id) {
            Node::Folder(_) => (0o040_000, 0),
            Node::File(..) => (0o100_000, 0),
            Node::Symlink(_) => (0o120_000, 0),
            Node::Fifo => (0o010_000, 0),
            Node::Device(true, major, minor) => (0o020_000, rustix::fs::makedev(*major, *minor)),
            Node::Device(false, major, minor) => (0o060_000, rustix::fs::makedev(*major, *minor)),
        };
        let _ = writeln!(
            text,
            "dev={:x},ino={},mode={:o},uid={},gid={},nlink={},rdev={device} ",
            it.dev(),
            it.ino(),
            kind | meta.mode,
            meta.uid,
            meta.gid,
            it.nlink(),
        );
    }
    fs::write(&staged.state, text).cannot("write", &staged.state)?;
    Ok(staged)
}

fn lay_out(tree: &Tree, id: Id, place: &Path, staged: &mut Staged) -> Result<()> {
    staged.inodes += 1;
    match tree.node(id) {
        Node::Folder(children) => {
            fs::create_dir(place).cannot("create", place)?;
            let names: usize = children.keys().map(|name| name.len() + 12).sum();
            staged.bytes += (names as u64).next_multiple_of(BLOCK) + BLOCK;
        }
        Node::File(content) => {
            match &content.place {
                // The same content may have been added twice only by a link, which is handled before.
                Place::Own(path) => fs::rename(path, place).cannot("create", place)?,
                Place::Below(..) => {
                    let opened = content.open()?;
                    copy_part(&opened.file, 0, content.len, place, "copying")?;
                    opened.check()?;
                }
            }
            fs::set_permissions(place, Permissions::from_mode(0o600)).cannot("write", place)?;
            staged.bytes += content.len.next_multiple_of(BLOCK);
        }
        Node::Symlink(target) => {
            symlink(OsStr::from_bytes(target), place).cannot("create", place)?;
            staged.bytes += BLOCK;
        }
        Node::Device(..) | Node::Fifo => {
            File::create_new(place).cannot("create", place)?;
        }
    }
    if let (Some(value), Node::File(..)) = (&tree.meta(id).capability, tree.node(id))
        && rustix::fs::lsetxattr(place, CAPABILITY, value, XattrFlags::empty()).is_err()
    {
        staged.capabilities_lost += 1;
    }
    Ok(())
}

/// fakeroot's server, which ends with this process.
struct Faked {
    child: Child,
    key: String,
    library: PathBuf,
}

impl Faked {
    fn start(state: &Path) -> Result<Faked> {
        let tool = Tool::find("faked-sysv", "fakeroot")?;
        let Some(library) = library() else {
            return Err(Failure::plain(
                "the library libfakeroot-sysv.so is missing; install it: apt-get install fakeroot",
            ));
        };
        let mut command = tool.command_ended_by("TERM");
        let input = File::open(state).cannot("open", state)?;
        command
            .args(["--foreground", "--load"])
            .stdin(input)
            .stdout(Stdio::piped());
        let mut child = command.spawn().cannot("run", Path::new("faked-sysv"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            let _ = BufReader::new(out).read_line(&mut line);
        }
        let key = line.split(':').next().unwrap_or("").trim().to_owned();
        let faked = Faked {
            child,
            key,
            library,
        };
        if faked.key.is_empty() || !faked.key.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Failure::plain(
                "faked-sysv does not start (System V message queues are needed); look at ipcs -q and the sysctl kernel.msgmni",
            ));
        }
        Ok(faked)
    }
}

impl Drop for Faked {
    fn drop(&mut self) {
        // By its own signal it removes its message queues.
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

fn library() -> Option<PathBuf> {
    let below = fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    let places = below.chain(["/usr/lib", "/usr/lib64"].map(PathBuf::from));
    places
        .map(|place| place.join("libfakeroot/libfakeroot-sysv.so"))
        .find(|file| file.is_file())
}

impl Staged {
    /// Makes the image `to`. Without a size it is as large as needed, with a tenth to spare.
    pub fn make(&self, kind: FileSystem, size: Option<u64>, to: &Path) -> Result<()> {
        let faked = Faked::start(&self.state)?;
        match kind {
            FileSystem::Erofs => self.compressed_erofs(&faked, to),
            FileSystem::Ext4 => {
                let inodes = self.inodes + self.inodes / 10 + 1024;
                let needed = self.bytes + inodes * INODE;
                // The last tries only if names and holes take more than was thought.
                let guesses = [
                    needed + needed / 10 + SMALLEST,
                    needed + needed / 3 + 4 * SMALLEST,
                    needed * 2 + 16 * SMALLEST,
                ];
                let guesses = size.map_or(guesses.to_vec(), |size| vec![size]);
                for (index, size) in guesses.iter().enumerate() {
                    let size = size.next_multiple_of(1 << 20);
                    match self.ext4(&faked, size, inodes, to) {
                        Err(_) if index + 1 < guesses.len() => {
                            fs::remove_file(to).cannot("remove", to)?
                        }
                        other => return other,
                    }
                }
                Ok(())
            }
        }
    }

    fn run(&self, faked: &Faked, tool: &Tool, args: &[&OsStr]) -> Result<Option<String>> {
        let mut command = tool.command();
        command
            .args(args)
            .env("FAKEROOTKEY", &faked.key)
            .env("LD_PRELOAD", &faked.library);
        let ended = tool.finish(command, |out| {
            std::io::copy(out, &mut std::io::sink())?;
            Ok(Vec::new())
        })?;
        Ok((ended.code != Some(0)).then(|| ended.why()))
    }

    fn ext4(&self, faked: &Faked, size: u64, inodes: u64, to: &Path) -> Result<()> {
        let tool = Tool::find("mke2fs", "e2fsprogs")?;
        let file = File::create_new(to).cannot("create", to)?;
        file.set_len(size).cannot("write", to)?;
        let inodes = inodes.to_string();
        let args = [
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-N",
            &inodes,
            "-E",
            "root_owner=0:0",
            "-d",
        ];
        let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        args.extend([self.folder.as_os_str(), to.as_os_str()]);
        match self.run(faked, &tool, &args)? {
            None => Ok(()),
            Some(why) => Err(Failure::plain(format!(
                "mke2fs cannot make a file system of {} MiB for {} MiB of files ({why}); give a larger --size",
                size >> 20,
                self.bytes >> 20
            ))),
        }
    }

    fn compressed_erofs(&self, faked: &Faked, to: &Path) -> Result<()> {
        let tool = Tool::find("mkfs.erofs", "erofs-utils")?;
        let options = ["--quiet", "-zlz4hc"].map(OsStr::new);
        let args = [&options[..], &[to.as_os_str(), self.folder.as_os_str()]].concat();
        match self.run(faked, &tool, &args)? {
            None => Ok(()),
            Some(why) => Err(Failure::plain(format!(
                "mkfs.erofs cannot make the file system ({why}); try --type ext4"
            ))),
        }
    }
}

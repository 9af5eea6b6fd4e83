//! Disks from folders, archives and image layouts, honest and hostile: the real program, checked by the readers of
//! erofs-utils.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use support::archives::{Entry, blob, file, hostile, image, index, layers, link, tar};
use support::needs::{self, needs};
use support::{Folder, Random};

/// What an archive may have, all of it.
fn everything() -> Vec<u8> {
    let blocks = vec![b'b'; 3 * 4096];
    let long = vec![b'l'; 4096 + 100];
    let target = "t".repeat(99);
    let mut entries = vec![
        Entry("./", b'5', 0o751, 0, "", b""),
        Entry("bin/", b'5', 0o750, 1234, "", b""),
        Entry("bin/su", b'0', 0o4755, 0, "", b"a program"),
        Entry("bin/su2", b'1', 0, 0, "./bin/su", b""),
        Entry(
            "home/my file's \"name\"\n",
            b'0',
            0o600,
            70_000,
            "",
            b"mine",
        ),
        link("lib", "usr/lib"),
        Entry("usr/lib/", b'5', 0o755, 0, "", b""),
        file("usr/lib/inside", "x"),
        Entry("blocks", b'0', 0o644, 0, "", &blocks),
        Entry("long", b'0', 0o644, 0, "", &long),
        file("empty", ""),
        Entry("null", b'3', 0o666, 0, "", b""),
        Entry("disk", b'4', 0o660, 0, "", b""),
        Entry("fifo", b'6', 0o600, 0, "", b""),
        link("dangling", "/no/such/place"),
        link("target", &target),
        // Before `.` and `..` in the order of bytes.
        file("!", "first"),
        file("-", "second"),
        file(".hidden", "third"),
    ];
    // Several blocks of entries.
    let names: Vec<String> = (0..1000).map(|n| format!("many/file-{n}")).collect();
    entries.extend(names.iter().map(|name| file(name, name)));
    tar(&entries)
}

fn is_everything(folder: &Folder, disk: &Path) {
    let to = format!("unpacked-{}", folder.names("").len());
    folder.unpack(disk, &to);
    let of = |name: &str| fs::read(folder.join(&to).join(name)).unwrap();
    let su = folder.stat(disk, "/bin/su");
    assert!(su.contains("Links: 2") && su.contains("Uid: 0"), "{su}");
    // That program shows no set-user-ID bit.
    let number = su.split("NID: ").nth(1).unwrap();
    let number: u64 = number.split(' ').next().unwrap().parse().unwrap();
    let mut mode = [0; 2];
    let raw = fs::File::open(disk).unwrap();
    raw.read_exact_at(&mut mode, number * 32 + 4).unwrap();
    assert_eq!(u16::from_le_bytes(mode), 0o104_755);
    let bin = folder.stat(disk, "/bin");
    assert!(bin.contains("Uid: 1234   Gid: 1235  Access: 0750"), "{bin}");
    let root = folder.stat(disk, "/");
    assert!(root.contains("Access: 0751"), "{root}");
    assert!(folder.stat(disk, "/null").contains("char dev"));
    assert!(folder.stat(disk, "/disk").contains("block dev"));
    let times = fs::metadata(folder.join(&to).join("long")).unwrap();
    assert_eq!(times.mtime(), 0o14_000_000_000);
    assert_eq!(of("blocks"), vec![b'b'; 3 * 4096]);
    assert_eq!(of("long"), vec![b'l'; 4096 + 100]);
    assert_eq!(of("home/my file's \"name\"\n"), b"mine");
    assert_eq!(of("lib/inside"), b"x");
    assert_eq!(of("!"), b"first");
    for n in 0..1000 {
        let name = format!("many/file-{n}");
        assert_eq!(of(&name), name.as_bytes());
    }
    assert_eq!(folder.names(&format!("{to}/many")).len(), 1000);
    let names = folder.names(&to);
    assert_eq!(names.len(), 16, "{names:?}");
}

#[test]
fn archive_becomes_a_disk_with_all_that_is_in_it() {
    needs!(root, "fsck.erofs", "dump.erofs");
    let folder = Folder::new();
    folder.write("root.tar", everything());
    let disk = folder.disk("root.tar");
    assert!(disk.starts_with(folder.join("cache/disks")), "{disk:?}");
    is_everything(&folder, &disk);
    assert_eq!(fs::metadata(&disk).unwrap().mode() & 0o777, 0o400);
    assert_eq!(folder.names("cache/work"), [""; 0]);
}

#[test]
fn same_content_from_any_source_is_one_disk() {
    needs!(root, "xz", "zstd", "gzip", "tar");
    let folder = Folder::new();
    let archive = everything();
    folder.write("root.tar", &archive);
    let disk = folder.disk("root.tar");
    for program in ["xz", "zstd", "gzip"] {
        folder.run(program, &["-k", "-q", "root.tar"]);
    }
    fs::create_dir(folder.join("root")).unwrap();
    folder.shell("tar -xpf root.tar -C root --numeric-owner");
    // Copies differ in the times of folders and links.
    folder.shell("touch -h root root/bin root/lib; cp -a root copy; touch copy/bin");
    let manifest = image(&folder.join("layout"), &[archive], "amd64");
    index(&folder.join("layout"), &[manifest]);
    folder.run("tar", &["cf", "image.tar", "-C", "layout", "."]);
    folder.run("gzip", &["-k", "image.tar"]);
    for source in [
        "root.tar.xz",
        "root.tar.zst",
        "root.tar.gz",
        "root",
        "copy",
        "layout",
        "image.tar",
        "image.tar.gz",
    ] {
        assert_eq!(folder.disk(source), disk, "{source}");
    }
    assert_eq!(folder.names("cache/disks").len(), 1);
    // The same bytes too, where there is nothing to find.
    let again = folder.run(
        env!("CARGO_BIN_EXE_mayfly-image"),
        &["disk", "copy", "--cache", "other"],
    );
    assert!(fs::read(again.trim_end()).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn ordinary_user_gets_the_same_disk_of_an_archive() {
    needs!(root, "setpriv");
    let folder = Folder::new();
    folder.write("root.tar", everything());
    let disk = folder.disk("root.tar");
    folder.run("cp", &[env!("CARGO_BIN_EXE_mayfly-image"), "program"]);
    fs::create_dir(folder.join("home")).unwrap();
    folder.run("chown", &["1000:1000", "home"]);
    let mut command = Command::new("setpriv");
    command.current_dir(folder.path());
    command.args(["--reuid", "1000", "--regid", "1000", "--clear-groups"]);
    command.args(["./program", "disk", "root.tar"]);
    command.env("HOME", folder.join("home"));
    command.env_remove("XDG_CACHE_HOME");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let own = String::from_utf8(output.stdout).unwrap();
    let place = folder.join("home/.cache/mayfly/images/disks");
    assert_eq!(
        Path::new(own.trim_end()),
        place.join(disk.file_name().unwrap())
    );
    assert!(fs::read(own.trim_end()).unwrap() == fs::read(disk).unwrap());
}

#[test]
fn folder_keeps_links_capabilities_and_holes_and_lacks_sockets() {
    needs!(root, "setcap", "getfattr", "fsck.erofs", "dump.erofs");
    let folder = Folder::new();
    folder.write("root/bin/ping", "a program");
    folder.run("setcap", &["cap_net_raw+ep", "root/bin/ping"]);
    folder.run("ln", &["root/bin/ping", "root/bin/ping6"]);
    let sparse = fs::File::create(folder.join("root/sparse")).unwrap();
    sparse.write_all_at(b"the end", 64 << 20).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("root/socket")).unwrap();
    let output = folder.output(&["disk", "root"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("1 sockets were left out"), "{said}");
    let disk = folder.disk("root");
    let it = fs::metadata(&disk).unwrap();
    assert!(it.len() > 64 << 20 && it.blocks() * 512 < 1 << 20, "{it:?}");
    folder.unpack(&disk, "out");
    assert_eq!(folder.names("out"), ["bin", "sparse"]);
    assert_eq!(
        fs::read(folder.join("out/sparse")).unwrap()[64 << 20..],
        *b"the end"
    );
    let ping = folder.stat(&disk, "/bin/ping");
    assert!(ping.contains("Links: 2"), "{ping}");
    assert!(ping.contains("Xattr size: 48"), "{ping}");
}

#[test]
fn image_layout_is_put_together_from_its_layers() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    let manifest = image(&folder.join("layout"), &layers(), "amd64");
    let named = |name: &str| {
        let more =
            format!("{{\"annotations\":{{\"org.opencontainers.image.ref.name\":\"{name}\"}},");
        manifest.replacen('{', &more, 1)
    };
    index(&folder.join("layout"), &[named("a:1"), named("b:2")]);
    folder.refuses(&["disk", "layout"], &["a:1, b:2", "--name"]);
    folder.refuses(&["disk", "layout", "--name", "c"], &["no image"]);
    let disk = folder.succeeds(&["disk", "layout", "--name", "b:2"]);
    folder.unpack(Path::new(disk.trim_end()), "out");
    assert_eq!(folder.names("out"), ["bin", "dir", "kept"]);
    assert_eq!(folder.names("out/dir"), ["new"]);
    assert_eq!(fs::read(folder.join("out/kept")).unwrap(), b"2");
    let bad = tar(&[file("../../planted", "x")]);
    let two = [layers().remove(0), bad];
    let manifest = image(&folder.join("bad"), &two, "amd64");
    index(&folder.join("bad"), &[manifest]);
    folder.refuses(&["disk", "bad"], &["layer 2 of 2", "leads out"]);
}

#[test]
fn image_whose_content_is_not_that_of_its_digest_is_refused() {
    let folder = Folder::new();
    let layout = folder.join("layout");
    let manifest = image(&layout, &layers(), "amd64");
    index(&layout, std::slice::from_ref(&manifest));
    for blob in folder.names("layout/blobs/sha256") {
        let path = layout.join("blobs/sha256").join(&blob);
        let right = fs::read(&path).unwrap();
        let mut wrong = right.clone();
        *wrong.last_mut().unwrap() ^= 1;
        fs::write(&path, wrong).unwrap();
        folder.refuses(&["disk", "layout"], &["digest", &blob]);
        fs::write(&path, right).unwrap();
    }
    folder.disk("layout");
    fs::write(layout.join("index.json"), "not JSON").unwrap();
    folder.refuses(&["disk", "layout"], &["not JSON"]);
}

#[test]
fn indexes_of_many_indexes_are_refused_before_all_are_read() {
    let folder = Folder::new();
    let layout = folder.join("layout");
    // Each names the one below it 1000 times: 10^12 to be read.
    let mut below = blob(&layout, b"{}");
    for _ in 0..4 {
        let all = vec![below; 1000].join(",");
        below = blob(&layout, format!("{{\"manifests\":[{all}]}}").as_bytes());
    }
    index(&layout, std::slice::from_ref(&below));
    folder.refuses(&["disk", "layout"], &["more than 256 manifests"]);
}

#[test]
fn hostile_archives_are_refused_and_reach_nothing() {
    needs!("gzip", "tar");
    let folder = Folder::new();
    folder.write("outside", "untouched");
    for (archive, why) in hostile() {
        folder.write("bad.tar", archive);
        folder.refuses(&["disk", "bad.tar"], &["bad.tar", why]);
    }
    folder.write("bad.tar", tar(&[Entry("./", b'5', 0o755, 0, "", b"")]));
    folder.refuses(&["disk", "bad.tar"], &["bad.tar", "holds no files"]);
    // Links that lead out on a host stay inside.
    let absolute = folder.join("outside").display().to_string();
    let entries = [
        link("out", &absolute),
        link("up", "../../../../../../../../tmp"),
        Entry("tmp/", b'5', 0o755, 0, "", b""),
        file("up/mf-planted", "x"),
        file(&absolute, "inside"),
        file("out", "a file now"),
    ];
    folder.write("links.tar", tar(&entries));
    folder.disk("links.tar");
    assert_eq!(fs::read(folder.join("outside")).unwrap(), b"untouched");
    assert!(!Path::new("/tmp/mf-planted").exists());
    let mut bytes = tar(&[file("a", &"x".repeat(5000))]);
    bytes.truncate(3000);
    folder.write("bad.tar", bytes);
    folder.refuses(&["disk", "bad.tar"], &["bad.tar", "truncated"]);
    let zeros = fs::File::create(folder.join("zeros")).unwrap();
    zeros.set_len(8 << 20).unwrap();
    folder.shell("tar czf bomb.tgz zeros; tar cf bomb.tar zeros; mkdir sparse; mv zeros sparse");
    for (source, why) in [
        ("bomb.tgz", "4 MiB"),
        ("bomb.tar", "--max-size"),
        ("sparse", "--max-size"),
    ] {
        folder.refuses(&["disk", source, "--max-size", "4M"], &[source, why]);
    }
    folder.write("text", "no archive");
    folder.refuses(&["disk", "text"], &["text", "neither a tar archive"]);
    folder.refuses(&["disk", "missing"], &["missing", "check the name"]);
    folder.refuses(&["disk", "/dev/null"], &["neither a file nor a folder"]);
    fs::create_dir(folder.join("nothing")).unwrap();
    folder.refuses(&["disk", "nothing"], &["holds no files"]);
    folder.refuses(&["disk", "."], &["holds the cache"]);
}

#[test]
fn archives_of_random_damage_are_refused_or_give_a_disk() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    let good = everything();
    let mut random = Random::new();
    for _ in 0..25 {
        let mut bad = good.clone();
        for _ in 0..=random.next() % 4 {
            // Most of it in headers of the first entries.
            let at = (random.next() % 40 * 512 + random.next() % 512) as usize;
            bad[at] = random.next() as u8;
        }
        if random.next().is_multiple_of(4) {
            bad.truncate((random.next() % bad.len() as u64) as usize);
        }
        folder.write("bad.tar", bad);
        let output = folder.output(&["disk", "bad.tar"]);
        match output.status.code() {
            Some(0) => {
                let disk = String::from_utf8(output.stdout).unwrap();
                folder.run("fsck.erofs", &[disk.trim_end()]);
            }
            Some(1) => assert_eq!(output.stderr.iter().filter(|b| **b == b'\n').count(), 1),
            _ => panic!("{output:?}"),
        }
        assert_eq!(folder.names("cache/work"), [""; 0]);
    }
}

#[test]
fn folder_that_looks_like_a_layout_is_a_root_where_that_is_said() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    folder.write("root/index.json", "of an application");
    let disk = folder.disk("root");
    folder.unpack(&disk, "out");
    assert_eq!(folder.names("out"), ["index.json"]);
    folder.write("root/oci-layout", "{}");
    folder.refuses(&["disk", "root"], &["not JSON"]);
    let disk = folder.succeeds(&["disk", "root", "--root"]);
    folder.unpack(Path::new(disk.trim_end()), "out2");
    assert_eq!(folder.names("out2"), ["index.json", "oci-layout"]);
}

#[test]
fn archive_of_a_root_with_names_of_an_image_is_a_root() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    folder.write("root/manifest.json", "{\"name\": \"of a web application\"}");
    folder.write("root/index.json", "of an application");
    folder.run("tar", &["cf", "root.tar", "-C", "root", "."]);
    assert_eq!(folder.disk("root.tar"), folder.disk("root"));
    // One that is a list, too.
    folder.write("root/manifest.json", "[{\"name\": \"x\"}]");
    folder.run("tar", &["cf", "root2.tar", "-C", "root", "."]);
    assert_eq!(folder.disk("root2.tar"), folder.disk("root"));
}

#[test]
fn archive_of_an_image_that_has_a_name_twice_is_its_last_one() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    let layout = folder.join("layout");
    let old = image(&layout, &[tar(&[])], "amd64");
    index(&layout, &[old]);
    folder.run("tar", &["cf", "image.tar", "-C", "layout", "."]);
    let new = image(&layout, &layers(), "amd64");
    index(&layout, &[new]);
    folder.run("tar", &["rf", "image.tar", "-C", "layout", "."]);
    assert_eq!(folder.disk("image.tar"), folder.disk("layout"));
}

/// A length at and around the borders of blocks and of what stands behind an inode.
fn border(random: &mut Random) -> usize {
    const BORDERS: [u64; 9] = [0, 1, 63, 2048, 4032, 4096, 6144, 8192, 300_000];
    let border = BORDERS[(random.next() % 9) as usize];
    (border + random.next() % 5).saturating_sub(2) as usize
}

#[test]
fn random_trees_are_read_back_as_they_were() {
    needs!("fsck.erofs", "diff");
    let mut random = Random::new();
    for turn in 0..8 {
        let folder = Folder::new();
        let mut below = vec!["root".to_owned()];
        for n in 0..300 {
            let parent = below[(random.next() % below.len() as u64) as usize].clone();
            // Names of any length, in any order.
            let len = 1 + random.next() % if n % 7 == 0 { 240 } else { 30 };
            let letter = |_| (b'!' + (random.next() % 90) as u8) as char;
            let name: String = (0..len).map(letter).filter(|c| *c != '/').collect();
            let path = format!("{parent}/{name}{n}");
            if path.len() > 2000 {
                continue;
            }
            match random.next() % 6 {
                0 => {
                    fs::create_dir_all(folder.join(&path)).unwrap();
                    below.push(path);
                }
                1 => {
                    let target = "t".repeat(1 + border(&mut random) % 4090);
                    fs::create_dir_all(folder.join(&parent)).unwrap();
                    std::os::unix::fs::symlink(target, folder.join(&path)).unwrap();
                }
                _ => {
                    let len = border(&mut random);
                    folder.write(&path, random.bytes(len));
                }
            }
        }
        let disk = folder.disk("root");
        folder.unpack(&disk, "out");
        folder.run("diff", &["-r", "--no-dereference", "root", "out"]);
        println!("turn {turn}: as it was");
    }
}

#[test]
fn disk_that_is_ready_is_given_back_as_it_is() {
    needs!("mkfs.erofs", "mke2fs");
    let folder = Folder::new();
    folder.write("root/file", "x");
    folder.run("mkfs.erofs", &["--quiet", "ready.erofs", "root"]);
    folder.run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", "root", "ready.ext4", "8M"],
    );
    for name in ["ready.erofs", "ready.ext4"] {
        assert_eq!(folder.disk(name), folder.join(name));
    }
    assert_eq!(folder.names("cache/disks"), [""; 0]);
}

#[test]
fn cache_where_another_user_may_write_is_refused() {
    let folder = Folder::new();
    folder.write("root/file", "x");
    fs::create_dir(folder.join("cache")).unwrap();
    fs::set_permissions(folder.join("cache"), fs::Permissions::from_mode(0o777)).unwrap();
    folder.refuses(&["disk", "root"], &["another user may write there"]);
}

//! Root disks from folders, archives and container images, honest and hostile.

#[path = "../../../jailer/images/tests/support/archives.rs"]
mod archives;
#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use archives::{Entry, blob, file, hostile, image, index, layers, link, program, tar};
use support::Folder;
use support::needs::{self, needs};

fn checked(folder: &Folder, disk: &str) {
    folder.run("e2fsck", &["-fn", disk]);
}

fn stat(folder: &Folder, disk: &str, path: &str) -> String {
    folder.run("debugfs", &["-R", &format!("stat {path}"), disk])
}

fn cat(folder: &Folder, disk: &str, path: &str) -> String {
    folder.run("debugfs", &["-R", &format!("cat {path}"), disk])
}

/// Whether the disk has something at this path.
fn has(folder: &Folder, disk: &str, path: &str) -> bool {
    stat(folder, disk, path).contains("Inode:")
}

/// What an archive may have, all of it.
fn everything() -> Vec<u8> {
    tar(&[
        Entry("./", b'5', 0o755, 0, "", b""),
        Entry("bin/", b'5', 0o750, 1234, "", b""),
        Entry("bin/su", b'0', 0o4755, 0, "", b"a program"),
        Entry("bin/su2", b'1', 0, 0, "./bin/su", b""),
        Entry(
            "home/me/my file's \"name\"\n",
            b'0',
            0o600,
            70_000,
            "",
            b"mine",
        ),
        Entry("usr/lib/", b'5', 0o755, 0, "", b""),
        link("lib", "usr/lib"),
        file("lib/inside", "through the link"),
        Entry("null", b'3', 0o666, 0, "", b""),
        Entry("fifo", b'6', 0o600, 0, "", b""),
        link("dangling", "/no/such/place"),
    ])
}

fn is_everything(folder: &Folder, disk: &str) {
    checked(folder, disk);
    let su = stat(folder, disk, "/bin/su");
    assert!(
        su.contains("Mode:  04755") && su.contains("Links: 2"),
        "{su}"
    );
    let bin = stat(folder, disk, "/bin");
    assert!(bin.contains("Mode:  0750"), "{bin}");
    assert!(bin.contains("User:  1234   Group:  1235"), "{bin}");
    let listed = folder.run("debugfs", &["-R", "ls -l /home/me", disk]);
    assert!(
        listed.contains(" 70000") && listed.contains("my file's"),
        "{listed}"
    );
    assert!(stat(folder, disk, "/null").contains("Type: character special"));
    assert!(stat(folder, disk, "/fifo").contains("Type: FIFO"));
    assert_eq!(cat(folder, disk, "/usr/lib/inside"), "through the link");
    let time = stat(folder, disk, "/bin/su");
    assert!(time.contains("mtime: 0x60000000"), "{time}");
}

#[test]
fn an_archive_becomes_an_ext4_disk_with_its_owners_modes_and_devices() {
    needs!("mke2fs", "debugfs", "faked-sysv", "xz", "zstd");
    let folder = Folder::new();
    fs::write(folder.join("root.tar"), everything()).unwrap();
    folder.succeeds(&["rootfs", "root.tar", "disk", "--as-is"]);
    is_everything(&folder, "disk");
    assert!(!has(&folder, "disk", "/proc"));
    assert!(folder.len("disk") < 16 << 20);
    for (program, name) in [
        ("xz", "root.tar.xz"),
        ("zstd", "root.tar.zst"),
        ("gzip", "root.tar.gz"),
    ] {
        folder.run(program, &["-k", "-q", "root.tar"]);
        folder.succeeds(&[
            "rootfs", name, "disk", "--as-is", "--force", "--size", "64M",
        ]);
        is_everything(&folder, "disk");
        assert_eq!(folder.len("disk"), 64 << 20);
    }
}

#[test]
fn an_archive_becomes_an_erofs_disk() {
    needs!("mkfs.erofs", "dump.erofs", "faked-sysv");
    let folder = Folder::new();
    fs::write(folder.join("root.tar"), everything()).unwrap();
    let said = folder.succeeds(&["rootfs", "root.tar", "disk", "--as-is", "--type", "erofs"]);
    assert!(said.contains("disk:ro"), "{said}");
    assert!(!said.contains("knows MBR"), "{said}");
    folder.run("fsck.erofs", &["disk"]);
    let su = folder.run("dump.erofs", &["--path=/bin/su", "disk"]);
    assert!(su.contains("Links: 2") && su.contains("Uid: 0"), "{su}");
    let bin = folder.run("dump.erofs", &["--path=/bin", "disk"]);
    assert!(bin.contains("Uid: 1234   Gid: 1235  Access: 0750"), "{bin}");
    assert!(
        folder
            .run("dump.erofs", &["--path=/null", "disk"])
            .contains("char dev")
    );
    let said = folder.succeeds(&[
        "rootfs",
        "root.tar",
        "small",
        "--as-is",
        "--type",
        "erofs",
        "--compress",
    ]);
    assert!(said.contains("knows MBR"), "{said}");
    folder.run("fsck.erofs", &["small"]);
}

#[test]
fn an_ordinary_user_gets_the_same_disk() {
    needs!(root, "mke2fs", "debugfs", "faked-sysv");
    let folder = Folder::new();
    fs::write(folder.join("root.tar"), everything()).unwrap();
    folder.run("chown", &["1000:1000", "."]);
    // The program may lie where only root reaches it.
    folder.run("cp", &[env!("CARGO_BIN_EXE_mayfly-disks"), "program"]);
    folder.run(
        "setpriv",
        &[
            "--reuid",
            "1000",
            "--regid",
            "1000",
            "--clear-groups",
            "./program",
            "rootfs",
            "root.tar",
            "disk",
            "--as-is",
        ],
    );
    is_everything(&folder, "disk");
    assert_eq!(folder.names(), ["disk", "program", "root.tar"]);
}

#[test]
fn a_hostile_archive_reaches_nothing_and_is_refused() {
    needs!("mke2fs", "debugfs", "faked-sysv", "gzip");
    let folder = Folder::new();
    fs::write(folder.join("outside"), "untouched").unwrap();
    let absolute = folder.join("outside").display().to_string();
    for (archive, why) in hostile() {
        fs::write(folder.join("bad.tar"), archive).unwrap();
        folder.refuses(&["rootfs", "bad.tar", "disk"], &["bad.tar", why]);
    }
    // Links that lead out of the root on a host stay inside of it.
    let entries = [
        Entry("tmp/", b'5', 0o755, 0, "", b""),
        link("out", &absolute),
        link("up", "../../../../../../../../tmp"),
        file("up/planted", "x"),
        file(&absolute, "inside"),
        file("out", "a file now"),
    ];
    fs::write(folder.join("links.tar"), tar(&entries)).unwrap();
    folder.succeeds(&["rootfs", "links.tar", "disk", "--as-is"]);
    checked(&folder, "disk");
    assert_eq!(cat(&folder, "disk", "/tmp/planted"), "x");
    assert_eq!(cat(&folder, "disk", &absolute), "inside");
    assert_eq!(fs::read(folder.join("outside")).unwrap(), b"untouched");
    assert!(!Path::new("/tmp/planted").exists());
    // Truncated, damaged, too large, and content that is much more than the archive.
    let mut bytes = tar(&[file("a", &"x".repeat(5000))]);
    bytes.truncate(3000);
    fs::write(folder.join("bad.tar"), &bytes).unwrap();
    folder.refuses(&["rootfs", "bad.tar", "disk2"], &["bad.tar", "truncated"]);
    fs::write(folder.join("zeros"), "").unwrap();
    fs::File::options()
        .write(true)
        .open(folder.join("zeros"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    folder.run("tar", &["czf", "bomb.tgz", "zeros"]);
    folder.refuses(
        &["rootfs", "bomb.tgz", "disk2", "--max-size", "4M"],
        &["bomb.tgz", "4 MiB"],
    );
    folder.run("tar", &["cf", "bomb.tar", "zeros"]);
    folder.refuses(
        &["rootfs", "bomb.tar", "disk2", "--max-size", "4M"],
        &["bomb.tar", "--max-size"],
    );
    fs::write(
        folder.join("full.tar"),
        tar(&[file("full", &"x".repeat(8 << 20))]),
    )
    .unwrap();
    folder.refuses(
        &["rootfs", "full.tar", "disk2", "--size", "3"],
        &["mke2fs", "--size"],
    );
    fs::write(
        folder.join("empty.tar"),
        tar(&[Entry("./", b'5', 0o755, 0, "", b"")]),
    )
    .unwrap();
    folder.refuses(&["rootfs", "empty.tar", "disk2"], &["holds no files"]);
    fs::write(folder.join("text"), "no archive").unwrap();
    folder.refuses(&["rootfs", "text", "disk2"], &["text: is raw", "import"]);
}

#[test]
fn a_folder_becomes_a_disk_and_is_left_as_it_is() {
    needs!("mke2fs", "debugfs", "faked-sysv");
    let folder = Folder::new();
    fs::create_dir_all(folder.join("root/bin")).unwrap();
    fs::write(folder.join("root/bin/sh"), "a shell").unwrap();
    folder.run("chmod", &["755", "root/bin/sh"]);
    folder.run("ln", &["root/bin/sh", "root/bin/bash"]);
    folder.run("ln", &["-s", "sh", "root/bin/dash"]);
    let said = folder.succeeds(&["rootfs", "root", "disk"]);
    checked(&folder, "disk");
    assert!(said.contains("init=/sbin/mayfly-init"), "{said}");
    assert!(cat(&folder, "disk", "/sbin/mayfly-init").starts_with("#!/bin/sh\n"));
    assert!(stat(&folder, "disk", "/sbin/mayfly-init").contains("Mode:  0755"));
    assert!(stat(&folder, "disk", "/bin/sh").contains("Links: 2"));
    assert!(stat(&folder, "disk", "/etc/resolv.conf").contains("/proc/net/pnp"));
    assert_eq!(cat(&folder, "disk", "/etc/hostname"), "mayfly\n");
    assert!(stat(&folder, "disk", "/tmp").contains("Mode:  01777"));
    assert_eq!(folder.run("find", &["root"]).lines().count(), 5);
    assert_eq!(folder.names(), ["disk", "root"]);
}

#[test]
fn a_system_with_an_init_gets_a_console_only() {
    needs!("mke2fs", "debugfs", "faked-sysv");
    let folder = Folder::new();
    let made = |entries: &[Entry<'_>]| {
        fs::write(folder.join("root.tar"), tar(entries)).unwrap();
        folder.succeeds(&["rootfs", "root.tar", "disk", "--force"])
    };
    let said = made(&[
        program("usr/lib/systemd/systemd", "x"),
        link("usr/sbin/init", "../lib/systemd/systemd"),
        program("usr/sbin/agetty", "x"),
        link("sbin", "usr/sbin"),
    ]);
    assert!(
        said.contains("systemd found") && said.contains("init=/sbin/init'"),
        "{said}"
    );
    let place = "/etc/systemd/system/serial-getty@ttyS0.service.d/mayfly.conf";
    assert!(cat(&folder, "disk", place).contains("--autologin root"));
    let said = made(&[
        program("bin/busybox", "x"),
        link("sbin/init", "/bin/busybox"),
        file("etc/inittab", "::sysinit:/sbin/openrc\n"),
    ]);
    assert!(
        said.contains("busybox init found") && said.contains("init=/sbin/init'"),
        "{said}"
    );
    let inittab = cat(&folder, "disk", "/etc/inittab");
    assert_eq!(inittab, "::sysinit:/sbin/openrc\nttyS0::respawn:-/bin/sh\n");
    let said = made(&[
        program("sbin/init", "x"),
        file("etc/inittab", "#T0:23:respawn:/sbin/getty ttyS0\n"),
    ]);
    assert!(said.contains("added to /etc/inittab"), "{said}");
    let said = made(&[program("app", "x")]);
    assert!(said.contains("no init and no shell"), "{said}");
}

fn is_image(folder: &Folder, disk: &str) {
    checked(folder, disk);
    assert!(!has(folder, disk, "/gone") && !has(folder, disk, "/dir/old"));
    assert!(has(folder, disk, "/dir/new") && !has(folder, disk, "/dir/.wh..wh..opq"));
    assert_eq!(cat(folder, disk, "/kept"), "2");
    let init = cat(folder, disk, "/sbin/mayfly-init");
    assert!(
        init.contains(r"set -- '/bin/app' 'it'\''s an argument'"),
        "{init}"
    );
    assert!(
        init.contains("export A='b c'\n") && init.contains("cd '/srv'"),
        "{init}"
    );
}

#[test]
fn a_container_image_becomes_a_disk_that_runs_its_command() {
    needs!("mke2fs", "debugfs", "faked-sysv", "gzip", "zstd");
    let folder = Folder::new();
    let mut layers = layers();
    let packed = |program: &str, content: &[u8]| {
        fs::write(folder.join("layer"), content).unwrap();
        folder.run("sh", &["-c", &format!("{program} -q <layer >packed")]);
        fs::read(folder.join("packed")).unwrap()
    };
    layers[0] = packed("gzip", &layers[0]);
    let manifest = image(&folder.join("layout"), &layers, "amd64");
    index(&folder.join("layout"), std::slice::from_ref(&manifest));
    let said = folder.succeeds(&["rootfs", "layout", "disk"]);
    is_image(&folder, "disk");
    assert!(
        said.contains("init=/sbin/mayfly-init") && said.contains("user \"app\""),
        "{said}"
    );
    folder.run("tar", &["cf", "image.tar", "-C", "layout", "."]);
    folder.succeeds(&["rootfs", "image.tar", "disk", "--force"]);
    is_image(&folder, "disk");
    // One of several platforms, in an index in the index, with a layer by zstd.
    layers[1] = packed("zstd", &layers[1]);
    let ours = image(&folder.join("layout"), &layers, "amd64");
    let with = |manifest: &str, more: &str| manifest.replacen('{', &format!("{{{more},"), 1);
    let platform =
        |name: &str| format!("\"platform\":{{\"os\":\"linux\",\"architecture\":\"{name}\"}}");
    let other = image(&folder.join("layout"), &layers, "arm64");
    let list = format!(
        "{{\"manifests\":[{},{}]}}",
        with(&other, &platform("arm64")),
        with(&ours, &platform("amd64"))
    );
    index(
        &folder.join("layout"),
        &[blob(&folder.join("layout"), list.as_bytes())],
    );
    folder.succeeds(&["rootfs", "layout", "disk", "--force"]);
    is_image(&folder, "disk");
    // Several names.
    let named = |name: &str| {
        with(
            &ours,
            &format!("\"annotations\":{{\"org.opencontainers.image.ref.name\":\"{name}\"}}"),
        )
    };
    index(&folder.join("layout"), &[named("a:1"), named("b:2")]);
    folder.refuses(&["rootfs", "layout", "disk2"], &["a:1, b:2", "--name"]);
    folder.succeeds(&["rootfs", "layout", "disk", "--force", "--name", "b:2"]);
    folder.refuses(&["rootfs", "layout", "disk2", "--name", "c"], &["no image"]);
}

#[test]
fn an_archive_of_docker_save_becomes_a_disk() {
    needs!("mke2fs", "debugfs", "faked-sysv");
    let folder = Folder::new();
    let [low, high] = layers().try_into().unwrap();
    let config = r#"{"os":"linux","architecture":"amd64","config":{"Cmd":["/bin/app","it's an argument"],"Env":["A=b c"],"WorkingDir":"/srv"}}"#;
    let manifest = r#"[{"Config":"c.json","RepoTags":["app:1"],"Layers":["1/layer.tar","2/layer.tar","3/layer.tar"]}]"#;
    let saved = tar(&[
        Entry("1/layer.tar", b'0', 0o644, 0, "", &low),
        Entry("2/layer.tar", b'0', 0o644, 0, "", &high),
        link("3/layer.tar", "../2/layer.tar"),
        file("c.json", config),
        file("manifest.json", manifest),
    ]);
    fs::write(folder.join("app.tar"), saved).unwrap();
    folder.succeeds(&["rootfs", "app.tar", "disk"]);
    is_image(&folder, "disk");
    folder.succeeds(&["rootfs", "app.tar", "disk", "--force", "--name", "app:1"]);
    folder.refuses(
        &["rootfs", "app.tar", "disk2", "--name", "app:2"],
        &["no image"],
    );
}

#[test]
fn a_container_image_that_is_wrong_is_refused() {
    needs!("mke2fs", "faked-sysv");
    let folder = Folder::new();
    let manifest = image(&folder.join("layout"), &layers(), "arm64");
    index(&folder.join("layout"), &[manifest]);
    folder.refuses(&["rootfs", "layout", "disk"], &["arm64"]);
    let manifest = image(&folder.join("layout"), &layers(), "amd64");
    index(&folder.join("layout"), std::slice::from_ref(&manifest));
    let digest = manifest
        .split('"')
        .nth(3)
        .unwrap()
        .replace("sha256:", "layout/blobs/sha256/");
    let right = fs::read(folder.join(&digest)).unwrap();
    let mut wrong = right.clone();
    wrong.push(b' ');
    fs::write(folder.join(&digest), wrong).unwrap();
    folder.refuses(&["rootfs", "layout", "disk"], &["digest"]);
    fs::remove_file(folder.join(&digest)).unwrap();
    folder.refuses(&["rootfs", "layout", "disk"], &["incomplete", "missing"]);
    for digest in ["sha256:../../../etc/passwd", "md5:x", "sha256:00"] {
        index(
            &folder.join("layout"),
            &[format!("{{\"digest\":\"{digest}\"}}")],
        );
        folder.refuses(&["rootfs", "layout", "disk"], &["not of SHA-256"]);
    }
    fs::write(folder.join("layout/index.json"), "not JSON").unwrap();
    folder.refuses(&["rootfs", "layout", "disk"], &["not JSON"]);
    let bad = tar(&[file("../../../../tmp/planted", "x")]);
    let manifest = image(&folder.join("layout"), &[bad], "amd64");
    index(&folder.join("layout"), &[manifest]);
    folder.refuses(&["rootfs", "layout", "disk"], &["leads out"]);
}

#[test]
fn debian_is_installed_by_mmdebstrap_or_its_reason_is_told() {
    needs!("mke2fs", "debugfs", "faked-sysv");
    let folder = Folder::new();
    fs::write(
        folder.join("root.tar"),
        tar(&[program("sbin/init", "x"), program("bin/sh", "x")]),
    )
    .unwrap();
    fs::create_dir(folder.join("bin")).unwrap();
    let program = |script: &str| folder.program("bin/mmdebstrap", script);
    let run = || {
        let path = format!(
            "{}:{}",
            folder.join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly-disks"));
        command.args([
            "rootfs",
            "--debian",
            "bookworm",
            "disk",
            "--include",
            "curl,vim",
        ]);
        command
            .current_dir(folder.path())
            .env("PATH", path)
            .output()
            .unwrap()
    };
    program("echo \"$*\" >asked; shift 5; cp root.tar \"$1\"");
    let output = run();
    assert!(output.status.success(), "{output:?}");
    let asked = fs::read_to_string(folder.join("asked")).unwrap();
    assert!(
        asked.contains("--include=init,curl,vim bookworm "),
        "{asked}"
    );
    assert!(
        asked.ends_with(" http://deb.debian.org/debian\n"),
        "{asked}"
    );
    checked(&folder, "disk");
    fs::remove_file(folder.join("disk")).unwrap();
    program("echo 'I: working' >&2; echo 'E: no such suite' >&2; exit 1");
    let output = run();
    let messages = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(1) && messages.contains("no such suite"),
        "{messages}"
    );
    assert!(!folder.has("disk"));
    folder.refuses(&["rootfs", "--debian", "x;y", "disk"], &["impossible name"]);
}

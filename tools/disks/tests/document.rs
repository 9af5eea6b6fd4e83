//! docs/disks.md: the commands of its table "Coming from" are run as they stand.

#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs;
use std::process::Command;

use support::Folder;
use support::needs::{self, needs};

const DOCUMENT: &str = include_str!("../../../docs/disks.md");

/// The commands in the last column of the table, row by row.
fn commands() -> Vec<&'static str> {
    let (_, section) = DOCUMENT.split_once("## Coming from\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let cells = rows.map(|row| row.trim_end_matches('|').rsplit('|').next().unwrap());
    cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect()
}

/// What a reader has before the first command: a disk in each format, and the programs' names.
fn prepare(folder: &Folder) {
    folder.marked("made", "marked");
    for (format, options, name) in [
        ("vmdk", "subformat=twoGbMaxExtentSparse", "web.vmdk"),
        ("vmdk", "subformat=streamOptimized", "appliance-disk1.vmdk"),
        ("vhdx", "", "web.vhdx"),
        ("vpc", "subformat=fixed,force_size=on", "web.vhd"),
        ("vdi", "", "web.vdi"),
        ("qcow2", "", "web.qcow2"),
    ] {
        folder.convert(format, options, "made", name);
    }
    fs::write(folder.join("appliance.ovf"), "<Envelope/>").unwrap();
    folder.run(
        "tar",
        &[
            "cf",
            "appliance.ova",
            "appliance.ovf",
            "appliance-disk1.vmdk",
        ],
    );
    folder.qemu_img("snapshot -c monday web.qcow2");
    fs::create_dir(folder.join("web.hdd")).unwrap();
    folder.convert("parallels", "", "made", "web.hdd/web.hds");
    let descriptor = "<Parallels_disk_image><StorageData><Storage><Start>0</Start><End>204801</End>\
        <Image><Type>Compressed</Type><File>web.hds</File></Image></Storage></StorageData></Parallels_disk_image>";
    fs::write(folder.join("web.hdd/DiskDescriptor.xml"), descriptor).unwrap();
    folder.run("cp", &["made", "cloud.raw"]);
    folder.run("xz", &["-q", "-1", "cloud.raw"]);
    fs::create_dir_all(folder.join("system/bin")).unwrap();
    fs::write(folder.join("system/bin/sh"), "a shell").unwrap();
    folder.run("chmod", &["755", "system/bin/sh"]);
    folder.run("tar", &["czf", "system.tar.gz", "-C", "system", "."]);
    // What docker and mmdebstrap put out: neither a daemon nor a network is needed here.
    folder.run("tar", &["cf", "layer.tar", "-C", "system", "."]);
    let config = r#"{"os":"linux","architecture":"amd64","config":{"Cmd":["/bin/sh"]}}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    let manifest = r#"[{"Config":"config.json","RepoTags":["app:1"],"Layers":["layer.tar"]}]"#;
    fs::write(folder.join("manifest.json"), manifest).unwrap();
    fs::create_dir_all(folder.join("bin")).unwrap();
    fs::create_dir_all(folder.join("tools")).unwrap();
    for (name, script) in [
        (
            "bin/docker",
            "test \"$1 $2 $3\" = 'save app:1 -o' && tar cf \"$4\" layer.tar config.json manifest.json",
        ),
        ("bin/mmdebstrap", "shift 5; tar cf \"$1\" -C system ."),
        (
            "tools/guest",
            &format!("exec {} \"$@\"", env!("CARGO_BIN_EXE_mayfly-disks")),
        ),
    ] {
        folder.program(name, script);
    }
}

#[test]
fn commands_of_the_table_coming_from_work_as_they_stand() {
    needs!("qemu-img", "mke2fs", "mkfs.erofs", "xz", "faked-sysv");
    let folder = Folder::new();
    prepare(&folder);
    let commands = commands();
    assert!(commands.len() >= 18, "{commands:?}");
    let path = format!(
        "{}:{}",
        folder.join("bin").display(),
        std::env::var("PATH").unwrap()
    );
    for command in &commands {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", command])
            .current_dir(folder.path())
            .env("PATH", &path);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        let starts = command.contains(" import ") || command.contains(" rootfs ");
        assert_eq!(
            said.contains("mayfly-jailer run"),
            starts,
            "{command}: {said}"
        );
    }
    for name in [
        "web",
        "appliance",
        "vhdx",
        "vhd",
        "vdi",
        "hdd",
        "qcow2",
        "monday",
        "cloud",
    ] {
        assert!(folder.same("made", &format!("{name}.raw")), "{name}");
    }
    for format in ["vmdk", "vhdx", "vhd", "vdi", "hds", "qcow2"] {
        folder.succeeds(&["import", &format!("back.{format}"), "again", "--force"]);
        assert!(folder.same("made", "again"), "{format}");
    }
    for name in ["app", "system", "small", "debian"] {
        folder.run("e2fsck", &["-fn", &format!("{name}.ext4")]);
    }
}

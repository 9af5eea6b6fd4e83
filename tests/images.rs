//! Guests whose root is a folder, a tarball or an image layout (`mayfly-jailer run --image SOURCE`), with real binaries and
//! a real Linux guest. What disks hold, and the cache, is tested with `mayfly-image` itself (jailer/images/tests).

mod common;

use common::{containers, needs};
#[path = "jail/host.rs"]
mod host;
#[path = "jail/image.rs"]
mod image;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use image::Images;
use run::Who;

/// What a guest says of the owners, modes, links and devices of its root.
const LOOK: &str = "cd /srv; stat -c '%n %u %g %a %h' mine su link; stat -c '%n %F %t,%T' zero; readlink far; \
                    cat data | md5sum; cat nested/deep/er; echo written >data; cat data";

impl Images {
    /// With the program that makes disks, and a root to make them of.
    fn new(test: &str, who: Who) -> Images {
        let images = Images::real(test, who);
        let place = &images.place;
        fs::copy(common::mayfly_image(), place.path("mayfly-image")).unwrap();
        images.make_folder("cache");
        fs::create_dir_all(place.path("root/srv/nested/deep")).unwrap();
        let root = PathBuf::from(place.path("root"));
        let applets = ["sh", "cat", "stat", "readlink", "md5sum", "mkdir", "rm"];
        containers::busybox_root(&root, &applets);
        fs::write(root.join("srv/mine"), "x").unwrap();
        fs::write(root.join("srv/su"), "x").unwrap();
        fs::write(root.join("srv/data"), "data".repeat(100_000)).unwrap();
        fs::write(root.join("srv/nested/deep/er"), "deeper\n").unwrap();
        fs::hard_link(root.join("srv/su"), root.join("srv/link")).unwrap();
        symlink("t".repeat(4000), root.join("srv/far")).unwrap();
        let srv = |name: &str| place.path(&format!("root/srv/{name}"));
        common::run("chown", &["1234:70000", &srv("mine")]);
        common::run("chmod", &["4711", &srv("su")]);
        common::run("mknod", &[&srv("zero"), "c", "1", "5"]);
        images
    }

    fn image(&self, words: &[&str]) -> String {
        let mut command = Command::new(self.place.path("mayfly-image"));
        command.env("MAYFLY_IMAGES", self.place.path("cache"));
        let output = command.args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", err(&output));
        out(&output)
    }

    fn disks(&self) -> Vec<PathBuf> {
        let Ok(disks) = fs::read_dir(self.place.path("cache/disks")) else {
            return Vec::new();
        };
        disks.map(|disk| disk.unwrap().path()).collect()
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_root(images: &Images, text: &str) {
    let sum = format!("{}  -", sum_of_data(images));
    let lines: Vec<&str> = text.lines().collect();
    let far = "t".repeat(4000);
    assert_eq!(
        lines,
        [
            "mine 1234 70000 644 1",
            "su 0 0 4711 2",
            "link 0 0 4711 2",
            "zero character special file 1,5",
            &far,
            &sum,
            "deeper",
            "written",
        ]
    );
}

/// The MD5 of what is in `srv/data`, by another program.
fn sum_of_data(images: &Images) -> String {
    let output = Command::new("md5sum")
        .arg(images.place.path("root/srv/data"))
        .output();
    out(&output.unwrap()).split(' ').next().unwrap().to_owned()
}

#[test]
fn folder_is_the_root_of_a_guest_and_its_disk_is_kept_while_that_runs() {
    needs!(kvm, root, guest);
    let images = Images::new("folder_root", Who::Root);
    let script = format!("{LOOK}; echo up; read line; echo $line");
    let command = ["/bin/sh", "-c", &script];
    let mut jailer = images.run(&images.place.path("root"), &["-i"], &command);
    jailer
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = jailer.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.ends_with("up\n") && stdout.read_line(&mut text).unwrap() > 0 {}
    let listed = images.image(&["list"]);
    assert!(listed.contains("in use"), "{listed}: {text}");
    assert!(images.image(&["prune", "--all"]).starts_with("0 disks"));
    assert_eq!(images.disks().len(), 1);
    child.stdin.take().unwrap().write_all(b"go on\n").unwrap();
    while stdout.read_line(&mut text).unwrap() > 0 {}
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    is_root(&images, text.strip_suffix("up\ngo on\n").unwrap());
    assert!(images.image(&["prune", "--all"]).starts_with("1 disks"));
    images.place.nothing_is_left();
}

#[test]
fn tarball_run_by_an_ordinary_user_has_the_owners_of_the_tarball() {
    needs!(kvm, root, guest, "gzip");
    let images = Images::new("tarball_root", Who::User);
    let archive = images.place.path("root.tar.gz");
    let root = images.place.path("root");
    common::run(
        "tar",
        &["czf", &archive, "--numeric-owner", "-C", &root, "."],
    );
    let command = ["/bin/sh", "-c", LOOK];
    let output = images.run(&archive, &[], &command).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    is_root(&images, &out(&output));
    let [disk] = &images.disks()[..] else {
        panic!("{:?}", images.disks())
    };
    let it = fs::metadata(disk).unwrap();
    assert_eq!(it.uid(), host::UID);
    images.place.nothing_is_left();
}

#[test]
fn image_of_which_no_disk_can_be_made_is_told_in_one_message() {
    needs!(kvm, root, guest);
    let images = Images::new("no_image", Who::Root);
    let root = images.place.path("root");
    let bad = images.place.path("bad");
    fs::write(&bad, "text").unwrap();
    let refused = |image: &str, words: &[&str]| {
        let output = images.run(image, &[], &["/bin/true"]).output().unwrap();
        let text = err(&output);
        assert_eq!(output.status.code(), Some(125), "{image}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{image}: {text}");
        for word in words {
            assert!(text.contains(word), "{image}: no {word:?} in: {text}");
        }
        assert_eq!(images.disks().len(), 0);
        images.place.nothing_is_left();
    };
    refused(&bad, &["--image", &bad, "neither a tar archive"]);
    refused(&images.place.path("gone"), &["--image", "No such file"]);
    refused(&format!("{root}:rw"), &[":rw", "a disk is made of it"]);
    fs::remove_file(images.place.path("mayfly-image")).unwrap();
    refused(&root, &["mayfly-image", "not beside mayfly-jailer"]);
}

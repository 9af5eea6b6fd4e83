//! What the tests of guests that run a command (`mayfly-jailer run --image`) need besides: the real programs, a real
//! Linux guest, and the command line.

use std::fs;
use std::process::Command;

use super::common;
use super::host::UID;
use super::run::{Place, Who};

/// A test's programs and images, and who uses them.
pub struct Images {
    pub place: Place,
    pub who: Who,
}

impl Images {
    /// With the real monitor and agent, and an empty folder for sockets. Guests of root are copies of the suite's
    /// templates; those of other users boot.
    pub fn real(test: &str, who: Who) -> Images {
        let mut place = Place::real(test, &common::mayfly());
        if who == Who::Root {
            place.mayfly = Some(common::mayfly());
        }
        fs::copy(common::agent(), place.path("agent")).unwrap();
        let images = Images { place, who };
        images.make_folder("runtime");
        images
    }

    /// Makes a folder of the user's own.
    pub fn make_folder(&self, name: &str) {
        let path = self.place.path(name);
        fs::create_dir(&path).unwrap();
        if self.who == Who::User {
            common::run("chown", &[&UID.to_string(), &path]);
        }
    }

    /// `mayfly-jailer run --image`.
    pub fn run(&self, image: &str, more: &[&str], command: &[&str]) -> Command {
        let linux = common::linux();
        let kernel = linux.kernel.display().to_string();
        let agent = self.place.path("agent");
        let words = ["run", "--image", image, "--kernel", &kernel, "--cmdline"];
        let words = [&words[..], &[&linux.cmdline, "--agent", &agent], more].concat();
        let mut jailer = self.place.jailer(self.who, &words);
        jailer.env("MAYFLY_IMAGES", self.place.path("cache"));
        jailer.env("XDG_RUNTIME_DIR", self.place.path("runtime"));
        if self.who == Who::Root && !more.contains(&"--template") {
            jailer
                .arg("--template")
                .arg(common::containers::templates());
        }
        if !command.is_empty() {
            jailer.arg("--").args(command);
        }
        jailer
    }
}

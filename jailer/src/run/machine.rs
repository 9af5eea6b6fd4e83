//! The machine to run: a configuration in the monitor's own JSON whose paths and tap names have been
//! taken out, and the opened files that stand for them.
//!
//! Looking comes first and touches nothing (`Described`), then everything is opened (`Machine`),
//! then it is told to the monitor: at best in one request that carries all descriptors, in several
//! where there are more than one request can carry.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::args::{self, Net, Plain};
use super::json;
use super::opening::{Kind, open_tap};
use crate::failure::Failure;

/// Most descriptors one request can carry.
const WITH_ONE_REQUEST: usize = mayfly::wire::limits::DESCRIPTORS_MAX;

/// The sections of a configuration.
const SECTIONS: [&str; 8] = [
    "boot-source",
    "drives",
    "network-interfaces",
    "machine-config",
    "cpu-config",
    "logger",
    "metrics",
    "serial",
];

/// Sections of Firecracker's for which there is nothing here.
const OUT_OF_SCOPE: [&str; 6] = [
    "balloon",
    "vsock",
    "entropy",
    "mmds-config",
    "memory-hotplug",
    "pmem",
];

/// The monitor's own default command line with a console, which this command shows: the word
/// `8250.nr_uarts=0` would take it away.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=1 nomodule i8042.noaux i8042.nomux \
                       i8042.dumbkbd swiotlb=noforce";

/// A configuration, and what it names.
#[derive(Debug)]
pub struct Described {
    body: Map<String, Value>,
    things: Vec<Thing>,
    /// Where it wants the monitor's log.
    pub log: Option<PathBuf>,
    /// Where it wants the console.
    pub console: Option<PathBuf>,
}

/// Something named by a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Thing {
    /// Where in the configuration, as a JSON pointer to the object that names it.
    at: String,
    kind: Kind,
    source: Source,
}

impl Thing {
    /// What the user calls it.
    fn name(&self) -> String {
        match &self.source {
            Source::Path(path) => path.display().to_string(),
            Source::Name(name) => name.clone(),
            Source::Descriptor(number) => format!("descriptor {number}"),
            Source::Socket(path) => path.display().to_string(),
            Source::Made(_) => "of its own".into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Path(PathBuf),
    Name(String),
    Descriptor(RawFd),
    /// A socket to be made there.
    Socket(PathBuf),
    Made(Own),
}

/// A tap made for this microVM, in the network namespace of its jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// Connected to the host.
    Auto,
    /// To be connected by a program of the user's.
    User,
}

impl Kind {
    /// The member that holds a path or name.
    fn member(self) -> &'static str {
        match self {
            Kind::Kernel => "kernel_image_path",
            Kind::Initrd => "initrd_path",
            Kind::Disk { .. } => "path_on_host",
            Kind::Metrics => "metrics_path",
            Kind::Tap => "host_dev_name",
            Kind::Console => "console_socket",
        }
    }

    /// Whether a bare "fd" in the object that names one says which: a boot source names two files,
    /// and the console's goes for its output.
    fn is_alone(self) -> bool {
        !matches!(self, Kind::Kernel | Kind::Initrd | Kind::Console)
    }
}

impl Described {
    /// From plain options.
    pub fn plain(plain: &Plain) -> Result<Described, Failure> {
        let mut boot = Map::new();
        boot.insert("kernel_image_path".into(), text(&plain.kernel)?);
        if let Some(initrd) = &plain.initrd {
            boot.insert("initrd_path".into(), text(initrd)?);
        }
        let cmdline = plain.cmdline.as_deref().unwrap_or(CMDLINE);
        boot.insert("boot_args".into(), cmdline.into());
        let mut drives = Vec::new();
        for (index, (path, read_only)) in plain.drives.iter().enumerate() {
            drives.push(json!({
                "drive_id": if index == 0 { "root".to_owned() } else { format!("disk{index}") },
                "path_on_host": text(path)?,
                "is_read_only": read_only,
                "is_root_device": index == 0 && plain.initrd.is_none(),
            }));
        }
        let mut nets = Vec::new();
        let mut own = Vec::new();
        for (index, net) in plain.nets.iter().enumerate() {
            let id = format!("eth{index}");
            nets.push(match net {
                Net::Tap(name) => json!({ "iface_id": id, "host_dev_name": name }),
                Net::Descriptor(number) => json!({ "iface_id": id, "fd": number }),
                Net::Auto | Net::User => {
                    let kind = if *net == Net::Auto {
                        Own::Auto
                    } else {
                        Own::User
                    };
                    own.push((index, kind));
                    json!({ "iface_id": id })
                }
            });
        }
        let body = json!({
            "boot-source": boot,
            "drives": drives,
            "network-interfaces": nets,
            "machine-config": {
                "vcpu_count": plain.vcpus.unwrap_or(1),
                "mem_size_mib": plain.memory.unwrap_or(128),
            },
        });
        Described::of(body, &own)
    }

    /// From a file.
    pub fn config(path: &Path) -> Result<Described, Failure> {
        let what = format!("use the configuration {} (--config)", path.display());
        let mut body = json::read(path, &what)?;
        let see = |failure: Failure| failure.remedy(format_args!("see {}", path.display()));
        if let Value::Object(body) = &mut body {
            keep_known(body).map_err(see)?;
        }
        Described::of(body, &[]).map_err(see)
    }

    fn of(body: Value, own: &[(usize, Own)]) -> Result<Described, Failure> {
        let what = "understand the configuration";
        let Value::Object(mut body) = body else {
            return Err(Failure::new(what, "it is not a JSON object"));
        };
        let mut things = Vec::new();
        if let Some(boot) = body.get("boot-source") {
            for kind in [Kind::Kernel, Kind::Initrd] {
                things.extend(thing(boot, "/boot-source", kind)?);
            }
        }
        for (index, drive) in list(&body, "drives")?.iter().enumerate() {
            let read_only = drive.get("is_read_only") == Some(&Value::Bool(true));
            let at = format!("/drives/{index}");
            things.extend(thing(drive, &at, Kind::Disk { read_only })?);
        }
        for (index, net) in list(&body, "network-interfaces")?.iter().enumerate() {
            let at = format!("/network-interfaces/{index}");
            match own.iter().find(|(made, _)| *made == index) {
                Some((_, own)) => things.push(Thing {
                    at,
                    kind: Kind::Tap,
                    source: Source::Made(*own),
                }),
                None => things.extend(thing(net, &at, Kind::Tap)?),
            }
        }
        if own.len() > 1 {
            return Err(Failure::new("use --net auto or user", "it is given twice")
                .remedy("one such interface is what a jail has; give taps for others"));
        }
        if let Some(metrics) = body.get("metrics") {
            things.extend(thing(metrics, "/metrics", Kind::Metrics)?);
        }
        if let Some(serial) = body.get("serial") {
            things.extend(thing(serial, "/serial", Kind::Console)?);
        }
        let log = take_output(&mut body, "logger", "log_path")?;
        let console = take_output(&mut body, "serial", "serial_out_path")?;
        if let Some(Value::String(path)) = body.get("cpu-config") {
            let what = format!("use the CPU configuration {path}");
            let masks = json::read(Path::new(path), &what)?;
            body.insert("cpu-config".into(), masks);
        }
        Ok(Described {
            body,
            things,
            log,
            console,
        })
    }

    /// The inherited descriptors that stand for something.
    pub fn inherited(&self) -> Vec<RawFd> {
        let number = |thing: &Thing| match thing.source {
            Source::Descriptor(number) => Some(number),
            _ => None,
        };
        self.things.iter().filter_map(number).collect()
    }

    /// The tap that is to be made in the jail, if there is one.
    pub fn own_tap(&self) -> Option<Own> {
        self.things.iter().find_map(|thing| match thing.source {
            Source::Made(own) => Some(own),
            _ => None,
        })
    }

    /// Opens everything. A tap or socket that is still to be made is left out until then.
    pub fn open(
        self,
        mut inherit: impl FnMut(RawFd) -> Result<OwnedFd, Failure>,
    ) -> Result<Machine, Failure> {
        let mut files = Vec::new();
        for thing in &self.things {
            files.push(match &thing.source {
                Source::Path(path) => Some(thing.kind.open(path)?),
                Source::Name(name) => Some(open_tap(name)?),
                Source::Descriptor(number) => {
                    let fd = inherit(*number)?;
                    thing
                        .kind
                        .examine(fd.as_fd(), &format!("descriptor {number}"))?;
                    Some(fd)
                }
                Source::Made(_) | Source::Socket(_) => None,
            });
        }
        Ok(Machine {
            body: self.body,
            things: self.things,
            files,
        })
    }
}

fn text(path: &Path) -> Result<Value, Failure> {
    path.to_str().map(Value::from).ok_or_else(|| {
        Failure::new(
            format_args!("use the path {}", path.display()),
            "it is not UTF-8",
        )
    })
}

/// Takes the path at which this program, and not the monitor, writes something.
fn take_output(
    body: &mut Map<String, Value>,
    section: &str,
    member: &str,
) -> Result<Option<PathBuf>, Failure> {
    let Some(object) = body.get_mut(section).and_then(Value::as_object_mut) else {
        return Ok(None);
    };
    let found = object.remove(member).or_else(|| object.remove("fd"));
    match found {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(path)) => Ok(Some(path.into())),
        Some(_) => Err(Failure::new(
            format_args!("use \"{member}\" of \"{section}\" in the configuration"),
            "it is not a path, and this program opens the file itself",
        )
        .remedy("give a path, or leave it out and redirect what is printed")),
    }
}

/// Leaves out the sections that nobody knows, as the monitor does where it reads a file, and refuses
/// those that it refuses.
fn keep_known(body: &mut Map<String, Value>) -> Result<(), Failure> {
    body.retain(|name, _| SECTIONS.contains(&&**name) || OUT_OF_SCOPE.contains(&&**name));
    let is_asked_for = |value: &Value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        _ => true,
    };
    for name in OUT_OF_SCOPE {
        if body.remove(name).is_some_and(|value| is_asked_for(&value)) {
            let what = format!("use the section \"{name}\" of the configuration");
            return Err(Failure::new(
                what,
                "it is out of scope: there is no such device",
            ));
        }
    }
    Ok(())
}

fn list<'a>(body: &'a Map<String, Value>, name: &str) -> Result<&'a [Value], Failure> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(Failure::new(
            format_args!("understand \"{name}\""),
            "it is not a list",
        )),
    }
}

/// What `object` names as its `kind`, if it does. What else is wrong with it the monitor will say.
fn thing(object: &Value, at: &str, kind: Kind) -> Result<Option<Thing>, Failure> {
    let what = || {
        format!(
            "understand the {} of {at} in the configuration",
            kind.word()
        )
    };
    let number = |fd: &Value| {
        let number = fd.as_i64().and_then(|number| RawFd::try_from(number).ok());
        number
            .filter(|&number| number > 2)
            .ok_or_else(|| Failure::new(what(), "\"fd\" is not the number of a descriptor above 2"))
    };
    let own_fd = object.get("fd").filter(|_| kind.is_alone());
    let source = match (object.get(kind.member()), own_fd) {
        (Some(Value::Object(inner)), None) if inner.contains_key("fd") => {
            Source::Descriptor(number(&inner["fd"])?)
        }
        (Some(Value::Number(found)), _) => {
            let why = format!("\"{}\" is the number {found}", kind.member());
            let remedy = format!("give a string, or {{\"fd\": {found}}} for a descriptor");
            return Err(Failure::new(what(), why).remedy(remedy));
        }
        (Some(Value::String(path)), _) if kind == Kind::Console => Source::Socket(path.into()),
        (Some(Value::String(name)), None) if kind == Kind::Tap => Source::Name(name.clone()),
        (Some(Value::String(path)), None) => Source::Path(path.into()),
        (None, Some(fd)) => Source::Descriptor(number(fd)?),
        (Some(Value::String(_)), Some(_)) => {
            return Err(Failure::new(
                what(),
                format_args!("it has both \"fd\" and \"{}\"", kind.member()),
            ));
        }
        _ => return Ok(None),
    };
    Ok(Some(Thing {
        at: at.to_owned(),
        kind,
        source,
    }))
}

/// A machine with everything it names opened.
#[derive(Debug)]
pub struct Machine {
    body: Map<String, Value>,
    things: Vec<Thing>,
    /// One for each thing; none for a tap still to be made.
    files: Vec<Option<OwnedFd>>,
}

/// One request to the monitor.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// Its method and path.
    pub line: String,
    /// Its body.
    pub body: Value,
    /// The files that go with it, by their place in the machine's list.
    files: Vec<usize>,
}

impl Machine {
    /// A machine of one kernel, for `check`.
    pub fn of_kernel(kernel: OwnedFd, memory_mib: u64) -> Machine {
        let body = json!({
            "boot-source": { "boot_args": "" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
        });
        let Value::Object(body) = body else {
            unreachable!("written as an object above")
        };
        let thing = Thing {
            at: "/boot-source".into(),
            kind: Kind::Kernel,
            source: Source::Path("of this check".into()),
        };
        Machine {
            body,
            things: vec![thing],
            files: vec![Some(kernel)],
        }
    }

    /// Takes the tap that was made in the jail.
    pub fn set_tap(&mut self, tap: OwnedFd) {
        self.set(tap, |source| matches!(source, Source::Made(_)));
    }

    /// Where the configuration wants a socket for clients of the monitor's console.
    pub fn socket(&self) -> Option<&Path> {
        self.things.iter().find_map(|thing| match &thing.source {
            Source::Socket(path) => Some(&**path),
            _ => None,
        })
    }

    /// Takes that socket.
    pub fn set_socket(&mut self, listener: OwnedFd) {
        self.set(listener, |source| matches!(source, Source::Socket(_)));
    }

    fn set(&mut self, file: OwnedFd, is_it: impl Fn(&Source) -> bool) {
        let at = self.things.iter().position(|thing| is_it(&thing.source));
        if let Some(place) = at.and_then(|at| self.files.get_mut(at)) {
            *place = Some(file);
        }
    }

    /// The length of the longest request's body.
    pub fn longest_body(&self) -> usize {
        let bodies = self.requests().into_iter().map(|request| request.body);
        bodies.map(|body| body.to_string().len()).max().unwrap_or(0)
    }

    /// Tells the guest its address on the kernel's command line, unless that has one already.
    pub fn set_guest_address(&mut self, words: &str, mac: &str) {
        let boot = self
            .body
            .get_mut("boot-source")
            .and_then(Value::as_object_mut);
        if let Some(boot) = boot {
            let old = boot
                .get("boot_args")
                .and_then(Value::as_str)
                .unwrap_or(CMDLINE);
            if !old.split_whitespace().any(|word| word.starts_with("ip=")) {
                // Before what is for init.
                let new = match old.split_once(" -- ") {
                    Some((kernel, init)) => format!("{kernel} {words} -- {init}"),
                    None => format!("{old} {words}"),
                };
                boot.insert("boot_args".into(), new.into());
            }
        }
        let own = self
            .things
            .iter()
            .find(|thing| matches!(thing.source, Source::Made(_)));
        if let Some(own) = own.map(|thing| thing.at.clone())
            && let Some(net) = self.interface(&own)
        {
            net.entry("guest_mac").or_insert_with(|| mac.into());
        }
    }

    fn interface(&mut self, at: &str) -> Option<&mut Map<String, Value>> {
        let index: usize = at.strip_prefix("/network-interfaces/")?.parse().ok()?;
        self.body
            .get_mut("network-interfaces")?
            .get_mut(index)?
            .as_object_mut()
    }

    /// What to send, in order; the last one starts the guest.
    pub fn requests(&self) -> Vec<Request> {
        if self.files.len() <= WITH_ONE_REQUEST {
            let mut body = Value::Object(self.body.clone());
            for (index, thing) in self.things.iter().enumerate() {
                if let Some(object) = body.pointer_mut(&thing.at) {
                    put(object, thing.kind, index);
                }
            }
            if let Some(body) = body.as_object_mut() {
                body.entry("drives").or_insert_with(|| json!([]));
                body.insert("start".into(), true.into());
            }
            let files = (0..self.files.len()).collect();
            return vec![Request {
                line: "PUT /vm".into(),
                body,
                files,
            }];
        }
        self.one_by_one()
    }

    fn one_by_one(&self) -> Vec<Request> {
        let mut requests = Vec::new();
        let mut tell = |line: String, at: &str, object: &Value| {
            let mut body = object.clone();
            let mut files = Vec::new();
            for (index, thing) in self
                .things
                .iter()
                .enumerate()
                .filter(|(_, thing)| thing.at == at)
            {
                put(&mut body, thing.kind, files.len());
                files.push(index);
            }
            requests.push(Request { line, body, files });
        };
        for section in [
            "logger",
            "metrics",
            "serial",
            "machine-config",
            "cpu-config",
            "boot-source",
        ] {
            if let Some(object) = self.body.get(section).filter(|object| !object.is_null()) {
                tell(format!("PUT /{section}"), &format!("/{section}"), object);
            }
        }
        for (section, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
            for (index, object) in list(&self.body, section)
                .unwrap_or_default()
                .iter()
                .enumerate()
            {
                let id = object.get(id).and_then(Value::as_str).unwrap_or_default();
                tell(
                    format!("PUT /{section}/{id}"),
                    &format!("/{section}/{index}"),
                    object,
                );
            }
        }
        tell(
            "PUT /actions".into(),
            "",
            &json!({ "action_type": "InstanceStart" }),
        );
        requests
    }

    /// What the user calls the files that an answer to `request` may speak of, in the order of their
    /// numbers. At the start those are the kernel's and the initrd's.
    pub fn names(&self, request: &Request) -> Vec<String> {
        if request.files.is_empty() {
            return self.images();
        }
        request
            .files
            .iter()
            .filter_map(|&index| self.things.get(index))
            .map(Thing::name)
            .collect()
    }

    /// What the user calls the files that are mapped into the guest, in the order of the request
    /// that they go with.
    pub fn images(&self) -> Vec<String> {
        let is_image = |thing: &&Thing| matches!(thing.kind, Kind::Kernel | Kind::Initrd);
        self.things
            .iter()
            .take_while(is_image)
            .map(Thing::name)
            .collect()
    }

    /// The files that go with `request`.
    pub fn files(&self, request: &Request) -> Vec<BorrowedFd<'_>> {
        request
            .files
            .iter()
            .filter_map(|&index| self.files.get(index)?.as_ref())
            .map(AsFd::as_fd)
            .collect()
    }
}

/// Puts `names` in the place of the descriptors' numbers, which are all that the monitor knows of
/// the files it was handed, in its words `text`. A number it was not handed stays.
pub fn rename(text: &[u8], names: &[String]) -> Vec<u8> {
    const WORD: &[u8] = b"descriptor ";
    let mut renamed = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(&byte) = rest.first() {
        let digits = match rest.strip_prefix(WORD) {
            Some(after) => after.iter().take_while(|it| it.is_ascii_digit()).count(),
            None => 0,
        };
        let end = if digits == 0 { 1 } else { WORD.len() + digits };
        let name = rest
            .get(WORD.len()..end)
            .and_then(|number| std::str::from_utf8(number).ok()?.parse::<usize>().ok())
            .and_then(|number| names.get(number));
        match name {
            Some(name) => {
                // "in descriptor 0" is how the monitor says it, but no file is in its name.
                if renamed.ends_with(b" in ") {
                    renamed.truncate(renamed.len() - b"in ".len());
                }
                renamed.extend(name.replace(char::is_control, "?").bytes());
                rest = rest.get(end..).unwrap_or_default();
            }
            None => {
                renamed.push(byte);
                rest = rest.get(1..).unwrap_or_default();
            }
        }
    }
    renamed
}

/// Puts the number of a descriptor in the place of a path or name.
fn put(object: &mut Value, kind: Kind, number: usize) {
    if let Some(object) = object.as_object_mut() {
        if kind.is_alone() {
            object.remove("fd");
        }
        object.insert(kind.member().into(), json!({ "fd": number }));
    }
}

/// The options' words for the machine, described.
pub fn describe_machine(machine: &args::Machine) -> Result<Option<Described>, Failure> {
    match machine {
        args::Machine::Client => Ok(None),
        args::Machine::Config(path) => Described::config(path).map(Some),
        args::Machine::Plain(plain) => Described::plain(plain).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(text: &str) -> Result<Described, Failure> {
        Described::of(serde_json::from_str(text).unwrap(), &[])
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    const WHOLE: &str = r#"{
        "boot-source": { "kernel_image_path": "/k", "initrd_path": { "fd": 8 } },
        "drives": [{ "drive_id": "a", "path_on_host": "/d", "is_read_only": true },
                   { "drive_id": "b", "fd": 7 }],
        "network-interfaces": [{ "iface_id": "e", "host_dev_name": "tap0" }],
        "logger": { "log_path": "/l", "level": "Info" },
        "serial": { "serial_out_path": "/s" } }"#;

    #[test]
    fn configuration_is_searched_for_everything_it_names() {
        let described = described(WHOLE).unwrap();
        assert_eq!(described.inherited(), [8, 7]);
        assert_eq!(described.log, Some("/l".into()));
        assert_eq!(described.console, Some("/s".into()));
        let kinds: Vec<Kind> = described.things.iter().map(|thing| thing.kind).collect();
        let disk = |read_only| Kind::Disk { read_only };
        assert_eq!(
            kinds,
            [
                Kind::Kernel,
                Kind::Initrd,
                disk(true),
                disk(false),
                Kind::Tap
            ]
        );
    }

    /// The machine of `WHOLE`, everything in it open.
    fn whole() -> Machine {
        let described = described(WHOLE).unwrap();
        let files = described.things.iter().map(|_| Some(null())).collect();
        Machine {
            body: described.body,
            things: described.things,
            files,
        }
    }

    #[test]
    fn request_has_descriptors_in_place_of_names() {
        let machine = whole();
        let requests = machine.requests();
        let [request] = &requests[..] else {
            panic!("{requests:?}")
        };
        assert_eq!(request.line, "PUT /vm");
        assert_eq!(machine.files(request).len(), 5);
        let at = |pointer: &str| request.body.pointer(pointer).cloned();
        assert_eq!(at("/boot-source/kernel_image_path/fd"), Some(0.into()));
        assert_eq!(at("/boot-source/initrd_path/fd"), Some(1.into()));
        assert_eq!(at("/drives/1/path_on_host/fd"), Some(3.into()));
        assert_eq!(at("/drives/1/fd"), None);
        assert_eq!(at("/network-interfaces/0/host_dev_name/fd"), Some(4.into()));
        assert_eq!(at("/logger/log_path"), None);
        assert_eq!(at("/start"), Some(true.into()));
    }

    #[test]
    fn numbers_that_were_handed_out_get_their_names_back() {
        let machine = whole();
        let names = machine.names(&machine.requests()[0]);
        assert_eq!(names, ["/k", "descriptor 8", "/d", "descriptor 7", "tap0"]);
        assert_eq!(machine.images(), ["/k", "descriptor 8"]);
        let hostile = ["/descriptor 1".to_owned(), "/\x1b[31m".to_owned()];
        for (text, names, expected) in [
            (
                "kernel descriptor 0 is not an ELF file",
                &names[..],
                "kernel /k is not an ELF file",
            ),
            (
                "The disk in descriptor 2 is a folder; the tap in descriptor 4",
                &names,
                "The disk /d is a folder; the tap tap0",
            ),
            ("The file `descriptor 1`", &names, "The file `descriptor 8`"),
            (
                "no descriptor 5: a descriptor",
                &names,
                "no descriptor 5: a descriptor",
            ),
            ("descriptor 00 1 descriptor ", &names, "/k 1 descriptor "),
            (
                "descriptor 0, descriptor 1",
                &hostile,
                "/descriptor 1, /?[31m",
            ),
        ] {
            let renamed = rename(text.as_bytes(), names);
            assert_eq!(String::from_utf8(renamed).unwrap(), expected);
        }
    }

    #[test]
    fn more_than_one_request_can_carry_goes_in_several() {
        let drives: Vec<Value> = (0..33)
            .map(|n| json!({ "drive_id": format!("d{n}"), "path_on_host": "/d", "is_root_device": false }))
            .collect();
        let body = json!({ "boot-source": { "kernel_image_path": "/k" }, "drives": drives });
        let described = Described::of(body, &[]).unwrap();
        let files = described.things.iter().map(|_| Some(null())).collect();
        let machine = Machine {
            body: described.body,
            things: described.things,
            files,
        };
        let requests = machine.requests();
        let lines: Vec<&str> = requests
            .iter()
            .map(|request| request.line.as_str())
            .collect();
        assert_eq!(lines.len(), 35);
        assert_eq!(
            (lines[0], lines[33]),
            ("PUT /boot-source", "PUT /drives/d32")
        );
        assert_eq!(requests[34].body, json!({ "action_type": "InstanceStart" }));
        assert!(
            requests[..34]
                .iter()
                .all(|request| machine.files(request).len() == 1)
        );
    }

    #[test]
    fn plain_options_become_a_configuration_and_the_address_is_told_once() {
        let plain = Plain {
            kernel: "/k".into(),
            cmdline: Some("quiet -- single".into()),
            drives: vec![("/d".into(), true)],
            nets: vec![Net::Auto],
            ..Plain::default()
        };
        let described = Described::plain(&plain).unwrap();
        assert_eq!(described.own_tap(), Some(Own::Auto));
        let files = described.things.iter().map(|_| None).collect();
        let mut machine = Machine {
            body: described.body,
            things: described.things,
            files,
        };
        machine.set_guest_address("ip=1", "06:00:00:00:00:01");
        machine.set_guest_address("ip=2", "06:00:00:00:00:02");
        let body = Value::Object(machine.body.clone());
        assert_eq!(
            body.pointer("/boot-source/boot_args"),
            Some(&"quiet ip=1 -- single".into())
        );
        let mac = body.pointer("/network-interfaces/0/guest_mac");
        assert_eq!(mac, Some(&"06:00:00:00:00:01".into()));
        assert_eq!(body.pointer("/drives/0/is_root_device"), Some(&true.into()));
    }

    #[test]
    fn command_line_without_an_option_has_a_console() {
        let plain = Plain {
            kernel: "/k".into(),
            ..Plain::default()
        };
        let body = Value::Object(Described::plain(&plain).unwrap().body);
        let words = body.pointer("/boot-source/boot_args").unwrap();
        let words: Vec<&str> = words.as_str().unwrap().split(' ').collect();
        assert!(words.contains(&"console=ttyS0"), "{words:?}");
        // Linux has as many UARTs as this says.
        assert!(!words.iter().any(|word| word.starts_with("8250.nr_uarts")));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, expected) in [
            ("[]", "not a JSON object"),
            (r#"{ "drives": {} }"#, "not a list"),
            (r#"{ "drives": [{ "fd": 1 }] }"#, "above 2"),
            (r#"{ "drives": [{ "fd": "x" }] }"#, "above 2"),
            (
                r#"{ "drives": [{ "fd": 5, "path_on_host": "/d" }] }"#,
                "both",
            ),
            (
                r#"{ "boot-source": { "kernel_image_path": 5 } }"#,
                "is the number 5; give a string, or {\"fd\": 5}",
            ),
            (r#"{ "logger": { "fd": 5 } }"#, "not a path"),
            (r#"{ "serial": { "serial_out_path": {} } }"#, "not a path"),
        ] {
            let failure = described(text).unwrap_err().to_string();
            assert!(failure.contains(expected), "{text}: {failure}");
        }
    }

    #[test]
    fn sections_are_kept_left_out_or_refused_as_the_monitor_does_with_a_file() {
        let kept = |text: &str| {
            let mut body = serde_json::from_str(text).unwrap();
            keep_known(&mut body).map(|()| Value::Object(body).to_string())
        };
        let text = r#"{"serial":{},"something":{"else":1},"start":5,"vsock":null,"pmem":[]}"#;
        assert_eq!(kept(text).unwrap(), r#"{"serial":{}}"#);
        for (name, value) in OUT_OF_SCOPE
            .iter()
            .zip(["1", "{}", "[1]", "false", "0", "[{}]"])
        {
            let failure = kept(&format!(r#"{{"{name}":{value}}}"#)).unwrap_err();
            let text = failure.to_string();
            assert!(text.contains(&format!("\"{name}\"")), "{text}");
        }
    }

    #[test]
    fn sockets_and_taps_that_are_made_later_find_their_places() {
        let text = r#"{ "serial": { "console_socket": "/c", "fd": null }, "drives": [] }"#;
        let described = described(text).unwrap();
        assert_eq!(described.own_tap(), None);
        let mut machine = described.open(|_| Ok(null())).unwrap();
        assert_eq!(machine.socket(), Some(Path::new("/c")));
        machine.set_tap(null());
        assert_eq!(machine.files(&machine.requests()[0]).len(), 0);
        machine.set_socket(null());
        let requests = machine.requests();
        assert_eq!(machine.files(&requests[0]).len(), 1);
        let fd = requests[0].body.pointer("/serial/console_socket/fd");
        assert_eq!(fd, Some(&0.into()));
        assert_eq!(machine.longest_body(), requests[0].body.to_string().len());
    }
}

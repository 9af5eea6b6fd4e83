//! The devices of a virtual machine: one list for each kind, whose entries hold what was asked for
//! beside what was opened for it, and in its place the device's handle once it runs.
//!
//! The order of the lists, and in each of its entries, is the order of slots: bus, command line,
//! tables, threads, metrics and `GET /vm/config` all follow it. What one kind has of its own is in a
//! file beside this one, as its [`Kind`]; a kind is registered in `wire::config::devices`.

mod block;
mod limits;
mod net;

use std::{io, mem};

use serde::{Deserialize, Serialize};

pub use self::limits::bucket;
use super::change::{Change, Edit, edit};
use crate::error::ActionError;
use crate::seccomp::Category;
use crate::sys::passed::Passed;
use crate::virtio::{
    Device, DeviceControl, DeviceHandle, DeviceState, Gathered, PerWorker, WorkerReply,
};
use crate::wire::config::{self as wire, AnyDevice, AnyUpdate, DeviceConfig, each_device_kind};
use crate::wire::limits::{DEVICES_MAX, POLL_US_MAX, QUEUES_MAX};

/// One kind of device, as control handles it. Of these steps only the two that open may wait for
/// the host: they have all they need, and may run on another thread.
pub trait Kind: Sized + 'static {
    /// What clients ask for.
    type Config: DeviceConfig<Update: Send> + Send + 'static;
    /// What was opened for one.
    type Opened: std::fmt::Debug + Send + 'static;
    /// The device.
    type Device: Device<Update: Send> + std::fmt::Debug;
    /// The filter of its thread.
    const CATEGORY: Category;
    /// Its thread is called this and the device's id.
    const THREAD: &'static str;

    /// How many queues, or pairs of them, the guest may use: each has a worker.
    fn queues(config: &Self::Config) -> usize;

    /// Checks `config` beside the others of its kind, and fills in what it leaves out.
    ///
    /// # Errors
    /// Why it cannot be.
    fn check<'a>(
        config: &mut Self::Config,
        others: impl Iterator<Item = &'a Self::Config>,
    ) -> Result<(), ActionError>;

    /// How long its thread polls, if the client has said so, in microseconds.
    fn poll_us(config: &Self::Config) -> Option<u16>;

    /// Whether it comes before the others of its kind, as the guest counts them.
    fn is_first(_config: &Self::Config) -> bool {
        false
    }

    /// Whether it keeps something of its files that has to be written when the guest ends.
    fn is_unsettled(_config: &Self::Config) -> bool {
        false
    }

    /// `opened` once more, for a new configuration of the device, where opening again is not possible.
    ///
    /// # Errors
    /// The host's.
    fn reopen(_opened: &Self::Opened) -> io::Result<Option<Self::Opened>> {
        Ok(None)
    }

    /// Opens what `config` names, or takes it from `before`. May wait.
    ///
    /// # Errors
    /// Why it cannot be used.
    fn open(
        config: &mut Self::Config,
        before: &mut Vec<Self::Opened>,
        passed: &mut Passed,
    ) -> Result<Self::Opened, ActionError>;

    /// A copy of what was opened, for the device.
    ///
    /// # Errors
    /// The host's.
    fn copy(opened: &Self::Opened) -> io::Result<Self::Opened>;

    /// Makes the device of what was opened and of its state, which was saved `elapsed` nanoseconds ago: one for
    /// each worker, and in `states` as many as were saved. May wait.
    ///
    /// # Errors
    /// The host's, or why the device cannot go on from `states`.
    fn build(
        config: &Self::Config,
        opened: Self::Opened,
        states: &PerWorker<StateOf<Self>>,
        elapsed: u64,
    ) -> io::Result<PerWorker<Self::Device>>;

    /// Checks a change to the device of `config`; none if there is no such device.
    ///
    /// # Errors
    /// Why it cannot be made.
    fn check_update(
        config: Option<&Self::Config>,
        update: &<Self::Config as DeviceConfig>::Update,
    ) -> Result<(), ActionError>;

    /// Whether `update` names something to be opened.
    fn update_opens(_update: &<Self::Config as DeviceConfig>::Update) -> bool {
        false
    }

    /// Opens what `update` names, for each worker of the device of `config`. May wait.
    ///
    /// # Errors
    /// Why it cannot be used.
    fn open_update(
        config: &Self::Config,
        update: &<Self::Config as DeviceConfig>::Update,
        passed: &mut Passed,
    ) -> Result<PerWorker<<Self::Device as Device>::Update>, ActionError>;

    /// Notes `update` in `config`.
    fn note_update(config: &mut Self::Config, update: <Self::Config as DeviceConfig>::Update);
}

/// Checks the `poll_us` of the device `id`.
///
/// # Errors
/// It is out of range; `section` comes before that.
fn check_poll_us(section: &str, id: &str, poll_us: Option<u16>) -> Result<(), ActionError> {
    match poll_us {
        Some(micros) if micros > POLL_US_MAX => Err(ActionError(format!(
            "{section}poll_us {micros} of `{id}` is out of range [0, {POLL_US_MAX}]"
        ))),
        _ => Ok(()),
    }
}

/// Checks the `queues` of the device `id`.
///
/// # Errors
/// There are none, or too many; `section` comes before that.
fn check_queues(section: &str, id: &str, queues: Option<u16>) -> Result<(), ActionError> {
    match queues {
        Some(queues) if !(1..=QUEUES_MAX).contains(&usize::from(queues)) => Err(ActionError(
            format!("{section}queues {queues} of `{id}` is out of range [1, {QUEUES_MAX}]"),
        )),
        _ => Ok(()),
    }
}

/// What is saved of a device of kind `K` itself.
pub type StateOf<K> = <<K as Kind>::Device as Device>::State;

/// A device: what was asked for, and what there is for it.
#[derive(Debug)]
pub struct Entry<K: Kind> {
    /// What was asked for.
    pub config: K::Config,
    /// What there is for it.
    pub backing: Backing<K>,
}

/// What there is for a device.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there are at most 19, and a box would be an allocation at the start for each"
)]
pub enum Backing<K: Kind> {
    /// What was opened for it.
    Opened(K::Opened),
    /// The device runs, and has that.
    Running(DeviceHandle<K::Device>),
}

/// A device that was checked, and a change of a running one.
type Put = Result<Change<Edit<Devices>>, ActionError>;
type Patch = Result<Change<ForDevice>, ActionError>;

/// Sends a running device a change; it answers with the token.
pub type ForDevice = Box<dyn FnOnce(&mut Devices, u64) -> Result<(), ActionError> + Send>;

/// The devices of one kind, in the order of their slots.
#[derive(Debug)]
pub struct List<K: Kind>(pub Vec<Entry<K>>);

impl<K: Kind> Default for List<K> {
    fn default() -> Self {
        List(Vec::new())
    }
}

impl<K: Kind> Entry<K> {
    /// The names of its threads, of which tools know the first.
    fn threads(&self) -> impl Iterator<Item = String> {
        let (kind, id) = (K::THREAD, self.config.id());
        (0..K::queues(&self.config)).map(move |worker| match worker {
            0 => format!("{kind} {id}"),
            _ => format!("{kind}{worker} {id}"),
        })
    }
}

/// A device as it is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice<S> {
    /// Its name among those of its kind.
    pub id: String,
    /// All of it.
    pub state: DeviceState<S>,
}

/// Something that is done for each device, of whichever kind.
pub trait Visit {
    /// Does it for one.
    ///
    /// # Errors
    /// Why it failed.
    fn device<K: Listed>(&mut self, entry: &Entry<K>) -> Result<(), ActionError>;
}

/// Where in [`Devices`] the list of a kind is.
pub trait Listed: Kind {
    /// Its list.
    fn list(devices: &mut Devices) -> &mut List<Self>;
    /// Its list of saved ones.
    fn saved(devices: &mut SavedDevices) -> &mut Vec<SavedDevice<StateOf<Self>>>;
}

/// Puts `item` into `list`, in place of the one with the same id, which it returns.
fn place<K: Kind, T>(list: &mut Vec<T>, item: T, config: impl Fn(&T) -> &K::Config) -> Option<T> {
    let first = K::is_first(config(&item));
    let id = config(&item).id();
    match list.iter().position(|other| config(other).id() == id) {
        None if first => list.insert(0, item),
        None => list.push(item),
        Some(at) => {
            let old = list.get_mut(at).map(|old| mem::replace(old, item));
            if first {
                // The two change places, as clients know it: the guest names disks by order.
                list.swap(0, at);
            }
            return old;
        }
    }
    None
}

impl<K: Listed> List<K> {
    fn running(&self) -> impl Iterator<Item = &dyn DeviceControl> {
        self.0.iter().filter_map(|entry| match &entry.backing {
            Backing::Opened(_) => None,
            Backing::Running(handle) => Some(handle as &dyn DeviceControl),
        })
    }

    fn unsettled(&self) -> impl Iterator<Item = &dyn DeviceControl> {
        self.0.iter().filter_map(|entry| match &entry.backing {
            Backing::Running(handle) if K::is_unsettled(&entry.config) => {
                Some(handle as &dyn DeviceControl)
            }
            _ => None,
        })
    }

    fn take_saved(&self) -> Option<Vec<SavedDevice<StateOf<K>>>> {
        let saved = self.0.iter().map(|entry| match &entry.backing {
            Backing::Opened(_) => None,
            Backing::Running(handle) => Some(SavedDevice {
                id: entry.config.id().to_owned(),
                state: handle.take_saved()?,
            }),
        });
        saved.collect()
    }

    fn reopened(&self) -> Result<Vec<K::Opened>, ActionError> {
        let mut before = Vec::new();
        for entry in &self.0 {
            if let Backing::Opened(opened) = &entry.backing {
                before.extend(K::reopen(opened).map_err(|e| ActionError::of(&e))?);
            }
        }
        Ok(before)
    }

    /// The three steps of a PUT of one device.
    fn put(&self, mut config: K::Config) -> Put {
        K::check(&mut config, self.0.iter().map(|entry| &entry.config))?;
        let mut before = self.reopened()?;
        Ok(Change::new(move |passed| {
            let opened = K::open(&mut config, &mut before, passed)?;
            let backing = Backing::Opened(opened);
            edit(move |devices| {
                let List(list) = K::list(devices);
                place::<K, _>(list, Entry { config, backing }, |entry| &entry.config)
            })
        }))
    }

    /// Checks all of `configs`, and tells how to open them, or take them from `before`.
    fn opening(
        configs: Vec<K::Config>,
        mut before: Vec<K::Opened>,
    ) -> Result<impl FnOnce(&mut Passed) -> Result<Self, ActionError> + use<K>, ActionError> {
        let mut checked: Vec<K::Config> = Vec::new();
        for mut config in configs {
            K::check(&mut config, checked.iter())?;
            place::<K, _>(&mut checked, config, |config| config);
        }
        Ok(move |passed: &mut Passed| {
            let mut list = Vec::new();
            for mut config in checked {
                let opened = K::open(&mut config, &mut before, passed)?;
                let backing = Backing::Opened(opened);
                list.push(Entry { config, backing });
            }
            Ok(List(list))
        })
    }

    /// The three steps of a PATCH of a running device.
    fn patch(&self, update: <K::Config as DeviceConfig>::Update) -> Patch {
        let id = K::Config::updated(&update).to_owned();
        let entry = self.0.iter().find(|entry| entry.config.id() == id);
        let config = entry.map(|entry| &entry.config);
        K::check_update(config, &update)?;
        let Some(config) = config.cloned() else {
            return Err(ActionError(format!("There is no device `{id}`.")));
        };
        let opens = K::update_opens(&update);
        Ok(Change::new(move |passed| {
            let message = K::open_update(&config, &update, passed)?;
            let send: ForDevice = Box::new(move |devices, token| {
                let List(list) = K::list(devices);
                for entry in list.iter_mut().filter(|entry| entry.config.id() == id) {
                    if let Backing::Running(handle) = &entry.backing {
                        handle
                            .update(token, message)
                            .map_err(|e| ActionError::of(&e))?;
                        K::note_update(&mut entry.config, update);
                        break;
                    }
                }
                Ok(())
            });
            Ok(send)
        })
        .waiting(opens))
    }
}

macro_rules! declare {
    ($($list:ident = $section:literal: $wire:ident::$config:ident, $control:ident::$kind:ident [$($serde:tt)*];)+) => {
        /// All devices, in the order of their slots.
        #[derive(Debug, Default)]
        pub struct Devices {
            $(
                #[doc = concat!("Those of the section `", $section, "`.")]
                pub $list: List<$control::$kind>,
            )+
        }

        /// What was opened for devices and cannot be opened again, for those that take their place.
        #[derive(Debug, Default)]
        pub struct Reopened {
            $($list: Vec<<$control::$kind as Kind>::Opened>,)+
        }

        $(impl Listed for $control::$kind {
            fn list(devices: &mut Devices) -> &mut List<Self> {
                &mut devices.$list
            }

            fn saved(devices: &mut SavedDevices) -> &mut Vec<SavedDevice<StateOf<Self>>> {
                &mut devices.$list
            }
        })+

        /// All devices as they are saved, in the order of their slots.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct SavedDevices {
            $(
                #[doc = concat!("Those of the section `", $section, "`.")]
                #[serde(default)]
                pub $list: Vec<SavedDevice<StateOf<$control::$kind>>>,
            )+
        }

        impl SavedDevices {
            /// Their ids.
            pub fn ids(&self) -> impl Iterator<Item = &str> {
                std::iter::empty()$(.chain(self.$list.iter().map(|device| &*device.id)))+
            }
        }

        impl Devices {
            /// How many there are.
            pub fn count(&self) -> usize {
                0usize$(.saturating_add(self.$list.0.len()))+
            }

            /// What was asked for.
            pub fn configs(&self) -> wire::Devices {
                wire::Devices {
                    $($list: self.$list.0.iter().map(|entry| entry.config.clone()).collect(),)+
                }
            }

            /// The three steps of a PUT of one device.
            pub fn put(&self, device: AnyDevice) -> Put {
                match device {
                    $(AnyDevice::$config(config) => self.$list.put(config),)+
                }
            }

            /// The three steps of a PATCH of a running device.
            pub fn patch(&self, update: AnyUpdate) -> Patch {
                match update {
                    $(AnyUpdate::$config(update) => self.$list.patch(update),)+
                }
            }

            /// What those have that do not run yet, for a list that is to take the place of this one.
            ///
            /// # Errors
            /// The host's.
            pub fn reopened(&self) -> Result<Reopened, ActionError> {
                Ok(Reopened { $($list: self.$list.reopened()?,)+ })
            }

            /// Checks a whole list, and tells how to open it, or take it from `before`.
            ///
            /// # Errors
            /// What is wrong with one of them, or with all together.
            pub fn opening(
                devices: wire::Devices,
                before: Reopened,
            ) -> Result<impl FnOnce(&mut Passed) -> Result<Devices, ActionError> + use<>, ActionError> {
                $(let $list = List::<$control::$kind>::opening(devices.$list, before.$list)?;)+
                Ok(move |passed: &mut Passed| {
                    Ok(Devices { $($list: $list(passed)?,)+ })
                })
            }

            /// What all of them have saved, once each has answered so; `None` if one has not.
            pub fn take_saved(&self) -> Option<SavedDevices> {
                Some(SavedDevices { $($list: self.$list.take_saved()?,)+ })
            }

            /// Those that run.
            pub fn running(&self) -> impl Iterator<Item = &dyn DeviceControl> {
                std::iter::empty()$(.chain(self.$list.running()))+
            }

            /// What comes of a worker's answer: that of its device, once each of its workers has answered.
            pub fn gather(&self, mut reply: WorkerReply) -> Option<WorkerReply> {
                for device in self.running() {
                    match device.gather(reply) {
                        Gathered::Other(other) => reply = other,
                        Gathered::Partly => return None,
                        Gathered::Whole(whole) => return Some(whole),
                    }
                }
                Some(reply)
            }

            /// Those that run, and keep something of their files that has to be written when the guest ends.
            pub fn unsettled(&self) -> impl Iterator<Item = &dyn DeviceControl> {
                std::iter::empty()$(.chain(self.$list.unsettled()))+
            }

            /// Has `visit` see each device, in the order of slots.
            ///
            /// # Errors
            /// The first that it tells of.
            pub fn visit(&self, visit: &mut impl Visit) -> Result<(), ActionError> {
                $(for entry in &self.$list.0 {
                    visit.device(entry)?;
                })+
                Ok(())
            }

            /// The names of their threads, in the order of slots.
            pub fn threads(&self) -> impl Iterator<Item = String> {
                std::iter::empty()$(.chain(self.$list.0.iter().flat_map(Entry::threads)))+
            }

            /// Checks that there are not too many.
            ///
            /// # Errors
            /// There are.
            pub fn check_count(&self) -> Result<(), ActionError> {
                if self.count() <= DEVICES_MAX {
                    return Ok(());
                }
                let counts = [$(format!("{} {}", self.$list.0.len(), $section.replace('-', " ")),)+];
                Err(ActionError(format!(
                    "Start microvm error: {} are more than the {DEVICES_MAX} devices there is room for",
                    counts.join(" and ")
                )))
            }
        }
    };
}

each_device_kind!(declare);

//! What a guest that runs a command is to be, and the message that tells its agent.

use mayfly_agent_protocol::fields;
use serde::{Deserialize, Serialize};

use crate::process::command::{Body, Command, CommandError};
use crate::process::pack::CopyIn;

/// What the root disk is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootMode {
    /// Only read.
    ReadOnly,
    /// Written to.
    ReadWrite,
    /// Only read, with the guest's memory for what is written.
    Overlay,
}

/// What the guest is to be, and run.
#[derive(Debug)]
pub struct Plan {
    /// The name of its host.
    pub hostname: String,
    /// Type of the root disk's file system.
    pub root_type: &'static str,
    /// What the root disk is to it.
    pub root_mode: RootMode,
    /// What it runs.
    pub command: Command,
    /// Whether no program writes to the root once the command starts.
    pub is_sealed: bool,
    /// Type of the file system of the second disk, which takes what is written to an overlay.
    pub upper_type: Option<&'static str>,
    /// Where memory is mounted.
    pub memory: Vec<Memory>,
    /// The network interface that it is to set up.
    pub interface: Option<Interface>,
    /// What is copied into the guest before the command starts.
    pub copies: Vec<CopyIn>,
    /// What it is told where its machine was saved and copied before.
    pub renewal: Option<Renewal>,
    /// Whether it is to run only when it is asked for ([`Agent::begin`](super::Agent::begin)).
    pub is_held: bool,
}

/// What is new in a guest whose machine was saved and copied before it had disks and a network.
#[derive(Debug)]
pub struct Renewal {
    /// For its random numbers.
    pub seed: [u8; fields::SEED_LEN],
    /// Sectors of each of its disks, in order.
    pub sectors: Vec<u64>,
    /// The address that its interface had, if it is not the one that it is to have.
    pub old_mac: Option<[u8; 6]>,
}

/// Memory that is mounted in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Where.
    pub path: String,
    /// Flags of mount(2).
    pub flags: u32,
    /// Options of tmpfs(5).
    pub options: String,
}

/// A network interface that the guest sets up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// By which the guest knows it.
    pub mac: [u8; 6],
    /// Longest packet.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes by it; those without a gateway first.
    pub routes: Vec<Route>,
}

/// An address of 4 or 16 bytes, and how many of its bits are the network's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// In the network's order.
    pub bytes: Vec<u8>,
    /// Bits of the network.
    pub prefix: u8,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// To this network.
    pub to: Address,
    /// By way of this address, if it is not empty.
    pub gateway: Vec<u8>,
}

impl Interface {
    fn add_to(&self, setup: &mut Body) -> Result<(), CommandError> {
        let interface = [&self.mac[..], &self.mtu.to_le_bytes()].concat();
        setup.add(fields::INTERFACE, &interface)?;
        for Address { bytes, prefix } in &self.addresses {
            setup.add(fields::ADDRESS, &[&[*prefix][..], bytes].concat())?;
        }
        for Route { to, gateway } in &self.routes {
            setup.add(
                fields::ROUTE,
                &[&[to.prefix][..], &to.bytes, gateway].concat(),
            )?;
        }
        Ok(())
    }
}

impl Plan {
    /// The body of the message that sets the guest up.
    pub fn setup(&self) -> Result<Vec<u8>, CommandError> {
        let mode = match self.root_mode {
            RootMode::ReadOnly => fields::READ_ONLY,
            RootMode::ReadWrite => fields::READ_WRITE,
            RootMode::Overlay => fields::OVERLAY,
        };
        let mut setup = Body::default();
        setup.add(fields::HOSTNAME, self.hostname.as_bytes())?;
        setup.add(fields::ROOT_TYPE, self.root_type.as_bytes())?;
        setup.add(fields::ROOT_MODE, &[mode])?;
        if let Some(renewal) = &self.renewal {
            setup.add(fields::SEED, &renewal.seed)?;
            for sectors in &renewal.sectors {
                setup.add(fields::SECTORS, &sectors.to_le_bytes())?;
            }
            if let Some(mac) = &renewal.old_mac {
                setup.add(fields::FOUND_BY, mac)?;
            }
        }
        if self.is_sealed {
            setup.add(fields::SEALED, b"")?;
        }
        if let Some(kind) = self.upper_type {
            setup.add(fields::UPPER_TYPE, kind.as_bytes())?;
        }
        if let Some(interface) = &self.interface {
            interface.add_to(&mut setup)?;
        }
        for memory in &self.memory {
            setup.add(fields::MEMORY, memory.path.as_bytes())?;
            let options = [&memory.flags.to_le_bytes()[..], memory.options.as_bytes()].concat();
            setup.add(fields::MEMORY_OPTIONS, &options)?;
        }
        setup.finish()
    }
}

//! What a lab is and how it stands, kept in `state.json`: enough to clean up after a crash of the
//! daemon, which is the only one that writes it while it runs.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::paths::{LabDir, write_atomically};
use crate::process::ProcessId;

/// The largest lab: addresses, tap names and the hosts file are laid out for it.
pub const MAX_HOSTS: u8 = 9;

/// A host of the lab, 1 to [`MAX_HOSTS`]; written `host2`, read as `host2` or `2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub u8);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host{}", self.0)
    }
}

impl FromStr for HostId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("host").unwrap_or(text).parse() {
            Ok(number @ 1..=MAX_HOSTS) => Ok(Self(number)),
            _ => Err(format!("not a host of a lab: hosts are host1 to host{MAX_HOSTS}")),
        }
    }
}

impl HostId {
    pub fn address(self) -> String {
        format!("10.77.0.{}", self.0)
    }

    pub fn mac(self) -> String {
        format!("52:54:00:4d:00:{:02x}", self.0)
    }

    pub fn tap(self) -> String {
        format!("tap{}", self.0)
    }
}

/// How instructions of a host are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Tcg,
    Kvm,
}

/// What was asked for with `lab up`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabConfig {
    pub hosts: u8,
    pub accelerator: Accelerator,
    pub memory_mib: u32,
    pub cpus: u32,
    /// A FLUSH is answered and does nothing: the block server lies, to prove that tests notice.
    pub ignore_flush: bool,
    pub netns: String,
}

impl LabConfig {
    pub fn host_ids(&self) -> impl Iterator<Item = HostId> + use<> {
        (1..=self.hosts).map(HostId)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    Off,
    On,
    /// QMP stop: the host's clock stands still too (DESIGN §13).
    Paused,
    /// SIGSTOP of the emulator: the host's clock runs on, as on metal.
    Stalled,
}

/// What the lab does to the traffic of a host.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub cut: bool,
    /// Added once to each round trip of this host.
    pub delay_ms: u32,
    pub loss_percent: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    pub id: HostId,
    pub power: Power,
    pub qemu: Option<ProcessId>,
    pub link: Link,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabState {
    pub config: LabConfig,
    pub daemon: Option<ProcessId>,
    pub hosts: Vec<HostState>,
}

impl LabState {
    pub fn new(config: LabConfig) -> Self {
        let hosts = config
            .host_ids()
            .map(|id| HostState { id, power: Power::Off, qemu: None, link: Link::default() })
            .collect();
        Self { config, daemon: None, hosts }
    }

    /// `None` when no lab was brought up in this directory.
    pub fn load(dir: &LabDir) -> Result<Option<Self>> {
        let path = dir.state();
        match std::fs::read(&path) {
            Ok(text) => {
                let state = serde_json::from_slice(&text)
                    .with_context(|| format!("{} is damaged: remove it after `lab down`", path.display()))?;
                Ok(Some(state))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    pub fn save(&self, dir: &LabDir) -> Result<()> {
        write_atomically(&dir.state(), &serde_json::to_vec_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_by_number_or_name() {
        assert_eq!("host3".parse(), Ok(HostId(3)));
        assert_eq!("3".parse(), Ok(HostId(3)));
        for wrong in ["0", "host0", "host10", "300", "web1", ""] {
            assert!(wrong.parse::<HostId>().is_err(), "{wrong} is no host");
        }
    }
}

//! The hosts of a lab: power, network and what they answer.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Progress, consoles};
use crate::agent::Agent;
use crate::control::{LinkChange, PowerAction, Reply};
use crate::image::Images;
use crate::nbd::BlockServer;
use crate::paths::LabDir;
use crate::process::ProcessId;
use crate::state::{HostId, HostState, LabState, Power};
use crate::witness::Witness;
use crate::{machine, net, qmp};

const POLL: Duration = Duration::from_millis(100);
/// Lines of the serial console that go into an error.
const TAIL_LINES: usize = 12;

pub struct Hosts {
    dir: LabDir,
    pub blocks: Arc<BlockServer>,
    state: Mutex<LabState>,
    hosts: BTreeMap<HostId, Host>,
}

struct Host {
    agent: Agent,
    console_witness: Arc<Witness>,
    /// Held while the power of this host changes: changes happen one after the other.
    power: tokio::sync::Mutex<()>,
}

impl Hosts {
    pub fn new(dir: LabDir, state: LabState) -> Result<Self> {
        let blocks = BlockServer::start(&dir, &state.config)?;
        let mut hosts = BTreeMap::new();
        for id in state.config.host_ids() {
            let host = Host {
                agent: Agent::new(dir.host_socket(id, "agent")),
                console_witness: Arc::new(Witness::append_to(&dir.console_witness(id))?),
                power: tokio::sync::Mutex::new(()),
            };
            hosts.insert(id, host);
        }
        Ok(Self { dir, blocks, state: Mutex::new(state), hosts })
    }

    pub fn agent(&self, id: HostId) -> Result<&Agent> {
        self.host_state(id)?.expect_running(id)?;
        Ok(&self.host(id)?.agent)
    }

    pub async fn up(self: &Arc<Self>, timeout: Duration, progress: &Progress) -> Result<Value> {
        let ids: Vec<HostId> = self.hosts.keys().copied().collect();
        let start = Instant::now();
        let mut waits = tokio::task::JoinSet::new();
        for id in ids {
            self.start(id).await?;
            let (hosts, progress) = (Arc::clone(self), progress.clone());
            waits.spawn(async move { hosts.wait_until_up(id, timeout, &progress).await });
        }
        while let Some(wait) = waits.join_next().await {
            wait??;
        }
        Ok(json!({"seconds": start.elapsed().as_secs_f64()}))
    }

    pub async fn power(
        self: &Arc<Self>,
        id: HostId,
        action: PowerAction,
        wait: Option<Duration>,
        progress: &Progress,
    ) -> Result<Value> {
        let host = self.host(id)?;
        let changing = host.power.lock().await;
        let state = self.host_state(id)?;
        let qmp_socket = self.dir.host_socket(id, "qmp");
        let mut answer = Value::Null;
        match action {
            PowerAction::Off => {
                let lost = self.blocks.lose_power(id);
                // Before the emulator ends: its end is then no news.
                self.set_power(id, Power::Off, None)?;
                if let Some(qemu) = state.qemu {
                    tokio::task::spawn_blocking(move || qemu.end()).await??;
                }
                host.agent.disconnect().await;
                answer = json!({"unflushed_bytes_lost": lost});
            }
            PowerAction::On => {
                drop(changing);
                self.start(id).await?;
            }
            PowerAction::Reset => {
                state.expect_running(id)?;
                qmp::execute(&qmp_socket, "system_reset").await?;
                host.agent.disconnect().await;
                self.until_agent_closed(id).await?;
                self.restore_delay_when_up(id);
            }
            PowerAction::Pause | PowerAction::Resume => {
                let (from, to, command) = match action {
                    PowerAction::Pause => (Power::On, Power::Paused, "stop"),
                    _ => (Power::Paused, Power::On, "cont"),
                };
                state.expect(id, from)?;
                qmp::execute(&qmp_socket, command).await?;
                self.set_power(id, to, state.qemu)?;
            }
            PowerAction::Stall | PowerAction::Unstall => {
                let (from, to, signal) = match action {
                    PowerAction::Stall => (Power::On, Power::Stalled, Signal::SIGSTOP),
                    _ => (Power::Stalled, Power::On, Signal::SIGCONT),
                };
                state.expect(id, from)?;
                state.qemu.context("a host that is on has a process")?.signal(signal)?;
                self.set_power(id, to, state.qemu)?;
            }
        }
        if let Some(timeout) = wait.filter(|_| matches!(action, PowerAction::On | PowerAction::Reset)) {
            self.wait_until_up(id, timeout, progress).await?;
        }
        Ok(answer)
    }

    pub async fn change_link(&self, id: HostId, change: LinkChange) -> Result<Value> {
        let (netns, states, host) = {
            let mut state = self.state();
            let host = state.hosts.iter_mut().find(|host| host.id == id).with_context(|| unknown(id))?;
            match change {
                LinkChange::Cut => host.link.cut = true,
                LinkChange::Heal => host.link = Default::default(),
                LinkChange::Delay { ms } => host.link.delay_ms = ms,
                LinkChange::Loss { percent } => host.link.loss_percent = percent,
            }
            let host = host.clone();
            state.save(&self.dir)?;
            (state.config.netns.clone(), state.hosts.clone(), host)
        };
        net::apply_filter(&netns, &states)?;
        if matches!(change, LinkChange::Heal | LinkChange::Delay { .. }) {
            self.apply_delay(&netns, &host).await?;
        }
        Ok(serde_json::to_value(host.link)?)
    }

    pub async fn status(&self) -> Result<Value> {
        let state = self.state().clone();
        let mut rows = Vec::new();
        for host in &state.hosts {
            let answers = match (host.power, self.hosts.get(&host.id)) {
                (Power::On, Some(known)) => known.agent.answers(Duration::from_secs(2)).await,
                _ => false,
            };
            rows.push(json!({
                "host": host.id.to_string(),
                "address": host.id.address(),
                "power": host.power,
                "agent": answers,
                "pid": host.qemu.map(|qemu| qemu.pid),
                "link": host.link,
                "unflushed_bytes": self.blocks.volatile_bytes(host.id),
                "hung_exports": self.blocks.hung(host.id),
            }));
        }
        Ok(json!({"config": state.config, "hosts": rows}))
    }

    /// Starts the emulator of a host that is off; one that runs is left as it is.
    async fn start(self: &Arc<Self>, id: HostId) -> Result<()> {
        let host = self.host(id)?;
        let _changing = host.power.lock().await;
        if self.host_state(id)?.qemu.is_some_and(|qemu| qemu.is_alive()) {
            return Ok(());
        }
        let config = self.state().config.clone();
        let images = Images::current(&self.dir)?;
        for kind in ["qmp", "serial", "agent", "console"] {
            // A killed emulator leaves its sockets behind; connecting to one would hide the new.
            let _ = std::fs::remove_file(self.dir.host_socket(id, kind));
        }
        let log_path = self.dir.qemu_log(id);
        let log = OpenOptions::new().create(true).append(true).open(&log_path).context("open the emulator's log")?;
        let mut command = net::inside(&config.netns, machine::EMULATOR);
        command.args(machine::arguments(&self.dir, &config, &images, id));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = tokio::process::Command::from(command).spawn().context("start the emulator")?;
        let qemu = ProcessId::of(child.id().context("the emulator ended at once")?)?;
        self.set_power(id, Power::On, Some(qemu))?;
        let hosts = Arc::clone(self);
        tokio::spawn(async move {
            let ended = child.wait().await;
            hosts.emulator_ended(id, qemu, ended.map(|status| status.to_string()));
        });
        let witness = Arc::clone(&host.console_witness);
        tokio::spawn(consoles::collect(id, self.dir.host_socket(id, "console"), witness));
        self.restore_delay_when_up(id);
        Ok(())
    }

    /// However it ended (power off, poweroff in the host, a crash), its disks have lost power.
    fn emulator_ended(&self, id: HostId, qemu: ProcessId, how: std::io::Result<String>) {
        let is_current = self.host_state(id).is_ok_and(|state| state.qemu == Some(qemu));
        tracing::info!(host = %id, pid = qemu.pid, ?how, is_current, "emulator ended");
        if is_current {
            self.blocks.lose_power(id);
            if let Err(error) = self.set_power(id, Power::Off, None) {
                tracing::error!(host = %id, error = format!("{error:#}"), "cannot save the state");
            }
        }
    }

    async fn wait_until_up(&self, id: HostId, timeout: Duration, progress: &Progress) -> Result<()> {
        let start = Instant::now();
        let host = self.host(id)?;
        let socket = self.dir.host_socket(id, "qmp");
        loop {
            let state = self.host_state(id)?;
            if state.qemu.is_none() {
                bail!("{id} ended before it was up\n{}", self.last_words(id));
            }
            let open = state.power == Power::On && qmp::frontend_is_open(&socket, "agent").await.unwrap_or(false);
            if open && host.agent.answers(Duration::from_secs(2)).await {
                let text = format!("{id} answers after {:.1} s", start.elapsed().as_secs_f64());
                let _ = progress.try_send(Reply::Progress { text });
                return Ok(());
            }
            if start.elapsed() > timeout {
                bail!("{id} is not up after {} s\n{}", timeout.as_secs(), self.last_words(id));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// After a reset the old agent may seem open for a moment.
    async fn until_agent_closed(&self, id: HostId) -> Result<()> {
        let socket = self.dir.host_socket(id, "qmp");
        let deadline = Instant::now() + Duration::from_secs(5);
        while qmp::frontend_is_open(&socket, "agent").await? && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// A delay inside a host is lost with each boot, so it is set again.
    fn restore_delay_when_up(self: &Arc<Self>, id: HostId) {
        if self.host_state(id).is_ok_and(|state| state.link.delay_ms == 0) {
            return;
        }
        let hosts = Arc::clone(self);
        tokio::spawn(async move {
            let (progress, _) = tokio::sync::mpsc::channel(1);
            let restored = async {
                hosts.wait_until_up(id, Duration::from_secs(120), &progress).await?;
                let netns = hosts.state().config.netns.clone();
                hosts.apply_delay(&netns, &hosts.host_state(id)?).await
            };
            if let Err(error) = restored.await {
                tracing::error!(host = %id, error = format!("{error:#}"), "the delay of this host is not set");
            }
        });
    }

    async fn apply_delay(&self, netns: &str, host: &HostState) -> Result<()> {
        let on_tap = net::apply_delay(netns, host)?;
        if on_tap && host.link.delay_ms > 0 {
            return Ok(());
        }
        // No netem here, or nothing to delay any more: the host's own side follows.
        if host.power != Power::On {
            return Ok(());
        }
        let argv = net::delay_inside_host(host.link.delay_ms);
        let done = self.host(host.id)?.agent.run(&argv, &[], Duration::from_secs(20)).await?;
        if done.exit_code != 0 {
            bail!("tc in {} refused the delay: {}", host.id, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }

    /// The end of the serial log and of the emulator's log, for an error's reader.
    fn last_words(&self, id: HostId) -> String {
        let tail = |path: std::path::PathBuf| {
            let text = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let from = lines.len().saturating_sub(TAIL_LINES);
            format!("last lines of {}:\n  {}", path.display(), lines[from..].join("\n  "))
        };
        format!("{}\n{}", tail(self.dir.serial_log(id)), tail(self.dir.qemu_log(id)))
    }

    fn host(&self, id: HostId) -> Result<&Host> {
        self.hosts.get(&id).with_context(|| unknown(id))
    }

    fn host_state(&self, id: HostId) -> Result<HostState> {
        let state = self.state();
        state.hosts.iter().find(|host| host.id == id).cloned().with_context(|| unknown(id))
    }

    fn set_power(&self, id: HostId, power: Power, qemu: Option<ProcessId>) -> Result<()> {
        let mut state = self.state();
        let host = state.hosts.iter_mut().find(|host| host.id == id).with_context(|| unknown(id))?;
        host.power = power;
        host.qemu = qemu;
        state.save(&self.dir)
    }

    fn state(&self) -> MutexGuard<'_, LabState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl HostState {
    fn expect_running(&self, id: HostId) -> Result<()> {
        match self.power {
            Power::On => Ok(()),
            Power::Off => bail!("{id} is off: `lab power {id} on`"),
            Power::Paused => bail!("{id} is paused: `lab power {id} resume`"),
            Power::Stalled => bail!("{id} is stalled: `lab power {id} unstall`"),
        }
    }

    fn expect(&self, id: HostId, power: Power) -> Result<()> {
        if self.power != power {
            bail!("{id} is {:?}, not {power:?}: see `lab status`", self.power);
        }
        Ok(())
    }
}

fn unknown(id: HostId) -> String {
    format!("this lab has no {id}: see `lab status`")
}

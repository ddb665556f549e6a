//! A guest as stories use it: a stock Debian kernel that counts on its console and on a shared disk.

use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde_json::Value;

use super::memory::MOST_BEYOND_RAM_MIB;
use super::memory::beyond_ram;
use super::stage::ConsoleLine;
use super::stage::Stage;
use crate::state::HostId;

pub const KERNEL: &str = "/usr/share/quorate/images/guest-vmlinuz";
pub const INITRD: &str = "/usr/share/quorate/images/guest-initrd.gz";
/// The same with QEMU's guest agent in it.
pub const AGENT_INITRD: &str = "/usr/share/quorate/images/guest-agent-initrd.gz";
/// The one that goes over to the root disk.
pub const ROOT_INITRD: &str = "/usr/share/quorate/images/guest-root-initrd.gz";
/// Emulated hosts that boot guests while others do are slow.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Of a guest that has booted: until its vmm has let go of what only the boot needed.
const AT_REST_WITHIN: Duration = Duration::from_secs(60);

/// A defined guest.
pub struct Guest {
    pub name: String,
    /// Its id, which is also the name of its directory on its host.
    pub id: String,
}

/// What a guest is made of, beside the images that all share.
pub struct Shape<'a> {
    pub vcpus: u32,
    /// `shared1` to `shared4`: small disks that all hosts see. The guest stamps the first.
    pub disks: &'a [&'a str],
    /// On the network of the hosts, with this address (10.77.0.100 and above are free).
    pub address: Option<&'a str>,
    /// With QEMU's guest agent.
    pub agent: bool,
    /// Highly available: its permit is of class `lease`.
    pub lease: bool,
}

impl Guest {
    pub async fn define(stage: &Stage, asked: HostId, name: &str, shape: &Shape<'_>) -> Result<Guest> {
        let vcpus = shape.vcpus.to_string();
        let disk = |export: &&str| format!("id={export},path=/dev/disk/by-id/virtio-{export}");
        let disks: Vec<String> = shape.disks.iter().map(disk).collect();
        let network = shape.address.map(|address| format!(" address={address}/24")).unwrap_or_default();
        // Memory that it has given back is zero, and costs a migration nothing.
        let command_line = format!("console=ttyS0 quiet init_on_free=1 hostname={name}{network}");
        let initrd = if shape.agent { AGENT_INITRD } else { INITRD };
        let mut words = vec!["vm", "create", name, "--vcpus", &vcpus, "--memory", "192MiB"];
        words.extend(["--kernel", KERNEL, "--initrd", initrd, "--cmdline", &command_line]);
        for disk in &disks {
            words.extend(["--disk", disk]);
        }
        if shape.address.is_some() {
            words.extend(["--nic", "id=lan,bridge=br0"]);
        }
        if shape.lease {
            words.push("--ha");
        }
        stage.quorate(asked, &words).await?;
        Guest::defined(stage, asked, name).await
    }

    /// One that was defined in other words.
    pub async fn defined(stage: &Stage, asked: HostId, name: &str) -> Result<Guest> {
        let shown = stage.query(asked, &["vm", "show", name]).await?;
        let id = field(&shown, "id").and_then(Value::as_str).context("`vm show` names no id")?;
        Ok(Guest { name: name.to_owned(), id: id.to_owned() })
    }

    /// Starts it on a host and waits for its userland. The line that says so.
    pub async fn start(&self, stage: &Stage, asked: HostId, host: HostId) -> Result<ConsoleLine> {
        let since_ns = stage.now_ns();
        stage.quorate(asked, &["vm", "start", &self.name, "--host", &host.to_string()]).await?;
        self.boots(stage, host, since_ns).await
    }

    /// Waits until it reaches userland on `host`.
    pub async fn boots(&self, stage: &Stage, host: HostId, since_ns: u64) -> Result<ConsoleLine> {
        let what = format!("{} reaches userland on {host}", self.name);
        let up = stage
            .until(&what, BOOT_LIMIT, async || {
                let lines = stage.console(host)?;
                let up = |line: &ConsoleLine| {
                    line.vm == self.id && line.t_ns >= since_ns && line.line.contains("quorate-guest up")
                };
                Ok(lines.into_iter().find(up))
            })
            .await?;
        self.weigh(stage, host).await?;
        Ok(up)
    }

    /// What its process on `host` has beyond the guest's RAM, once it has let go of what only the boot of the guest needed.
    async fn weigh(&self, stage: &Stage, host: HostId) -> Result<()> {
        let mine =
            format!("for p in $(pidof vmm); do grep -q {} /proc/$p/cmdline && cat /proc/$p/smaps; done; true", self.id);
        let shown = self.show(stage, host).await?;
        let ram_mib =
            field(&shown, "spec").and_then(|spec| spec["memory_mib"].as_u64()).context("`vm show` names no memory")?;
        let what = format!("the vmm of {} on {host} has at most {MOST_BEYOND_RAM_MIB} MiB beyond guest RAM", self.name);
        let light = async || {
            let beyond_mib = beyond_ram(&stage.sh(host, &mine).await?, ram_mib)?.pss_mib();
            ensure!(beyond_mib <= MOST_BEYOND_RAM_MIB, "it has {beyond_mib:.2} MiB");
            Ok(Some(beyond_mib))
        };
        stage.weighed(stage.until(&what, AT_REST_WITHIN, light).await?);
        Ok(())
    }

    pub async fn show(&self, stage: &Stage, asked: HostId) -> Result<Value> {
        stage.query(asked, &["vm", "show", &self.name]).await
    }

    pub async fn status(&self, stage: &Stage, asked: HostId) -> Result<String> {
        let shown = self.show(stage, asked).await?;
        Ok(field(&shown, "status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Epoch of its present permit.
    pub async fn epoch(&self, stage: &Stage, asked: HostId) -> Result<u64> {
        let shown = self.show(stage, asked).await?;
        let epoch = field(&shown, "epoch").and_then(Value::as_u64);
        epoch.with_context(|| format!("{} has no permit", self.name))
    }

    /// Where it runs.
    pub async fn home(&self, stage: &Stage, asked: HostId) -> Result<HostId> {
        let shown = self.show(stage, asked).await?;
        let name = field(&shown, "host_name").and_then(Value::as_str).context("the guest has no host")?;
        name.parse().map_err(anyhow::Error::msg)
    }

    pub async fn reaches(&self, stage: &Stage, asked: HostId, status: &str, limit: Duration) -> Result<()> {
        let what = format!("{} is {status}", self.name);
        stage.until(&what, limit, async || Ok((self.status(stage, asked).await? == status).then_some(()))).await
    }

    /// Types lines on its console from `host`, which need not run it, and returns what it said from the first to the end of the last; what
    /// it has said by then if that takes longer than 75 seconds. A session begins with what was said before it, so marks tell.
    pub async fn console(&self, stage: &Stage, host: HostId, lines: &[&str]) -> Result<String> {
        let mark = format!("said-{}", stage.now_ns());
        ensure!(!lines.iter().any(|line| line.contains('\'')), "a line with a quote cannot be typed: {lines:?}");
        let typed: String = lines.iter().map(|line| format!(" '{line}'")).collect();
        // The end of what is typed ends no session: its output goes on. So the session is ended when the answer is there.
        let script = format!(
            "rm -f /tmp/said; (sleep 1; printf '%s\\n' 'sh echo {mark} begins'{typed} 'sh echo {mark} ends') \
             | timeout 80 quorate vm console {} >/tmp/said 2>&1 & \
             for i in $(seq 75); do grep -q '^{mark} ends' /tmp/said && break; sleep 1; done; kill $!; wait; \
             sed -n '/^{mark} begins/,/^{mark} ends/p' /tmp/said | grep -v '^{mark} '; true",
            self.name
        );
        stage.sh(host, &script).await
    }

    pub async fn stop(&self, stage: &Stage, asked: HostId) -> Result<()> {
        stage.quorate(asked, &["vm", "stop", &self.name]).await?;
        self.reaches(stage, asked, "Down", Duration::from_secs(90)).await
    }
}

/// A field of an object that may be wrapped in a read's envelope.
pub fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).or_else(|| value.as_object()?.values().find_map(|inner| inner.get(name)))
}

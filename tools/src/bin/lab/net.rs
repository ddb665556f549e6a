//! The lab's network: a namespace of its own, a bridge, a tap a host. Hosts are 10.77.0.N, the lab
//! itself is 10.77.0.254 on the bridge. Cuts and losses are nftables rules on the taps; delay is
//! netem, on the tap where this machine's kernel has it, else inside the host.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::state::{HostState, LabConfig};

const BRIDGE: &str = "br0";
const LAB_ADDRESS: &str = "10.77.0.254/24";

/// Makes namespace, bridge and taps.
pub fn create(config: &LabConfig) -> Result<()> {
    let ns = &config.netns;
    ip(&["netns", "add", ns]).context("a lab needs root, for its network namespace")?;
    ip(&["-n", ns, "link", "set", "lo", "up"])?;
    ip(&["-n", ns, "link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["-n", ns, "addr", "add", LAB_ADDRESS, "dev", BRIDGE])?;
    ip(&["-n", ns, "link", "set", BRIDGE, "up"])?;
    for host in config.host_ids() {
        let tap = host.tap();
        ip(&["-n", ns, "tuntap", "add", "dev", &tap, "mode", "tap"])?;
        ip(&["-n", ns, "link", "set", &tap, "master", BRIDGE])?;
        ip(&["-n", ns, "link", "set", &tap, "up"])?;
    }
    Ok(())
}

/// Removes the namespace and all in it; nothing to do when it is gone.
pub fn remove(netns: &str) -> Result<()> {
    let list = Command::new("ip").args(["netns", "list"]).output().context("run ip netns list")?;
    let exists =
        String::from_utf8_lossy(&list.stdout).lines().any(|line| line.split_whitespace().next() == Some(netns));
    if exists { ip(&["netns", "del", netns]) } else { Ok(()) }
}

/// A command that runs inside the lab's network.
pub fn inside(netns: &str, program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns, program]);
    command
}

/// Replaces all rules by those for the hosts' links, in one transaction.
pub fn apply_filter(netns: &str, hosts: &[HostState]) -> Result<()> {
    let mut child = inside(netns, "nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run nft")?;
    child.stdin.take().context("no pipe to nft")?.write_all(filter_rules(hosts).as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft refused the lab's rules: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The rules as nft reads them. Both directions of a tap are filtered, so that a cut host neither
/// speaks nor hears, not even a broadcast. Loss applies to what a host sends and to what it gets.
fn filter_rules(hosts: &[HostState]) -> String {
    // A table is created so that deleting it cannot fail: the pair empties it in every case.
    let mut rules = "table netdev lab\ndelete table netdev lab\ntable netdev lab {\n".to_owned();
    for host in hosts {
        let rule = match (host.link.cut, host.link.loss_percent) {
            (true, _) => "drop".to_owned(),
            (false, 0) => continue,
            (false, percent) => format!("numgen random mod 100 < {percent} drop"),
        };
        let tap = host.id.tap();
        for (direction, name) in [("ingress", "from"), ("egress", "to")] {
            rules.push_str(&format!(
                "  chain {name}_{tap} {{\n    type filter hook {direction} device \"{tap}\" priority 0; policy accept;\n    {rule}\n  }}\n"
            ));
        }
    }
    rules.push_str("}\n");
    rules
}

/// Sets the delay of one host's tap. `false`: this machine's kernel has no netem.
pub fn apply_delay(netns: &str, host: &HostState) -> Result<bool> {
    let tap = host.id.tap();
    if host.link.delay_ms == 0 {
        // There may be none to delete; a kernel without netem never has one.
        let _ = inside(netns, "tc").args(["qdisc", "del", "dev", &tap, "root"]).output().context("run tc")?;
        return Ok(true);
    }
    let output =
        inside(netns, "tc").args(netem_arguments("replace", &tap, host.link.delay_ms)).output().context("run tc")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(true)
    } else if complaint.contains("qdisc kind is unknown") || complaint.contains("No such file") {
        Ok(false)
    } else {
        bail!("tc refused a delay on {tap}: {}", complaint.trim())
    }
}

/// The same for the host's own side, run there: delays what it sends. With its path, because
/// busybox has a tc of its own that knows no netem.
pub fn delay_inside_host(delay_ms: u32) -> Vec<String> {
    let command = if delay_ms == 0 {
        "/usr/sbin/tc qdisc del dev eth0 root 2>/dev/null; true".to_owned()
    } else {
        format!("/usr/sbin/tc {}", netem_arguments("replace", "eth0", delay_ms).join(" "))
    };
    vec!["sh".to_owned(), "-c".to_owned(), command]
}

fn netem_arguments(verb: &str, device: &str, delay_ms: u32) -> Vec<String> {
    // The queue holds a second of 100,000 packets/s: netem drops what exceeds its limit.
    let text = format!("qdisc {verb} dev {device} root netem delay {delay_ms}ms limit 100000");
    text.split(' ').map(str::to_owned).collect()
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("run ip: install iproute2")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{HostId, Link, Power};

    fn host(id: u8, link: Link) -> HostState {
        HostState { id: HostId(id), power: Power::On, qemu: None, link }
    }

    #[test]
    fn a_cut_host_is_dropped_in_both_directions_and_others_are_not_filtered() {
        let rules = filter_rules(&[host(1, Link::default()), host(2, Link { cut: true, ..Link::default() })]);
        assert_eq!(
            rules,
            "table netdev lab\ndelete table netdev lab\ntable netdev lab {\n\
             \x20 chain from_tap2 {\n    type filter hook ingress device \"tap2\" priority 0; policy accept;\n    drop\n  }\n\
             \x20 chain to_tap2 {\n    type filter hook egress device \"tap2\" priority 0; policy accept;\n    drop\n  }\n}\n"
        );
    }

    #[test]
    fn loss_is_a_share_of_packets_and_a_cut_wins_over_it() {
        let lossy = Link { loss_percent: 7, ..Link::default() };
        assert!(filter_rules(&[host(3, lossy)]).contains("numgen random mod 100 < 7 drop"));
        let both = filter_rules(&[host(3, Link { cut: true, ..lossy })]);
        assert!(!both.contains("numgen") && both.contains("\n    drop\n"));
    }

    #[test]
    fn healed_hosts_leave_an_empty_table() {
        assert_eq!(
            filter_rules(&[host(1, Link::default())]),
            "table netdev lab\ndelete table netdev lab\ntable netdev lab {\n}\n"
        );
    }
}

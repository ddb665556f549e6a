//! The root disk in an emulator of this machine, without a lab: seconds instead of minutes, and no nested guest.

use std::process::Stdio;
use std::time::Duration;

use pnet_base::MacAddr;
use seed::Addresses;
use seed::Interface;
use seed::Seed;
use seed::User;
use tokio::io::AsyncBufReadExt;
use tokio::io::BufReader;
use tokio::io::Lines;
use tokio::process::Child;
use tokio::process::ChildStdout;

use super::*;
use crate::machine::EMULATOR;

/// That of `tests/lab_stories.rs`, whose downloads serve here too.
const LAB_DIR: &str = "/tmp/quorate-lab-test";
/// Far longer than a boot takes; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(240);

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICVur2i7fm5MpAjDeEo+8LGzDepo8ZMRipjUUXpOaLiq alice@desk";
/// As `ssh-keygen -l` says it of that key.
const FINGERPRINT: &str = "SHA256:nExohU0hOAdY1Rsx3iQjh6qxT4uQxEuKVPUSr5jELbM";
const MACS: [MacAddr; 2] = [MacAddr(0x52, 0x54, 0, 1, 2, 3), MacAddr(0x52, 0x54, 0, 1, 2, 4)];

fn seed(instance_id: &str, host_name: &str) -> Seed {
    let user = User { name: "alice".to_owned(), ssh_keys: vec![KEY.to_owned()], sudo: false };
    let card = |mac, addresses| Interface { mac, addresses, gateway4: None, gateway6: None, dns: Vec::new() };
    let fixed = Addresses::Static(vec!["10.77.9.5/24".parse().expect("an address")]);
    Seed {
        instance_id: instance_id.to_owned(),
        host_name: host_name.to_owned(),
        user: Some(user),
        // Not in the order of the cards.
        network: vec![card(MACS[1], Addresses::Dhcp), card(MACS[0], fixed)],
        user_data: Some("#!/bin/bash\necho \"$(hostname) by bash, ${#BASH_VERSINFO[@]}\"\n".to_owned()),
    }
}

/// A guest whose serial line is read.
struct Guest {
    said: Lines<BufReader<ChildStdout>>,
    emulator: Child,
}

impl Guest {
    fn boot(kernel: &Path, initrd: &Path, disk: &Path, seed: &Path) -> Guest {
        let drive = |path: &Path, more: &str| format!("if=virtio,format=raw,file={}{more}", path.display());
        let mut command = tokio::process::Command::new(EMULATOR);
        command.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-display", "none", "-no-reboot"]);
        command.args(["-nodefaults", "-serial", "stdio", "-device", "virtio-rng-pci"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check root=/dev/vda"]);
        command.args(["-drive", &drive(disk, ""), "-drive", &drive(seed, ",readonly=on")]);
        for (number, mac) in MACS.iter().enumerate() {
            // Nothing leaves the emulator, whose own server answers DHCP with address 15 of each network.
            command.args(["-netdev", &format!("user,id=n{number},restrict=on,net=10.0.{number}.0/24")]);
            command.args(["-device", &format!("virtio-net-pci,netdev=n{number},mac={mac},romfile=")]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut emulator = command.spawn().expect("the emulator starts");
        let said = BufReader::new(emulator.stdout.take().expect("a pipe")).lines();
        Guest { said, emulator }
    }

    /// At once, and without a word to the guest.
    async fn lose_power(mut self) {
        self.emulator.kill().await.expect("the emulator ends");
    }

    /// All lines up to the one that says what boot this was.
    async fn until_up(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let read = async {
            while let Some(line) = self.said.next_line().await.expect("text") {
                lines.push(line.trim_end().to_owned());
                if line.contains(" boot host=") {
                    return true;
                }
            }
            false
        };
        let is_up = tokio::time::timeout(PATIENCE, read).await.unwrap_or(false);
        assert!(is_up, "the guest does not come up: {lines:#?}");
        lines
    }
}

#[tokio::test]
#[ignore = "three boots in an emulator take minutes; `lab show first-boot` shows the same through the product"]
async fn a_seed_is_applied_at_the_first_boot_and_not_again_in_an_emulator() {
    let lab = LabDir::find(Some(Path::new(LAB_DIR))).expect("a directory");
    std::fs::create_dir_all(lab.images()).expect("a directory for images");
    let mut say = |line: &str| println!("{line}");
    let packages = packages::fetch(&lab, &mut say).expect("packages");
    let root = build(&lab, &packages, &mut say).expect("a root disk");
    let kernel = crate::image::kernel::unpacked(&lab, &packages.guest_kernel.image).expect("a kernel");

    let here = tempfile::tempdir().expect("a directory");
    let (disk, seed_disk) = (here.path().join("disk"), here.path().join("seed"));
    std::fs::copy(&root.disk, &disk).expect("a copy of the root disk");
    let boot = |seed: &Seed| {
        std::fs::write(&seed_disk, seed::image(seed).expect("a seed")).expect("the seed's disk");
        Guest::boot(&kernel, &root.initrd, &disk, &seed_disk)
    };
    let expected = |boot: &str, host: &str| {
        format!("quorate-guest {boot} host={host} key={FINGERPRINT} address=10.77.9.5/24,10.0.1.15/24")
    };

    let mut first = boot(&seed("i-1", "web1.example.org"));
    let said = first.until_up().await;
    assert_eq!(said.last(), Some(&expected("first boot", "web1")), "{said:#?}");
    assert!(said.iter().any(|line| line == "user-data: web1 by bash, 6"), "{said:#?}");
    first.lose_power().await;

    let mut later = boot(&seed("i-1", "web2"));
    let said = later.until_up().await;
    assert_eq!(said.last(), Some(&expected("later boot", "web1")), "{said:#?}");
    assert!(!said.iter().any(|line| line.starts_with("user-data:")), "{said:#?}");
    later.lose_power().await;

    let mut renewed = boot(&seed("i-2", "web2"));
    let said = renewed.until_up().await;
    assert_eq!(said.last(), Some(&expected("first boot", "web2")), "another id is another first boot: {said:#?}");
}

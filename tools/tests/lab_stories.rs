//! The product as a whole, in emulated hosts: what `lab demo` and the shorter stories of `lab show` promise, as tests.
//!
//! They need root (a network namespace) and the programs beside this one: `make test` builds them first. The long
//! stories (20 and 50 runs) are `make shows`.

use std::path::Path;
use std::process::Command;

/// Short, because sockets live below it; one lab at a time (see .config/nextest.toml).
const LAB_DIR: &str = "/tmp/quorate-lab-test";

fn tell(arguments: &[&str], last_line: &str) {
    let lab = Path::new(env!("CARGO_BIN_EXE_lab"));
    for program in ["hostd", "quorate", "vmm"] {
        let beside = lab.with_file_name(program);
        assert!(beside.exists(), "{} is not built; run `make test`", beside.display());
    }
    assert!(rustix::process::geteuid().is_root(), "a lab makes a network namespace: run `sudo make test`");
    // What a story that was broken off left behind.
    let down = Command::new(lab).args(["--dir", LAB_DIR, "down"]).status().expect("lab starts");
    assert!(down.success(), "`lab down` failed");
    let told = Command::new(lab).args(["--dir", LAB_DIR]).args(arguments).output().expect("lab starts");
    let said = String::from_utf8_lossy(&told.stdout);
    println!("{said}{}", String::from_utf8_lossy(&told.stderr));
    assert!(told.status.success() && said.lines().last() == Some(last_line), "the story did not end well");
}

#[test]
fn three_hosts_form_a_cluster_run_a_guest_and_lose_their_leader() {
    tell(&["demo"], "demo: ok");
}

#[test]
fn a_debian_kernel_runs_with_console_disk_and_acpi_on_any_host() {
    tell(&["show", "guest"], "guest: ok");
}

#[test]
fn a_debian_root_disk_takes_name_key_and_address_from_its_seed() {
    tell(&["show", "first-boot"], "first-boot: ok");
}

#[test]
fn a_guest_moves_between_hosts_while_it_writes() {
    tell(&["show", "migrate", "--runs", "2"], "migrate: ok");
}

#[test]
fn a_disk_and_a_card_come_to_a_running_guest_move_with_it_and_leave() {
    tell(&["show", "plug"], "plug: ok");
}

#[test]
fn a_guest_sleeps_through_a_loss_of_power_of_its_host() {
    tell(&["show", "suspend"], "suspend: ok");
}

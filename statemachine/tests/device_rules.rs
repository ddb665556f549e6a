//! Devices that come to a guest and leave it while it runs; its memory; processors; how guests may be moved. One story each.

#[allow(dead_code, reason = "other stories use the rest")]
mod cluster;

use cluster::Cluster;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::ids::HostId;
use statemachine::ids::VmId;
use statemachine::invariants;
use statemachine::planner;
use statemachine::rejection::Rejection;
use statemachine::state::Cpu;
use statemachine::state::CpuModel;
use statemachine::state::DeviceWord;
use statemachine::state::Devices;
use statemachine::state::Disk;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::HostProcessor;
use statemachine::state::MigrationPolicy;
use statemachine::state::Nic;
use statemachine::state::Plugs;
use statemachine::state::StopMode;
use statemachine::state::VmSpec;

/// Two hosts; `web` runs with one disk and one card.
fn running() -> (Cluster, VmId) {
    let mut cluster = Cluster::of(2);
    cluster.root(Cluster::define_with("web", vec![Disk::raw("root", "/srv/root")], 1)).expect("defined");
    cluster.start("web").expect("room");
    let vm = cluster.vm("web");
    up(&mut cluster, "web");
    (cluster, vm)
}

fn up(cluster: &mut Cluster, name: &str) {
    let (vm, permit) = (cluster.vm(name), cluster.permit(name));
    let report = cluster.report(permit.host);
    let told = Command::ReportVmStatus { report, vm, epoch: permit.epoch, status: GuestStatus::Up };
    cluster.ask(Actor::Host(permit.host), permit.host, told).expect("its own guest");
}

fn change(cluster: &mut Cluster, vm: VmId, spec: VmSpecChange) -> Result<(), Rejection> {
    let change = VmChange { spec, ..VmChange::default() };
    let said = cluster.root(Command::VmChange { vm, change }).map(|_| ());
    assert_eq!(invariants::check(&cluster.fold.state), []);
    said
}

fn plug(cluster: &mut Cluster, vm: VmId, disk: Disk) -> Result<(), Rejection> {
    change(
        cluster,
        vm,
        VmSpecChange { plug: Devices { disks: vec![disk], nics: Vec::new() }, ..VmSpecChange::default() },
    )
}

fn unplug(cluster: &mut Cluster, vm: VmId, id: &str) -> Result<(), Rejection> {
    change(cluster, vm, VmSpecChange { unplug: vec![id.to_owned()], ..VmSpecChange::default() })
}

fn says(cluster: &mut Cluster, name: &str, device: &str, word: DeviceWord) {
    let (vm, permit) = (cluster.vm(name), cluster.permit(name));
    let report = cluster.report(permit.host);
    let told = Command::ReportVmDevice { report, vm, epoch: permit.epoch, device: device.to_owned(), word };
    cluster.ask(Actor::Host(permit.host), permit.host, told).expect("its own guest");
    assert_eq!(invariants::check(&cluster.fold.state), []);
}

fn granted(cluster: &Cluster, vm: VmId) -> VmSpec {
    let known = cluster.fold.state.vms.get(&vm).expect("defined");
    VmSpec::clone(known.granted_spec.as_ref().expect("it runs"))
}

fn plugs(cluster: &Cluster, vm: VmId) -> Plugs {
    cluster.fold.state.plugs.get(&vm).cloned().unwrap_or_default()
}

#[test]
fn a_disk_that_is_plugged_belongs_to_the_guest_before_its_host_acts() {
    let (mut cluster, vm) = running();
    plug(&mut cluster, vm, Disk::raw("data", "/srv/data")).unwrap();
    assert_eq!(granted(&cluster, vm).device_ids().collect::<Vec<_>>(), ["root", "data", "n0"]);
    assert!(plugs(&cluster, vm).coming.contains("data"));
    let slots: Vec<_> = granted(&cluster, vm).disks.iter().map(|disk| disk.slot).collect();
    assert_eq!(slots, [Some(1), Some(2)], "what was there stays where the guest sees it");
    assert_eq!(cluster.fold.state.vms.get(&vm).unwrap().spec.disks, granted(&cluster, vm).disks);

    cluster.root(Cluster::define_on_disk("db", "/srv/data", false)).unwrap();
    assert!(matches!(cluster.start("db"), Err(Rejection::DiskInUse { .. })), "S2");
    says(&mut cluster, "web", "data", DeviceWord::Plugged);
    assert!(plugs(&cluster, vm).coming.is_empty());
    assert!(!cluster.fold.state.vms.get(&vm).unwrap().runs_with_another_spec());
}

#[test]
fn a_disk_that_leaves_belongs_to_the_guest_until_nothing_of_it_is_open() {
    let (mut cluster, vm) = running();
    unplug(&mut cluster, vm, "root").unwrap();
    cluster.root(Cluster::define_on_disk("db", "/srv/root", false)).unwrap();
    assert!(matches!(cluster.start("db"), Err(Rejection::DiskInUse { .. })));
    says(&mut cluster, "web", "root", DeviceWord::Kept("the guest keeps it".to_owned()));
    assert!(matches!(cluster.start("db"), Err(Rejection::DiskInUse { .. })));
    let back = plug(&mut cluster, vm, Disk::raw("root", "/srv/root")).unwrap_err();
    assert!(back.to_string().contains("on its way out"), "{back}");
    let other_name = plug(&mut cluster, vm, Disk::raw("again", "/srv/root")).unwrap_err();
    assert!(other_name.to_string().contains("/srv/root open"), "{other_name}");

    says(&mut cluster, "web", "root", DeviceWord::Unplugged);
    assert_eq!(plugs(&cluster, vm), Plugs::default());
    assert_eq!(granted(&cluster, vm).device_ids().collect::<Vec<_>>(), ["n0"]);
    cluster.start("db").expect("it is free");
}

#[test]
fn no_slot_is_given_twice_while_its_device_leaves() {
    let (mut cluster, vm) = running();
    plug(&mut cluster, vm, Disk::raw("data", "/srv/data")).unwrap();
    unplug(&mut cluster, vm, "data").unwrap();
    plug(&mut cluster, vm, Disk::raw("more", "/srv/more")).unwrap();
    let slot = |cluster: &Cluster, id: &str| granted(cluster, vm).disks.iter().find(|disk| disk.id == id).unwrap().slot;
    assert_eq!((slot(&cluster, "data"), slot(&cluster, "more")), (Some(2), Some(3)));
    says(&mut cluster, "web", "data", DeviceWord::Unplugged);
    plug(&mut cluster, vm, Disk::raw("last", "/srv/last")).unwrap();
    assert_eq!(slot(&cluster, "last"), Some(2));
    let taken = plug(&mut cluster, vm, Disk { slot: Some(3), ..Disk::raw("worse", "/srv/worse") });
    assert!(matches!(taken, Err(Rejection::Invalid { .. })), "{taken:?}");
}

#[test]
fn a_guest_on_its_way_and_one_that_ends_keep_the_devices_that_they_have() {
    let (mut cluster, vm) = running();
    cluster.root(Command::VmMigrate { vm, host: None }).expect("another host");
    let refused = plug(&mut cluster, vm, Disk::raw("data", "/srv/data")).unwrap_err();
    assert!(refused.to_string().contains("cancel-migration"), "{refused}");
    cluster.root(Command::VmCancelMigration { vm }).unwrap();
    plug(&mut cluster, vm, Disk::raw("data", "/srv/data")).unwrap();

    cluster.root(Command::VmStop { vm, mode: StopMode::Shutdown }).unwrap();
    assert!(unplug(&mut cluster, vm, "data").is_err());
    cluster.exit("web", ExitReason::GuestPoweredOff);
    assert_eq!(plugs(&cluster, vm), Plugs::default());
    unplug(&mut cluster, vm, "data").expect("it does not run: only its definition changes");
    assert!(change(&mut cluster, vm, VmSpecChange { unplug: vec!["data".to_owned()], ..Default::default() }).is_err());
}

#[test]
fn what_only_changes_waits_for_the_next_start() {
    let (mut cluster, vm) = running();
    let faster = Disk { read_only: true, ..Disk::raw("root", "/srv/root") };
    change(&mut cluster, vm, VmSpecChange { disks: Some(vec![faster]), ..VmSpecChange::default() }).unwrap();
    assert!(!granted(&cluster, vm).disks[0].read_only);
    assert!(cluster.fold.state.vms.get(&vm).unwrap().runs_with_another_spec());
    assert_eq!(plugs(&cluster, vm), Plugs::default());
}

#[test]
fn a_word_about_a_device_is_believed_where_it_fits() {
    let (mut cluster, vm) = running();
    plug(&mut cluster, vm, Disk::raw("data", "/srv/data")).unwrap();
    let before = cluster.fold.head.seq;
    says(&mut cluster, "web", "data", DeviceWord::Unplugged);
    says(&mut cluster, "web", "root", DeviceWord::Kept("why".to_owned()));
    says(&mut cluster, "web", "other", DeviceWord::Plugged);
    assert_eq!(cluster.fold.head.seq, before, "nobody asked for any of it");
    says(&mut cluster, "web", "data", DeviceWord::NotPlugged("no such file".to_owned()));
    assert!(plugs(&cluster, vm).coming.contains("data"), "it is tried again");
    let seq = cluster.fold.head.seq;
    says(&mut cluster, "web", "data", DeviceWord::NotPlugged("no such file".to_owned()));
    assert_eq!(cluster.fold.head.seq, seq, "said once");
}

#[test]
fn a_card_and_a_disk_do_not_share_a_name() {
    let (mut cluster, vm) = running();
    let nic = Nic { id: "root".to_owned(), bridge: "br0".to_owned(), mac: None, slot: None };
    let both = VmSpecChange { plug: Devices { disks: Vec::new(), nics: vec![nic] }, ..VmSpecChange::default() };
    assert!(matches!(change(&mut cluster, vm, both), Err(Rejection::Invalid { .. })));
}

#[test]
fn a_running_guest_makes_do_with_less_memory_within_bounds() {
    let (mut cluster, vm) = running();
    assert!(cluster.root(Command::VmMemory { vm, mib: 65 }).is_err(), "more than it has");
    cluster.root(Cluster::define("big", 1, 512, statemachine::state::RunStrategy::Manual)).unwrap();
    let big = cluster.vm("big");
    assert!(cluster.root(Command::VmMemory { vm: big, mib: 256 }).is_err(), "it does not run");
    cluster.start("big").unwrap();
    assert!(cluster.root(Command::VmMemory { vm: big, mib: 63 }).is_err());
    cluster.root(Command::VmMemory { vm: big, mib: 256 }).unwrap();
    assert_eq!(cluster.fold.state.memory_targets.get(&big), Some(&256));
    cluster.exit("big", ExitReason::GuestPoweredOff);
    assert_eq!(cluster.fold.state.memory_targets.get(&big), None);
}

fn report_processor(cluster: &mut Cluster, host: HostId, models: &[CpuModel], fingerprint: &str) {
    let processor = HostProcessor {
        vendor: "GenuineIntel".to_owned(),
        model_name: "a processor".to_owned(),
        models: models.to_vec(),
        fingerprint: fingerprint.to_owned(),
        tsc_khz: 2_000_000,
        scales_tsc: false,
    };
    let report = cluster.report(host);
    cluster.ask(Actor::Host(host), host, Command::ReportProcessor { report, processor }).expect("its own word");
}

#[test]
fn a_guest_gets_the_model_that_its_cluster_has_in_common_when_it_starts() {
    let mut cluster = Cluster::of(2);
    let (first, second) = (cluster.host(0), cluster.host(1));
    cluster.root(Cluster::define("old", 1, 64, statemachine::state::RunStrategy::Manual)).unwrap();
    cluster.start("old").unwrap();
    let model = |cluster: &Cluster, name: &str| granted(cluster, cluster.vm(name)).cpu.model;
    assert_eq!(model(&cluster, "old"), CpuModel::Cluster, "nobody has said anything yet");

    report_processor(&mut cluster, first, &[CpuModel::V3, CpuModel::V2], "a");
    report_processor(&mut cluster, second, &[CpuModel::V2], "b");
    cluster.root(Cluster::define("web", 1, 64, statemachine::state::RunStrategy::Manual)).unwrap();
    cluster.start("web").unwrap();
    assert_eq!(model(&cluster, "web"), CpuModel::V2);
    report_processor(&mut cluster, second, &[CpuModel::V3, CpuModel::V2], "b");
    assert_eq!(model(&cluster, "web"), CpuModel::V2, "for as long as it runs");
    assert!(!cluster.fold.state.vms.get(&cluster.vm("web")).unwrap().runs_with_another_spec());
}

#[test]
fn a_guest_moves_where_its_processor_is() {
    let mut cluster = Cluster::of(2);
    let (first, second) = (cluster.host(0), cluster.host(1));
    report_processor(&mut cluster, first, &[CpuModel::V3, CpuModel::V2], "a");
    report_processor(&mut cluster, second, &[CpuModel::V2], "b");
    for (name, model) in [("all", CpuModel::Host), ("new", CpuModel::V3)] {
        cluster.root(Cluster::define(name, 1, 64, statemachine::state::RunStrategy::Manual)).unwrap();
        let vm = cluster.vm(name);
        let cpu = Some(Cpu { model, ..Cpu::default() });
        change(&mut cluster, vm, VmSpecChange { cpu, ..VmSpecChange::default() }).unwrap();
        cluster.root(Command::VmStart { vm, host: Some(first) }).unwrap();
        up(&mut cluster, name);
        let refused = cluster.root(Command::VmMigrate { vm, host: Some(second) }).unwrap_err();
        assert!(refused.to_string().contains("Processor excluded 1"), "{refused}");
    }
    let new = cluster.vm("new");
    cluster.root(Command::VmStop { vm: new, mode: StopMode::PowerOff }).unwrap();
    cluster.exit("new", ExitReason::PoweredOff);
    let there = cluster.root(Command::VmStart { vm: new, host: Some(second) }).unwrap_err();
    assert!(there.to_string().contains("cannot be x86-64-v3"), "{there}");

    report_processor(&mut cluster, second, &[CpuModel::V2], "a");
    let all = cluster.vm("all");
    cluster.root(Command::VmMigrate { vm: all, host: Some(second) }).expect("an equal processor");
}

#[test]
fn guests_leave_a_host_in_maintenance_unless_their_policy_says_no() {
    let (mut cluster, vm) = running();
    let host = cluster.permit("web").host;
    let moves = |cluster: &Cluster| planner::evacuations(&cluster.fold.state).collect::<Vec<_>>();
    assert_eq!(moves(&cluster), []);
    cluster.root(Command::HostMaintenance { host }).unwrap();
    assert_eq!(moves(&cluster), [Command::VmMigrate { vm, host: None }]);
    let stay = MigrationPolicy { automatic: Some(false), ..MigrationPolicy::default() };
    let id = cluster.fold.state.vms.get(&vm).unwrap().cluster;
    cluster.root(Command::ClusterMigrationPolicy { cluster: id, policy: stay }).unwrap();
    assert_eq!(moves(&cluster), []);
    cluster.root(Command::ClusterMigrationPolicy { cluster: id, policy: MigrationPolicy::default() }).unwrap();

    for command in moves(&cluster) {
        cluster.duty(command).expect("the other host has room");
    }
    assert!(cluster.fold.state.moving(vm).is_some());
    let seq = cluster.fold.head.seq;
    for command in moves(&cluster) {
        cluster.duty(command).expect("asked again, it is under way");
    }
    assert_eq!(cluster.fold.head.seq, seq);
}

#[test]
fn a_policy_has_bounds() {
    let mut cluster = Cluster::of(1);
    let id = *cluster.fold.state.clusters.iter().next().unwrap().0;
    let none = MigrationPolicy::default();
    for policy in [
        MigrationPolicy { downtime_ms: Some(0), ..none },
        MigrationPolicy { downtime_ms: Some(MigrationPolicy::MAX_DOWNTIME_MS + 1), ..none },
        MigrationPolicy { mib_per_second: Some(0), ..none },
        MigrationPolicy { seconds_per_gib: Some(MigrationPolicy::MAX_SECONDS_PER_GIB + 1), ..none },
    ] {
        assert!(cluster.root(Command::ClusterMigrationPolicy { cluster: id, policy }).is_err(), "{policy:?}");
    }
}

//! The rules of `decide`, one story each.

mod cluster;

use cluster::Cluster;
use cluster::boot;
use pnet_base::MacAddr;
use statemachine::Batch;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostChange;
use statemachine::command::HostFacts;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::decide::FEATURE_LEVEL;
use statemachine::event::FeatureLevelActivated;
use statemachine::fold::ApplyError;
use statemachine::fold::Decision;
use statemachine::ids::DataCenterId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::rejection::Rejection;
use statemachine::rejection::RejectionClass;
use statemachine::rejection::TokenFault;
use statemachine::scheduler;
use statemachine::scheduler::FilterName;
use statemachine::state::Capacity;
use statemachine::state::Created;
use statemachine::state::Desired;
use statemachine::state::ExitReason;
use statemachine::state::Fingerprint;
use statemachine::state::GuestFacts;
use statemachine::state::GuestStatus;
use statemachine::state::Nic;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::state::TokenPurpose;
use statemachine::view;
use statemachine::view::HostStatus;
use statemachine::view::VmStatus;

#[test]
fn a_site_is_initialised_once() {
    let mut cluster = Cluster::of(1);
    assert_eq!(cluster.fold.state.site.as_ref().map(|site| site.name.as_str()), Some("test"));
    let again = Cluster::init_command();
    assert_eq!(cluster.root(again), Err(Rejection::AlreadyInitialised));
}

#[test]
fn a_join_token_admits_one_host_and_answers_the_same_machine_again() {
    let mut cluster = Cluster::of(1);
    let hash = cluster.token(TokenPurpose::Join, 60_000);
    let join = |number| Command::HostJoin { secret_hash: hash, candidate: Cluster::candidate(number) };
    let answer = cluster.ask(Actor::Joiner, HostId(1), join(2)).expect("a fresh token admits");
    let head = cluster.fold.head.seq;
    assert_eq!(answer.created, Some(Created::Host(HostId(head.0))), "the id of a host is the seq of its join");
    // The answer was lost on the way; the same key pair asks again.
    let again = cluster.ask(Actor::Joiner, HostId(1), join(2)).expect("the same machine");
    assert_eq!((again.created, cluster.fold.head.seq), (answer.created, head));
    let other = cluster.ask(Actor::Joiner, HostId(1), join(3));
    assert_eq!(other, Err(Rejection::TokenRefused { fault: TokenFault::Used }));
}

#[test]
fn expired_revoked_unknown_and_foreign_tokens_are_told_apart() {
    let mut cluster = Cluster::of(1);
    let refused = |fault| Err(Rejection::TokenRefused { fault });
    let join = |secret_hash| Command::HostJoin { secret_hash, candidate: Cluster::candidate(2) };

    let short = cluster.token(TokenPurpose::Join, 1_000);
    cluster.clock_ms += 1_001;
    assert_eq!(cluster.ask(Actor::Joiner, HostId(1), join(short)), refused(TokenFault::Expired));

    let revoked = cluster.token(TokenPurpose::Join, 60_000);
    let id = cluster.fold.state.token_by_hash(&revoked).expect("just made").0;
    cluster.root(Command::TokenRevoke { token: id }).expect("an administrator revokes");
    assert_eq!(cluster.ask(Actor::Joiner, HostId(1), join(revoked)), refused(TokenFault::Revoked));

    let admin = cluster.token(TokenPurpose::Admin, 60_000);
    assert_eq!(cluster.ask(Actor::Joiner, HostId(1), join(admin)), refused(TokenFault::WrongPurpose));
    assert_eq!(cluster.ask(Actor::Joiner, HostId(1), join([42; 32])), refused(TokenFault::Unknown));
}

#[test]
fn a_viewer_looks_and_an_expired_administrator_does_nothing() {
    let mut cluster = Cluster::of(1);
    let viewer = cluster.token(TokenPurpose::Viewer, 60_000);
    let admin = cluster.token(TokenPurpose::Admin, 60_000);
    let token = |cluster: &Cluster, hash| Actor::Token(cluster.fold.state.token_by_hash(hash).expect("made").0);
    let (viewer, admin) = (token(&cluster, &viewer), token(&cluster, &admin));
    let define = || Cluster::define("web1", 1, 64, RunStrategy::Manual);
    let refusal = cluster.ask(viewer, HostId(1), define()).expect_err("a viewer may only look");
    assert_eq!(refusal.class(), RejectionClass::Forbidden);
    cluster.clock_ms += 60_001;
    let refusal = cluster.ask(admin, HostId(1), define()).expect_err("expired");
    assert_eq!(refusal.class(), RejectionClass::Forbidden);
}

#[test]
fn a_host_speaks_for_itself_alone() {
    let mut cluster = Cluster::of(2);
    let [first, second] = [cluster.host(0), cluster.host(1)];
    let report = cluster.report(second);
    let facts = cluster.fold.state.hosts.get(&second).expect("joined").facts.clone();
    let forged = cluster.ask(Actor::Host(first), first, Command::ReportHost { report, facts });
    assert_eq!(forged.map_err(|no| no.class()), Err(RejectionClass::Forbidden));
}

#[test]
fn a_host_forwards_in_its_own_name_alone() {
    let cluster = Cluster::of(2);
    let [first, second] = [cluster.host(0), cluster.host(1)];
    let from = |actor| {
        cluster.request(actor, first, Command::TokenRevoke { token: statemachine::TokenId(1) }).may_come_from(first)
    };
    assert!(from(Actor::Root(first)) && from(Actor::Joiner));
    assert!(!from(Actor::Host(second)), "another host's word about its guests (R1)");
    assert!(!from(Actor::Duty(second)) && !from(Actor::Root(second)));
}

#[test]
fn a_retry_is_answered_as_the_first_time_and_another_body_conflicts() {
    let mut cluster = Cluster::of(1);
    let define = || Cluster::define("web1", 1, 64, RunStrategy::Manual);
    let first = cluster.keyed("k", 1, define()).expect("new");
    let head = cluster.fold.head;
    assert_eq!(cluster.keyed("k", 1, define()), Ok(first));
    assert_eq!(cluster.fold.head, head, "nothing was decided twice");
    assert_eq!(cluster.keyed("k", 2, define()), Err(Rejection::IdempotencyConflict { seq: first.seq }));
}

#[test]
fn a_rejection_is_not_remembered() {
    let mut cluster = Cluster::of(1);
    let start = |cluster: &Cluster| Command::VmStart { vm: cluster.vm("web1"), host: None };
    cluster.root(Cluster::define("web1", 1, 9998, RunStrategy::Manual)).expect("defined");
    let command = start(&cluster);
    cluster.keyed("k", 1, command.clone()).expect_err("no host has that much memory");
    cluster.grow(cluster.host(0), 16_384);
    cluster.keyed("k", 1, command).expect("the retry finds the memory that was added");
}

#[test]
fn pending_starts_count_and_the_explanation_says_who_was_full() {
    let mut cluster = Cluster::of(2);
    for name in ["a", "b", "c"] {
        cluster.root(Cluster::define(name, 1, 1200, RunStrategy::Manual)).expect("defined");
    }
    cluster.start("a").expect("room");
    cluster.start("b").expect("room on the other host");
    assert_ne!(cluster.permit("a").host, cluster.permit("b").host, "evenly distributed");
    let Err(Rejection::NoHostFits { explanation, .. }) = cluster.start("c") else {
        panic!("two hosts of 2048 MiB cannot hold three guests of 1200 MiB");
    };
    let memory = &explanation.filtered[0];
    assert_eq!((memory.filter, memory.hosts), (FilterName::Memory, 2));
    assert!(memory.reasons[0].contains("1200 MiB wanted, 848 of 2048 MiB free"), "{memory:?}");
}

#[test]
fn the_stored_explanation_is_what_the_scheduler_says_again_on_the_state_before() {
    let mut cluster = Cluster::of(3);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    let before = cluster.fold.clone();
    cluster.start("web1").expect("room");
    let vm = cluster.fold.state.vms.get(&cluster.vm("web1")).expect("defined");
    let stored = vm.placement.as_deref().expect("placed");
    assert_eq!(stored.decided_on, before.head.seq);
    let known = before.state.vms.get(&cluster.vm("web1")).expect("defined");
    assert_eq!(scheduler::place(&before.state, known, None, before.head.seq).as_ref(), Ok(stored));
}

#[test]
fn a_vm_holds_one_permit_whose_epoch_is_the_seq_of_its_batch() {
    let mut cluster = Cluster::of(3);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    let answer = cluster.start("web1").expect("room");
    assert_eq!(cluster.permit("web1").epoch, Epoch::from(answer.seq));
    let head = cluster.fold.head;
    cluster.start("web1").expect("it runs already");
    assert_eq!(cluster.fold.head, head);
}

#[test]
fn lease_is_the_default_for_highly_available_guests_and_operator_for_the_rest() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("plain", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.root(Cluster::define_ha("ha", 1, 64)).expect("defined");
    cluster.start("plain").expect("room");
    cluster.start("ha").expect("room");
    assert_eq!(cluster.permit("plain").release, ReleaseClass::Operator);
    assert_eq!(cluster.permit("ha").release, ReleaseClass::Lease);
}

#[test]
fn a_disk_has_one_writer() {
    let mut cluster = Cluster::of(2);
    cluster.root(Cluster::define_on_disk("a", "/dev/vdb", false)).expect("defined");
    cluster.root(Cluster::define_on_disk("b", "/dev/vdb", false)).expect("a definition promises nothing");
    cluster.start("a").expect("room");
    let refusal = cluster.start("b").expect_err("a holds the disk");
    assert_eq!(refusal.code(), "disk-in-use");
    cluster.exit("a", ExitReason::GuestPoweredOff);
    cluster.start("b").expect("the disk is free");
}

#[test]
fn a_hardware_address_is_that_of_one_card() {
    let mut cluster = Cluster::of(1);
    let mac = Some(MacAddr::new(0x52, 0x54, 0, 1, 2, 3));
    cluster.root(Cluster::define_with_nic("a", mac)).expect("defined");
    let refusal = cluster.root(Cluster::define_with_nic("b", mac)).expect_err("a has it");
    assert_eq!(refusal.code(), "mac-in-use");
    cluster.root(Cluster::define_with_nic("b", None)).expect("one is made");
    // A running guest keeps its address until it stops, whatever its definition says by then.
    cluster.start("a").expect("room");
    let nics = |nics| VmChange { spec: VmSpecChange { nics: Some(nics), ..Default::default() }, ..Default::default() };
    let (a, b) = (cluster.vm("a"), cluster.vm("b"));
    let with_address = || Nic { id: "lan".to_owned(), bridge: "br1".to_owned(), mac, slot: None };
    cluster.root(Command::VmChange { vm: a, change: nics(Vec::new()) }).expect("it gives the address away");
    let take = Command::VmChange { vm: b, change: nics(vec![with_address()]) };
    assert_eq!(cluster.root(take.clone()).expect_err("a runs with it").code(), "mac-in-use");
    cluster.exit("a", ExitReason::GuestPoweredOff);
    cluster.root(take).expect("the address is free");
}

#[test]
fn a_card_waits_for_the_level_that_knows_cards() {
    let mut cluster = Cluster::of(1);
    if let Some(site) = cluster.fold.state.site.as_mut() {
        site.feature_level = 2;
    }
    let refusal = cluster.root(Cluster::define_with_nic("a", None));
    assert_eq!(refusal, Err(Rejection::FeatureLevel { needed: 3, level: 2 }));
    cluster.run_duties();
    cluster.root(Cluster::define_with_nic("a", None)).expect("every host knows cards");
}

#[test]
fn a_guest_that_powers_off_stays_down_when_manual_and_is_due_again_when_always() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("manual", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.root(Cluster::define("always", 1, 64, RunStrategy::Always)).expect("defined");
    cluster.start("manual").expect("room");
    cluster.run_duties();
    cluster.exit("manual", ExitReason::GuestPoweredOff);
    cluster.exit("always", ExitReason::GuestPoweredOff);
    assert_eq!(cluster.status("manual"), VmStatus::Down);
    assert_eq!(cluster.status("always"), VmStatus::WaitForLaunch);
    let old = cluster.last_epoch("always");
    cluster.run_duties();
    assert!(cluster.permit("always").epoch > old, "R2: a new epoch, never the old one again");
}

#[test]
fn stop_halts_a_vm_that_always_runs_and_start_brings_it_back() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Always)).expect("defined");
    cluster.run_duties();
    let vm = cluster.vm("web1");
    cluster.root(Command::VmStop { vm, mode: StopMode::Shutdown }).expect("it runs");
    assert_eq!(cluster.status("web1"), VmStatus::PoweringDown);
    let early = cluster.start("web1").expect_err("it still has its old permit");
    assert_eq!(early.code(), "vm-state");
    cluster.exit("web1", ExitReason::PoweredOff);
    assert_eq!(cluster.fold.state.vms.get(&vm).expect("defined").run_strategy, RunStrategy::Halted);
    cluster.run_duties();
    assert_eq!(cluster.status("web1"), VmStatus::Down);
    cluster.start("web1").expect("start again");
    assert_eq!(cluster.fold.state.vms.get(&vm).expect("defined").run_strategy, RunStrategy::Always);
}

#[test]
fn a_report_about_an_epoch_that_is_over_is_dropped() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web1").expect("room");
    let old = cluster.permit("web1").epoch;
    cluster.exit("web1", ExitReason::GuestPoweredOff);
    cluster.start("web1").expect("room");
    let host = cluster.host(0);
    let (report, vm) = (cluster.report(host), cluster.vm("web1"));
    let late = Command::ReportVmStatus { report, vm, epoch: old, status: GuestStatus::Up };
    assert_eq!(cluster.ask(Actor::Host(host), host, late).map_err(|no| no.class()), Err(RejectionClass::Stale));
    assert_eq!(cluster.status("web1"), VmStatus::WaitForLaunch, "hazard H16: it does not rise from the dead");
}

#[test]
fn what_a_guest_says_of_itself_is_known_while_it_may_run() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web").expect("room");
    let (vm, permit) = (cluster.vm("web"), cluster.permit("web"));
    let says = |cluster: &mut Cluster, epoch, hostname: &str| {
        let facts = GuestFacts { hostname: Some(hostname.to_owned()), ..GuestFacts::default() };
        let report = cluster.report(permit.host);
        let told = Command::ReportVmGuest { report, vm, epoch, facts: facts.into() };
        cluster.ask(Actor::Host(permit.host), permit.host, told)
    };
    says(&mut cluster, permit.epoch, "web-1").expect("news");
    let head = cluster.fold.head;
    says(&mut cluster, permit.epoch, "web-1").expect("no news");
    assert_eq!(cluster.fold.head, head, "what is known changes nothing");
    let old = Epoch(permit.epoch.0 - 1);
    assert_eq!(says(&mut cluster, old, "web-0").expect_err("of another life").class(), RejectionClass::Stale);
    let escape = says(&mut cluster, permit.epoch, "web\u{1b}[2J").expect_err("hostile");
    assert_eq!(escape.class(), RejectionClass::Invalid);
    let known = |cluster: &Cluster| cluster.fold.state.guests.get(&vm).and_then(|facts| facts.hostname.clone());
    assert_eq!(known(&cluster).as_deref(), Some("web-1"));
    cluster.exit("web", ExitReason::GuestPoweredOff);
    assert_eq!(known(&cluster), None);
}

#[test]
fn a_report_with_an_old_counter_is_dropped() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web1").expect("room");
    let host = cluster.host(0);
    let (vm, epoch) = (cluster.vm("web1"), cluster.permit("web1").epoch);
    let [early, late] = [cluster.report(host), cluster.report(host)];
    let status = |report, status| Command::ReportVmStatus { report, vm, epoch, status };
    cluster.ask(Actor::Host(host), host, status(late, GuestStatus::Up)).expect("newest");
    let overtaken = cluster.ask(Actor::Host(host), host, status(early, GuestStatus::PoweringUp));
    assert_eq!(overtaken, Err(Rejection::StaleReport));
}

#[test]
fn a_new_boot_id_releases_the_permits_and_a_late_word_of_the_old_one_does_not() {
    let mut cluster = Cluster::of(2);
    cluster.root(Cluster::define_ha("ha", 1, 64)).expect("defined");
    cluster.root(Cluster::define("plain", 1, 64, RunStrategy::Manual)).expect("defined");
    let host = cluster.host(1);
    for name in ["ha", "plain"] {
        let vm = cluster.vm(name);
        cluster.root(Command::VmStart { vm, host: Some(host) }).expect("room");
    }
    let old = cluster.permit("ha").epoch;
    cluster.reboot(host, boot(99)).expect("it came back");
    assert_eq!(cluster.status("plain"), VmStatus::Down);
    assert_eq!(cluster.status("ha"), VmStatus::WaitForLaunch);
    cluster.run_duties();
    let new = cluster.permit("ha");
    assert!(new.epoch > old);
    // A report of the old incarnation was under way all the time.
    let first_boot = Cluster::candidate(2).facts.boot;
    assert_eq!(cluster.reboot(host, first_boot), Err(Rejection::StaleReport));
    assert_eq!(cluster.permit("ha"), new);
}

#[test]
fn a_permit_names_the_incarnation_that_it_was_granted_to() {
    let mut cluster = Cluster::of(1);
    cluster.reboot(cluster.host(0), boot(7)).expect("it came back");
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web1").expect("room");
    assert_eq!(cluster.permit("web1").boot, boot(7));
}

#[test]
fn silence_makes_statuses_and_never_ends_a_permit() {
    let mut cluster = Cluster::of(2);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    let (host, vm) = (cluster.host(1), cluster.vm("web1"));
    cluster.root(Command::VmStart { vm, host: Some(host) }).expect("room");
    let permit = cluster.permit("web1");
    let status = |cluster: &Cluster| view::host_status(cluster.fold.state.hosts.get(&host).expect("joined"));
    cluster.duty(Command::HostSuspect { host }).expect("silent");
    assert_eq!(status(&cluster), HostStatus::Connecting);
    cluster.duty(Command::HostLost { host }).expect("silent");
    assert_eq!((status(&cluster), cluster.status("web1")), (HostStatus::NonResponsive, VmStatus::Unknown));
    assert_eq!(cluster.permit("web1"), permit);
    cluster.duty(Command::HostRecover { host }).expect("it is back");
    assert_eq!(status(&cluster), HostStatus::Up);
}

#[test]
fn a_host_leaves_through_maintenance_and_its_name_for_good() {
    let mut cluster = Cluster::of(2);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    let (host, vm) = (cluster.host(1), cluster.vm("web1"));
    cluster.root(Command::VmStart { vm, host: Some(host) }).expect("room");
    cluster.root(Command::HostRemove { host }).expect_err("it is active");
    cluster.root(Command::HostMaintenance { host }).expect("no new guests");
    let refusal = cluster.root(Command::HostRemove { host }).expect_err("it runs a guest");
    assert!(refusal.to_string().contains("1 VMs still hold a permit"), "{refusal}");
    cluster.exit("web1", ExitReason::GuestPoweredOff);
    cluster.root(Command::HostRemove { host }).expect("empty and in maintenance");
    let report = cluster.report(host);
    let facts = Cluster::candidate(2).facts;
    let ghost = cluster.ask(Actor::Host(host), host, Command::ReportHost { report, facts });
    assert!(matches!(ghost, Err(Rejection::HostRemoved { .. })), "{ghost:?}");
}

#[test]
fn the_storage_manager_is_sticky_and_prefers_the_leader_then_priority() {
    let mut cluster = Cluster::of(3);
    let data_center = DataCenterId(1);
    let priority = |host, priority| Command::HostChange {
        host,
        change: HostChange { spm_priority: Some(priority), failure_domain: None },
    };
    let spm = |cluster: &Cluster| cluster.fold.state.data_centers.get(&data_center).and_then(|dc| dc.spm);
    cluster.run_duties();
    let first = spm(&cluster).expect("granted");
    assert_eq!(first.host, cluster.host(0));
    let other = cluster.host(2);
    let taken = cluster.duty(Command::SpmGrant { data_center, host: other });
    assert!(matches!(taken, Err(Rejection::SpmHeld { .. })), "{taken:?}");
    cluster.root(priority(cluster.host(0), -1)).expect("never");
    cluster.root(priority(other, 9)).expect("first");
    cluster.ask(Actor::Host(first.host), first.host, Command::SpmRelease { data_center }).expect("its own");
    cluster.run_duties();
    let second = spm(&cluster).expect("granted again");
    assert_eq!(second.host, other);
    assert!(second.token > first.token, "S1: tokens rise");
}

#[test]
fn contradictory_and_oversized_definitions_are_refused_in_words() {
    let mut cluster = Cluster::of(1);
    let cases: Vec<(Command, &str)> = vec![
        (Cluster::define("Web_1", 1, 64, RunStrategy::Manual), "vm name"),
        (Cluster::define("web1", 0, 64, RunStrategy::Manual), "vcpus"),
        (Cluster::define("web1", 1, 1, RunStrategy::Manual), "memory"),
        (Cluster::define_on_disk("web1", "/srv/../etc/shadow", false), "disk path"),
        (Cluster::define_on_disk("web1", "relative", false), "disk path"),
        (Cluster::define_with_nic("web1", Some(MacAddr::broadcast())), "nic mac"),
        (Cluster::define_with_nic("web1", Some(MacAddr::zero())), "nic mac"),
        (Cluster::define_on_bridge("web1", "br0; reboot"), "nic bridge"),
        (Cluster::define_on_bridge("web1", "../br0"), "nic bridge"),
        (Cluster::define_on_bridge("web1", "sixteen-long-name"), "nic bridge"),
    ];
    for (command, field) in cases {
        let refusal = cluster.root(command).expect_err(field);
        assert_eq!(refusal.class(), RejectionClass::Invalid);
        assert!(refusal.to_string().starts_with(field), "{refusal}");
    }
}

#[test]
fn what_rests_on_a_batch_in_flight_is_decided_on_the_speculative_fold_only() {
    let mut cluster = Cluster::of(1);
    let applied = cluster.fold.clone();
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("speculative");
    let again = cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual));
    assert!(matches!(again, Err(Rejection::NameTaken { .. })), "hazard C13: this answer must be held");
    let request =
        cluster.request(Actor::Root(HostId(1)), HostId(1), Cluster::define("web1", 1, 64, RunStrategy::Manual));
    assert!(matches!(applied.decide(&request, cluster.clock_ms), Decision::Batch { .. }));
}

#[test]
fn two_who_change_different_things_of_a_vm_at_once_do_not_undo_each_other() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    let vm = cluster.vm("web1");
    // Both were written by people who looked at the same VM.
    for spec in [
        VmSpecChange { memory_mib: Some(1024), ..VmSpecChange::default() },
        VmSpecChange { cmdline: Some("quiet".to_owned()), ..VmSpecChange::default() },
    ] {
        let change = VmChange { spec, ..VmChange::default() };
        cluster.root(Command::VmChange { vm, change }).expect("changed");
    }
    let spec = &cluster.fold.state.vms.get(&vm).expect("defined").spec;
    assert_eq!((spec.memory_mib, spec.cmdline.as_str(), spec.vcpus), (1024, "quiet", 1));
}

#[test]
fn a_running_vm_keeps_the_resources_that_it_was_started_with() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web1").expect("room");
    let vm = cluster.vm("web1");
    let spec = VmSpecChange { memory_mib: Some(1024), ..VmSpecChange::default() };
    let change = VmChange { spec, ..VmChange::default() };
    cluster.root(Command::VmChange { vm, change }).expect("takes effect at the next start");
    let host = cluster.host(0);
    assert_eq!(cluster.fold.state.hosts.get(&host).expect("joined").usage.memory_mib, 64);
    cluster.exit("web1", ExitReason::GuestPoweredOff);
    assert_eq!(cluster.fold.state.hosts.get(&host).expect("joined").usage.memory_mib, 0, "R3: the books balance");
    assert_eq!(cluster.fold.state.vms.get(&vm).expect("defined").desired, Desired::Stopped(StopMode::Shutdown));
}

#[test]
fn a_new_level_waits_for_every_host_that_is_not_away() {
    let mut cluster = Cluster::of(3);
    let level = |cluster: &Cluster| cluster.fold.state.site.as_ref().map_or(0, |site| site.feature_level);
    // The site of an older release, and one host that was not upgraded.
    if let Some(site) = cluster.fold.state.site.as_mut() {
        site.feature_level = 1;
    }
    let old = cluster.host(2);
    let facts = |cluster: &Cluster, feature_level| HostFacts {
        feature_level,
        ..cluster.fold.state.hosts.get(&old).expect("a host").facts.clone()
    };
    let (report, outdated) = (cluster.report(old), facts(&cluster, 1));
    cluster.ask(Actor::Host(old), old, Command::ReportHost { report, facts: outdated }).expect("its word");
    let five = Command::VoterCount { voters: 5 };
    assert_eq!(cluster.root(five.clone()), Err(Rejection::FeatureLevel { needed: 2, level: 1 }));
    let early = cluster.duty(Command::FeatureLevelActivate { level: 2 });
    assert!(matches!(early, Err(Rejection::HostState { ref name, .. }) if name == "host3"), "{early:?}");
    cluster.run_duties();
    assert_eq!(level(&cluster), 1, "the leader does not ask in vain either");
    let (report, upgraded) = (cluster.report(old), facts(&cluster, FEATURE_LEVEL));
    cluster.ask(Actor::Host(old), old, Command::ReportHost { report, facts: upgraded }).expect("its word");
    cluster.run_duties();
    assert_eq!(level(&cluster), FEATURE_LEVEL);
    cluster.root(five).expect("now it may");
    assert_eq!(cluster.fold.state.site.as_ref().map(|site| site.voters), Some(5));
}

#[test]
fn a_host_that_is_away_does_not_hold_a_level_back_and_stops_at_it_when_it_comes() {
    let mut cluster = Cluster::of(2);
    let away = cluster.host(1);
    if let Some(site) = cluster.fold.state.site.as_mut() {
        site.feature_level = 1;
    }
    let (report, old) = (cluster.report(away), cluster.fold.state.hosts.get(&away).expect("a host").facts.clone());
    let facts = HostFacts { feature_level: 1, ..old };
    cluster.ask(Actor::Host(away), away, Command::ReportHost { report, facts }).expect("its word");
    cluster.duty(Command::HostLost { host: away }).expect("silent");
    cluster.duty(Command::FeatureLevelActivate { level: 2 }).expect("it is away");
    // A level that this build lacks, as an older build meets this one.
    let mut fold = cluster.fold.clone();
    let any = cluster.request(Actor::Root(HostId(1)), HostId(1), Command::VoterCount { voters: 5 });
    let Decision::Batch { batch, .. } = fold.decide(&any, cluster.clock_ms) else { panic!("a change is a batch") };
    let batch = Batch { events: vec![FeatureLevelActivated { level: FEATURE_LEVEL + 1 }.into()], ..batch };
    let refused = fold.apply_sealed(&batch.seal());
    assert_eq!(refused, Err(ApplyError::LevelTooHigh { seq: fold.head.seq.next(), level: FEATURE_LEVEL + 1 }));
    assert_eq!(fold, cluster.fold, "it stops before it");
}

#[test]
fn a_recovery_takes_the_other_hosts_out_with_all_that_they_held() {
    let mut cluster = Cluster::of(3);
    cluster.root(Cluster::define("web1", 1, 64, RunStrategy::Always)).expect("a VM");
    cluster.run_duties();
    let holder = cluster.permit("web1").host;
    let survivor = (0..3).map(|index| cluster.host(index)).find(|host| *host != holder).expect("another");
    if let Some(site) = cluster.fold.state.site.as_mut() {
        site.feature_level = 1;
    }
    let recover = |generation, ca| Command::SiteRecover { generation, ca: Fingerprint([ca; 32]) };
    let by = |cluster: &mut Cluster, command| cluster.ask(Actor::Duty(survivor), survivor, command);
    let wrong = by(&mut cluster, recover(2, 8));
    assert!(matches!(wrong, Err(Rejection::Invalid { .. })), "{wrong:?}");
    let recovered = by(&mut cluster, recover(1, 8)).expect("the next generation");
    assert_eq!(by(&mut cluster, recover(1, 8)).map(|again| again.seq), Ok(recovered.seq), "asked again it is done");
    let other = by(&mut cluster, recover(1, 7));
    assert!(matches!(other, Err(Rejection::Invalid { .. })), "another authority, another recovery: {other:?}");
    let state = &cluster.fold.state;
    assert_eq!(state.hosts.iter().map(|(id, _)| *id).collect::<Vec<_>>(), vec![survivor]);
    assert_eq!(state.removed_hosts.iter().count(), 2);
    let site = state.site.as_ref().expect("a site");
    assert_eq!((site.generation, site.ca), (1, Fingerprint([8; 32])));
    assert_eq!(site.feature_level, FEATURE_LEVEL, "one host is left, so nothing holds the level back");
    assert!(cluster.fold.state.vm_by_name("web1").is_some_and(|(_, vm)| vm.permit.is_none()));
    assert!(state.data_centers.values().all(|center| center.spm.is_none_or(|spm| spm.host == survivor)));
    cluster.run_duties();
    assert_eq!(cluster.permit("web1").host, survivor, "what should run runs again");
}

#[test]
fn a_recovery_of_a_large_site_takes_several_batches_and_no_newcomer() {
    let mut cluster = Cluster::of(2);
    let (survivor, gone) = (cluster.host(0), cluster.host(1));
    let facts = HostFacts {
        capacity: Capacity { cpu_threads: 4_096, memory_mib: 10_000_000 },
        ..cluster.fold.state.hosts.get(&gone).expect("a host").facts.clone()
    };
    let report = cluster.report(gone);
    cluster.ask(Actor::Host(gone), gone, Command::ReportHost { report, facts }).expect("a large host");
    for number in 0..3_000 {
        let name = format!("vm{number}");
        cluster.root(Cluster::define(&name, 1, 16, RunStrategy::Manual)).expect("a VM");
        let vm = cluster.vm(&name);
        cluster.root(Command::VmStart { vm, host: Some(gone) }).expect("it starts");
        cluster.duty(Command::VmPlace { vm }).expect("it fits");
    }
    let command = Command::SiteRecover { generation: 1, ca: Fingerprint([8; 32]) };
    let by = |cluster: &mut Cluster| cluster.ask(Actor::Duty(survivor), survivor, command.clone()).expect("a batch");
    let first = by(&mut cluster);
    assert!(cluster.fold.state.hosts.contains(&gone), "it still holds permits");
    let newcomer = cluster.join(7);
    let second = by(&mut cluster);
    assert!(!cluster.fold.state.hosts.contains(&gone));
    assert!(cluster.fold.state.hosts.contains(&newcomer), "who joined after the recovery stays");
    assert!(cluster.fold.state.vms.values().all(|vm| vm.permit.is_none()));
    assert!(second.seq > first.seq);
    assert_eq!(by(&mut cluster).seq, cluster.fold.head.seq, "nothing is left to do");
}

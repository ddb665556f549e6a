//! Rules about guests that run, and about their disks.

#[allow(dead_code, reason = "other stories use the rest")]
mod cluster;

use cluster::Cluster;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::ids::Seq;
use statemachine::rejection::RejectionClass;
use statemachine::state::BackingImage;
use statemachine::state::Disk;
use statemachine::state::DiskFault;
use statemachine::state::DiskFormat;
use statemachine::state::ExitReason;
use statemachine::state::GuestStatus;
use statemachine::state::Pause;
use statemachine::state::RateLimit;
use statemachine::state::RunStrategy;

fn say(cluster: &mut Cluster, name: &str, status: GuestStatus) {
    let (vm, permit) = (cluster.vm(name), cluster.permit(name));
    let report = cluster.report(permit.host);
    let told = Command::ReportVmStatus { report, vm, epoch: permit.epoch, status };
    cluster.ask(Actor::Host(permit.host), permit.host, told).expect("its own guest");
}

#[test]
fn a_guest_stands_still_until_its_user_says_otherwise_or_its_run_ends() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web", 1, 64, RunStrategy::Manual)).expect("defined");
    let vm = cluster.vm("web");
    let pause = |cluster: &mut Cluster, paused| cluster.root(Command::VmPause { vm, paused });
    assert_eq!(pause(&mut cluster, true).expect_err("down").code(), "vm-state");
    cluster.start("web").expect("room");
    let head = cluster.fold.head;
    pause(&mut cluster, false).expect("nothing to do");
    assert_eq!(cluster.fold.head, head);
    let at = pause(&mut cluster, true).expect("it runs").seq;
    let known = |cluster: &Cluster| cluster.fold.state.pauses.get(&vm).copied();
    assert_eq!(known(&cluster), Some(Pause { wanted: true, at }));
    let at = pause(&mut cluster, false).expect("it stands").seq;
    assert_eq!(known(&cluster), Some(Pause { wanted: false, at }));
    cluster.exit("web", ExitReason::GuestPoweredOff);
    assert_eq!(known(&cluster), None);
}

#[test]
fn going_on_is_news_to_a_guest_that_an_error_holds_each_time() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web").expect("room");
    let vm = cluster.vm("web");
    say(&mut cluster, "web", GuestStatus::PausedIo);
    let mut last = Seq::ZERO;
    for _ in 0..2 {
        let at = cluster.root(Command::VmPause { vm, paused: false }).expect("held").seq;
        assert!(at > last);
        assert_eq!(cluster.fold.state.pauses.get(&vm), Some(&Pause { wanted: false, at }));
        last = at;
    }
}

#[test]
fn the_error_that_holds_a_guest_is_known_while_it_does() {
    let mut cluster = Cluster::of(1);
    cluster.root(Cluster::define("web", 1, 64, RunStrategy::Manual)).expect("defined");
    cluster.start("web").expect("room");
    let (vm, permit) = (cluster.vm("web"), cluster.permit("web"));
    let tell = |cluster: &mut Cluster, fault| {
        let report = cluster.report(permit.host);
        let told = Command::ReportVmDiskFault { report, vm, epoch: permit.epoch, fault };
        cluster.ask(Actor::Host(permit.host), permit.host, told)
    };
    let known = |cluster: &Cluster| cluster.fold.state.disk_faults.get(&vm).cloned();
    let fault = |what: &str| DiskFault { disk: "root".to_owned(), what: what.to_owned(), no_space: true };
    tell(&mut cluster, Some(fault("full"))).expect("news");
    assert_eq!(known(&cluster), Some(fault("full")));
    let escape = tell(&mut cluster, Some(fault("\u{1b}[2J"))).expect_err("hostile");
    assert_eq!(escape.class(), RejectionClass::Invalid);
    tell(&mut cluster, None).expect("over");
    assert_eq!(known(&cluster), None);
    tell(&mut cluster, Some(fault("full"))).expect("news");
    cluster.exit("web", ExitReason::PoweredOff);
    assert_eq!(known(&cluster), None);
}

fn chain(images: &[(&str, DiskFormat)]) -> Vec<BackingImage> {
    images.iter().map(|(path, format)| BackingImage { path: (*path).to_owned(), format: *format }).collect()
}

#[test]
fn an_image_below_a_disk_is_read_by_many_and_written_by_none() {
    let mut cluster = Cluster::of(2);
    let base = || chain(&[("/srv/base.raw", DiskFormat::Raw)]);
    let over = |path: &str| Disk { format: DiskFormat::Qcow2, backing: base(), ..Disk::raw("root", path) };
    cluster.root(Cluster::define_with_disks("a", vec![over("/srv/a")])).expect("defined");
    cluster.root(Cluster::define_with_disks("b", vec![over("/srv/b")])).expect("defined");
    cluster.root(Cluster::define_with_disks("owner", vec![Disk::raw("root", "/srv/base.raw")])).expect("defined");
    cluster.start("a").expect("room");
    cluster.start("b").expect("both read the base");
    assert_eq!(cluster.start("owner").expect_err("S2").code(), "disk-in-use");
    cluster.exit("a", ExitReason::GuestPoweredOff);
    cluster.exit("b", ExitReason::GuestPoweredOff);
    cluster.start("owner").expect("nobody reads it");
    assert_eq!(cluster.start("a").expect_err("S2").code(), "disk-in-use");
}

#[test]
fn disks_that_make_no_sense_are_refused_in_words() {
    let raw = || Disk::raw("root", "/srv/root");
    let image = || Disk { format: DiskFormat::Qcow2, ..raw() };
    let below = |images: &[(&str, DiskFormat)]| vec![Disk { backing: chain(images), ..image() }];
    let limited = |limit| vec![Disk { rate_limit: Some(limit), ..raw() }];
    let no_limit = RateLimit::default();
    let many: Vec<BackingImage> =
        (0..33).map(|number| BackingImage { path: format!("/srv/{number}"), format: DiskFormat::Qcow2 }).collect();
    let cases: Vec<(Vec<Disk>, &str)> = vec![
        (vec![Disk { shareable: true, ..image() }], "disk format"),
        (vec![Disk { backing: chain(&[("/srv/base", DiskFormat::Raw)]), ..raw() }], "disk backing"),
        (below(&[("/srv/../base", DiskFormat::Raw)]), "disk backing"),
        (below(&[("/srv/root", DiskFormat::Qcow2)]), "disk backing"),
        (below(&[("/srv/b", DiskFormat::Qcow2), ("/srv/b", DiskFormat::Qcow2)]), "disk backing"),
        (below(&[("/srv/b", DiskFormat::Raw), ("/srv/c", DiskFormat::Raw)]), "disk backing"),
        (vec![Disk { backing: many, ..image() }], "disk backing"),
        (limited(RateLimit { iops: Some(0), ..no_limit }), "disk rate_limit"),
        (limited(RateLimit { bytes_per_second: Some(100), ..no_limit }), "disk rate_limit"),
        (limited(RateLimit { burst_bytes: Some(1 << 20), ..no_limit }), "disk rate_limit"),
        (limited(RateLimit { iops: Some(1000), burst_iops: Some(9), ..no_limit }), "disk rate_limit"),
        (
            vec![Disk { backing: chain(&[("/srv/data", DiskFormat::Raw)]), ..image() }, Disk::raw("data", "/srv/data")],
            "disks",
        ),
    ];
    for (disks, field) in cases {
        let refusal = Cluster::of(1).root(Cluster::define_with_disks("web", disks)).expect_err(field);
        assert_eq!(refusal.class(), RejectionClass::Invalid);
        assert!(refusal.to_string().starts_with(field), "{field}: {refusal}");
    }
    let sound = Disk {
        backing: chain(&[("/srv/b", DiskFormat::Qcow2), ("/srv/c", DiskFormat::Raw)]),
        rate_limit: Some(RateLimit { iops: Some(1000), burst_iops: Some(10), ..no_limit }),
        ..image()
    };
    Cluster::of(1).root(Cluster::define_with_disks("web", vec![sound])).expect("as it should be");
}

#[test]
fn disks_and_cards_share_the_slots() {
    let mut cluster = Cluster::of(1);
    let disk = |number| Disk::raw(&format!("d{number}"), &format!("/srv/{number}"));
    let full: Vec<Disk> = (0..16).map(disk).collect();
    let refusal = cluster.root(Cluster::define_with("a", full.clone(), 8)).expect_err("24 of 23 slots");
    assert!(refusal.to_string().contains("together at most 23"), "{refusal}");
    cluster.root(Cluster::define_with("a", full, 7)).expect("they fit");
}

//! Golden bytes: every version of every event ever written still decodes to the same value (DESIGN §3).
//!
//! A new kind of event needs a sample here and a file in `tests/golden/`; write the file once with
//! `QUORATE_WRITE_GOLDEN=1 cargo nextest run -p statemachine golden` and never change it again.

#[allow(dead_code, reason = "the samples use the things of this world and not its dice")]
mod world;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use pnet_base::MacAddr;
use statemachine::Event;
use statemachine::command::HostCandidate;
use statemachine::command::HostFacts;
use statemachine::event::*;
use statemachine::ids::*;
use statemachine::scheduler;
use statemachine::state::*;
use uuid::Uuid;

fn explanation() -> scheduler::Explanation {
    scheduler::Explanation {
        policy: PolicyName::EvenlyDistributed,
        decided_on: Seq(41),
        considered: 3,
        chosen: Some(HostId(4)),
        filtered: vec![scheduler::FilterCount {
            filter: scheduler::FilterName::Memory,
            hosts: 1,
            reasons: vec!["host2: 4096 MiB wanted, 12 of 2048 MiB free".to_owned()],
        }],
        best: vec![scheduler::RankedHost {
            host: HostId(4),
            name: "host4".to_owned(),
            total: 3,
            units: vec![scheduler::UnitRank {
                unit: scheduler::WeightName::OptimalForEvenDistributionCpu,
                factor: 2,
                score: 125,
                rank: 1,
            }],
        }],
    }
}

fn guest_facts() -> GuestFacts {
    let interface = |name: &str, addresses: &[&str]| GuestInterface {
        name: name.to_owned(),
        mac: Some(MacAddr::new(0x52, 0x54, 0, 1, 2, 3)),
        addresses: addresses.iter().map(|address| address.parse().expect("an address")).collect(),
    };
    GuestFacts {
        hostname: Some("web1".to_owned()),
        os: Some(GuestOs {
            id: Some("debian".to_owned()),
            version_id: Some("12".to_owned()),
            pretty_name: Some("Debian GNU/Linux 12".to_owned()),
            kernel: None,
        }),
        interfaces: [interface("eth0", &["10.0.0.5/24", "fe80::5054:ff:fe01:203/64"]), interface("eth1", &[])].into(),
        filesystems: [GuestFilesystem {
            mountpoint: "/".to_owned(),
            kind: "ext4".to_owned(),
            total_bytes: Some(1 << 30),
        }]
        .into(),
    }
}

/// As they were when the bytes were frozen.
fn at_level_1(facts: HostFacts) -> HostFacts {
    HostFacts { feature_level: 1, ..facts }
}

fn disk_fault() -> DiskFault {
    DiskFault { disk: "root".to_owned(), what: "write of 4096 bytes: no space left".to_owned(), no_space: true }
}

fn progress() -> MigrationProgress {
    MigrationProgress {
        round: 3,
        sent_bytes: 4_000_000_000,
        remaining_bytes: 70_000,
        dirty_bytes_per_second: 600,
        throttle_percent: 20,
        downtime_us: 1_500,
    }
}

fn samples() -> Vec<Event> {
    let vm = VmId(Uuid::from_u128(0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00));
    let (host, token, data_center, cluster) = (HostId(4), TokenId(3), DataCenterId(1), ClusterId(1));
    let boot = BootId(Uuid::from_u128(5));
    let print = Fingerprint([7; 32]);
    let text = || "text".to_owned();
    let spec = || Arc::new(world::spec(15));
    vec![
        SiteInitialised { site: SiteId(Uuid::from_u128(9)), name: text(), ca: print, feature_level: 1 }.into(),
        DataCenterCreated { data_center, name: text() }.into(),
        ClusterCreated { cluster, data_center, name: text(), scheduling: SchedulingPolicy::default() }.into(),
        EventsTrimmed { upto: Seq(7_000) }.into(),
        FeatureLevelActivated { level: 2 }.into(),
        VoterCountChanged { voters: 5 }.into(),
        SiteRecovered { generation: 1, host, ca: print }.into(),
        HostFailureDomainChanged { host, domain: text() }.into(),
        TokenCreated { token, purpose: TokenPurpose::Join, secret_hash: [8; 32], expires_ms: 99, note: text() }.into(),
        TokenRevoked { token }.into(),
        TokenUsed { token, host }.into(),
        HostJoined {
            host,
            cluster,
            candidate: HostCandidate { facts: at_level_1(world::candidate(4).facts), ..world::candidate(4) },
        }
        .into(),
        CertificateIssued { host, serial: text(), fingerprint: print, not_after_ms: 77 }.into(),
        HostReported { host, counter: 6, facts: at_level_1(world::facts(5, 4, 2048)) }.into(),
        HostRebooted { host, from: boot, to: BootId(Uuid::from_u128(6)) }.into(),
        HostSuspected { host }.into(),
        HostUnreachable { host }.into(),
        HostRecovered { host }.into(),
        HostMaintenanceRequested { host }.into(),
        HostActivated { host }.into(),
        HostRemoved { host }.into(),
        HostSpmPriorityChanged { host, priority: -1 }.into(),
        VmDefined { vm, name: text(), cluster, spec: spec(), run_strategy: RunStrategy::Always }.into(),
        VmRenamed { vm, name: text() }.into(),
        VmSpecChanged { vm, spec: spec() }.into(),
        VmRunStrategyChanged { vm, run_strategy: RunStrategy::Halted }.into(),
        VmDeleted { vm }.into(),
        VmDesiredChanged { vm, desired: Desired::Stopped(StopMode::PowerOff) }.into(),
        VmDesiredReset { vm }.into(),
        VmPlaced { vm, explanation: Arc::new(explanation()) }.into(),
        VmPermitGranted { vm, host, boot, release: ReleaseClass::Lease }.into(),
        VmPermitReleased { vm, epoch: Epoch(42), evidence: ReleaseEvidence::BootId }.into(),
        VmObservedStatus { vm, epoch: Epoch(42), host, counter: 8, status: GuestStatus::PausedLease }.into(),
        VmObservedExit { vm, epoch: Epoch(42), host, counter: 9, reason: ExitReason::Lost, detail: text() }.into(),
        VmObservedGuest { vm, epoch: Epoch(42), host, counter: 10, facts: Arc::new(guest_facts()) }.into(),
        VmDesiredPause { vm, paused: true }.into(),
        VmObservedDiskFault { vm, epoch: Epoch(42), host, counter: 13, fault: Some(disk_fault()) }.into(),
        MigrationStarted {
            vm,
            epoch: Epoch(42),
            from: host,
            to: HostId(5),
            to_boot: boot,
            explanation: Arc::new(explanation()),
        }
        .into(),
        MigrationProgressed { vm, migration: MigrationId(43), host, counter: 11, progress: progress() }.into(),
        MigrationCommitted {
            vm,
            migration: MigrationId(43),
            from: host,
            to: HostId(5),
            boot,
            release: ReleaseClass::Operator,
            counter: 12,
        }
        .into(),
        MigrationAborted {
            vm,
            migration: MigrationId(43),
            from: host,
            to: HostId(5),
            reason: AbortReason::TargetLost,
            detail: text(),
        }
        .into(),
        SpmGranted { data_center, host }.into(),
        SpmReleased { data_center, host }.into(),
        VmDesiredDevices {
            vm,
            epoch: Epoch(40),
            plug: Devices {
                disks: vec![Disk { slot: Some(3), ..Disk::raw("data", "/srv/data.raw") }],
                nics: vec![Nic { id: "wan".to_owned(), bridge: "br1".to_owned(), mac: None, slot: Some(22) }],
            },
            unplug: vec![text()],
        }
        .into(),
        VmObservedDevice { vm, epoch: Epoch(40), host, counter: 6, device: text(), word: DeviceWord::Kept(text()) }
            .into(),
        VmDesiredMemory { vm, mib: 512 }.into(),
        SuspensionStarted { vm, epoch: Epoch(42), host }.into(),
        SuspensionCompleted { vm, suspension: MigrationId(43), host, counter: 14, bytes: 200_000_000 }.into(),
        SuspensionAborted { vm, suspension: MigrationId(43), host, reason: AbortReason::Failed, detail: text() }.into(),
        SuspensionDiscarded { vm, suspension: MigrationId(43), host }.into(),
        HostProcessorReported {
            host,
            counter: 6,
            processor: HostProcessor {
                vendor: "AuthenticAMD".to_owned(),
                model_name: text(),
                models: vec![CpuModel::V2, CpuModel::V3],
                fingerprint: "0a1b".to_owned(),
                tsc_khz: 2_000_000,
                scales_tsc: false,
            },
        }
        .into(),
        ClusterMigrationPolicyChanged {
            cluster,
            policy: MigrationPolicy {
                automatic: Some(false),
                downtime_ms: Some(500),
                mib_per_second: Some(200),
                seconds_per_gib: None,
            },
        }
        .into(),
    ]
}

/// Events that hold a spec of a later layout: (layout, event).
fn samples_of_later_layouts() -> Vec<(u8, Event)> {
    let nic = |id: &str, mac| Nic { id: id.to_owned(), bridge: "br0".to_owned(), mac, slot: None };
    let nics = vec![nic("lan", None), nic("wan", Some(MacAddr::new(0x52, 0x54, 0, 1, 2, 3)))];
    let image = Disk {
        format: DiskFormat::Qcow2,
        backing: vec![BackingImage { path: "/srv/base.raw".to_owned(), format: DiskFormat::Raw }],
        on_error: OnError::Enospc,
        rate_limit: Some(RateLimit {
            iops: Some(500),
            bytes_per_second: Some(1 << 20),
            burst_iops: Some(50),
            burst_bytes: None,
        }),
        ..Disk::raw("root", "/srv/top.qcow2")
    };
    let first_boot = FirstBoot {
        host_name: "web1".to_owned(),
        user: Some(FirstUser { name: "me".to_owned(), ssh_keys: vec!["ssh-ed25519 AAAA me".to_owned()] }),
        interfaces: vec![Interface {
            nic: "lan".to_owned(),
            addresses: vec!["192.0.2.5/24".to_owned()],
            gateway: Some("192.0.2.1".to_owned()),
        }],
        dns: vec!["192.0.2.2".to_owned()],
        user_data: Some("#!/bin/sh".to_owned()),
    };
    let topology = Topology { sockets: 1, cores: 2, threads: 2 };
    let spec = Arc::new(VmSpec {
        nics,
        disks: vec![image],
        cpu: Cpu { model: CpuModel::V3, topology: Some(topology), weight: Some(50), cap_percent: Some(150) },
        pages: MemoryPages::Mib2,
        first_boot: Some(first_boot),
        on_watchdog: OnWatchdog::InjectNmi,
        on_panic: OnPanic::Pause,
        migration: MigrationPolicy { downtime_ms: Some(20), ..MigrationPolicy::default() },
        ..world::spec(15)
    });
    let vm = VmId(Uuid::from_u128(7));
    vec![(2, VmSpecChanged { vm, spec }.into())]
}

fn golden_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let text = text.trim();
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("hex digits")).collect()
}

#[test]
fn golden_bytes_of_every_event_decode_to_what_they_meant() {
    let write = std::env::var_os("QUORATE_WRITE_GOLDEN").is_some();
    let later = samples_of_later_layouts().into_iter().map(|(layout, event)| (format!(".spec{layout}"), event));
    for (layout, event) in samples().into_iter().map(|event| (String::new(), event)).chain(later) {
        let encoded = event.encode();
        let name = format!("{:03}-{}.v{}{layout}.hex", encoded.kind, event.name(), encoded.version);
        let path = golden_dir().join(name);
        if write && !path.exists() {
            std::fs::create_dir_all(golden_dir()).expect("the tree is writable");
            std::fs::write(&path, hex(&encoded.payload) + "\n").expect("the tree is writable");
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let stored = EncodedEvent { payload: unhex(&golden), ..encoded.clone() };
        assert_eq!(Event::decode(&stored).as_ref(), Ok(&event), "{}", path.display());
        assert_eq!(stored, encoded, "today's encoding of {} is what was frozen", event.name());
    }
}

#[test]
fn every_kind_of_event_has_a_sample_and_a_number_of_its_own() {
    let sampled: BTreeSet<_> = samples().iter().map(|event| (event.kind(), event.name())).collect();
    let kinds: BTreeSet<_> = Event::KINDS.iter().copied().collect();
    assert_eq!(sampled, kinds);
    assert_eq!(kinds.iter().map(|(number, _)| number).collect::<BTreeSet<_>>().len(), Event::KINDS.len());
}

#[test]
fn an_event_of_a_later_release_is_refused_by_name_and_number() {
    let later = EncodedEvent { kind: 9999, version: 1, payload: Vec::new() };
    let refusal = Event::decode(&later).expect_err("unknown").to_string();
    assert!(refusal.contains("9999") && refusal.contains("upgrade"), "{refusal}");
}

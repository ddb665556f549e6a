use super::*;
use serde_json::{Value, json};

fn example() -> Value {
    json!({
        "vm": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d",
        "name": "web1",
        "epoch": 41,
        "machine": "q-direct-1",
        "vcpus": 2,
        "memory_bytes": 268435456u64,
        "kernel": "/var/lib/quorate/vmlinuz",
        "cmdline": "console=ttyS0 quorate.epoch=41",
        "disks": [{"id": "root", "path": "/dev/nbd0", "shared": true}],
        "nics": [{"id": "lan", "mac": "52:54:00:12:34:56", "mtu": 9000}],
        "identity": {"uuid": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d"},
        "release": "operator",
        "started_marker": "/var/lib/quorate/started/41",
        "run_dir": "/run/quorate/vm/web1"
    })
}

fn with(field: &str, value: Value) -> Result<VmmConfig, ConfigError> {
    let mut config = example();
    config[field] = value;
    VmmConfig::parse(config.to_string().as_bytes())
}

#[test]
fn a_configuration_survives_being_written_and_read() {
    let config = VmmConfig::parse(example().to_string().as_bytes()).unwrap();
    let again = serde_json::to_vec(&config).unwrap();
    assert_eq!(VmmConfig::parse(&again).unwrap(), config);
    assert_eq!(config.machine, MachineType::QDirect1);
    assert_eq!(config.nics[0].mac, MacAddr::new(0x52, 0x54, 0, 0x12, 0x34, 0x56));
}

#[test]
fn a_configuration_of_before_network_cards_has_none() {
    let mut config = example();
    config.as_object_mut().unwrap().remove("nics");
    let config = VmmConfig::parse(config.to_string().as_bytes()).unwrap();
    assert!(config.nics.is_empty());
    // And is written as before, for a vmm of before.
    assert!(!serde_json::to_string(&config).unwrap().contains("nics"));
}

#[test]
fn a_card_without_an_mtu_has_that_of_ethernet() {
    let config = with("nics", json!([{"id": "lan", "mac": "52:54:00:12:34:56"}])).unwrap();
    assert_eq!(config.nics[0].mtu, 1500);
}

#[test]
fn disks_and_cards_share_the_slots() {
    let disks = |count: u8| (0..count).map(|i| json!({"id": format!("d{i}"), "path": "/x"})).collect::<Vec<_>>();
    let nics: Vec<_> = (0..8).map(|i| json!({"id": format!("n{i}"), "mac": format!("02:00:00:00:00:0{i}")})).collect();
    let mut config = example();
    config["nics"] = json!(nics);
    config["disks"] = json!(disks(15));
    VmmConfig::parse(config.to_string().as_bytes()).unwrap();
    config["disks"] = json!(disks(16));
    assert!(matches!(VmmConfig::parse(config.to_string().as_bytes()), Err(ConfigError::Invalid { .. })));
}

#[test]
fn panics_are_reported_and_watchdogs_reset_unless_said_otherwise() {
    let plain = VmmConfig::parse(example().to_string().as_bytes()).unwrap();
    assert_eq!((plain.on_panic, plain.watchdog), (OnPanic::Report, None));
    assert_eq!(plain.generation(), plain.vm);
    let text = serde_json::to_string(&plain).unwrap();
    assert!(["panic", "watchdog", "generation"].iter().all(|field| !text.contains(field)), "as it was before: {text}");
    let watched = with("watchdog", json!({})).unwrap();
    assert_eq!(watched.watchdog.unwrap().action, WatchdogAction::Reset);
    let watched = with("watchdog", json!({"action": "inject_nmi"})).unwrap();
    assert_eq!(watched.watchdog.unwrap().action, WatchdogAction::InjectNmi);
    assert_eq!(with("on_panic", json!("power_off")).unwrap().on_panic, OnPanic::PowerOff);
    for (field, value) in [("on_panic", json!("explode")), ("watchdog", json!({"action": "reset", "more": 1}))] {
        assert!(matches!(with(field, value), Err(ConfigError::Parse(_))));
    }
}

#[test]
fn processors_are_the_hosts_and_pages_small_unless_said_otherwise() {
    let plain = VmmConfig::parse(example().to_string().as_bytes()).unwrap();
    assert_eq!((plain.cpu(), plain.huge_pages), (CpuConfig::of(CpuModel::Host, 2), None));
    let text = serde_json::to_string(&plain).unwrap();
    assert!(!text.contains("cpu\"") && !text.contains("huge"), "as it was before: {text}");
    let given = with("cpu", json!({"model": "x86-64-v3", "sockets": 2, "cores": 1, "threads": 1})).unwrap();
    assert_eq!(given.cpu(), CpuConfig { model: CpuModel::X86_64V3, sockets: 2, cores: 1, threads: 1 });
    let of_the_host = with("cpu", json!({"sockets": 1, "cores": 1, "threads": 2})).unwrap();
    assert_eq!(of_the_host.cpu().model, CpuModel::Host);
    assert_eq!(with("huge_pages", json!("mib2")).unwrap().huge_pages, Some(HugePages::Mib2));
    for (field, value) in [
        ("cpu", json!({"model": "486", "sockets": 1, "cores": 2, "threads": 1})),
        ("cpu", json!({"model": "host"})),
        ("huge_pages", json!("4k")),
    ] {
        assert!(matches!(with(field, value), Err(ConfigError::Parse(_))));
    }
}

#[test]
fn processors_that_cannot_be_arranged_are_refused_in_words() {
    let words = |vcpus: u16, cpu: Value| {
        let mut config = example();
        (config["vcpus"], config["cpu"]) = (json!(vcpus), cpu);
        VmmConfig::parse(config.to_string().as_bytes()).unwrap_err().to_string()
    };
    let three = words(4, json!({"sockets": 1, "cores": 3, "threads": 1}));
    assert!(three.contains("1 sockets of 3 cores of 1 threads are 3 processors, and vcpus is 4"), "{three}");
    assert!(words(4, json!({"sockets": 0, "cores": 4, "threads": 1})).contains("are 0 processors"));
    assert!(words(1, json!({"sockets": 65535, "cores": 65535, "threads": 65535})).contains("281462092005375"));
    let gaps = words(201, json!({"sockets": 67, "cores": 3, "threads": 1}));
    assert!(gaps.contains("APIC id 266, above 254"), "{gaps}");
}

#[test]
fn an_unknown_field_is_refused() {
    assert!(matches!(with("tpm", json!(true)), Err(ConfigError::Parse(_))));
}

#[test]
fn a_lease_belongs_to_the_lease_class_and_to_no_other() {
    assert!(with("release", json!("lease")).is_err());
    assert!(with("lease", json!({"deadline_boottime_ns": 1})).is_err());
    let mut config = example();
    config["release"] = json!("lease");
    config["lease"] = json!({"deadline_boottime_ns": 1});
    VmmConfig::parse(config.to_string().as_bytes()).unwrap();
}

#[test]
fn a_guest_that_comes_gets_its_first_deadline_later() {
    let incoming = |config: &Value| VmmConfig::parse_incoming(config.to_string().as_bytes());
    let mut config = example();
    config["release"] = json!("lease");
    incoming(&config).unwrap();
    config["lease"] = json!({"deadline_boottime_ns": 1});
    assert!(incoming(&config).is_err());
    let mut config = example();
    config["vcpus"] = json!(0);
    assert!(matches!(incoming(&config), Err(ConfigError::Invalid { .. })));
}

fn nic(id: &str, mac: &str) -> Value {
    json!({"id": id, "mac": mac})
}

#[test]
fn bounds_are_kept() {
    for (field, value) in [
        ("epoch", json!(0)),
        ("vcpus", json!(0)),
        ("vcpus", json!(255)),
        ("memory_bytes", json!(4096)),
        ("memory_bytes", json!(268435457u64)),
        ("max_memory_bytes", json!(134217728u64)),
        ("huge_pages", json!("gib1")),
        ("cmdline", json!("x".repeat(2048))),
        ("cmdline", json!("a\nb")),
        ("name", json!("n".repeat(256))),
        ("kernel", json!("vmlinuz")),
        ("disks", json!([{"id": "a", "path": "/x"}, {"id": "a", "path": "/y"}])),
        ("disks", json!([{"id": "a", "path": "/x", "serial": "s".repeat(21)}])),
        ("nics", json!([nic("a", "00:00:00:00:00:00")])),
        ("nics", json!([nic("a", "ff:ff:ff:ff:ff:ff")])),
        ("nics", json!([nic("a", "01:00:5e:00:00:01")])),
        ("nics", json!([nic("", "02:00:00:00:00:01")])),
        ("nics", json!([nic("a=b", "02:00:00:00:00:01")])),
        ("nics", json!([nic("a", "02:00:00:00:00:01"), nic("a", "02:00:00:00:00:02")])),
        ("nics", json!([nic("a", "02:00:00:00:00:01"), nic("b", "02:00:00:00:00:01")])),
        ("nics", json!([{"id": "a", "mac": "02:00:00:00:00:01", "mtu": 1279}])),
        ("nics", json!([{"id": "a", "mac": "02:00:00:00:00:01", "mtu": 65522}])),
        ("nics", json!((0..9).map(|i| nic(&format!("n{i}"), &format!("02:00:00:00:00:0{i}"))).collect::<Vec<_>>())),
    ] {
        let shown = value.to_string();
        assert!(matches!(with(field, value), Err(ConfigError::Invalid { .. })), "{field} = {shown}");
    }
}

//! What may come and go, as values.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pnet_base::MacAddr;
use proptest::prelude::*;
use serde_json::json;
use vmm_control::config::{MAX_DISKS, MAX_DISKS_AND_NICS, MAX_NICS};
use vmm_control::slots::{FIRST_SLOT, LAST_SLOT};
use vmm_control::{DeviceKind, DeviceState, DiskConfig, ErrorCode, NicConfig, VmmConfig};

use super::inventory::*;

pub(super) fn config(disks: &[DiskConfig], nics: &[NicConfig]) -> VmmConfig {
    let config = json!({
        "vm": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d",
        "name": "web1",
        "epoch": 41,
        "machine": "q-direct-1",
        "vcpus": 1,
        "memory_bytes": 32u64 << 20,
        "kernel": "/vmlinuz",
        "identity": {"uuid": "6f2d1a34-5b1c-4f0e-9d3a-0a4f5e7b8c9d"},
        "release": "operator",
        "started_marker": "/started",
        "run_dir": "/run",
        "disks": disks,
        "nics": nics,
    });
    VmmConfig::parse(config.to_string().as_bytes()).unwrap()
}

pub(super) fn disk(id: &str, slot: Option<u8>) -> DiskConfig {
    DiskConfig { id: id.into(), path: format!("/{id}").into(), slot, ..DiskConfig::default() }
}

fn nic(id: &str, last: u8, slot: Option<u8>) -> NicConfig {
    NicConfig { id: id.into(), mac: MacAddr::new(2, 0, 0, 0, 0, last), mtu: 1500, slot }
}

fn a_disk(id: &str) -> DeviceConfig {
    DeviceConfig::Disk(disk(id, None))
}

fn slots(inventory: &Inventory) -> Vec<(String, u8)> {
    inventory.status().into_iter().map(|device| (device.id, device.slot)).collect()
}

fn place(plug: Result<Plug, Refusal>) -> Place {
    match plug.unwrap() {
        Plug::Open(place) => place,
        Plug::Known => panic!("it is new"),
    }
}

fn state(inventory: &Inventory, id: &str) -> Option<DeviceState> {
    inventory.status().into_iter().find(|device| device.id == id).map(|device| device.state)
}

#[test]
fn devices_without_a_slot_have_the_places_they_always_had() {
    let nics = [nic("lan", 1, None), nic("dmz", 2, None)];
    let inventory = Inventory::new(&config(&[disk("root", None), disk("data", None)], &nics)).unwrap();
    let (root, data, dmz, lan) = (1, 2, LAST_SLOT - 1, LAST_SLOT);
    let expected = [("root", root), ("data", data), ("dmz", dmz), ("lan", lan)];
    assert_eq!(slots(&inventory), expected.map(|(id, slot)| (id.to_owned(), slot)));
    let status = inventory.status();
    assert_eq!((status[0].address.as_str(), status[0].kind, status[0].link_up), ("02:00.0", DeviceKind::Disk, None));
    assert_eq!((status[3].kind, status[3].link_up), (DeviceKind::Nic, Some(true)));
}

#[test]
fn a_slot_that_is_named_is_kept_and_the_others_go_around_it() {
    let disks = [disk("a", None), disk("b", Some(1)), disk("c", None), disk("d", Some(LAST_SLOT))];
    let inventory = Inventory::new(&config(&disks, &[nic("lan", 1, None)])).unwrap();
    let expected = [("b", 1), ("a", 2), ("c", 3), ("lan", LAST_SLOT - 1), ("d", LAST_SLOT)];
    assert_eq!(slots(&inventory), expected.map(|(id, slot)| (id.to_owned(), slot)));
}

#[test]
fn a_plug_takes_the_first_free_slot_and_is_known_when_repeated() {
    let mut inventory = Inventory::new(&config(&[disk("a", None), disk("b", Some(3))], &[])).unwrap();
    let new = place(inventory.plug(a_disk("c")));
    assert_eq!((new.slot, state(&inventory, "c")), (2, Some(DeviceState::Plugging)));
    assert_eq!(inventory.plug(a_disk("c")).unwrap(), Plug::Known);
    assert!(inventory.opened(new));
    assert_eq!(inventory.plug(a_disk("c")).unwrap(), Plug::Known);
    assert_eq!(inventory.plug(DeviceConfig::Disk(disk("c", Some(2)))).unwrap(), Plug::Known, "the slot as answered");
    assert_eq!(place(inventory.plug(a_disk("d"))).slot, 4);
    assert_eq!(place(inventory.plug(DeviceConfig::Nic(nic("lan", 1, None)))).slot, LAST_SLOT);
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let nics = [nic("lan", 1, None)];
    let mut inventory = Inventory::new(&config(&[disk("a", None)], &nics)).unwrap();
    let other_path = DiskConfig { path: "/other".into(), ..disk("a", None) };
    for (device, code, words) in [
        (DeviceConfig::Disk(other_path), ErrorCode::Taken, "another device has the id a"),
        (DeviceConfig::Disk(disk("a", Some(9))), ErrorCode::Taken, "another device has the id a"),
        (a_disk("lan"), ErrorCode::Taken, "another device has the id lan"),
        (DeviceConfig::Disk(disk("b", Some(1))), ErrorCode::Taken, "slot 1 is that of a"),
        (DeviceConfig::Disk(disk("b", Some(0))), ErrorCode::BadRequest, "must be 1 to"),
        (DeviceConfig::Disk(disk("b", Some(LAST_SLOT + 1))), ErrorCode::BadRequest, "must be 1 to"),
        (a_disk(""), ErrorCode::BadRequest, "empty"),
        (DeviceConfig::Disk(DiskConfig { path: "x".into(), ..disk("b", None) }), ErrorCode::BadRequest, "absolute"),
        (DeviceConfig::Nic(nic("dmz", 1, None)), ErrorCode::BadRequest, "used twice"),
    ] {
        let fault = inventory.plug(device.clone()).unwrap_err().fault();
        assert_eq!(fault.code, code, "{device:?}");
        assert!(fault.message.contains(words), "{}", fault.message);
    }
    assert_eq!(inventory.status().len(), 2);
}

#[test]
fn storage_that_hangs_is_asked_a_few_times_only() {
    let mut inventory = Inventory::new(&config(&[], &[])).unwrap();
    let first = place(inventory.plug(a_disk("d0")));
    for i in 1..MAX_OPENING {
        place(inventory.plug(a_disk(&format!("d{i}"))));
    }
    assert!(matches!(inventory.plug(a_disk("more")), Err(Refusal::Busy)));
    assert_eq!(inventory.plug(a_disk("d0")).unwrap(), Plug::Known);
    assert!(inventory.opened(first));
    place(inventory.plug(a_disk("more")));
}

#[test]
fn an_unplug_presses_the_button_once_in_six_seconds() {
    let mut inventory = Inventory::new(&config(&[disk("a", None)], &[])).unwrap();
    let start = Instant::now();
    let later = |seconds| start + Duration::from_secs(seconds);
    assert_eq!(inventory.unplug("a", false, start).unwrap(), Unplug::Ask(1));
    assert_eq!(state(&inventory, "a"), Some(DeviceState::Unplugging));
    assert_eq!(inventory.unplug("a", false, later(5)).unwrap(), Unplug::Wait, "it would cancel the first one");
    assert_eq!(inventory.unplug("a", false, later(6)).unwrap(), Unplug::Ask(1));
    assert_eq!(inventory.unplug("a", true, later(6)).unwrap(), Unplug::Pull(1));
    assert!(matches!(inventory.plug(a_disk("a")), Err(Refusal::Leaving { .. })));
    assert_eq!(inventory.kept(1), Some("a".to_owned()));
    assert_eq!((inventory.kept(1), state(&inventory, "a")), (None, Some(DeviceState::Present)));
    assert_eq!(inventory.unplug("a", false, later(7)).unwrap(), Unplug::Ask(1), "asked anew");
}

#[test]
fn a_device_that_is_unplugged_while_it_opens_is_not_wanted_any_more() {
    let mut inventory = Inventory::new(&config(&[], &[])).unwrap();
    let place = place(inventory.plug(a_disk("a")));
    for force in [false, true] {
        assert_eq!(inventory.unplug("a", force, Instant::now()).unwrap(), Unplug::Wait);
    }
    assert_eq!(state(&inventory, "a"), Some(DeviceState::Unplugging));
    assert!(matches!(inventory.plug(a_disk("a")), Err(Refusal::Leaving { .. })));
    assert!(!inventory.opened(place) && inventory.present().is_empty());
    assert_eq!(inventory.gone(place), Some("a".to_owned()));
    assert!(matches!(inventory.unplug("a", false, Instant::now()), Err(Refusal::NotFound { .. })));
}

#[test]
fn the_past_of_a_slot_says_nothing_about_its_next_device() {
    let mut inventory = Inventory::new(&config(&[], &[])).unwrap();
    let first = place(inventory.plug(a_disk("a")));
    inventory.gone(first);
    let second = place(inventory.plug(a_disk("b")));
    assert_eq!(first.slot, second.slot);
    assert_eq!(inventory.gone(first), None);
    assert!(!inventory.opened(first) && inventory.opened(second));
}

#[test]
fn a_reset_ends_the_wait_for_a_guest() {
    let mut inventory = Inventory::new(&config(&[disk("a", None), disk("b", None)], &[])).unwrap();
    inventory.unplug("a", false, Instant::now()).unwrap();
    let opening = place(inventory.plug(a_disk("c")));
    let gone: Vec<_> = inventory.drop_leaving().into_iter().map(|(_, id)| id).collect();
    assert_eq!(gone, ["a"]);
    let built: Vec<_> = inventory.present().into_iter().map(|(place, device)| (place.slot, device)).collect();
    assert_eq!(built, [(2, a_disk("b"))], "in its slot, and without the one that is being opened");
    assert!(inventory.opened(opening));
}

#[test]
fn a_disk_and_a_card_of_one_name_are_told_apart_where_that_is_possible() {
    let mut inventory = Inventory::new(&config(&[disk("x", None)], &[nic("x", 1, None)])).unwrap();
    assert!(matches!(inventory.unplug("x", false, Instant::now()), Err(Refusal::Ambiguous { .. })));
    assert_eq!(inventory.set_link("x", false).unwrap(), LAST_SLOT);
    assert!(!inventory.link_is_up(LAST_SLOT) && inventory.link_is_up(1));
    let mut inventory = Inventory::new(&config(&[disk("x", None)], &[])).unwrap();
    assert!(matches!(inventory.set_link("x", false), Err(Refusal::NoNic { .. })));
    assert!(matches!(inventory.set_link("y", false), Err(Refusal::NotFound { .. })));
}

#[derive(Debug, Clone)]
enum Step {
    PlugDisk(u8, Option<u8>),
    PlugNic(u8, Option<u8>),
    Unplug(u8, bool),
    Opened(usize),
    Gone(usize),
    Kept(u8),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = prop::option::weighted(0.3, any::<u8>().prop_map(|slot| slot % (LAST_SLOT + 3)));
    let id = 0u8..40;
    let step = prop_oneof![
        4 => (id.clone(), slot.clone()).prop_map(|(id, slot)| Step::PlugDisk(id, slot)),
        2 => (id.clone(), slot).prop_map(|(id, slot)| Step::PlugNic(id, slot)),
        2 => (id, any::<bool>()).prop_map(|(id, force)| Step::Unplug(id, force)),
        4 => (0usize..64).prop_map(Step::Opened),
        2 => (0usize..64).prop_map(Step::Gone),
        1 => any::<u8>().prop_map(Step::Kept),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 0..120)
}

proptest! {
    /// Whatever comes and goes: each device has a slot and an id of its own, in range; there are never more than a guest can have;
    /// and a device that is there keeps its slot.
    #[test]
    fn the_inventory_is_always_one_that_a_guest_can_have(steps in steps()) {
        let mut inventory = Inventory::new(&config(&[disk("boot", None)], &[])).unwrap();
        let mut places: Vec<Place> = Vec::new();
        for step in steps {
            let before = inventory.status();
            match step {
                Step::PlugDisk(id, slot) => {
                    if let Ok(Plug::Open(place)) = inventory.plug(DeviceConfig::Disk(disk(&format!("d{id}"), slot))) {
                        prop_assert!(slot.is_none_or(|slot| slot == place.slot));
                        places.push(place);
                    }
                }
                Step::PlugNic(id, slot) => {
                    if let Ok(Plug::Open(place)) = inventory.plug(DeviceConfig::Nic(nic(&format!("n{id}"), id, slot))) {
                        places.push(place);
                    }
                }
                Step::Unplug(id, force) => drop(inventory.unplug(&format!("d{id}"), force, Instant::now())),
                Step::Opened(at) => if let Some(place) = places.get(at) {
                    inventory.opened(*place);
                },
                Step::Gone(at) => if let Some(place) = places.get(at) {
                    inventory.gone(*place);
                },
                Step::Kept(slot) => drop(inventory.kept(slot)),
                Step::Reset => drop(inventory.drop_leaving()),
            }
            let after = inventory.status();
            let slots: BTreeSet<u8> = after.iter().map(|device| device.slot).collect();
            let ids: BTreeSet<&str> = after.iter().map(|device| device.id.as_str()).collect();
            prop_assert_eq!((slots.len(), ids.len()), (after.len(), after.len()));
            prop_assert!(slots.iter().all(|slot| (FIRST_SLOT..=LAST_SLOT).contains(slot)));
            let disks = after.iter().filter(|device| device.kind == DeviceKind::Disk).count();
            prop_assert!(disks <= MAX_DISKS && after.len() - disks <= MAX_NICS && after.len() <= MAX_DISKS_AND_NICS);
            for device in &after {
                let moved = before.iter().any(|old| old.id == device.id && old.slot != device.slot);
                prop_assert!(!moved);
            }
        }
    }
}

#[test]
fn a_save_waits_for_what_comes_and_for_what_is_taken_away() {
    let mut inventory = Inventory::new(&config(&[disk("root", None), disk("old", None)], &[])).unwrap();
    let now = Instant::now();
    inventory.check_settled().unwrap();
    inventory.unplug("old", false, now).unwrap();
    inventory.check_settled().unwrap();
    let coming = place(inventory.plug(a_disk("data")));
    let refusal = inventory.check_settled().unwrap_err().fault();
    assert_eq!((refusal.code, refusal.message.contains("data is being plugged")), (ErrorCode::NotNow, true));
    // Not wanted any more, it does not come; whoever opens it hears of that in time.
    inventory.unplug("data", false, now).unwrap();
    inventory.check_settled().unwrap();
    assert!(!inventory.opened(coming));
    inventory.gone(coming);
    let coming = place(inventory.plug(a_disk("data")));
    assert!(inventory.opened(coming));
    inventory.check_settled().unwrap();
    inventory.unplug("old", true, now).unwrap();
    let refusal = inventory.check_settled().unwrap_err().fault();
    assert_eq!((refusal.code, refusal.message.contains("old is being taken away")), (ErrorCode::NotNow, true));
    inventory.drop_leaving();
    inventory.check_settled().unwrap();
}

#[test]
fn a_guest_of_release_class_lease_can_be_one_that_comes() {
    let mut leased = config(&[disk("root", None)], &[]);
    leased.release = vmm_control::ReleaseClass::Lease;
    let mut inventory = Inventory::new(&leased).unwrap();
    place(inventory.plug(a_disk("data")));
}

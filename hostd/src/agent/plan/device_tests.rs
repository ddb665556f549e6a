//! Devices that come and leave while a guest runs.

use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::state::DeviceWord;
use statemachine::state::Devices;
use statemachine::state::Disk;
use vmm_control::DeviceState;

use super::*;

/// A guest that runs here, has been told of `data`, and whose process has nothing yet.
fn with_data_coming() -> (Agent, VmId) {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    let plug = Devices { disks: vec![Disk::raw("data", "/srv/data")], nics: Vec::new() };
    change(&mut agent, vm, VmSpecChange { plug, ..VmSpecChange::default() });
    has(&mut agent, vm, &[]);
    (agent, vm)
}

fn change(agent: &mut Agent, vm: VmId, spec: VmSpecChange) {
    agent.site.root(Command::VmChange { vm, change: VmChange { spec, ..VmChange::default() } });
    agent.catch_up();
}

fn take_back(agent: &mut Agent, vm: VmId) {
    change(agent, vm, VmSpecChange { unplug: vec!["data".to_owned()], ..VmSpecChange::default() });
}

fn guest(agent: &mut Agent, vm: VmId) -> &mut Guest {
    agent.guests.get_mut(&vm).unwrap()
}

fn has(agent: &mut Agent, vm: VmId, devices: &[DeviceState]) {
    guest(agent, vm).see_devices(devices.iter().map(|state| ("data".to_owned(), *state)).collect());
}

#[derive(Debug, PartialEq)]
enum Step {
    Plug,
    Unplug,
    Say(DeviceWord),
}

/// What is planned about `data`, noted as begun.
fn steps(agent: &mut Agent) -> Vec<Step> {
    let now = agent.now;
    let mut steps = Vec::new();
    for action in agent.plan() {
        match action {
            Action::Plug { vm, device, .. } => {
                guest(agent, vm).begin_plug(device.id(), now);
                steps.push(Step::Plug);
            }
            Action::Unplug { vm, device, .. } => {
                guest(agent, vm).note_device(&device, now);
                steps.push(Step::Unplug);
            }
            Action::Report { news: News::Device(_, word), .. } => steps.push(Step::Say(word)),
            _ => {}
        }
    }
    steps
}

fn later(agent: &mut Agent, ms: u64) {
    agent.now = agent.now.plus_ms(ms);
}

#[test]
fn a_device_is_plugged_once_and_said_to_be_there_when_it_is() {
    let (mut agent, vm) = with_data_coming();
    assert_eq!(steps(&mut agent), [Step::Plug]);
    later(&mut agent, 60_000);
    assert_eq!(steps(&mut agent), [], "it is not answered");
    guest(&mut agent, vm).plug_answered("data", None);
    has(&mut agent, vm, &[]);
    assert_eq!(steps(&mut agent), [], "that may be from before");
    has(&mut agent, vm, &[DeviceState::Plugging]);
    assert_eq!(steps(&mut agent), []);
    has(&mut agent, vm, &[DeviceState::Present]);
    assert_eq!(steps(&mut agent), [Step::Say(DeviceWord::Plugged)]);
}

#[test]
fn a_device_that_cannot_be_had_is_tried_again_at_growing_distances() {
    let (mut agent, vm) = with_data_coming();
    let why = || "no such file".to_owned();
    let mut tried = Vec::new();
    for second in 0..40 {
        let planned = steps(&mut agent);
        if planned.contains(&Step::Plug) {
            tried.push(second);
            guest(&mut agent, vm).plug_answered("data", Some(why()));
            has(&mut agent, vm, &[]);
            has(&mut agent, vm, &[]);
            assert_eq!(steps(&mut agent), [Step::Say(DeviceWord::NotPlugged(why()))]);
        }
        later(&mut agent, 1_000);
    }
    assert_eq!(tried, [0, 2, 6, 14, 30]);
}

#[test]
fn a_device_is_asked_for_until_nothing_of_it_is_open() {
    let (mut agent, vm) = with_data_coming();
    take_back(&mut agent, vm);
    has(&mut agent, vm, &[DeviceState::Present]);
    assert_eq!(steps(&mut agent), [Step::Unplug]);
    has(&mut agent, vm, &[DeviceState::Unplugging]);
    later(&mut agent, 1_000);
    assert_eq!(steps(&mut agent), []);
    later(&mut agent, 1_000);
    assert_eq!(steps(&mut agent), [Step::Unplug]);
    guest(&mut agent, vm).device_words.insert("data".to_owned(), "in use".to_owned());
    assert_eq!(steps(&mut agent), [Step::Say(DeviceWord::Kept("in use".to_owned()))]);
    has(&mut agent, vm, &[]);
    let now = agent.now;
    guest(&mut agent, vm).begin_handing("data", now);
    assert_eq!(steps(&mut agent), [], "its files are being opened for the guest (S2)");
    guest(&mut agent, vm).handing.clear();
    assert_eq!(steps(&mut agent), [Step::Say(DeviceWord::Unplugged)]);
}

#[test]
fn a_disk_that_may_still_be_opened_is_not_said_to_be_free() {
    // S2: from the word on another guest may have it.
    let (mut agent, vm) = with_data_coming();
    assert_eq!(steps(&mut agent), [Step::Plug]);
    take_back(&mut agent, vm);
    has(&mut agent, vm, &[]);
    assert_eq!(steps(&mut agent), [], "the question is under way");
    guest(&mut agent, vm).plug_answered("data", None);
    assert_eq!(steps(&mut agent), [], "what it said before does not count");
    has(&mut agent, vm, &[]);
    assert_eq!(steps(&mut agent), [], "this may have been said before it was answered");
    has(&mut agent, vm, &[DeviceState::Present]);
    later(&mut agent, 2_000);
    assert_eq!(steps(&mut agent), [Step::Unplug]);

    guest(&mut agent, vm).devices = None;
    assert_eq!(steps(&mut agent), [], "a process that has said nothing may have anything");
}

#[test]
fn a_device_that_comes_back_begins_anew() {
    let (mut agent, vm) = with_data_coming();
    take_back(&mut agent, vm);
    has(&mut agent, vm, &[DeviceState::Present]);
    assert_eq!(steps(&mut agent), [Step::Unplug]);
    guest(&mut agent, vm).device_words.insert("data".to_owned(), "in use".to_owned());
    has(&mut agent, vm, &[DeviceState::Unplugging]);
    has(&mut agent, vm, &[]);
    let host = agent.host();
    let epoch = guest(&mut agent, vm).epoch;
    let report = agent.site.report_id(host, boot(2));
    let told = Command::ReportVmDevice { report, vm, epoch, device: "data".to_owned(), word: DeviceWord::Unplugged };
    agent.site.must(Actor::Host(host), told);
    let plug = Devices { disks: vec![Disk::raw("data", "/srv/data")], nics: Vec::new() };
    change(&mut agent, vm, VmSpecChange { plug, ..VmSpecChange::default() });
    assert_eq!(steps(&mut agent), [Step::Plug], "at once, and nothing is said of why the last one stayed");
}

#[test]
fn a_guest_on_its_way_or_about_to_end_is_left_as_it_is() {
    let (mut agent, vm) = with_data_coming();
    agent.site.status(vm, agent.host(), GuestStatus::Up);
    agent.site.root(Command::VmMigrate { vm, host: None });
    agent.catch_up();
    assert_eq!(steps(&mut agent), []);
    agent.site.root(Command::VmCancelMigration { vm });
    agent.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    agent.catch_up();
    assert_eq!(steps(&mut agent), []);
}

#[test]
fn memory_is_asked_for_once_and_again_of_a_process_that_did_not_hear() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    agent.site.root(Command::VmMemory { vm, mib: 64 });
    agent.catch_up();
    assert_eq!(agent.orders(), [], "it has that");
    let bigger = statemachine::state::VmSpec { memory_mib: 512, ..spec(ReleaseClass::Operator) };
    let big = agent.site.define("big", bigger);
    let epoch = agent.site.start(big, agent.host());
    let mut guest = Guest::launching(epoch, ReleaseClass::Operator);
    guest.phase = Phase::Alive { status: GuestStatus::Up, quiesced: false };
    agent.guests.insert(big, guest);
    agent.site.root(Command::VmMemory { vm: big, mib: 128 });
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::Memory { mib: 128 }]);
    assert_eq!(agent.orders(), []);
    agent.guests.get_mut(&big).unwrap().memory_told = None;
    assert_eq!(agent.orders(), [Order::Memory { mib: 128 }]);
}

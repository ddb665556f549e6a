//! States of a saved guest's devices: taken as a process takes them that waits for a guest, but for KVM's part, and worked with.
//!
//! Each function says whether the state was taken. What was taken is saved again as it is.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use pnet_base::MacAddr;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::json;
use uuid::Uuid;
use vm_memory::GuestAddress;
use vmm::agent_channel::AgentChannel;
use vmm::bus::PioDevice;
use vmm::console_hub::ConsoleHub;
use vmm::cpu::gate::RunGate;
use vmm::devices::balloon::state::SavedBalloon;
use vmm::devices::block::BlockConfig;
use vmm::devices::block::BlockMetrics;
use vmm::devices::block::BlockSize;
use vmm::devices::block::config::Geometry;
use vmm::devices::block::config::MAX_SEGMENTS;
use vmm::devices::block::config::QUEUE_SIZE;
use vmm::devices::block::engine::Engine;
use vmm::devices::block::request::Request;
use vmm::devices::block::state::SavedBlock;
use vmm::devices::console::Console;
use vmm::devices::legacy::PowerControl;
use vmm::devices::legacy::PowerRequest;
use vmm::devices::legacy::pm::PowerManagement;
use vmm::devices::legacy::pvpanic::PvPanic;
use vmm::devices::legacy::reset::ResetPort;
use vmm::devices::legacy::rtc::RealTimeClock;
use vmm::devices::legacy::serial::SerialPort;
use vmm::devices::legacy::vmgenid::VmGeneration;
use vmm::devices::net::NetConfig;
use vmm::devices::net::state::SavedNet;
use vmm::devices::watchdog::timer::SavedTimer;
use vmm::devices::watchdog::timer::Timer;
use vmm::incident::PanicSink;
use vmm::interrupt::fake::FakeLine;
use vmm::lease::quiesce::DiskGate;
use vmm::memory::GuestMemory;
use vmm::saved::payload::PayloadKind;
use vmm::saved::processor;
use vmm::saved::vcpu::SavedVcpu;
use vmm::saved::vm::SavedClock;
use vmm::saved::vm::SavedIrqchip;
use vmm::saved::vm::SavedPit;
use vmm::virtio::VirtioDevice;
use vmm::virtio::device::QueuePosition;
use vmm_control::DiskFormat;
use vmm_control::OnError;
use vmm_control::PanicKind;

use crate::disk::SharedScript;
use crate::disk::Storage;
use crate::disk::memory_file;
use crate::guest::Guest;
use crate::saved::here;

const DISK_BYTES: u64 = 64 << 10;
const MEMORY_PAGES: u64 = 64;
const PORTS: u16 = 128;

struct Nobody;

impl PowerControl for Nobody {
    fn request(&self, _request: PowerRequest) {}
}

impl PanicSink for Nobody {
    fn panicked(&self, _kind: PanicKind) {}
}

/// A state of the form that it should have. What can be read is written as it was read.
fn decoded<T: Serialize + DeserializeOwned + PartialEq + Debug>(state: &Value) -> Option<T> {
    let read: T = serde_json::from_value(state.clone()).ok()?;
    let written = serde_json::to_value(&read).expect("a state is JSON");
    assert_eq!(serde_json::from_value::<T>(written).ok().as_ref(), Some(&read), "a state survives being written");
    Some(read)
}

/// A guest that looks at every port of a device, and writes back what it finds.
fn use_ports(device: &mut dyn PioDevice) {
    for port in 0..16 {
        let mut byte = [0];
        device.read(port, &mut byte);
        device.write(port, &byte);
        device.read(port, &mut [0; 4]);
    }
}

/// A state that is not on the PCI bus.
pub fn payload(kind: PayloadKind, state: &Value) -> bool {
    match kind {
        PayloadKind::Vcpu => decoded::<SavedVcpu>(state).is_some_and(|vcpu| {
            let cpuid = vcpu.cpuid(0);
            let leaves = serde_json::from_value(state["cpuid"].clone()).expect("they were read before");
            // Too many leaves are refused by both.
            processor::check(&leaves, &here().cpuid).is_ok() && cpuid.is_ok()
        }),
        PayloadKind::Irqchip => decoded::<SavedIrqchip>(state).is_some(),
        PayloadKind::Pit => decoded::<SavedPit>(state).is_some(),
        PayloadKind::Clock => decoded::<SavedClock>(state).is_some(),
        PayloadKind::PowerManagement => power_management(state),
        PayloadKind::RealTimeClock => real_time_clock(state),
        PayloadKind::Serial => serial(state),
        PayloadKind::ResetPort => decoded(state).is_some_and(|saved| {
            let mut port = ResetPort::new(Arc::new(Nobody));
            port.restore(saved);
            let saved = port.save();
            port.restore(saved);
            assert_eq!(port.save(), saved);
            true
        }),
        PayloadKind::PanicPort => decoded(state).is_some_and(|saved| {
            let mut port = PvPanic::new(Arc::new(Nobody));
            let taken = port.restore(&saved).is_ok();
            assert!(!taken || port.save() == saved);
            use_ports(&mut port);
            taken
        }),
        PayloadKind::Generation => decoded(state).is_some_and(|saved| {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("a small memory");
            let pm = PowerManagement::new(Arc::new(FakeLine::default()), Arc::new(Nobody));
            let generation = VmGeneration::new(memory, Arc::new(Mutex::new(pm)), Uuid::from_u128(7));
            generation.restore(saved).is_ok()
        }),
        PayloadKind::Pci => state.is_object(),
    }
}

fn power_management(state: &Value) -> bool {
    let Some(saved) = decoded(state) else { return false };
    let mut pm = PowerManagement::new(Arc::new(FakeLine::default()), Arc::new(Nobody));
    pm.restore(saved);
    pm.press_power_button();
    let saved = pm.save();
    let mut again = PowerManagement::new(Arc::new(FakeLine::default()), Arc::new(Nobody));
    again.restore(saved.clone());
    let without_time = |saved| {
        let mut value = serde_json::to_value(saved).expect("a state is JSON");
        value["timer_ns"] = json!(0);
        value
    };
    assert_eq!(without_time(again.save()), without_time(saved));
    for port in 0..PORTS {
        pm.read(port, &mut [0; 4]);
        pm.write(port, &[0xff]);
    }
    true
}

fn real_time_clock(state: &Value) -> bool {
    let Some(saved) = decoded(state) else { return false };
    let mut clock = RealTimeClock::default();
    if clock.restore(saved).is_err() {
        return false;
    }
    let saved = clock.save();
    let mut again = RealTimeClock::default();
    again.restore(saved.clone()).expect("what was saved is taken back");
    assert_eq!(again.save(), saved);
    for index in 0..=255 {
        clock.write(0, &[index]);
        let mut byte = [0];
        clock.read(1, &mut byte);
        clock.write(1, &byte);
        clock.write(1, &[index]);
    }
    true
}

fn serial(state: &Value) -> bool {
    let Some(saved) = decoded(state) else { return false };
    let hub = ConsoleHub::new();
    let device = Arc::new(hub.device().expect("an event descriptor"));
    let mut port = SerialPort::new(Arc::new(FakeLine::default()), device);
    if port.restore(saved).is_err() {
        return false;
    }
    let saved = port.save();
    port.restore(saved.clone()).expect("what was saved is taken back");
    assert_eq!(port.save(), saved);
    use_ports(&mut port);
    port.take_input();
    true
}

fn geometry() -> (BlockConfig, Geometry) {
    let config = BlockConfig {
        name: "vda".into(),
        path: "/disk".into(),
        read_only: false,
        serial: "disk-0001".into(),
        block_size: BlockSize::B512,
        format: DiskFormat::Raw,
        backing: Vec::new(),
        on_error: OnError::Report,
        rate_limit: None,
    };
    let geometry = Geometry::new(&config, DISK_BYTES);
    (config, geometry)
}

/// A disk with a request of each kind.
pub fn disk() -> Value {
    let mut state = serde_json::to_value(SavedBlock::of(&geometry().1, &[])).expect("a state is JSON");
    let request = |head: u16, operation: Value, data: Value| json!({"head": head, "operation": operation, "data": data, "status": [[0x1_0000 + u64::from(head), 1]]});
    state["pending"] = json!([
        request(0, json!({"read": {"offset": 512}}), json!([[0x1_1000, 512], [0x2_0000, 1024]])),
        request(1, json!({"write": {"offset": 0}}), json!([[0x1_2000, 4096]])),
        request(2, json!("flush"), json!([])),
        request(3, json!({"discard": {"offset": 4096, "len": 4096}}), json!([])),
        request(4, json!({"zero": {"offset": 8192, "len": 512, "unmap": true}}), json!([])),
    ]);
    state
}

pub fn take_disk(state: &Value) -> bool {
    let Some(saved) = decoded::<SavedBlock>(state) else { return false };
    let (config, geometry) = geometry();
    if saved.check(&geometry).is_err() {
        return false;
    }
    let guest = Guest::new(&[QUEUE_SIZE], false);
    let requests = saved.clone().requests();
    let fits = |request: &Request| request.head < QUEUE_SIZE && request.fits(&geometry, &guest.memory);
    if requests.len() > usize::from(QUEUE_SIZE) || !requests.iter().all(fits) {
        return false;
    }
    let mut engine = Engine::new(&config, geometry.clone(), DiskGate::new(), Arc::new(BlockMetrics::default()));
    // The ring is empty: what the driver waits for was taken from it before.
    let at = QueuePosition { next_avail: 0, next_used: 0u16.wrapping_sub(requests.len() as u16) };
    engine.activate(guest.device_queue(0, at, MAX_SEGMENTS as usize + 2), false);
    let count = requests.len();
    engine.adopt(requests);
    let standing = engine.standing().expect("storage has nothing");
    // Empty buffers are left out, and mean nothing.
    assert_eq!(SavedBlock::of(&geometry, &standing.pending).requests(), saved.requests());
    let storage = Storage::new(Arc::new(memory_file(DISK_BYTES)), DISK_BYTES, SharedScript::default());
    engine.open(Box::new(storage), None);
    for _ in 0..3 {
        engine.serve(Duration::ZERO).expect("the ring is empty");
        engine.reap().expect("the requests were checked");
    }
    let standing = engine.standing().expect("storage has done all");
    assert!(standing.pending.is_empty());
    assert_eq!(standing.position, Some(QueuePosition::default()), "{count} requests are answered");
    true
}

fn card() -> NetConfig {
    NetConfig { name: "lan".into(), mac: MacAddr::new(0x52, 0x54, 0, 1, 2, 3), mtu: 1500 }
}

pub fn nic() -> Value {
    serde_json::to_value(SavedNet::of(&card(), true)).expect("a state is JSON")
}

pub fn take_nic(state: &Value) -> bool {
    decoded::<SavedNet>(state).is_some_and(|saved| saved.check(&card()).is_ok())
}

fn open_console() -> Arc<Console> {
    let hub = ConsoleHub::new();
    let device = Arc::new(hub.device().expect("an event descriptor"));
    let channel = AgentChannel::new().expect("an event descriptor");
    Console::without_thread(device, channel, RunGate::new()).expect("an event descriptor")
}

pub fn console() -> Value {
    let mut state = open_console().save().expect("a state is JSON");
    state["ports"][0]["unread"] = json!([1, 2, 3]);
    state["ports"][1]["control"]["ready"] = json!(true);
    state
}

pub fn take_console(state: &Value) -> bool {
    let console = open_console();
    if console.restore(state.clone()).is_err() {
        return false;
    }
    let saved = console.save().expect("a state is JSON");
    let again = open_console();
    again.restore(saved.clone()).expect("what was saved is taken back");
    assert_eq!(again.save().expect("a state is JSON"), saved);
    again.wake_here();
    true
}

pub fn watchdog() -> Value {
    let mut timer = Timer::new(false);
    timer.write_lock(2, Duration::ZERO);
    serde_json::to_value(timer.save(Duration::from_millis(5))).expect("a state is JSON")
}

pub fn take_watchdog(state: &Value) -> bool {
    let Some(saved) = decoded::<SavedTimer>(state) else { return false };
    let now = Duration::from_secs(3);
    let Ok(mut timer) = Timer::restore(&saved, now) else { return false };
    assert_eq!(timer.save(now), saved, "a state that is taken is saved again");
    while let Some(end) = timer.next_end() {
        timer.advance(end);
        timer.advance(end + Duration::from_secs(1));
        if timer.timed_out() {
            break;
        }
    }
    true
}

pub fn balloon() -> Value {
    json!({"version": SavedBalloon::VERSION, "wanted_pages": 10, "given_pages": 5})
}

pub fn take_balloon(state: &Value) -> bool {
    decoded::<SavedBalloon>(state).is_some_and(|saved| saved.check(MEMORY_PAGES).is_ok())
}

//! Devices that come and go, with storage and guests that take their time. No KVM: the guest's driver of the slots is the test.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_control::{DeviceState, DeviceStatus, DiskConfig, DiskFault, ErrorCode, Notice};

use super::build::Beginning;
use super::device_manager::{DeviceManager, OpenFiles};
use super::inventory_tests::{config, disk};
use super::open_device::{Connections, DiskOpener, Host};
use crate::cpu::gate::RunGate;
use crate::devices::block::disk::FileFacts;
use crate::devices::block::tests_of_hanging_disks::{Remote, hanging};
use crate::devices::block::{Block, BlockConfig, DiskFaults};
use crate::interrupt::fake::{FakeIoEvents, FakeMsi};
use crate::lease::quiesce::DiskGate;
use crate::lease::{self, Lease, Phase};
use crate::memory::GuestMemory;
use crate::pci::slot::bits::*;
use crate::pci::topology::{FIRST_SLOT_DEVICE, MAX_SLOTS, slot_address};
use crate::pci::{PciAddress, PciBus, PciMap, Topology};
use crate::saved::header::DeviceShape;
use crate::sys::boottime_ns;
use crate::virtio::locked;
use crate::virtio::testing::{Buffer, FakeDriver, PATIENCE, guest_memory};

const SECTOR: usize = 512;
const DISK_BYTES: u64 = 1 << 20;
/// Slot control of our ports: their first capability is at 0x40.
const CONTROL: u16 = 0x58;
const STATUS: u16 = 0x5a;

struct NoFaults;

impl DiskFaults for NoFaults {
    fn stopped(&self, fault: DiskFault) {
        panic!("no disk of these tests fails: {fault:?}");
    }
}

/// A host with storage, and the machines that run on it.
struct Bench {
    manager: Arc<DeviceManager>,
    notices: Receiver<Notice>,
    lease: Arc<Lease>,
    bus: Arc<PciBus>,
    msi: Arc<FakeMsi>,
    io_events: Arc<FakeIoEvents>,
    memory: GuestMemory,
    dir: TempDir,
}

struct Setting {
    disk_gate: Arc<DiskGate>,
    lease_ns: Option<u64>,
    disks: Option<DiskOpener>,
}

fn setting() -> Setting {
    Setting { disk_gate: DiskGate::new(), lease_ns: None, disks: None }
}

fn bench_with(boot: &[&str], setting: Setting) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let gate = RunGate::new();
    let Setting { disk_gate, lease_ns, disks } = setting;
    let lease = Lease::new(41, lease_ns, Arc::clone(&gate), Arc::clone(&disk_gate), Box::new(|_| {})).unwrap();
    if lease_ns.is_some() {
        lease::thread::start(Arc::clone(&lease)).unwrap();
    }
    let (told, notices) = channel();
    let told: Mutex<Sender<Notice>> = Mutex::new(told);
    let host = Host {
        gate,
        lease: Arc::clone(&lease),
        disks: disks.unwrap_or_else(|| Host::disk_opener(disk_gate, Arc::new(NoFaults))),
        opens_paths: true,
        notify: Arc::new(move |notice| drop(locked(&told).send(notice))),
    };
    let boot: Vec<_> = boot.iter().map(|id| image(dir.path(), id)).collect();
    let manager = DeviceManager::new(&config(&boot, &[]), Vec::new(), OpenFiles::new(), host).unwrap();
    let memory = guest_memory();
    let (msi, io_events) = (FakeMsi::new(), FakeIoEvents::new());
    let bus = build(&manager, &memory, &msi, &io_events);
    Bench { manager, notices, lease, bus, msi, io_events, memory, dir }
}

fn bench(boot: &[&str]) -> Bench {
    bench_with(boot, setting())
}

fn connections(memory: &GuestMemory, msi: &Arc<FakeMsi>, io_events: &Arc<FakeIoEvents>) -> Connections {
    Connections { memory: memory.clone(), msi: msi.clone(), io_events: io_events.clone() }
}

/// What a machine is, for this purpose.
fn build(
    manager: &Arc<DeviceManager>,
    memory: &GuestMemory,
    msi: &Arc<FakeMsi>,
    io_events: &Arc<FakeIoEvents>,
) -> Arc<PciBus> {
    let map = PciMap {
        ecam_base: 0xb000_0000,
        ecam_buses: 64,
        mmio32: 0xc000_0000..0xfc00_0000,
        mmio64: 0x40_0000_0000..0x50_0000_0000,
    };
    let connections = connections(memory, msi, io_events);
    let mut topology = Topology::new(map, msi.clone()).unwrap();
    topology.tell(manager.slot_events());
    topology.add_root_port(0).unwrap();
    for (slot, device) in manager.open_all(Beginning::Boot).unwrap() {
        topology.add_root_port_device(slot, connections.connect(device).unwrap()).unwrap();
    }
    topology.add_empty_root_ports().unwrap();
    let bus = topology.build();
    bus.program().unwrap();
    manager.attach(Arc::clone(&bus), connections);
    bus
}

/// An image of a megabyte that begins with its name.
fn image(dir: &Path, id: &str) -> DiskConfig {
    let path = dir.join(id);
    let mut bytes = vec![0; DISK_BYTES as usize];
    bytes[..id.len()].copy_from_slice(id.as_bytes());
    std::fs::write(&path, bytes).unwrap();
    DiskConfig { path, ..disk(id, None) }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "no end of waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether this process has the file open. Each test is a process of its own.
fn is_open(path: &Path) -> bool {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .any(|fd| std::fs::read_link(fd.unwrap().path()).is_ok_and(|to| to == path))
}

impl Bench {
    fn image(&self, id: &str) -> DiskConfig {
        image(self.dir.path(), id)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.path().join(id)
    }

    fn next_notice(&self) -> Notice {
        self.notices.recv_timeout(PATIENCE).expect("a notice")
    }

    fn plug(&self, disk: DiskConfig) -> DeviceStatus {
        let id = disk.id.clone();
        let status = self.manager.plug_disk(disk, Vec::new()).unwrap();
        let plugged = Notice::Plugged { id, slot: status.slot, address: status.address.clone() };
        assert_eq!(self.next_notice(), plugged);
        status
    }

    fn state(&self, id: &str) -> Option<DeviceState> {
        self.manager.status().into_iter().find(|device| device.id == id).map(|device| device.state)
    }

    // -- the guest

    fn register(&self, slot: u8, register: u16) -> u16 {
        let mut data = [0; 2];
        self.bus.config_read(PciAddress::on_root_bus(FIRST_SLOT_DEVICE + slot), register, &mut data);
        u16::from_le_bytes(data)
    }

    fn set_register(&self, slot: u8, register: u16, value: u16) {
        self.bus.config_write(PciAddress::on_root_bus(FIRST_SLOT_DEVICE + slot), register, &value.to_le_bytes());
    }

    fn is_present(&self, slot: u8) -> bool {
        self.register(slot, STATUS) & PRESENT != 0
    }

    /// What a guest does with a new device.
    fn power_on(&self, slot: u8) {
        self.set_register(slot, STATUS, STATUS_CLEARABLE);
        self.set_register(slot, CONTROL, ATTENTION_OFF | INDICATOR_ON);
    }

    /// Until the guest is asked for the device of a slot, and takes note.
    fn hear_button(&self, slot: u8) {
        wait_until("the button", || self.register(slot, STATUS) & BUTTON_PRESSED != 0);
        self.set_register(slot, STATUS, STATUS_CLEARABLE);
        self.set_register(slot, CONTROL, ATTENTION_OFF | INDICATOR_BLINK);
    }

    fn power_off(&self, slot: u8) {
        self.set_register(slot, CONTROL, ATTENTION_OFF | INDICATOR_BLINK | POWERED_OFF);
        self.set_register(slot, CONTROL, ATTENTION_OFF | INDICATOR_OFF | POWERED_OFF);
    }

    fn vendor(&self, slot: u8) -> u16 {
        let mut data = [0; 2];
        self.bus.config_read(slot_address(slot).unwrap(), 0, &mut data);
        u16::from_le_bytes(data)
    }

    /// A driver for the disk in a slot, which was the last to be connected.
    fn driver(&self, slot: u8) -> FakeDriver {
        let ports: Vec<_> = self.bus.root_functions().filter_map(|(_, function)| function.bridge()).collect();
        let function = ports[usize::from(slot)].child().unwrap();
        let vectors = (0..).map_while(|nth| self.msi.function(nth)).last().unwrap();
        let mut driver = FakeDriver::of(function, self.memory.clone(), vectors, &[256]);
        driver.start();
        driver
    }

    /// The guest resets.
    fn reset(&mut self) {
        self.end_machine();
        (self.msi, self.io_events) = (FakeMsi::new(), FakeIoEvents::new());
        self.bus = build(&self.manager, &self.memory, &self.msi, &self.io_events);
    }

    fn end_machine(&self) {
        use crate::lease::quiesce::Quiesce;
        self.manager.detach();
        for disk in self.manager.disks() {
            disk.cancel_and_drain(Instant::now() + PATIENCE).unwrap();
        }
        self.manager.forget(true);
    }
}

fn ask(driver: &mut FakeDriver, kind: u32, buffer: Buffer) -> u64 {
    let header = [&kind.to_le_bytes()[..], &[0; 12]].concat();
    let header = driver.buffer(&header);
    let status = driver.buffer(&[0xff]);
    driver.submit(0, &[Buffer::Out(header, 16), buffer, Buffer::In(status, 1)]);
    status
}

#[test]
fn a_disk_is_plugged_and_read() {
    let bench = bench(&["root"]);
    let asked = bench.manager.plug_disk(bench.image("data"), Vec::new()).unwrap();
    assert_eq!((asked.slot, asked.address.as_str()), (2, "03:00.0"));
    assert_eq!(bench.next_notice(), Notice::Plugged { id: "data".into(), slot: 2, address: "03:00.0".into() });
    assert_eq!(bench.state("data"), Some(DeviceState::Present));
    assert!(bench.is_present(2) && bench.vendor(2) == 0xffff, "the guest has not powered it on");
    bench.power_on(2);
    assert_eq!(bench.vendor(2), 0x1af4);
    let mut driver = bench.driver(2);
    let at = driver.buffer(&[0; SECTOR]);
    let status = ask(&mut driver, VIRTIO_BLK_T_IN, Buffer::In(at, SECTOR as u32));
    driver.used(0);
    assert_eq!((driver.bytes(status, 1), driver.bytes(at, 4)), (vec![0], b"data".to_vec()));
    let names: Vec<_> = bench.manager.disks().iter().map(|disk| disk.name().to_owned()).collect();
    assert_eq!(names, ["root", "data"]);

    // The same again is answered the same, and done once.
    let again = bench.manager.plug_disk(bench.image("data"), Vec::new()).unwrap();
    assert_eq!((again.slot, again.state), (2, DeviceState::Present));
    assert!(bench.notices.try_recv().is_err());
}

#[test]
fn a_disk_that_does_not_open_is_as_if_it_had_not_been_asked_for() {
    let bench = bench(&[]);
    let missing = DiskConfig { path: bench.path("missing"), ..disk("data", None) };
    bench.manager.plug_disk(missing, Vec::new()).unwrap();
    match bench.next_notice() {
        Notice::PlugFailed { id, message } => assert!(id == "data" && message.contains("/missing"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(bench.manager.status().is_empty() && !bench.is_present(1));
    bench.plug(bench.image("data"));
}

#[test]
fn a_disk_goes_when_the_guest_lets_it_go() {
    let bench = bench(&["root"]);
    let status = bench.plug(bench.image("data"));
    bench.power_on(2);
    bench.driver(2);
    let doorbells = bench.io_events.doorbells().len();
    let vectors = (0..).map_while(|nth| bench.msi.function(nth)).last().unwrap();
    let asked = bench.manager.unplug("data", false).unwrap();
    assert_eq!((asked.slot, asked.state), (status.slot, DeviceState::Unplugging));
    bench.hear_button(2);
    assert!(is_open(&bench.path("data")) && bench.vendor(2) == 0x1af4, "the guest still uses it");
    bench.power_off(2);
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "data".into() });
    assert!(!is_open(&bench.path("data")) && !bench.is_present(2));
    assert_eq!((bench.state("data"), bench.manager.disks().len()), (None, 1));
    assert!(bench.io_events.doorbells().len() <= doorbells);
    assert_eq!(Arc::strong_count(&vectors), 2, "only the fake and the test know the vectors");
    let gone = bench.manager.unplug("data", false).unwrap_err().fault();
    assert_eq!(gone.code, ErrorCode::NotFound);

    // The slot is free, and so is the id.
    assert_eq!(bench.plug(bench.image("data")).slot, 2);
}

#[test]
fn a_guest_may_keep_its_disk_and_may_lose_it() {
    let bench = bench(&["root"]);
    bench.manager.unplug("root", false).unwrap();
    bench.hear_button(1);
    bench.set_register(1, CONTROL, ATTENTION_OFF | INDICATOR_ON);
    assert_eq!(bench.next_notice(), Notice::Kept { id: "root".into() });
    assert_eq!(bench.state("root"), Some(DeviceState::Present));

    // A guest that says nothing: asked, asked again, and then not asked any more.
    bench.manager.unplug("root", false).unwrap();
    bench.manager.unplug("root", false).unwrap();
    assert_eq!(bench.state("root"), Some(DeviceState::Unplugging));
    bench.manager.unplug("root", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "root".into() });
    assert!(!bench.is_present(1) && !is_open(&bench.path("root")));
}

#[test]
fn storage_that_hangs_while_it_is_opened_holds_up_nobody() {
    let (open, may_open) = channel::<()>();
    let may_open = Mutex::new(may_open);
    let usual = Host::disk_opener(DiskGate::new(), Arc::new(NoFaults));
    let disks: DiskOpener = Box::new(move |disk, files, beginning| {
        if disk.id.starts_with("slow") {
            let _ = locked(&may_open).recv();
        }
        usual(disk, files, beginning)
    });
    let bench = bench_with(&["root"], Setting { disks: Some(disks), ..setting() });
    let slow = bench.manager.plug_disk(bench.image("slow"), Vec::new()).unwrap();
    assert_eq!((slow.slot, slow.state), (2, DeviceState::Plugging));
    assert_eq!(bench.manager.plug_disk(bench.image("slow"), Vec::new()).unwrap(), slow, "answered the same");
    // Others come and go meanwhile.
    assert_eq!(bench.plug(bench.image("quick")).slot, 3);
    bench.manager.unplug("quick", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "quick".into() });
    assert!(!bench.is_present(2));
    open.send(()).unwrap();
    assert!(matches!(bench.next_notice(), Notice::Plugged { id, slot: 2, .. } if id == "slow"));

    // One that nobody wants any more when it is there at last.
    bench.manager.plug_disk(bench.image("slow-too"), Vec::new()).unwrap();
    let status = bench.manager.unplug("slow-too", false).unwrap();
    assert_eq!((status.slot, bench.state("slow-too")), (3, Some(DeviceState::Unplugging)));
    assert!(bench.notices.try_recv().is_err(), "its opening may still succeed");
    open.send(()).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "slow-too".into() });
    assert!(!bench.is_present(3) && !is_open(&bench.path("slow-too")) && bench.state("slow-too").is_none());
}

/// A host whose disk `data` ends its requests when the test says so.
fn hanging_data() -> (DiskOpener, Remote) {
    let (backend, remote) = hanging();
    let backend = Mutex::new(Some(backend));
    let usual = Host::disk_opener(DiskGate::new(), Arc::new(NoFaults));
    let disks: DiskOpener = Box::new(move |disk, files, beginning| {
        let Some(backend) = locked(&backend).take_if(|_| disk.id == "data") else {
            return usual(disk, files, beginning);
        };
        let facts = FileFacts { bytes: DISK_BYTES, is_device: false };
        let (device, handle) =
            Block::on_backend(BlockConfig::from(disk), facts, DiskGate::new(), backend, Arc::new(NoFaults));
        Ok((device, handle))
    });
    (disks, remote)
}

#[test]
fn a_disk_that_hangs_is_gone_when_its_last_request_has_ended() {
    let (disks, remote) = hanging_data();
    let bench = bench_with(&[], Setting { disks: Some(disks), ..setting() });
    bench.plug(bench.image("data"));
    bench.power_on(1);
    let mut driver = bench.driver(1);
    let at = driver.buffer(&[7; SECTOR]);
    ask(&mut driver, VIRTIO_BLK_T_OUT, Buffer::Out(at, SECTOR as u32));
    remote.wait_held(1);
    drop(driver);
    bench.manager.unplug("data", false).unwrap();
    bench.hear_button(1);
    bench.power_off(1);
    assert!(!bench.is_present(1), "the guest is rid of it");
    // Another one comes into another slot and goes, while the first one still writes.
    assert_eq!(bench.plug(bench.image("other")).slot, 2);
    bench.manager.unplug("other", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "other".into() });
    assert_eq!(bench.state("data"), Some(DeviceState::Unplugging));
    let again = bench.manager.plug_disk(bench.image("data"), Vec::new()).unwrap_err().fault();
    assert_eq!(again.code, ErrorCode::NotNow);

    remote.finish();
    remote.wait_flush();
    assert!(bench.notices.try_recv().is_err(), "what it wrote is not on the disk yet");
    remote.finish();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "data".into() });
    assert_eq!(bench.state("data"), None);
}

#[test]
fn a_reset_builds_the_guest_as_it_is_now() {
    let mut bench = bench(&["root", "old", "busy"]);
    bench.plug(bench.image("new"));
    bench.manager.unplug("old", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "old".into() });
    // This one the guest was asked for, and has not answered.
    bench.manager.unplug("busy", false).unwrap();
    bench.reset();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "busy".into() });
    let devices: Vec<_> = bench.manager.status().into_iter().map(|device| (device.id, device.slot)).collect();
    assert_eq!(devices, [("root".to_owned(), 1), ("new".to_owned(), 4)]);
    assert!(bench.is_present(1) && bench.is_present(4) && !bench.is_present(2) && !bench.is_present(3));
    assert_eq!((bench.vendor(1), bench.vendor(4)), (0x1af4, 0x1af4), "with power, as any device at the start");
    assert!(!is_open(&bench.path("old")) && !is_open(&bench.path("busy")));
    assert_eq!(bench.manager.disks().len(), 2);
    // The new machine is served as the old one was.
    bench.manager.unplug("new", false).unwrap();
    bench.hear_button(4);
    bench.power_off(4);
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "new".into() });
}

#[test]
fn an_unplug_that_comes_while_a_machine_is_built_is_carried_out_by_it() {
    let mut bench = bench(&["root", "data"]);
    bench.end_machine();
    bench.manager.unplug("root", true).unwrap();
    bench.manager.unplug("data", false).unwrap();
    assert!(bench.notices.recv_timeout(Duration::from_millis(20)).is_err(), "there is no machine to take it from");
    (bench.msi, bench.io_events) = (FakeMsi::new(), FakeIoEvents::new());
    bench.bus = build(&bench.manager, &bench.memory, &bench.msi, &bench.io_events);
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "root".into() });
    bench.hear_button(2);
    bench.power_off(2);
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "data".into() });
}

#[test]
fn a_disk_that_opens_while_the_guest_resets_comes_into_the_next_machine() {
    let (open, may_open) = channel::<()>();
    let may_open = Mutex::new(may_open);
    let usual = Host::disk_opener(DiskGate::new(), Arc::new(NoFaults));
    let disks: DiskOpener = Box::new(move |disk, files, beginning| {
        let _ = locked(&may_open).recv();
        usual(disk, files, beginning)
    });
    let mut bench = bench_with(&[], Setting { disks: Some(disks), ..setting() });
    bench.manager.plug_disk(bench.image("data"), Vec::new()).unwrap();
    bench.end_machine();
    open.send(()).unwrap();
    wait_until("the disk to be open", || is_open(&bench.path("data")));
    assert!(bench.notices.try_recv().is_err(), "there is no machine to put it into");
    (bench.msi, bench.io_events) = (FakeMsi::new(), FakeIoEvents::new());
    bench.bus = build(&bench.manager, &bench.memory, &bench.msi, &bench.io_events);
    assert!(matches!(bench.next_notice(), Notice::Plugged { slot: 1, .. }));
    assert!(bench.is_present(1));
}

#[test]
fn an_old_machine_has_no_say_any_more() {
    let mut bench = bench(&["root"]);
    let old = Arc::clone(&bench.bus);
    bench.reset();
    old.ask_removal(1).unwrap();
    let port = PciAddress::on_root_bus(FIRST_SLOT_DEVICE + 1);
    old.config_write(port, CONTROL, &(ATTENTION_OFF | INDICATOR_OFF | POWERED_OFF).to_le_bytes());
    // Whatever it says comes before this.
    bench.plug(bench.image("data"));
    bench.manager.unplug("data", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "data".into() });
    assert_eq!(bench.state("root"), Some(DeviceState::Present));
}

#[test]
fn a_guest_that_was_asked_before_it_moved_here_is_still_at_it() {
    let source = bench(&["root"]);
    source.manager.unplug("root", false).unwrap();
    source.hear_button(1);
    let saved = source.bus.save().unwrap();

    let mut target = bench(&["root"]);
    target.end_machine();
    let (memory, msi, io_events) = (guest_memory(), FakeMsi::new(), FakeIoEvents::new());
    let connections = connections(&memory, &msi, &io_events);
    let map = target.bus.map().clone();
    let mut topology = Topology::new(map, msi.clone()).unwrap();
    topology.tell(target.manager.slot_events());
    for (slot, device) in target.manager.open_all(Beginning::Boot).unwrap() {
        topology.add_root_port_device(slot, connections.connect(device).unwrap()).unwrap();
    }
    topology.add_empty_root_ports().unwrap();
    target.bus = topology.build();
    target.bus.restore(saved).unwrap();
    target.manager.attach(Arc::clone(&target.bus), connections);
    assert_eq!(target.state("root"), Some(DeviceState::Unplugging));
    target.power_off(1);
    assert_eq!(target.next_notice(), Notice::Unplugged { id: "root".into() });
}

#[test]
fn a_saved_guest_has_what_is_in_its_slots() {
    let (disks, remote) = hanging_data();
    let bench = bench_with(&["root"], Setting { disks: Some(disks), ..setting() });
    let slots = || bench.manager.shapes(&bench.bus).into_keys().collect::<Vec<_>>();
    assert_eq!(slots(), [1]);
    bench.plug(DiskConfig { serial: "s".into(), ..bench.image("data") });
    let DeviceShape::Disk(data) = bench.manager.shapes(&bench.bus).remove(&2).unwrap() else {
        panic!("it is a disk");
    };
    assert_eq!((data.bytes, data.serial.as_str(), data.read_only), (DISK_BYTES, "s", false));
    bench.power_on(2);
    let mut driver = bench.driver(2);
    let at = driver.buffer(&[7; SECTOR]);
    ask(&mut driver, VIRTIO_BLK_T_OUT, Buffer::Out(at, SECTOR as u32));
    remote.wait_held(1);
    drop(driver);
    bench.manager.unplug("data", false).unwrap();
    bench.hear_button(2);
    assert_eq!(slots(), [1, 2], "the guest still has it");
    bench.manager.check_settled().unwrap();
    bench.power_off(2);
    // The guest has given it up, and its storage does not answer.
    assert_eq!((slots(), bench.state("data")), (vec![1], Some(DeviceState::Unplugging)));
    remote.finish();
    remote.wait_flush();
    remote.finish();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "data".into() });
    assert_eq!(slots(), [1]);
}

#[test]
fn a_guest_is_asked_before_it_is_saved() {
    let bench = bench(&["root"]);
    {
        // As a save does, which begins right after.
        let _held = bench.manager.hold();
        bench.manager.unplug("root", false).unwrap();
        assert!(bench.bus.asked_for().is_empty(), "the one who asks waits");
        bench.manager.ask_for_leaving(&bench.bus).unwrap();
        assert_eq!(bench.bus.asked_for(), [1]);
        assert_ne!(bench.register(1, STATUS) & BUTTON_PRESSED, 0);
    }
    bench.hear_button(1);
    bench.power_off(1);
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "root".into() });
}

#[test]
fn a_disk_that_was_plugged_is_closed_when_the_lease_ends() {
    let disk_gate = DiskGate::new();
    let lease_ns = boottime_ns() + 2_000_000_000;
    let bench = bench_with(&[], Setting { disk_gate, lease_ns: Some(lease_ns), disks: None });
    let shared = DiskConfig { shared: true, ..bench.image("data") };
    let gone = DiskConfig { shared: true, ..bench.image("gone") };
    bench.plug(gone);
    bench.manager.unplug("gone", true).unwrap();
    assert_eq!(bench.next_notice(), Notice::Unplugged { id: "gone".into() });
    bench.plug(shared);
    assert!(is_open(&bench.path("data")));
    wait_until("the end of the lease", || bench.lease.phase() == Phase::Quiesced);
    assert!(!is_open(&bench.path("data")));
    let refused = bench.manager.plug_disk(bench.image("more"), Vec::new()).unwrap_err().fault();
    assert_eq!(refused.code, ErrorCode::NotNow);
    bench.lease.confirm(41, boottime_ns() + 10_000_000_000).unwrap();
    wait_until("the lease", || bench.lease.phase() == Phase::Valid);
    assert!(is_open(&bench.path("data")) && !is_open(&bench.path("gone")));
    bench.lease.end();
}

#[test]
fn every_slot_of_the_guest_can_be_filled_and_emptied() {
    let bench = bench(&[]);
    let most = vmm_control::config::MAX_DISKS;
    for i in 0..most {
        let status = bench.plug(bench.image(&format!("d{i}")));
        assert_eq!(usize::from(status.slot), i + 1);
    }
    assert!(most < usize::from(MAX_SLOTS));
    let full = bench.manager.plug_disk(bench.image("more"), Vec::new()).unwrap_err().fault();
    assert_eq!(full.code, ErrorCode::Taken, "{full}");
    for i in (0..most).rev() {
        bench.manager.unplug(&format!("d{i}"), true).unwrap();
        assert_eq!(bench.next_notice(), Notice::Unplugged { id: format!("d{i}") });
    }
    assert!(bench.manager.status().is_empty() && bench.io_events.doorbells().is_empty());
}

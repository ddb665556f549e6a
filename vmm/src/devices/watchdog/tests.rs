//! The watchdog under a driver that does what Linux's does, and under ones that do anything. No KVM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::timer::{RELOAD, TIMER_1, TIMER_2, Timer};
use super::{Watchdog, WatchdogHandle};
use crate::cpu::gate::{RunGate, Stop};
use crate::incident::WatchdogSink;
use crate::interrupt::fake::FakeMsi;
use crate::pci::topology::WATCHDOG_DEVICE;
use crate::pci::{PciAddress, PciBus, PciFunction, PciMap, Topology};
use crate::virtio::testing::PATIENCE;

const SECOND: Duration = Duration::from_secs(1);
const ON: u8 = 2;
const LOCKED: u8 = 1;
const FREE_RUNNING: u8 = 4;
const MEGAHERTZ: u16 = 4;
const OUTPUT_OFF: u16 = 32;

/// What Linux does, on the bare state machine.
struct Driver {
    timer: Timer,
    now: Duration,
}

impl Driver {
    fn new() -> Self {
        Self { timer: Timer::new(false), now: Duration::ZERO }
    }

    fn unlock(&mut self) {
        for key in [0x80u16, 0x86] {
            self.timer.write(RELOAD, &key.to_le_bytes(), self.now);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.unlock();
        self.timer.write(offset, data, self.now);
    }

    /// The driver's heartbeat: each timer has half of it, in units of about a millisecond.
    fn set_heartbeat(&mut self, seconds: u32) {
        for timer in [TIMER_1, TIMER_2] {
            self.write(timer, &(seconds << 9).to_le_bytes());
        }
        self.keep_alive();
    }

    fn keep_alive(&mut self) {
        self.write(RELOAD, &0x100u16.to_le_bytes());
    }

    fn start(seconds: u32) -> Self {
        let mut driver = Self::new();
        driver.timer.write_config(0x0003);
        driver.timer.write_lock(0, driver.now);
        driver.set_heartbeat(seconds);
        driver.keep_alive();
        driver.timer.write_lock(ON, driver.now);
        driver
    }

    /// Lets time pass, with somebody looking every now and then. How often it acted.
    fn wait(&mut self, time: Duration) -> u32 {
        let end = self.now + time;
        let mut fired = 0;
        while self.now < end {
            self.now = (self.now + Duration::from_millis(700)).min(end);
            fired += u32::from(self.timer.advance(self.now));
        }
        fired
    }

    fn timed_out(&mut self) -> bool {
        let mut status = [0; 2];
        self.timer.read(RELOAD, &mut status);
        status == 0x200u16.to_le_bytes()
    }
}

#[test]
fn a_heartbeat_of_thirty_seconds_is_about_that() {
    let mut driver = Driver::start(30);
    // 2 * 15360 * 2^15 / 33 MHz.
    let end = Duration::from_nanos(2 * 15_252_014_545);
    assert_eq!(driver.wait(end - Duration::from_millis(1)), 0);
    assert_eq!(driver.wait(Duration::from_millis(1)), 1);
    assert!(driver.timed_out());
    assert_eq!(driver.wait(1000 * SECOND), 0, "once for each hang");
    driver.keep_alive();
    assert_eq!(driver.wait(40 * SECOND), 1, "the guest came back, and hangs again");
}

#[test]
fn a_guest_that_feeds_it_is_left_alone() {
    let mut driver = Driver::start(30);
    for _ in 0..100 {
        assert_eq!(driver.wait(29 * SECOND), 0);
        driver.keep_alive();
    }
    assert!(!driver.timed_out());
    driver.timer.write_lock(0, driver.now);
    assert_eq!(driver.timer.lock() & ON, 0);
    assert_eq!(driver.wait(1000 * SECOND), 0, "stopped");
}

#[test]
fn locked_on_it_stays_on() {
    let mut driver = Driver::start(30);
    driver.timer.write_lock(ON | LOCKED, driver.now);
    driver.timer.write_lock(0, driver.now);
    assert_eq!(driver.timer.lock(), ON | LOCKED);
    assert_eq!(driver.wait(31 * SECOND), 1);
    driver.timer.reset();
    assert_eq!(driver.timer.lock(), 0);
}

#[test]
fn nothing_is_written_without_both_keys_and_one_write_closes_again() {
    let mut driver = Driver::start(30);
    let short = 1u32.to_le_bytes();
    driver.timer.write(TIMER_1, &short, driver.now);
    driver.timer.write(RELOAD, &0x86u16.to_le_bytes(), driver.now);
    driver.timer.write(TIMER_1, &short, driver.now);
    driver.timer.write(RELOAD, &0x80u16.to_le_bytes(), driver.now);
    driver.timer.write(TIMER_1, &short, driver.now);
    // A look in between closes, too.
    driver.unlock();
    assert!(!driver.timed_out());
    driver.timer.write(TIMER_1, &short, driver.now);
    // So does a write that counts.
    driver.write(TIMER_2, &(30u32 << 9).to_le_bytes());
    driver.timer.write(TIMER_1, &short, driver.now);
    let mut preload = [0; 4];
    driver.timer.read(TIMER_1, &mut preload);
    assert_eq!(u32::from_le_bytes(preload), 30 << 9);
}

#[test]
fn what_timed_out_is_told_after_the_restart_until_the_driver_clears_it() {
    let mut driver = Driver::start(1);
    assert_eq!(driver.wait(2 * SECOND), 1);
    driver.timer.reset();
    assert!(driver.timed_out());
    driver.write(RELOAD, &0x300u16.to_le_bytes());
    assert!(!driver.timed_out());
    assert!(Driver { timer: Timer::new(true), now: SECOND }.timed_out());
}

#[test]
fn an_output_that_is_off_does_nothing() {
    let mut driver = Driver::start(1);
    driver.timer.write_config(OUTPUT_OFF | 3);
    assert_eq!(driver.wait(10 * SECOND), 0);
    assert!(!driver.timed_out());
}

#[test]
fn free_running_has_one_stage_and_the_fast_clock_is_fast() {
    let mut driver = Driver::start(30);
    driver.timer.write_lock(0, driver.now);
    driver.timer.write_lock(ON | FREE_RUNNING, driver.now);
    assert_eq!(driver.wait(16 * SECOND), 1);
    driver.timer.write_config(MEGAHERTZ);
    driver.keep_alive();
    assert_eq!(driver.wait(Duration::from_millis(16)), 1);
}

#[test]
fn a_saved_timer_has_as_much_time_left_on_another_clock() {
    let mut driver = Driver::start(30);
    driver.wait(20 * SECOND);
    let saved = serde_json::to_value(driver.timer.save(driver.now)).unwrap();
    let saved = serde_json::from_value(saved).unwrap();
    let start = 5000 * SECOND;
    let mut moved = Driver { timer: Timer::restore(&saved, start).unwrap(), now: start };
    assert_eq!(moved.wait(10 * SECOND), 0);
    assert_eq!(moved.wait(SECOND), 1);
}

#[test]
fn a_saved_timer_that_cannot_be_is_refused() {
    let driver = Driver::start(30);
    let good = serde_json::to_value(driver.timer.save(driver.now)).unwrap();
    let restore = |field: &str, value: serde_json::Value| {
        let mut saved = good.clone();
        saved[field] = value;
        Timer::restore(&serde_json::from_value(saved).unwrap(), SECOND)
    };
    assert!(restore("timed_out", true.into()).is_ok());
    for (field, value) in [
        ("config", serde_json::json!(0x40)),
        ("lock", serde_json::json!(8)),
        ("lock", serde_json::json!(0)),
        ("preload", serde_json::json!([1 << 20, 1])),
        ("counting", serde_json::json!({"stage": "second", "left_ns": u64::MAX})),
    ] {
        assert!(restore(field, value.clone()).is_err(), "{field} = {value}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Config(u16),
    Lock(u8),
    Write(u64, Vec<u8>),
    Keys,
    Read(u64, usize),
    Pass(u64),
    Reset,
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u16>().prop_map(Step::Config),
        any::<u8>().prop_map(Step::Lock),
        (prop_oneof![Just(0u64), Just(4), Just(12), 0u64..17], prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::Write(offset, data)),
        Just(Step::Keys),
        (0u64..17, 0usize..9).prop_map(|(offset, len)| Step::Read(offset, len)),
        (0u64..2_000_000_000_000).prop_map(Step::Pass),
        Just(Step::Reset),
        Just(Step::Move),
    ]
}

proptest! {
    /// Whatever a driver does, and however often the guest is moved: the timer acts only while it is on and only once between two
    /// reloads, a lock holds until the reset, and what is saved goes on as it was.
    #[test]
    fn a_hostile_driver_gets_no_more_than_a_watchdog(steps in prop::collection::vec(step(), 0..80)) {
        let mut driver = Driver::new();
        let mut may_fire = false;
        for step in steps {
            let was = driver.timer.lock();
            let held = was & LOCKED != 0 && !matches!(step, Step::Reset);
            match step {
                Step::Config(value) => driver.timer.write_config(value),
                Step::Lock(value) => {
                    driver.timer.write_lock(value, driver.now);
                    may_fire |= was & ON == 0;
                }
                Step::Write(offset, data) => {
                    driver.timer.write(offset, &data, driver.now);
                    may_fire = true;
                }
                Step::Keys => driver.unlock(),
                Step::Read(offset, len) => driver.timer.read(offset, &mut vec![0; len]),
                Step::Pass(nanos) => {
                    driver.now += Duration::from_nanos(nanos);
                    if driver.timer.advance(driver.now) {
                        prop_assert!(driver.timer.lock() & ON != 0 && may_fire);
                        may_fire = false;
                    }
                    prop_assert!(!driver.timer.advance(driver.now), "twice at one time");
                }
                Step::Reset => driver.timer.reset(),
                Step::Move => {
                    let saved = driver.timer.save(driver.now);
                    let new = Timer::restore(&saved, driver.now).unwrap();
                    // A stage whose end nobody has looked at yet ends at once.
                    if driver.timer.next_end().is_none_or(|end| end >= driver.now) {
                        prop_assert_eq!(&new, &driver.timer);
                    }
                    driver.timer = new;
                }
            }
            if held {
                prop_assert_eq!(driver.timer.lock(), was);
            }
        }
    }
}

#[derive(Default)]
struct Fired(AtomicU32);

impl WatchdogSink for Fired {
    fn expired(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The function on a bus, as firmware leaves it, with its thread.
struct Machine {
    bus: Arc<PciBus>,
    gate: Arc<RunGate>,
    fired: Arc<Fired>,
    has_fired: Arc<AtomicBool>,
    handle: Arc<WatchdogHandle>,
    bar: u64,
}

const FUNCTION: PciAddress = PciAddress::on_root_bus(WATCHDOG_DEVICE);

impl Machine {
    fn new() -> Self {
        Self::after(Arc::default())
    }

    fn after(has_fired: Arc<AtomicBool>) -> Self {
        let (gate, fired) = (RunGate::new(), Arc::new(Fired::default()));
        let (function, handle) = Watchdog::open(gate.clone(), fired.clone(), has_fired.clone()).unwrap();
        let map = PciMap {
            ecam_base: 0xb000_0000,
            ecam_buses: 64,
            mmio32: 0xc000_0000..0xfc00_0000,
            mmio64: 0x40_0000_0000..0x50_0000_0000,
        };
        let mut topology = Topology::new(map, FakeMsi::new()).unwrap();
        topology.add_fixed(WATCHDOG_DEVICE, function).unwrap();
        let bus = topology.build();
        bus.program().unwrap();
        let mut bar = [0; 4];
        bus.config_read(FUNCTION, 0x10, &mut bar);
        Self { bus, gate, fired, has_fired, handle, bar: u64::from(u32::from_le_bytes(bar)) }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for key in [0x80u16, 0x86] {
            self.bus.mmio_write(self.bar + RELOAD, &key.to_le_bytes());
        }
        self.bus.mmio_write(self.bar + offset, data);
    }

    /// Both stages of so many microseconds, about.
    fn start(&self, micros: u32) {
        self.bus.config_write(FUNCTION, 0x60, &MEGAHERTZ.to_le_bytes());
        self.write(TIMER_1, &micros.to_le_bytes());
        self.write(TIMER_2, &micros.to_le_bytes());
        self.bus.config_write(FUNCTION, 0x68, &[ON]);
    }

    fn fired(&self) -> u32 {
        self.fired.0.load(Ordering::SeqCst)
    }

    fn until_fired(&self, count: u32) {
        let until = std::time::Instant::now() + PATIENCE;
        while self.fired() < count {
            assert!(std::time::Instant::now() < until, "the watchdog does not act");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_driver_finds_it_at_its_address() {
    let machine = Machine::new();
    let mut id = [0; 4];
    machine.bus.config_read(FUNCTION, 0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x25ab_8086);
    assert_eq!(machine.bar, 0xc000_0000 + 24 * (2 << 20), "an address that guests know");
    machine.bus.config_write(FUNCTION, 0x60, &[0xff; 2]);
    machine.bus.config_write(FUNCTION, 0x68, &[0xff; 2]);
    let mut registers = [0; 12];
    machine.bus.config_read(FUNCTION, 0x60, &mut registers);
    assert_eq!((registers[0], registers[1], registers[8], registers[9]), (0x27, 0, 7, 0));
    machine.bus.config_write(FUNCTION, 0x68, &[0]);
    machine.bus.config_read(FUNCTION, 0x60, &mut registers);
    assert_eq!(registers[8], 7, "locked");
}

#[test]
fn the_thread_acts_and_the_next_machine_knows() {
    let machine = Machine::new();
    machine.start(500);
    machine.until_fired(1);
    assert!(machine.has_fired.load(Ordering::SeqCst));
    machine.handle.stop();

    let next = Machine::after(machine.has_fired.clone());
    let mut status = [0; 2];
    next.bus.mmio_read(next.bar + RELOAD, &mut status);
    assert_eq!(status, 0x200u16.to_le_bytes());
    next.write(RELOAD, &0x200u16.to_le_bytes());
    assert!(!next.has_fired.load(Ordering::SeqCst));
    // And starts anew.
    next.start(500);
    next.until_fired(1);
    next.write(RELOAD, &0x100u16.to_le_bytes());
    next.until_fired(2);
}

#[test]
fn it_does_not_run_while_the_guest_stands_for_whatever_reason() {
    let machine = Machine::new();
    // Two stages of 100 ms.
    machine.start(100_000);
    for reason in [Stop::Requested, Stop::Lease, Stop::IoError, Stop::Incident] {
        machine.gate.shut(reason);
        let stood = machine.gate.ran_for();
        // Longer than both stages together, were they to run.
        std::thread::sleep(Duration::from_millis(250));
        assert_eq!((machine.fired(), machine.gate.ran_for()), (0, stood), "{reason:?}");
        machine.gate.open(reason);
    }
    machine.until_fired(1);
    assert!(machine.gate.ran_for() >= Duration::from_millis(193), "{:?}", machine.gate.ran_for());
}

#[test]
fn a_watchdog_that_was_stopped_acts_no_more() {
    let machine = Machine::new();
    machine.start(20_000);
    machine.handle.stop();
    machine.handle.stop();
    let until = machine.gate.ran_for() + Duration::from_millis(60);
    while machine.gate.ran_for() < until {
        std::thread::yield_now();
    }
    machine.bus.mmio_read(machine.bar, &mut [0; 4]);
    assert_eq!(machine.fired(), 0);
}

#[test]
fn a_saved_function_goes_on() {
    let old = Machine::new();
    old.start(1_000_000);
    old.gate.shut(Stop::Requested);
    let saved = old.bus.save().unwrap();
    let new = Machine::new();
    new.gate.shut(Stop::Requested);
    new.bus.restore(saved.clone()).unwrap();
    let mut lock = [0];
    new.bus.config_read(FUNCTION, 0x68, &mut lock);
    assert_eq!(lock, [ON]);
    assert_eq!(new.bus.save().unwrap(), saved);
    new.gate.open(Stop::Requested);
    new.until_fired(1);
    assert!(new.gate.ran_for() >= Duration::from_millis(1800));

    let (function, _handle) = Watchdog::open(RunGate::new(), old.fired.clone(), Arc::default()).unwrap();
    let mut state = saved["00:1b.0"].clone();
    state["version"] = 9.into();
    assert!(matches!(function.restore(state.clone()), Err(crate::pci::PciError::Version { found: 9, .. })));
    state["version"] = 1.into();
    state["timer"]["preload"] = serde_json::json!([u32::MAX, 0]);
    assert!(matches!(function.restore(state), Err(crate::pci::PciError::Device(_))));
}

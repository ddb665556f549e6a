//! The console under a driver without MULTIPORT: both directions, bounds, and a driver that breaks the rules.

use std::sync::Arc;
use std::time::Instant;

use super::Console;
use super::config::{MULTIPORT, RECEIVE, TRANSMIT};
use crate::agent_channel::AgentChannel;
use crate::console_hub::{ClientRead, ConsoleClient, ConsoleHub};
use crate::cpu::gate::{RunGate, Stop};
use crate::pci::PciFunction;
use crate::virtio::testing::{Buffer, Descriptor, FakeDriver, NEXT, PATIENCE, attach};

const TX: usize = TRANSMIT as usize;
const RX: usize = RECEIVE as usize;

struct Guest {
    driver: FakeDriver,
    console: Arc<Console>,
    hub: Arc<ConsoleHub>,
    client: ConsoleClient,
}

fn open(hub: &ConsoleHub) -> Arc<Console> {
    open_at(hub, RunGate::new())
}

fn open_at(hub: &ConsoleHub, gate: Arc<RunGate>) -> Arc<Console> {
    Console::open(Arc::new(hub.device().unwrap()), AgentChannel::new().unwrap(), gate).unwrap()
}

#[test]
fn a_guest_that_stands_still_is_told_nothing() {
    let hub = ConsoleHub::new();
    let gate = RunGate::new();
    let console = open_at(&hub, gate.clone());
    let client = hub.attach().unwrap();
    let driver = attach(console.clone());
    let mut guest = Guest { driver, console, hub, client };
    guest.driver.start_with(!MULTIPORT);
    gate.shut(Stop::Saved);
    guest.offer_input(64);
    guest.client.send_input(b"typed");
    assert!(gate.wait_parked(Instant::now() + PATIENCE));
    guest.console.wake_here();
    assert_eq!(guest.driver.try_used(RX), None);
    gate.open(Stop::Saved);
    assert_eq!(guest.driver.used(RX).1, 5, "the bell of the gate wakes the thread");
}

fn guest() -> Guest {
    let hub = ConsoleHub::new();
    let console = open(&hub);
    let client = hub.attach().unwrap();
    let mut driver = attach(console.clone());
    driver.start_with(!MULTIPORT);
    Guest { driver, console, hub, client }
}

impl Guest {
    fn print(&mut self, text: &[u8]) {
        let at = self.driver.buffer(text);
        let head = self.driver.submit(TX, &[Buffer::Out(at, text.len() as u32)]);
        assert_eq!(self.driver.used(TX), (head, 0));
    }

    fn offer_input(&mut self, len: u32) -> u64 {
        let at = self.driver.buffer(&vec![0; len as usize]);
        self.driver.submit(RX, &[Buffer::In(at, len)]);
        at
    }

    /// What the client has to read now.
    fn seen(&self) -> Vec<u8> {
        let mut buffer = [0; 4096];
        match self.client.read(&mut buffer) {
            ClientRead::Bytes(n) => buffer[..n].to_vec(),
            _ => Vec::new(),
        }
    }
}

#[test]
fn what_the_guest_prints_reaches_the_client() {
    let mut guest = guest();
    guest.print(b"Linux version 6.1\r\n");
    guest.print(b"login: ");
    assert_eq!(guest.seen(), b"Linux version 6.1\r\nlogin: ");
    assert_eq!(guest.console.metrics().counters().console.bytes_out, 26);
    assert_eq!(guest.driver.interrupts(TX), 2);
}

#[test]
fn what_is_typed_reaches_the_guest_in_its_buffers() {
    let mut guest = guest();
    let (first, second) = (guest.offer_input(4), guest.offer_input(16));
    assert_eq!(guest.client.send_input(b"reboot\n"), 7);
    assert_eq!(guest.driver.used(RX).1, 4);
    assert_eq!(guest.driver.used(RX).1, 3);
    assert_eq!(guest.driver.bytes(first, 4), b"rebo");
    assert_eq!(guest.driver.bytes(second, 3), b"ot\n");
}

#[test]
fn input_waits_for_a_buffer_and_keeps_its_order() {
    let mut guest = guest();
    guest.client.send_input(b"one ");
    guest.client.send_input(b"two");
    assert!(guest.driver.try_used(RX).is_none());
    let mut got = Vec::new();
    while got.len() < 7 {
        let at = guest.offer_input(64);
        let (_, len) = guest.driver.used(RX);
        got.extend(guest.driver.bytes(at, len as usize));
    }
    assert_eq!(got, b"one two");
}

#[test]
fn a_long_chain_is_printed_in_order_and_in_pieces() {
    let mut guest = guest();
    let text: Vec<u8> = (0..10_000u32).flat_map(|i| format!("{i} ").into_bytes()).collect();
    let at = guest.driver.buffer(&text);
    let cut = 4097;
    guest.driver.submit(TX, &[Buffer::Out(at, cut), Buffer::Out(at + u64::from(cut), text.len() as u32 - cut)]);
    guest.driver.used(TX);
    assert_eq!(guest.hub.scrollback(), text);
}

#[test]
fn what_was_typed_before_the_driver_is_forgotten() {
    let hub = ConsoleHub::new();
    let console = open(&hub);
    let client = hub.attach().unwrap();
    client.send_input(b"typed while the guest booted");
    let mut driver = attach(console.clone());
    driver.start_with(!MULTIPORT);
    let mut guest = Guest { driver, console, hub, client };
    let at = guest.offer_input(64);
    guest.client.send_input(b"now");
    assert_eq!(guest.driver.used(RX).1, 3);
    assert_eq!(guest.driver.bytes(at, 3), b"now");
}

#[test]
fn a_broken_ring_needs_a_reset_and_nothing_else() {
    let mut guest = guest();
    for (i, next) in [(0, 1), (1, 0)] {
        guest.driver.descriptor(TX, i, Descriptor { address: 0x1000, len: 8, flags: NEXT, next });
    }
    guest.driver.offer(TX, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
    assert_eq!(guest.console.metrics().counters().driver_errors, 1);
    guest.driver.reset();
    guest.driver.start_with(!MULTIPORT);
    guest.print(b"again");
    assert!(guest.hub.scrollback().ends_with(b"again"));
}

#[test]
fn a_buffer_of_the_wrong_direction_moves_nothing() {
    let mut guest = guest();
    let at = guest.driver.buffer(b"secret");
    // A writable buffer in the transmit queue, a readable one in the receive queue.
    guest.driver.submit(TX, &[Buffer::In(at, 6)]);
    guest.driver.used(TX);
    guest.driver.submit(RX, &[Buffer::Out(at, 6)]);
    guest.client.send_input(b"x");
    assert_eq!(guest.driver.used(RX).1, 0);
    assert!(guest.seen().is_empty());
    assert_eq!(guest.driver.bytes(at, 6), b"secret");
}

#[test]
fn unread_input_goes_with_the_saved_state() {
    let mut guest = guest();
    guest.client.send_input(b"abc");
    // The thread takes it from the hub and has no buffer for it.
    guest.driver.wait("the input to be taken", |driver| {
        let saved = driver.function.save().unwrap();
        saved["device"]["ports"][0]["unread"].as_array().is_some_and(|bytes| bytes.len() == 3)
    });
    let saved = guest.driver.function.save().unwrap();

    let mut moved = super::tests::guest();
    let memory = guest.driver.memory.clone();
    let msi = crate::interrupt::fake::FakeMsi::new();
    let io_events = crate::interrupt::fake::FakeIoEvents::new();
    let function = crate::virtio::VirtioPci::new(moved.console.clone(), memory, &*msi, io_events).unwrap();
    moved.console = guest.console.clone();
    function.restore(saved).unwrap();
    guest.driver.function = function;
    let at = guest.offer_input(8);
    assert_eq!(guest.driver.used(RX).1, 3);
    assert_eq!(guest.driver.bytes(at, 3), b"abc");
}

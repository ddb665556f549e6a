//! The agent's port under a driver with MULTIPORT: set-up, both directions, clients that come and go, and a hostile driver.

use std::sync::Arc;

use super::Console;
use super::config::{
    AGENT_NAME, AGENT_RECEIVE, AGENT_TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT, MAX_CHAIN_BYTES, TRANSMIT,
};
use crate::agent_channel::{AgentChannel, AgentClient, AgentRead, TO_CLIENT_BYTES};
use crate::console_hub::ConsoleHub;
use crate::cpu::gate::RunGate;
use crate::interrupt::fake::{FakeIoEvents, FakeMsi};
use crate::pci::PciFunction;
use crate::virtio::VirtioPci;
use crate::virtio::testing::{Buffer, Descriptor, FakeDriver, NEXT, attach};

const RX: usize = AGENT_RECEIVE as usize;
const TX: usize = AGENT_TRANSMIT as usize;
const CONTROL_RX: usize = CONTROL_RECEIVE as usize;
const CONTROL_TX: usize = CONTROL_TRANSMIT as usize;

const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

const EVERYTHING: u32 = 64;

struct Guest {
    driver: FakeDriver,
    console: Arc<Console>,
    channel: Arc<AgentChannel>,
    hub: Arc<ConsoleHub>,
}

/// id, event, value, and what follows.
type Message = (u32, u16, u16, Vec<u8>);

impl Guest {
    /// A driver that has started and said nothing.
    fn new() -> Self {
        let hub = ConsoleHub::new();
        let channel = AgentChannel::new().unwrap();
        let console = Console::open(Arc::new(hub.device().unwrap()), Arc::clone(&channel), RunGate::new()).unwrap();
        let mut driver = attach(console.clone());
        driver.start();
        Self { driver, console, channel, hub }
    }

    /// A guest that has set up both ports and whose agent has opened its own.
    fn with_agent() -> Self {
        let mut guest = Self::new();
        guest.set_up();
        guest.say(1, PORT_OPEN, 1);
        guest.until("the port to be open", |guest| guest.channel.guest_open());
        guest
    }

    fn set_up(&mut self) {
        self.say(u32::MAX, DEVICE_READY, 1);
        let added: Vec<_> = (0..2).map(|_| self.hear()).collect();
        assert_eq!(added, [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
        self.say(0, PORT_READY, 1);
        assert_eq!(self.hear(), (0, 4, 1, vec![]), "a console");
        assert_eq!(self.hear(), (0, PORT_OPEN, 1, vec![]), "somebody always listens to it");
        self.say(1, PORT_READY, 1);
        assert_eq!(self.hear(), (1, 7, 1, AGENT_NAME.into()), "a name");
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.say_bytes(&bytes);
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        let at = self.driver.buffer(bytes);
        self.driver.submit(CONTROL_TX, &[Buffer::Out(at, bytes.len() as u32)]);
        self.driver.used(CONTROL_TX);
    }

    /// The device's next message.
    fn hear(&mut self) -> Message {
        let at = self.driver.buffer(&[0; EVERYTHING as usize]);
        self.driver.submit(CONTROL_RX, &[Buffer::In(at, EVERYTHING)]);
        let (_, len) = self.driver.used(CONTROL_RX);
        decode(&self.driver.bytes(at, len as usize))
    }

    fn write(&mut self, bytes: &[u8]) {
        self.write_without_wait(bytes);
        self.driver.used(TX);
    }

    fn write_without_wait(&mut self, bytes: &[u8]) {
        let at = self.driver.buffer(bytes);
        self.driver.submit(TX, &[Buffer::Out(at, bytes.len() as u32)]);
    }

    fn read(&mut self) -> Vec<u8> {
        let at = self.driver.buffer(&[0; EVERYTHING as usize]);
        self.driver.submit(RX, &[Buffer::In(at, EVERYTHING)]);
        let (_, len) = self.driver.used(RX);
        self.driver.bytes(at, len as usize)
    }

    fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        self.driver.wait(what, |_| done(self));
    }

    /// Attaches a client that the guest knows of.
    fn client(&mut self) -> AgentClient {
        let client = self.channel.attach().unwrap();
        assert_eq!(self.hear(), (1, PORT_OPEN, 1, vec![]));
        client
    }
}

fn decode(bytes: &[u8]) -> Message {
    let (header, rest) = bytes.split_first_chunk::<8>().expect("a message has a header");
    let value = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    (u32::from(value(0)) | u32::from(value(2)) << 16, value(4), value(6), rest.to_vec())
}

fn read_all(client: &AgentClient) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let AgentRead::Bytes(count) = client.read(&mut buffer) {
        all.extend_from_slice(&buffer[..count]);
    }
    all
}

#[test]
fn the_driver_finds_two_ports_by_number_and_name() {
    let mut guest = Guest::new();
    let mut max_nr_ports = [0; 4];
    guest.driver.function.bar_read(0, 0x2004, &mut max_nr_ports);
    assert_eq!(u32::from_le_bytes(max_nr_ports), 2);
    guest.set_up();
    assert!(!guest.channel.guest_open());
    // After a reset all of it is said again.
    guest.driver.reset();
    guest.driver.start();
    guest.set_up();
}

#[test]
fn a_request_and_its_answer_pass() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    client.send(b"{\"execute\":\"guest-ping\"}\n");
    assert_eq!(guest.read(), b"{\"execute\":\"guest-ping\"}\n");
    guest.write(b"{\"return\": {}}\n");
    assert_eq!(read_all(&client), b"{\"return\": {}}\n");
    let counters = guest.console.metrics().counters();
    assert_eq!((counters.agent.bytes_in, counters.agent.bytes_out, counters.console.bytes_out), (25, 15, 0));
    assert!(guest.hub.scrollback().is_empty(), "the agent's words are not the console's");
}

#[test]
fn the_guest_is_told_of_clients_and_hears_nothing_of_those_who_left() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    client.send(b"shutdown");
    // The device takes it, and has no buffer for it.
    guest.until("the request to be taken", |guest| guest.channel.counters().bytes_in == 8);
    drop(client);
    assert_eq!(guest.hear(), (1, PORT_OPEN, 0, vec![]));
    guest.write(b"to nobody");
    let client = guest.client();
    client.send(b"ping");
    assert_eq!(guest.read(), b"ping");
    assert_eq!(read_all(&client), b"");
    assert_eq!(guest.channel.counters().bytes_discarded, 9);
}

#[test]
fn a_change_of_clients_is_seen_as_a_change() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    drop(client);
    let _next = guest.channel.attach().unwrap();
    assert_eq!([guest.hear(), guest.hear()], [(1, PORT_OPEN, 0, vec![]), (1, PORT_OPEN, 1, vec![])]);
}

#[test]
fn a_client_waits_for_the_agent_and_ends_with_it() {
    let mut guest = Guest::new();
    let client = guest.channel.attach().unwrap();
    client.send(b"sync");
    guest.set_up();
    assert_eq!(guest.hear(), (1, PORT_OPEN, 1, vec![]));
    let at = guest.driver.buffer(&[0; 8]);
    guest.driver.submit(RX, &[Buffer::In(at, 8)]);
    // Everything before the opening is served in order, so this is not a matter of time.
    guest.say(0, PORT_OPEN, 1);
    assert!(guest.driver.try_used(RX).is_none(), "no program has the port open");
    guest.say(1, PORT_OPEN, 1);
    assert_eq!(guest.driver.used(RX).1, 4);

    guest.write(b"bye");
    guest.say(1, PORT_OPEN, 0);
    guest.until("the end", |guest| !guest.channel.guest_open());
    assert_eq!(read_all(&client), b"bye");
    assert_eq!(client.read(&mut [0; 8]), AgentRead::Ended);
}

#[test]
fn a_reset_ends_the_conversation() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    guest.driver.reset();
    assert_eq!(client.read(&mut [0; 8]), AgentRead::Ended);
    assert!(!guest.channel.guest_open());
    drop(client);
    // The machine of a guest that resets is dropped whole.
    let mut guest = Guest::with_agent();
    let client = guest.client();
    let channel = Arc::clone(&guest.channel);
    drop(guest);
    assert_eq!(client.read(&mut [0; 8]), AgentRead::Ended);
    assert!(!channel.guest_open());
}

#[test]
fn a_guest_that_talks_waits_for_its_client_and_loses_nothing() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    let text: Vec<u8> = (0..TO_CLIENT_BYTES as u32 / 2).flat_map(u32::to_le_bytes).collect();
    for part in text.chunks(16 << 10) {
        guest.write_without_wait(part);
    }
    let mut used = 0;
    guest.driver.wait("the channel to be full", |_| {
        used = guest.channel.counters().bytes_out;
        used >= TO_CLIENT_BYTES as u64
    });
    assert_eq!(used, TO_CLIENT_BYTES as u64, "the rest stays in the ring");
    let mut got = Vec::new();
    guest.until("the rest", |_| {
        got.extend(read_all(&client));
        got.len() == text.len()
    });
    assert!(got == text);
}

#[test]
fn a_driver_that_only_asks_costs_nothing() {
    let mut guest = Guest::with_agent();
    for _ in 0..500 {
        guest.say(u32::MAX, DEVICE_READY, 1);
        guest.say(1, PORT_READY, 1);
        drop(guest.channel.attach());
    }
    // It reads at last: each thing is said once.
    let said: Vec<_> = (0..3).map(|_| guest.hear()).collect();
    assert_eq!(said, [(0, 1, 1, vec![]), (1, 1, 1, vec![]), (1, 7, 1, AGENT_NAME.into())]);
    let at = guest.driver.buffer(&[0; 64]);
    guest.driver.submit(CONTROL_RX, &[Buffer::In(at, 64)]);
    guest.say(0, PORT_OPEN, 1);
    assert!(guest.driver.try_used(CONTROL_RX).is_none());
}

#[test]
fn nonsense_on_the_control_queue_is_counted_and_changes_nothing() {
    let mut guest = Guest::with_agent();
    guest.say_bytes(b"short");
    guest.say(7, PORT_READY, 1);
    guest.say(1, 4711, 1);
    let at = guest.driver.buffer(&[0; 16]);
    // A writable buffer where the device reads.
    guest.driver.submit(CONTROL_TX, &[Buffer::In(at, 16)]);
    guest.driver.used(CONTROL_TX);
    assert_eq!(guest.console.metrics().counters().control_ignored, 4);
    assert!(guest.channel.guest_open());

    // A buffer that is too small comes back empty, and the message waits for another.
    let _client = guest.channel.attach().unwrap();
    let small = guest.driver.buffer(&[0; 4]);
    guest.driver.submit(CONTROL_RX, &[Buffer::In(small, 4)]);
    assert_eq!(guest.driver.used(CONTROL_RX).1, 0);
    assert_eq!(guest.hear(), (1, PORT_OPEN, 1, vec![]));
}

#[test]
fn a_chain_beyond_the_bound_is_cut_and_counted() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    let chunk = 1 << 20;
    let at = guest.driver.buffer(&vec![b'x'; chunk]);
    let buffers = [Buffer::Out(at, chunk as u32), Buffer::Out(at, 5)];
    guest.driver.submit(TX, &buffers);
    guest.driver.used(TX);
    assert_eq!(read_all(&client).len() as u64, MAX_CHAIN_BYTES);
    assert_eq!(guest.console.metrics().counters().agent.bytes_cut, 5);
}

#[test]
fn a_broken_control_ring_needs_a_reset_and_ends_the_conversation() {
    let mut guest = Guest::with_agent();
    let client = guest.client();
    for (i, next) in [(0, 1), (1, 0)] {
        guest.driver.descriptor(CONTROL_TX, i, Descriptor { address: 0x1000, len: 8, flags: NEXT, next });
    }
    guest.driver.offer(CONTROL_TX, 0);
    guest.driver.wait("NEEDS_RESET", FakeDriver::needs_reset);
    assert_eq!(client.read(&mut [0; 8]), AgentRead::Ended);
    drop(client);
    guest.driver.reset();
    guest.driver.start();
    guest.set_up();
}

#[test]
fn the_console_works_beside_it() {
    let mut guest = Guest::with_agent();
    let at = guest.driver.buffer(b"login: ");
    guest.driver.submit(usize::from(TRANSMIT), &[Buffer::Out(at, 7)]);
    guest.driver.used(usize::from(TRANSMIT));
    assert_eq!(guest.hub.scrollback(), b"login: ");
}

#[test]
fn the_ports_go_with_the_saved_state() {
    let mut guest = Guest::with_agent();
    let _client = guest.client();
    guest.until("both ends to be quiet", |_| true);
    let saved = guest.driver.function.save().unwrap();

    let mut moved = Guest::new();
    let memory = guest.driver.memory.clone();
    let function = VirtioPci::new(moved.console.clone(), memory, &*FakeMsi::new(), FakeIoEvents::new()).unwrap();
    function.restore(saved.clone()).unwrap();
    guest.driver.function = function;
    std::mem::swap(&mut guest.channel, &mut moved.channel);
    assert!(guest.channel.guest_open(), "the program in the guest has not noticed");
    // Its client is another one now.
    assert_eq!(guest.hear(), (1, PORT_OPEN, 0, vec![]));
    let client = guest.client();
    client.send(b"ping");
    assert_eq!(guest.read(), b"ping");

    let mut old = saved;
    old["device"]["version"] = 1.into();
    let other = Guest::new();
    let function =
        VirtioPci::new(other.console.clone(), guest.driver.memory.clone(), &*FakeMsi::new(), FakeIoEvents::new());
    assert!(function.unwrap().restore(old).is_err());
}

//! The console's ports and their control messages under a hostile driver, with people and an agent's client at the other end.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::guest;
use fuzz::guest::Buffer;
use fuzz::guest::Guest;
use fuzz::guest::OWN;
use fuzz::joined;
use fuzz::keep_samples;
use libfuzzer_sys::fuzz_target;
use vmm::agent_channel::AgentChannel;
use vmm::agent_channel::AgentClient;
use vmm::agent_channel::AgentRead;
use vmm::agent_channel::TO_GUEST_BYTES;
use vmm::console_hub::ConsoleClient;
use vmm::console_hub::ConsoleHub;
use vmm::cpu::gate::RunGate;
use vmm::devices::console::Console;
use vmm::devices::console::config::CONTROL_RECEIVE;
use vmm::devices::console::config::CONTROL_TRANSMIT;
use vmm::devices::console::config::MULTIPORT;
use vmm::devices::console::config::QUEUE_SIZES;
use vmm::virtio::Activation;
use vmm::virtio::VirtioDevice;
use vmm::virtio::device::QueuePosition;

/// A control message: id, event, value, and what follows.
const SAY: u8 = OWN;
/// A program writes: which port, form, buffers.
const PRINT: u8 = OWN + 1;
/// Buffers to read into: which queue, how many, form, buffers.
const STOCK: u8 = OWN + 2;
/// The console's thread wakes.
const SERVE: u8 = OWN + 3;
/// Somebody types.
const TYPE: u8 = OWN + 4;
/// The agent's client: 0 leaves, 1 comes, 2 reads, or else sends what follows.
const CLIENT: u8 = OWN + 5;
/// The driver begins again: features, queues that it leaves out.
const RESET: u8 = OWN + 6;
/// The guest goes on in another process.
const MOVE: u8 = OWN + 7;
/// A state of another process, as it comes.
const STATE: u8 = OWN + 8;
const TAGS: u8 = OWN + 9;

const QUEUES: usize = QUEUE_SIZES.len();
/// Queues to the guest, and from it, by port.
const RECEIVE: [usize; 2] = [0, 4];
const TRANSMIT: [usize; 2] = [1, 5];
/// Passes after which a console has nothing left to do, unless somebody comes.
const MAX_PASSES: usize = 64;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut pieces = Pieces(data);
    let (shape, settings) = pieces.next().unwrap_or((0, &[]));
    let mut terminal = Terminal::new(shape, settings.first().copied().unwrap_or(0));
    for (tag, body) in pieces {
        terminal.act(tag % TAGS, body);
    }
});

struct Terminal {
    guest: Guest,
    hub: Arc<ConsoleHub>,
    person: ConsoleClient,
    channel: Arc<AgentChannel>,
    client: Option<AgentClient>,
    console: Arc<Console>,
    features: u64,
    /// The driver has these queues.
    enabled: [bool; QUEUES],
}

impl Terminal {
    fn new(shape: u8, left_out: u8) -> Self {
        let hub = ConsoleHub::new();
        let person = hub.attach().expect("the first client");
        let channel = AgentChannel::new().expect("an event descriptor");
        let guest = Guest::new(QUEUE_SIZES, shape & 1 != 0);
        let console = console(&hub, &channel);
        let features = if shape & 2 == 0 { MULTIPORT } else { 0 };
        let enabled = enabled(left_out);
        let mut terminal = Self { guest, hub, person, channel, client: None, console, features, enabled };
        terminal.activate(&[]);
        terminal
    }

    fn activate(&mut self, positions: &[QueuePosition]) {
        let queue = |index: usize| {
            let at = positions.get(index).copied().unwrap_or_default();
            self.enabled[index].then(|| self.guest.active_queue(index, at))
        };
        let interrupt: Arc<guest::Interrupts> = Arc::clone(&self.guest.interrupts);
        let activation = Activation {
            memory: self.guest.memory.clone(),
            features: self.features,
            queues: (0..QUEUES).map(queue).collect(),
            interrupt,
        };
        self.console.activate(activation).expect("a console takes any queues");
    }

    fn act(&mut self, tag: u8, body: &[u8]) {
        if self.guest.act(tag, body) {
            return;
        }
        let mut fields = Fields(body);
        match tag {
            SAY => {
                let at = 0x1_0000;
                self.guest.poke(at, body);
                let chain = [Buffer { address: at, len: body.len() as u32, write: false }];
                self.guest.chain(usize::from(CONTROL_TRANSMIT), None, 0, &chain);
            }
            PRINT => {
                let (port, form) = (usize::from(fields.u8() & 1), fields.u8());
                let chain = guest::buffers(&mut fields);
                self.guest.chain(TRANSMIT[port], None, form, &chain);
            }
            STOCK => {
                let queue = [RECEIVE[0], RECEIVE[1], usize::from(CONTROL_RECEIVE)][usize::from(fields.u8()) % 3];
                let (count, form) = (fields.u8(), fields.u8());
                let chain = guest::buffers(&mut fields);
                let chain: Vec<_> = chain.into_iter().map(|buffer| Buffer { write: true, ..buffer }).collect();
                for _ in 0..=count % 32 {
                    self.guest.chain(queue, None, form, &chain);
                }
            }
            SERVE => self.serve(usize::from(fields.u8())),
            TYPE => drop(self.person.send_input(body)),
            CLIENT => self.talk(fields.u8(), fields.rest()),
            RESET => {
                self.console.begin_reset();
                assert!(self.console.is_reset() && !self.channel.guest_open());
                self.guest.restart();
                self.features = if fields.u8() & 1 == 0 { MULTIPORT } else { 0 };
                self.enabled = enabled(fields.u8());
                self.activate(&[]);
            }
            MOVE => {
                let saved = self.console.save().expect("a state is JSON");
                assert!(self.go_on(saved.clone()), "what was saved is taken back");
                assert_eq!(
                    self.console.save().expect("a state is JSON"),
                    saved,
                    "a state that is taken is saved again"
                );
            }
            _ => {
                let Ok(state) = serde_json::from_slice::<serde_json::Value>(body) else { return };
                if self.go_on(state) {
                    let saved = self.console.save().expect("a state is JSON");
                    assert!(self.go_on(saved), "what was saved is taken back");
                }
            }
        }
    }

    /// Takes a state over, if it is one.
    fn go_on(&mut self, state: serde_json::Value) -> bool {
        let positions = self.console.positions().expect("a console knows where it is");
        let new = console(&self.hub, &self.channel);
        if new.restore(state).is_err() {
            return false;
        }
        self.console = new;
        if !positions.is_empty() {
            self.activate(&positions);
            assert_eq!(self.console.positions().expect("as before"), positions);
        }
        true
    }

    fn serve(&mut self, passes: usize) {
        let resets = self.guest.interrupts.resets.load(Ordering::Relaxed);
        for _ in 0..=passes.min(MAX_PASSES) {
            let console = &self.console;
            self.guest.step(|| console.wake_here());
        }
        let positions = self.console.positions().expect("a console knows where it is");
        let broken = self.guest.interrupts.resets.load(Ordering::Relaxed) != resets;
        assert!(!broken || positions.is_empty(), "a console that asks for its reset serves nobody");
        assert!(!broken || !self.channel.guest_open());
        let multiport = self.features & MULTIPORT != 0;
        for (queue, position) in positions.into_iter().enumerate() {
            let both = self.enabled[queue] && self.enabled[queue ^ 1];
            if both && (multiport || queue < 2) {
                self.guest.check_position(queue, position);
            } else {
                assert_eq!(position, QueuePosition::default(), "queue {queue} is not served");
            }
        }
    }

    fn talk(&mut self, what: u8, bytes: &[u8]) {
        match (what, &self.client) {
            (0, _) => self.client = None,
            (1, None) => self.client = self.channel.attach().ok(),
            (1, Some(client)) => {
                let Ok(next) = self.channel.attach() else { return };
                // One client at a time: the last one was ended by the guest.
                let mut buffer = [0; 4096];
                while let AgentRead::Bytes(_) = client.read(&mut buffer) {}
                assert_eq!(client.read(&mut buffer), AgentRead::Ended);
                self.client = Some(next);
            }
            (2, Some(client)) => {
                let mut buffer = vec![0; 4096];
                if let AgentRead::Bytes(count) = client.read(&mut buffer) {
                    assert!((1..=buffer.len()).contains(&count));
                }
            }
            (_, Some(client)) => {
                let room = client.room();
                assert!(room <= TO_GUEST_BYTES);
                assert_eq!(client.send(bytes), bytes.len().min(room));
            }
            _ => {}
        }
    }
}

fn console(hub: &ConsoleHub, channel: &Arc<AgentChannel>) -> Arc<Console> {
    let device = Arc::new(hub.device().expect("an event descriptor"));
    Console::without_thread(device, Arc::clone(channel), RunGate::new()).expect("an event descriptor")
}

fn enabled(left_out: u8) -> [bool; QUEUES] {
    std::array::from_fn(|queue| left_out & 1 << queue == 0)
}

fn samples() -> Vec<Vec<u8>> {
    let say = |id: u32, event: u16, value: u16| {
        (SAY, [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat())
    };
    let buffer = |len: u16| guest::buffer_bytes(0, 0x800, len);
    let print = |port: u8, form: u8| (PRINT, [&[port, form][..], &buffer(300), &buffer(5000)].concat());
    let stock = |queue: u8, count: u8| (STOCK, [&[queue, count, 0][..], &buffer(64)].concat());
    let serve = || (SERVE, vec![4]);
    let client = |what: u8| (CLIENT, [&[what][..], b"{\"execute\":\"guest-ping\"}\n"].concat());
    let set_up = || {
        vec![
            stock(2, 15),
            say(u32::MAX, 0, 1),
            say(0, 3, 1),
            say(1, 3, 1),
            serve(),
            say(1, 6, 1),
            client(1),
            client(9),
            stock(0, 3),
            stock(1, 3),
            (TYPE, b"ls\n".to_vec()),
            serve(),
            print(0, 0),
            print(1, guest::INDIRECT),
            serve(),
            client(2),
        ]
    };
    let sample = |shape: u8, left_out: u8, more: Vec<(u8, Vec<u8>)>| {
        let mut pieces = vec![(shape, vec![left_out])];
        pieces.extend(set_up());
        pieces.extend(more);
        pieces.extend(set_up());
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    let state = br#"{"version":2,"ports":[{"unread":[7],"control":{"add":true,"describe":false,"ready":true,"guest_open":true,"told":true}},
        {"unread":[1,2],"control":{"add":false,"describe":true,"ready":true,"guest_open":true,"told":false}}]}"#;
    vec![
        sample(1, 0, vec![(MOVE, vec![])]),
        sample(0, 0, vec![(RESET, vec![1, 0])]),
        sample(2, 0, vec![(RESET, vec![0, 4])]),
        sample(1, 8, vec![client(0), serve(), client(1), serve()]),
        sample(1, 0, vec![(STATE, state.to_vec())]),
        sample(1, 0, vec![say(1, 3, 0), say(7, 6, 1), say(1, 6, 0), serve()]),
    ]
}

//! What device and driver say to each other about ports (virtio 1.2, 5.3.6.2), as a pure state machine: messages in, messages out.
//!
//! ```text
//! driver                        device
//! DEVICE_READY 1             -> PORT_ADD for each port
//! PORT_READY 1 (port)        -> CONSOLE_PORT or PORT_NAME, then PORT_OPEN 1 if somebody is at the host's end
//! PORT_OPEN 0|1 (port)          a program in the guest closed or opened the port
//!                            <- PORT_OPEN 0|1 when a client at the host's end leaves or comes
//! ```
//!
//! There is no list of messages: what is left to say follows from what the guest was told and what is so now. A driver that asks
//! without end and reads nothing costs no memory, and a client that comes and goes meanwhile is told of once.

use serde::{Deserialize, Serialize};

use super::config::{AGENT, AGENT_NAME, CONSOLE, PORTS};

/// id, event, value; all little-endian.
pub const HEADER_BYTES: usize = 8;
/// The longest message of the device: a name.
pub const MAX_MESSAGE_BYTES: usize = HEADER_BYTES + AGENT_NAME.len();

mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Who is at the host's end. Another number is another client, and the guest is told of the change.
pub type HostEnd = u64;

/// The hub is always there.
const HUB: HostEnd = 1;
/// A client of another process: the guest came with a saved state.
const ELSEWHERE: HostEnd = u64::MAX;

/// A message to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    PortAdd { port: usize },
    ConsolePort { port: usize },
    PortName { port: usize, name: &'static str },
    PortOpen { port: usize, open: bool },
}

impl Message {
    pub fn encode(self) -> Vec<u8> {
        let (port, event, value, name) = match self {
            Self::PortAdd { port } => (port, event::PORT_ADD, 1, ""),
            Self::ConsolePort { port } => (port, event::CONSOLE_PORT, 1, ""),
            Self::PortName { port, name } => (port, event::PORT_NAME, 1, name),
            Self::PortOpen { port, open } => (port, event::PORT_OPEN, u16::from(open), ""),
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + name.len());
        bytes.extend((port as u32).to_le_bytes());
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}

/// What a message of the driver changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing outside of this state machine.
    Noted,
    /// A program in the guest opened or closed a port.
    Opened { port: usize, open: bool },
    /// Too short, of a port or kind that does not exist, or that the driver has no reason to send.
    Ignored,
}

/// The ports as the driver knows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    ports: [PortControl; PORTS],
}

/// One port. Saved with the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortControl {
    /// The driver is to be told that the port exists.
    add: bool,
    /// The driver is to be told what the port is.
    describe: bool,
    /// The driver has the port.
    ready: bool,
    /// A program in the guest has it open.
    guest_open: bool,
    /// Who is at the host's end, and who was when the guest was told last.
    #[serde(skip)]
    host: Option<HostEnd>,
    #[serde(with = "told")]
    told: Option<HostEnd>,
}

impl Default for Control {
    fn default() -> Self {
        let mut control = Self { ports: Default::default() };
        control.ports[CONSOLE].host = Some(HUB);
        control
    }
}

impl Control {
    /// Says who is at the host's end of the agent's port now. True when it is somebody else.
    pub fn agent_host_is(&mut self, host: Option<HostEnd>) -> bool {
        std::mem::replace(&mut self.ports[AGENT].host, host) != host
    }

    pub fn guest_open(&self, port: usize) -> bool {
        self.ports[port].guest_open
    }

    /// Takes a message of the driver.
    pub fn hear(&mut self, message: &[u8]) -> Heard {
        let Some(header) = message.first_chunk::<HEADER_BYTES>() else {
            return Heard::Ignored;
        };
        let [a, b, c, d, e, f, g, h] = *header;
        let id = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        if event == event::DEVICE_READY {
            // Any other value: the driver could not set the device up, and has no ports.
            self.ports.iter_mut().for_each(|port| port.add = value == 1);
            return Heard::Noted;
        }
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        let Some(port) = self.ports.get_mut(index) else {
            return Heard::Ignored;
        };
        match (event, value) {
            (event::PORT_READY, 1) => {
                port.ready = true;
                port.describe = true;
                // The driver has it anew, as closed.
                port.told = None;
                Heard::Noted
            }
            (event::PORT_READY, _) => {
                *port = PortControl { host: port.host, ..PortControl::default() };
                Heard::Opened { port: index, open: false }
            }
            (event::PORT_OPEN, value) if port.ready => {
                port.guest_open = value != 0;
                Heard::Opened { port: index, open: port.guest_open }
            }
            _ => Heard::Ignored,
        }
    }

    /// What the driver is to be told next.
    pub fn next_message(&self) -> Option<Message> {
        self.ports.iter().enumerate().find_map(|(index, port)| port.next_message(index))
    }

    /// The driver was told.
    pub fn told(&mut self, message: Message) {
        match message {
            Message::PortAdd { port } => self.ports[port].add = false,
            Message::ConsolePort { port } | Message::PortName { port, .. } => self.ports[port].describe = false,
            Message::PortOpen { port, open: true } => self.ports[port].told = self.ports[port].host,
            Message::PortOpen { port, open: false } => self.ports[port].told = None,
        }
    }

    pub fn save(&self) -> [PortControl; PORTS] {
        self.ports.clone()
    }

    pub fn restore(ports: [PortControl; PORTS]) -> Self {
        let mut control = Self { ports };
        // The hub is another one and always there, which changes nothing for the guest.
        let console = &mut control.ports[CONSOLE];
        console.host = Some(HUB);
        console.told = console.told.map(|_| HUB);
        control
    }
}

impl PortControl {
    fn next_message(&self, port: usize) -> Option<Message> {
        if self.add {
            return Some(Message::PortAdd { port });
        }
        if !self.ready {
            return None;
        }
        if self.describe {
            return Some(match port {
                CONSOLE => Message::ConsolePort { port },
                _ => Message::PortName { port, name: AGENT_NAME },
            });
        }
        match (self.told, self.host) {
            (told, host) if told == host => None,
            // Closed first, also between two clients: the guest's agent must see that the conversation is another one.
            (Some(_), _) => Some(Message::PortOpen { port, open: false }),
            (None, _) => Some(Message::PortOpen { port, open: true }),
        }
    }
}

/// A client's number means nothing to another process; that there was one does.
mod told {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{ELSEWHERE, HostEnd};

    pub fn serialize<S: Serializer>(told: &Option<HostEnd>, serializer: S) -> Result<S::Ok, S::Error> {
        told.is_some().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<HostEnd>, D::Error> {
        Ok(bool::deserialize(deserializer)?.then_some(ELSEWHERE))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
        [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    fn said(control: &mut Control) -> Vec<Message> {
        let mut said = Vec::new();
        while let Some(message) = control.next_message() {
            control.told(message);
            said.push(message);
            assert!(said.len() <= 4 * PORTS, "the device talks without end");
        }
        said
    }

    fn set_up() -> Control {
        let mut control = Control::default();
        control.hear(&message(u32::MAX, event::DEVICE_READY, 1));
        for port in 0..PORTS as u32 {
            control.hear(&message(port, event::PORT_READY, 1));
        }
        said(&mut control);
        control
    }

    #[test]
    fn a_driver_is_told_of_both_ports() {
        let mut control = Control::default();
        assert_eq!(said(&mut control), [], "not before it asks");
        control.hear(&message(u32::MAX, event::DEVICE_READY, 1));
        assert_eq!(said(&mut control), [Message::PortAdd { port: 0 }, Message::PortAdd { port: 1 }]);
        control.hear(&message(0, event::PORT_READY, 1));
        let console = [Message::ConsolePort { port: 0 }, Message::PortOpen { port: 0, open: true }];
        assert_eq!(said(&mut control), console);
        control.hear(&message(1, event::PORT_READY, 1));
        assert_eq!(said(&mut control), [Message::PortName { port: 1, name: AGENT_NAME }]);
        assert_eq!(Message::PortName { port: 1, name: "ab" }.encode(), b"\x01\0\0\0\x07\0\x01\0ab");
        assert_eq!(Message::PortOpen { port: 1, open: false }.encode(), b"\x01\0\0\0\x06\0\0\0");
    }

    #[test]
    fn clients_that_come_and_go_are_told_of_once() {
        let mut control = set_up();
        let (opened, closed) = (Message::PortOpen { port: 1, open: true }, Message::PortOpen { port: 1, open: false });
        assert!(control.agent_host_is(Some(7)));
        assert!(!control.agent_host_is(Some(7)));
        assert_eq!(said(&mut control), [opened]);
        assert!(control.agent_host_is(Some(8)));
        assert_eq!(said(&mut control), [closed, opened]);
        for client in 9..1000 {
            control.agent_host_is(None);
            control.agent_host_is(Some(client));
        }
        assert_eq!(said(&mut control), [closed, opened]);
        control.agent_host_is(None);
        control.agent_host_is(Some(999));
        assert_eq!(said(&mut control), [], "the guest never saw it leave");
    }

    #[test]
    fn a_driver_that_sets_a_port_up_again_is_told_again() {
        let mut control = set_up();
        control.agent_host_is(Some(7));
        said(&mut control);
        for _ in 0..1000 {
            control.hear(&message(1, event::PORT_READY, 1));
        }
        let opened = Message::PortOpen { port: 1, open: true };
        assert_eq!(said(&mut control), [Message::PortName { port: 1, name: AGENT_NAME }, opened]);
        assert_eq!(control.hear(&message(1, event::PORT_OPEN, 1)), Heard::Opened { port: 1, open: true });
        // It could not take the port: nothing more is said about it.
        assert_eq!(control.hear(&message(1, event::PORT_READY, 0)), Heard::Opened { port: 1, open: false });
        assert!(!control.guest_open(AGENT));
        assert_eq!(said(&mut control), []);
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut control = set_up();
        for bad in [
            &b""[..],
            b"1234567",
            &message(2, event::PORT_READY, 1),
            &message(u32::MAX, event::PORT_OPEN, 1),
            &message(1, 999, 1),
        ] {
            assert_eq!(control.hear(bad), Heard::Ignored);
        }
        let mut early = Control::default();
        assert_eq!(early.hear(&message(1, event::PORT_OPEN, 1)), Heard::Ignored, "the driver does not have it");
        assert_eq!(control, set_up());
    }

    #[test]
    fn a_guest_that_moved_is_told_that_its_client_stayed_behind() {
        let mut control = set_up();
        control.agent_host_is(Some(7));
        said(&mut control);
        control.hear(&message(1, event::PORT_OPEN, 1));
        let saved = serde_json::to_value(control.save()).unwrap();
        let mut moved = Control::restore(serde_json::from_value(saved).unwrap());
        assert!(moved.guest_open(AGENT));
        let closed = Message::PortOpen { port: 1, open: false };
        assert_eq!(said(&mut moved), [closed]);
        moved.agent_host_is(Some(7));
        assert_eq!(said(&mut moved), [Message::PortOpen { port: 1, open: true }]);
    }

    proptest! {
        /// Whatever a driver sends and however clients come and go, little is left to say, and it ends with the truth.
        #[test]
        fn the_device_has_little_to_say_and_ends_with_the_truth(
            steps in prop::collection::vec(
                (0u32..4, 0u16..9, 0u16..3, prop::option::of(0u64..4), any::<bool>()), 0..200,
            )
        ) {
            let mut control = Control::default();
            for (id, event, value, host, read) in steps {
                control.hear(&message(id, event, value));
                control.agent_host_is(host);
                if read {
                    said(&mut control);
                }
            }
            said(&mut control);
            for port in &control.ports {
                prop_assert!(!port.ready || port.told == port.host);
                prop_assert!(port.ready || !port.guest_open);
            }
        }
    }
}

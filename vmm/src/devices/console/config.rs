//! Numbers of the console that a guest sees.

/// Both ports, and the control messages between them: the driver names ports, opens and closes them.
pub const MULTIPORT: u64 = 1 << 1;

/// The ports. Their numbers belong to the machine type: a guest's agent finds its port by name, its console by number.
pub const PORTS: usize = 2;
/// `hvc0`, which a driver without MULTIPORT has too.
pub const CONSOLE: usize = 0;
pub const AGENT: usize = 1;
/// The name that QEMU's guest agent looks for, below `/dev/virtio-ports`.
pub const AGENT_NAME: &str = "org.qemu.guest_agent.0";

/// Queue of what is typed to the guest.
pub const RECEIVE: u16 = 0;
/// Queue of what the guest prints.
pub const TRANSMIT: u16 = 1;
/// Control messages to the driver.
pub const CONTROL_RECEIVE: u16 = 2;
/// Control messages of the driver.
pub const CONTROL_TRANSMIT: u16 = 3;
/// Queues of the agent's port (virtio 1.2, 5.3.2: port n has 2n + 2 and 2n + 3, from port 1 on).
pub const AGENT_RECEIVE: u16 = 4;
pub const AGENT_TRANSMIT: u16 = 5;
/// Part of the machine type. A control queue has room for everything that the device can have to say at once.
pub const QUEUE_SIZES: &[u16] = &[128, 128, 32, 32, 128, 128];

/// Buffers of one chain. Linux uses one.
pub const MAX_BUFFERS: usize = 64;
/// Bytes of one chain that are printed; a chain may name 4 GiB.
pub const MAX_CHAIN_BYTES: u64 = 1 << 20;

/// cols, rows, max_nr_ports, emerg_wr (virtio 1.2, 5.3.4).
pub const CONFIG_BYTES: usize = 12;
pub const MAX_NR_PORTS_OFFSET: usize = 4;

/// The queues of a port: to the guest, from the guest.
pub fn queues_of(port: usize) -> (u16, u16) {
    if port == CONSOLE { (RECEIVE, TRANSMIT) } else { (AGENT_RECEIVE, AGENT_TRANSMIT) }
}

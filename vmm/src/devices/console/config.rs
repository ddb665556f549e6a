//! Numbers of the console that a guest sees.

/// Queue of what is typed to the guest.
pub const RECEIVE: u16 = 0;
/// Queue of what the guest prints.
pub const TRANSMIT: u16 = 1;
/// Part of the machine type.
pub const QUEUE_SIZES: &[u16] = &[128, 128];
/// Buffers of one chain. Linux uses one.
pub const MAX_BUFFERS: usize = 64;
/// Bytes of one chain that are printed; a chain may name 4 GiB.
pub const MAX_CHAIN_BYTES: u64 = 1 << 20;

/// cols, rows, max_nr_ports, emerg_wr (virtio 1.2, 5.3.4): all belong to features that are not offered.
pub const CONFIG_BYTES: usize = 12;

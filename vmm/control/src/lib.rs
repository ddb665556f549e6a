//! What hostd and a vmm process say to each other. Both link this crate, and nothing else of each other.
//!
//! 1. hostd writes a [`VmmConfig`] to a file and runs `vmm run --sandbox --config FILE --control SOCKET --lock-fd N --tap-fd ID=N`,
//!    with a descriptor for the VM's lock and one for each network card.
//! 2. They talk over the control socket in lines of JSON: [`Request`], [`Reply`], [`Notice`] ([`protocol`]).
//!    With `--incoming` it runs a guest that comes from another process, and the permit comes with [`Call::Run`].
//! 3. When the guest has ended, the vmm leaves an [`ExitReport`] and an exit code that says the same ([`exit`]).
//!
//! Start reading at [`config`]. Everything here is a value or a function between values, but for [`descriptor`] and [`open`]; the socket is
//! in the vmm.

pub mod balloon;
pub mod config;
pub mod cpu;
pub mod descriptor;
pub mod device;
pub mod disk;
pub mod exit;
pub mod host;
pub mod open;
pub mod protocol;
pub mod slots;

pub use config::{
    ConfigError, Identity, LeaseConfig, LogLevel, MachineType, NicConfig, OnPanic, ReleaseClass, VmmConfig,
    WatchdogAction, WatchdogConfig,
};
pub use cpu::{CpuConfig, CpuModel};
pub use device::{DeviceKind, DeviceState, DeviceStatus};
pub use disk::{BackingImage, DiskConfig, DiskFormat, OnError, RateLimit};
pub use exit::{ExitError, ExitReason, ExitReport};
pub use host::{HostProcessor, HugePages};
pub use protocol::{
    Call, DiskFault, ErrorCode, Fault, Hello, IncomingState, IncomingStatus, LiveLimits, Message, Notice, PanicKind,
    PauseReason, ProtocolError, Reply, Request, RunState, SaveState, SaveStatus, Status,
};

/// The longest lease that exists: a lease lasts 12 s from the send time of the host's heartbeat (DESIGN §5), plus half a second
/// for hostd's own rounding. A later deadline is a mistake, or an echo from before a reboot, and is refused.
pub const MAX_LEASE_NS: u64 = 12_500_000_000;

//! What every guest has beside its disks and network cards: the functions on bus 0, and what belongs to them. Their addresses are part of
//! the machine type (see [`crate::pci`] and [`super::layout`]).

use std::sync::{Arc, Mutex};

use super::build::{Context, MachineError};
use super::layout::PORT_PVPANIC;
use crate::bus::PioBus;
use crate::devices::legacy::pvpanic::PvPanic;
use crate::devices::rng::{Rng, RngMetrics};
use crate::devices::watchdog::{Watchdog, WatchdogHandle};
use crate::pci::Topology;
use crate::pci::topology::{RNG_DEVICE, WATCHDOG_DEVICE};
use crate::virtio::pci::TransportError;
use crate::virtio::{VirtioDevice, VirtioPci};

/// These devices, as those who steer, count and save them see them.
#[derive(Clone)]
pub struct FixedHandles {
    pub pvpanic: Arc<Mutex<PvPanic>>,
    pub rng: Arc<RngMetrics>,
    /// Of a guest that has one.
    pub watchdog: Option<Arc<WatchdogHandle>>,
}

impl FixedHandles {
    /// Ends what could still act on the guest, or on the one after it.
    pub fn stop(&self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.stop();
        }
    }
}

/// Makes a virtio device a function of bus 0.
pub(super) type Connect<'a> = &'a dyn Fn(Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, TransportError>;

pub(super) fn add(
    topology: &mut Topology,
    context: &Context,
    pio: &PioBus,
    connect: Connect<'_>,
) -> Result<FixedHandles, MachineError> {
    let pvpanic = Arc::new(Mutex::new(PvPanic::new(Arc::clone(&context.incidents) as _)));
    pio.insert(u64::from(PORT_PVPANIC), 1, pvpanic.clone())?;

    let mut watchdog = None;
    if context.config.watchdog.is_some() {
        let sink = Arc::clone(&context.incidents) as _;
        let has_fired = Arc::clone(&context.watchdog_has_fired);
        let (function, handle) = Watchdog::open(Arc::clone(&context.gate), sink, has_fired)?;
        topology.add_fixed(WATCHDOG_DEVICE, function)?;
        watchdog = Some(handle);
    }

    let rng = Rng::open(Arc::clone(&context.gate))?;
    let handles = FixedHandles { pvpanic, rng: rng.metrics(), watchdog };
    topology.add_fixed(RNG_DEVICE, connect(rng)?)?;
    Ok(handles)
}

//! What every guest has beside its disks and network cards: the functions on bus 0, and what belongs to them. Their addresses are part of
//! the machine type (see [`crate::pci`] and [`super::layout`]).

use std::sync::Arc;

use super::build::{Context, MachineError};
use super::layout::Layout;
use super::open_device::Connections;
use crate::devices::balloon::{Balloon, BalloonHandle, Ram};
use crate::devices::rng::{Rng, RngMetrics};
use crate::devices::watchdog::{Watchdog, WatchdogHandle};
use crate::pci::Topology;
use crate::pci::topology::{BALLOON_DEVICE, RNG_DEVICE, WATCHDOG_DEVICE};

/// These devices, as those who steer and count them see them. Nothing here keeps guest memory.
#[derive(Clone)]
pub struct FixedHandles {
    pub rng: Arc<RngMetrics>,
    pub balloon: Arc<BalloonHandle>,
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

pub(super) fn add(
    topology: &mut Topology,
    context: &Context,
    layout: &Layout,
    connections: &Connections,
) -> Result<FixedHandles, MachineError> {
    let mut watchdog = None;
    if context.config.watchdog.is_some() {
        let sink = Arc::clone(&context.incidents) as _;
        let has_fired = Arc::clone(&context.watchdog_has_fired);
        let (function, handle) = Watchdog::open(Arc::clone(&context.gate), sink, has_fired)?;
        topology.add_fixed(WATCHDOG_DEVICE, function)?;
        watchdog = Some(handle);
    }

    let rng = Rng::open(Arc::clone(&context.gate))?;
    let rng_metrics = rng.metrics();
    topology.add_fixed(RNG_DEVICE, connections.integrate(rng)?)?;
    let (device, balloon) = Balloon::open(Ram::of(layout), context.config.memory_bytes, Arc::clone(&context.gate))?;
    topology.add_fixed(BALLOON_DEVICE, connections.integrate(device)?)?;
    Ok(FixedHandles { rng: rng_metrics, balloon, watchdog })
}

//! What every guest has beside its disks and network cards: the functions on bus 0, and what belongs to them. Their addresses are part of
//! the machine type (see [`crate::pci`] and [`super::layout`]).

use std::sync::{Arc, Mutex};

use super::build::{Context, MachineError};
use super::layout::{Layout, PORT_PVPANIC};
use crate::bus::PioBus;
use crate::devices::balloon::{Balloon, BalloonHandle, Ram};
use crate::devices::legacy::pvpanic::PvPanic;
use crate::devices::rng::{Rng, RngMetrics};
use crate::devices::watchdog::{Watchdog, WatchdogHandle};
use crate::pci::Topology;
use crate::pci::topology::{BALLOON_DEVICE, RNG_DEVICE, WATCHDOG_DEVICE};
use crate::virtio::pci::TransportError;
use crate::virtio::{VirtioDevice, VirtioPci};

/// These devices, as those who steer, count and save them see them. Nothing here keeps guest memory: the control thread holds it until
/// the next machine is there.
#[derive(Clone)]
pub struct FixedHandles {
    pub pvpanic: Arc<Mutex<PvPanic>>,
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

/// What they are made from.
pub(super) struct Base<'a> {
    pub context: &'a Context,
    pub layout: &'a Layout,
    pub pio: &'a PioBus,
}

/// Makes a virtio device a function of bus 0.
pub(super) type Connect<'a> = &'a dyn Fn(Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, TransportError>;

pub(super) fn add(
    topology: &mut Topology,
    base: &Base<'_>,
    connect: Connect<'_>,
) -> Result<FixedHandles, MachineError> {
    let Base { context, layout, pio } = *base;
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
    let rng_metrics = rng.metrics();
    topology.add_fixed(RNG_DEVICE, connect(rng)?)?;
    let (device, balloon) = Balloon::open(Ram::of(layout), context.config.memory_bytes, Arc::clone(&context.gate))?;
    topology.add_fixed(BALLOON_DEVICE, connect(device)?)?;
    Ok(FixedHandles { pvpanic, rng: rng_metrics, balloon, watchdog })
}

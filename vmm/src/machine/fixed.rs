//! The functions that every guest has on bus 0, beside its root ports. Their addresses belong to the machine type (see [`crate::pci`]).

use std::sync::Arc;

use super::build::{Context, MachineError};
use crate::devices::rng::{Rng, RngMetrics};
use crate::pci::Topology;
use crate::pci::topology::RNG_DEVICE;
use crate::virtio::pci::TransportError;
use crate::virtio::{VirtioDevice, VirtioPci};

/// The fixed functions of a machine, as those who steer and count them see them.
#[derive(Clone)]
pub struct FixedHandles {
    pub rng: Arc<RngMetrics>,
}

/// Makes a virtio device a function of bus 0.
pub(super) type Connect<'a> = &'a dyn Fn(Arc<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, TransportError>;

pub(super) fn add(
    topology: &mut Topology,
    context: &Context,
    connect: Connect<'_>,
) -> Result<FixedHandles, MachineError> {
    let rng = Rng::open(Arc::clone(&context.gate))?;
    let handles = FixedHandles { rng: rng.metrics() };
    topology.add_fixed(RNG_DEVICE, connect(rng)?)?;
    Ok(handles)
}

//! The network card as the transport sees it.

use std::sync::Arc;

use super::NetError;
use super::config::{Agreed, FEATURES, MAX_BUFFERS, NetConfig, QUEUE_SIZES, RECEIVE, TRANSMIT};
use super::state::SavedNet;
use super::tap::Tap;
use super::thread::{self, Command, Driver, Link, NetHandle, Start};
use crate::cpu::gate::RunGate;
use crate::virtio::device::{DeviceError, QueuePosition};
use crate::virtio::{Activation, ActiveQueue, DeviceKind, DeviceQueue, VirtioDevice};

const NAME: &str = "net";

/// A virtio network device. Its work is done by its thread.
pub struct Net {
    config: NetConfig,
    link: Arc<Link>,
}

impl Net {
    /// Connects a card to its tap and starts its thread. Frames pass `gate`, as the guest's vCPUs do.
    pub fn open(
        config: NetConfig,
        tap: Box<dyn Tap>,
        gate: Arc<RunGate>,
    ) -> Result<(Arc<Self>, Arc<NetHandle>), NetError> {
        let link = thread::start(&config.name, tap, gate)?;
        let handle = Arc::new(NetHandle { config: config.clone(), link: Arc::clone(&link) });
        Ok((Arc::new(Self { config, link }), handle))
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 1, class: [0x02, 0x00, 0x00], name: NAME }
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.config_bytes(self.link.is_link_up());
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let mut take = |index: u16| queues.get_mut(usize::from(index)).and_then(Option::take);
        let (Some(receive), Some(transmit)) = (take(RECEIVE), take(TRANSMIT)) else {
            // A card without both directions moves nothing.
            return Ok(());
        };
        let serve = |index: u16, active: ActiveQueue| {
            let queue = DeviceQueue::new(index, active.queue, memory.clone(), Arc::clone(&interrupt), MAX_BUFFERS);
            (queue, active.kick)
        };
        let (receive, receive_kick) = serve(RECEIVE, receive);
        let (transmit, transmit_kick) = serve(TRANSMIT, transmit);
        self.link.send(Command::Activate(Box::new(Start {
            receive,
            transmit,
            agreed: Agreed::new(features, self.config.mtu),
            driver: Driver { kicks: [receive_kick, transmit_kick], interrupt },
        })))
    }

    fn begin_reset(&self) {
        self.link.begin_reset();
    }

    fn is_reset(&self) -> bool {
        self.link.is_reset()
    }

    fn positions(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        Ok(self.link.positions()?.map(Vec::from).unwrap_or_default())
    }

    fn save(&self) -> Result<serde_json::Value, DeviceError> {
        // The thread answers in order: a cable that was pulled a moment ago is out when this returns.
        self.link.positions()?;
        serde_json::to_value(SavedNet::of(&self.config, self.link.is_link_up()))
            .map_err(|source| DeviceError::Encoding { device: NAME, source })
    }

    fn restore(&self, saved: serde_json::Value) -> Result<(), DeviceError> {
        let saved: SavedNet =
            serde_json::from_value(saved).map_err(|source| DeviceError::Encoding { device: NAME, source })?;
        saved.check(&self.config)?;
        self.link.show_link(saved.link_up);
        self.link.send(Command::Restored { link_up: saved.link_up })
    }
}

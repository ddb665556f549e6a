//! The ways that guests take between machines: the bytes of a migration, which the product carries over TLS. What matters of them
//! here is what stands still when, and what arrives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use statemachine::HostId;

use super::hardware::Hardware;
use super::network::Network;

#[derive(Clone)]
pub struct Roads {
    network: Network,
    machines: Arc<Mutex<BTreeMap<HostId, Hardware>>>,
}

impl Roads {
    pub fn new(network: Network) -> Roads {
        Roads { network, machines: Arc::default() }
    }

    pub fn lead_to(&self, host: HostId, hardware: Hardware) {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner).insert(host, hardware);
    }

    /// The machine at the other end, if bytes get there now: both directions are open and its hostd lives.
    pub fn far(&self, from: HostId, to: HostId) -> Option<Hardware> {
        let open = self.network.carries(from, to) && self.network.carries(to, from);
        let machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.get(&to).filter(|_| open).cloned()
    }
}

//! The agents of this host's guests, for whoever asks over the API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use tokio::sync::watch;

use super::AgentError;
use super::freeze::FrozenGuard;
use super::task::AgentOrders;
use super::task::AgentView;

/// One guest's agent.
#[derive(Debug, Clone)]
pub struct Agent {
    pub orders: AgentOrders,
    pub view: watch::Receiver<AgentView>,
    frozen: Arc<Mutex<Option<FrozenGuard>>>,
}

impl Agent {
    /// Freezes the guest's file systems until [`Agent::thaw`], and for `limit` at most; how many.
    pub async fn freeze(&self, limit: Duration) -> Result<u64, AgentError> {
        let guard = self.orders.freeze(limit).await?;
        let filesystems = guard.filesystems();
        *lock(&self.frozen) = Some(guard);
        Ok(filesystems)
    }

    pub async fn thaw(&self) -> Result<(), AgentError> {
        let guard = lock(&self.frozen).take();
        match guard {
            Some(guard) => guard.thaw().await,
            None => Err(AgentError::ThawedEarly),
        }
    }
}

/// By VM; the epoch tells a guest from the one before it.
#[derive(Debug, Clone, Default)]
pub struct Agents(Arc<Mutex<BTreeMap<VmId, (Epoch, Agent)>>>);

impl Agents {
    /// Known until the entry is dropped.
    pub fn enter(&self, vm: VmId, epoch: Epoch, orders: AgentOrders, view: watch::Receiver<AgentView>) -> Entry {
        let agent = Agent { orders, view, frozen: Arc::default() };
        lock(&self.0).insert(vm, (epoch, agent));
        Entry { agents: self.clone(), vm, epoch }
    }

    pub fn of(&self, vm: VmId) -> Option<Agent> {
        lock(&self.0).get(&vm).map(|(_, agent)| agent.clone())
    }
}

/// An agent's place among the others.
#[derive(Debug)]
pub struct Entry {
    agents: Agents,
    vm: VmId,
    epoch: Epoch,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut agents = lock(&self.agents.0);
        if agents.get(&self.vm).is_some_and(|(epoch, _)| *epoch == self.epoch) {
            agents.remove(&self.vm);
        }
    }
}

/// What is behind these locks is whole after every statement, so a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

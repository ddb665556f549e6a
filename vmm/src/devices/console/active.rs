//! The queues while the driver has given them to the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::EventFd;

use super::config::{CONTROL_RECEIVE, CONTROL_TRANSMIT, MAX_BUFFERS, MULTIPORT, PORTS, QUEUE_SIZES, queues_of};
use super::control::{Control, MAX_MESSAGE_BYTES};
use super::metrics::ConsoleMetrics;
use super::port::{CHAINS_PER_PASS, Pass, PortQueues};
use crate::virtio::device::QueuePosition;
use crate::virtio::{Activation, ActiveQueue, DeviceQueue, QueueError, VirtioInterrupt};

/// What the driver gave at DRIVER_OK. A port or the control queues are served when both of their queues are there.
pub struct Active {
    /// By index.
    pub ports: [Option<PortQueues>; PORTS],
    pub control: Option<ControlQueues>,
    kicks: Vec<Arc<EventFd>>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

/// The control queues.
pub struct ControlQueues {
    receive: DeviceQueue,
    transmit: DeviceQueue,
}

/// What came of listening to the driver.
pub struct Listened {
    pub pass: Pass,
    /// At least one message changed something.
    pub heard: bool,
}

impl Active {
    pub fn new(activation: Activation) -> Self {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let multiport = features & MULTIPORT != 0;
        let mut kicks = Vec::new();
        let mut take_pair = |receive: u16, transmit: u16| {
            let mut take = |index: u16| queues.get_mut(usize::from(index)).and_then(Option::take);
            let pair = [(receive, take(receive)?), (transmit, take(transmit)?)];
            Some(pair.map(|(index, ActiveQueue { queue, kick })| {
                kicks.push(Arc::new(kick));
                DeviceQueue::new(index, queue, memory.clone(), Arc::clone(&interrupt), MAX_BUFFERS)
            }))
        };
        let mut take_port = |port: usize| {
            // A driver without MULTIPORT has the first port only.
            let (receive, transmit) = Some(queues_of(port)).filter(|_| port == 0 || multiport)?;
            let [receive, transmit] = take_pair(receive, transmit)?;
            Some(PortQueues { receive, transmit })
        };
        let ports = std::array::from_fn(&mut take_port);
        let control = if multiport { take_pair(CONTROL_RECEIVE, CONTROL_TRANSMIT) } else { None };
        let control = control.map(|[receive, transmit]| ControlQueues { receive, transmit });
        Self { ports, control, kicks, interrupt }
    }

    /// The doorbells of all queues that are served.
    pub fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.kicks.clone()
    }

    pub fn interrupt(&self) -> &Arc<dyn VirtioInterrupt> {
        &self.interrupt
    }

    /// By queue index. A queue that is not served stands at its start.
    pub fn positions(&self) -> Vec<QueuePosition> {
        let mut positions = vec![QueuePosition::default(); QUEUE_SIZES.len()];
        let mut note = |index: u16, queue: &DeviceQueue| positions[usize::from(index)] = queue.position();
        for (port, queues) in self.ports.iter().enumerate() {
            if let Some(queues) = queues {
                let (receive, transmit) = queues_of(port);
                note(receive, &queues.receive);
                note(transmit, &queues.transmit);
            }
        }
        if let Some(control) = &self.control {
            note(CONTROL_RECEIVE, &control.receive);
            note(CONTROL_TRANSMIT, &control.transmit);
        }
        positions
    }
}

impl ControlQueues {
    /// Reads the driver's messages. `hear` says whether one meant something.
    pub fn listen(
        &mut self,
        mut hear: impl FnMut(&[u8]) -> bool,
        metrics: &ConsoleMetrics,
    ) -> Result<Listened, QueueError> {
        let queue = &mut self.transmit;
        queue.disable_doorbell()?;
        let (mut pass, mut served, mut heard) = (Pass::More, 0, false);
        while served < CHAINS_PER_PASS {
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                pass = Pass::Idle;
                break;
            };
            let mut message = [0; MAX_MESSAGE_BYTES];
            let len = chain.readable.len().min(MAX_MESSAGE_BYTES as u64) as usize;
            if chain.readable.read(queue.memory(), &mut message[..len]) && hear(&message[..len]) {
                heard = true;
            } else {
                metrics.control_ignored.fetch_add(1, Ordering::Relaxed);
            }
            queue.complete(chain.head, 0)?;
            served += 1;
        }
        if served > 0 {
            queue.notify()?;
        }
        Ok(Listened { pass, heard })
    }

    /// Tells the driver what is left to say, as far as it gave buffers.
    pub fn tell(&mut self, control: &mut Control, metrics: &ConsoleMetrics) -> Result<Pass, QueueError> {
        let queue = &mut self.receive;
        queue.disable_doorbell()?;
        let (mut pass, mut served) = (Pass::More, 0);
        while served < CHAINS_PER_PASS {
            let Some(message) = control.next_message() else {
                pass = Pass::Idle;
                break;
            };
            let Some(chain) = queue.pop()? else {
                // A buffer will ring the doorbell.
                if queue.enable_doorbell()? {
                    continue;
                }
                pass = Pass::Idle;
                break;
            };
            let bytes = message.encode();
            let written = if chain.writable.write(queue.memory(), &bytes) {
                control.told(message);
                bytes.len()
            } else {
                // Too small: the next buffer may be larger.
                metrics.control_ignored.fetch_add(1, Ordering::Relaxed);
                0
            };
            queue.complete(chain.head, written as u32)?;
            served += 1;
        }
        if served > 0 {
            queue.notify()?;
        }
        Ok(pass)
    }
}

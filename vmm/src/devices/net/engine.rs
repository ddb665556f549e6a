//! The state machine of a network card: two rings on one side, a tap on the other. No thread and no clock: each pass does a bounded
//! amount of work and says what to wait for.

use std::io;
use std::sync::Arc;

use super::config::{Agreed, Offloads};
use super::header::HEADER_BYTES;
use super::metrics::{NetMetrics, add};
use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::transmit::{Sent, Transmitter};
use crate::virtio::device::QueuePosition;
use crate::virtio::{DeviceQueue, QueueError};

/// More than a tap queues, unless somebody set it so: what comes on top is of now.
const STALE_FRAMES: usize = 4096;

/// What to wait for after a pass.
#[derive(Debug, Default)]
pub struct Waits {
    /// For nothing: there is more to do.
    pub more: bool,
    /// For a frame on the tap.
    pub tap_readable: bool,
    /// For room in the tap.
    pub tap_writable: bool,
    /// The tap has just become useless: the link is down for good.
    pub tap_error: Option<io::Error>,
}

/// The device side of a card.
pub struct Engine {
    tap: Box<dyn Tap>,
    metrics: Arc<NetMetrics>,
    queues: Option<Queues>,
    link_up: bool,
    /// The host deleted the interface.
    tap_gone: bool,
    /// The driver came with a saved state: what waits in the tap is for it.
    restored: bool,
}

struct Queues {
    receive: Receiver,
    transmit: Transmitter,
}

impl Engine {
    pub fn new(tap: Box<dyn Tap>, metrics: Arc<NetMetrics>) -> Self {
        Self { tap, metrics, queues: None, link_up: true, tap_gone: false, restored: false }
    }

    pub fn tap(&self) -> &dyn Tap {
        &*self.tap
    }

    pub fn set_link(&mut self, up: bool) {
        if up && !self.link_up {
            // What came while the cable was out did not come.
            self.discard_waiting();
        }
        self.link_up = up;
    }

    pub fn restore(&mut self, link_up: bool) {
        self.link_up = link_up;
        self.restored = true;
    }

    /// A driver has agreed on features and put up its queues.
    pub fn activate(&mut self, receive: DeviceQueue, transmit: DeviceQueue, agreed: Agreed) {
        self.set_offloads(agreed.to_guest);
        if !std::mem::take(&mut self.restored) {
            // Frames of before its time, and in a form that it may not know.
            self.discard_waiting();
        }
        self.queues =
            Some(Queues { receive: Receiver::new(receive, agreed), transmit: Transmitter::new(transmit, agreed) });
    }

    /// Forgets the driver's queues: nothing writes to guest memory when this returns.
    pub fn stop_serving(&mut self) {
        self.queues = None;
    }

    /// Frames to nobody are plain ones.
    pub fn forget_offloads(&self) {
        self.set_offloads(Offloads::NONE);
    }

    fn set_offloads(&self, to_guest: Offloads) {
        if let Err(error) = self.tap.set_offloads(to_guest) {
            // Frames come as before: whole and with checksums from the start, else judged one by one.
            tracing::warn!(%error, ?to_guest, "the tap does not take the driver's choice of offloads");
        }
    }

    fn discard_waiting(&self) {
        let mut header = [0u8; HEADER_BYTES];
        let list = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES }];
        for _ in 0..STALE_FRAMES {
            // SAFETY: the buffer is ours; what does not fit is lost, as intended.
            match unsafe { self.tap.read_frame(&list) } {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
    }

    /// Of both queues, while there is a driver.
    pub fn positions(&self) -> Option<[QueuePosition; 2]> {
        let queues = self.queues.as_ref()?;
        Some([queues.receive.position(), queues.transmit.position()])
    }

    /// Moves frames both ways. The error is the driver's.
    pub fn serve(&mut self) -> Result<Waits, QueueError> {
        let Some(queues) = self.queues.as_mut() else {
            return Ok(Waits::default());
        };
        let mut waits = Waits::default();
        let cable = (self.link_up && !self.tap_gone).then_some(&*self.tap);
        match queues.transmit.serve(cable, &self.metrics)? {
            Sent::More => waits.more = true,
            Sent::AwaitsFrames => {}
            Sent::AwaitsRoom => waits.tap_writable = true,
            Sent::TapGone(error) => waits.tap_error = Some(error),
        }
        if let Some(tap) = cable.filter(|_| waits.tap_error.is_none()) {
            match queues.receive.serve(tap, &self.metrics)? {
                Received::More => waits.more = true,
                Received::AwaitsFrame => waits.tap_readable = true,
                Received::AwaitsBuffers => {}
                Received::TapGone(error) => waits.tap_error = Some(error),
            }
        }
        if waits.tap_error.is_some() {
            self.tap_gone = true;
            // What is in the ring is dropped from now on.
            waits.more = true;
        }
        Ok(waits)
    }

    pub fn count_driver_error(&self) {
        add(&self.metrics.driver_errors, 1);
    }
}

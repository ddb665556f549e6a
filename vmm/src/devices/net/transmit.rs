//! From the guest to the tap: header and frame in one call, the frame straight from guest memory.

use std::io;

use vm_memory::Permissions;

use super::config::{Agreed, MAX_FRAME_BYTES, MIN_FRAME_BYTES, TRANSMIT};
use super::header::{FrameHeader, HEADER_BYTES};
use super::metrics::{NetMetrics, add};
use super::tap::{HostBuffers, Tap};
use crate::virtio::chain::ChainError;
use crate::virtio::device::QueuePosition;
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Frames of one pass.
const FRAMES_PER_PASS: usize = 64;

/// What a pass left.
#[derive(Debug)]
pub enum Sent {
    /// More frames may be there.
    More,
    /// The ring is empty; the doorbell will ring.
    AwaitsFrames,
    /// The tap has no room for the next frame.
    AwaitsRoom,
    /// The tap does not work any more.
    TapGone(io::Error),
}

pub struct Transmitter {
    queue: DeviceQueue,
    agreed: Agreed,
    /// A frame that the tap had no room for.
    held: Option<Chain>,
    /// For the call: kept, so that a frame costs no allocation.
    list: HostBuffers,
}

/// What became of a frame.
enum Fate {
    Done,
    Full,
    TapGone(io::Error),
}

impl Transmitter {
    pub fn new(queue: DeviceQueue, agreed: Agreed) -> Self {
        Self { queue, agreed, held: None, list: HostBuffers::default() }
    }

    /// Where the guest goes on: a frame that is held is as if it had never been taken.
    pub fn position(&self) -> QueuePosition {
        let position = self.queue.position();
        let held = u16::from(self.held.is_some());
        QueuePosition { next_avail: position.next_avail.wrapping_sub(held), ..position }
    }

    /// Moves a bounded number of frames. Without a tap they are dropped.
    pub fn serve(&mut self, tap: Option<&dyn Tap>, metrics: &NetMetrics) -> Result<Sent, QueueError> {
        self.queue.disable_doorbell()?;
        let used_before = self.queue.position().next_used;
        let mut result = Sent::More;
        for _ in 0..FRAMES_PER_PASS {
            let next = match self.held.take() {
                Some(chain) => Some(chain),
                None => self.queue.pop()?,
            };
            let Some(chain) = next else {
                if self.queue.enable_doorbell()? {
                    continue;
                }
                result = Sent::AwaitsFrames;
                break;
            };
            match self.send(&chain, tap, metrics)? {
                Fate::Done => self.queue.complete(chain.head, 0)?,
                Fate::Full => {
                    self.held = Some(chain);
                    result = Sent::AwaitsRoom;
                    break;
                }
                Fate::TapGone(error) => {
                    self.held = Some(chain);
                    result = Sent::TapGone(error);
                    break;
                }
            }
        }
        if self.queue.position().next_used != used_before {
            self.queue.notify()?;
        }
        Ok(result)
    }

    fn send(&mut self, chain: &Chain, tap: Option<&dyn Tap>, metrics: &NetMetrics) -> Result<Fate, QueueError> {
        let dropped = || {
            add(&metrics.tx_dropped, 1);
            Ok(Fate::Done)
        };
        let (Some(tap), Some(frame_bytes)) = (tap, frame_bytes(chain)) else {
            return dropped();
        };
        let copy_failed = || QueueError::Chain { index: TRANSMIT, source: ChainError::Copy { head: chain.head } };
        // A copy: the guest may write to its own at any moment, and what is judged is what the kernel gets.
        let mut header = [0; HEADER_BYTES];
        if !chain.readable.read(self.queue.memory(), &mut header) {
            return Err(copy_failed());
        }
        let Ok(header) = FrameHeader::decode(&header).toward_host(self.agreed.from_guest, frame_bytes) else {
            return dropped();
        };
        let mut header = header.encode();
        let list = &mut self.list.0;
        list.clear();
        list.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
        if !chain.readable.host_buffers(self.queue.memory(), Permissions::Read, HEADER_BYTES as u64, list) {
            return Err(copy_failed());
        }
        // SAFETY: the header is ours, and the queue keeps guest memory mapped.
        match unsafe { tap.write_frame(list) } {
            Ok(()) => {
                add(&metrics.tx_frames, 1);
                add(&metrics.tx_bytes, frame_bytes as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Fate::Full),
            Err(error) if is_gone(&error) => return Ok(Fate::TapGone(error)),
            // The interface is down, the frame is not what it says, memory is short: a network loses frames.
            Err(_) => add(&metrics.tx_refused, 1),
        }
        Ok(Fate::Done)
    }
}

/// Bytes of the frame behind the header, if both can be there.
fn frame_bytes(chain: &Chain) -> Option<usize> {
    let bytes = chain.readable.len().checked_sub(HEADER_BYTES as u64)?;
    let bytes = usize::try_from(bytes).ok()?;
    (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&bytes).then_some(bytes)
}

/// The interface was deleted under its descriptor, which stays useless for ever.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF))
}

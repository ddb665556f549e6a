//! From the tap to the guest: each frame is read straight into the buffers that the driver has put out.
//!
//! How long the next frame is, nobody says before it is read. So the read is offered all buffers that a frame could need, as far as
//! they are there, and behind them memory of our own: a frame that finds too few buffers ends in it, and waits for more. Chains that were
//! taken from the ring and not needed stay in a stock for the next frame.

use std::collections::VecDeque;
use std::io;

use vm_memory::Permissions;

use super::config::{Agreed, MAX_BUFFERS, MAX_FRAME_BYTES, MIN_FRAME_BYTES};
use super::header::{FrameHeader, HEADER_BYTES};
use super::metrics::{NetMetrics, add};
use super::tap::{HostBuffers, Tap};
use crate::virtio::chain::ChainError;
use crate::virtio::device::QueuePosition;
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Frames of one pass.
const FRAMES_PER_PASS: usize = 64;
/// Header and overflow beside the guest's buffers.
const OWN_BUFFERS: usize = 2;
const MAX_LIST: usize = libc::UIO_MAXIOV as usize;

/// What a pass left.
#[derive(Debug)]
pub enum Received {
    /// More frames may be there.
    More,
    /// The tap is empty.
    AwaitsFrame,
    /// The driver has put out too few buffers; the doorbell will ring.
    AwaitsBuffers,
    /// The tap does not work any more.
    TapGone(io::Error),
}

/// A chain that the driver has put out and that no frame has filled.
struct Ready {
    chain: Chain,
    bytes: u64,
    host: HostBuffers,
}

/// The chains that one read was offered, from the front of the stock.
#[derive(Clone, Copy)]
struct Listed {
    chains: usize,
    bytes: u64,
}

/// A frame that filled all chains that it was offered, and ends in the overflow.
struct Split {
    header: FrameHeader,
    /// Header and frame.
    bytes: u64,
    filled: Listed,
}

pub struct Receiver {
    queue: DeviceQueue,
    agreed: Agreed,
    stock: VecDeque<Ready>,
    stock_bytes: u64,
    stock_buffers: usize,
    split: Option<Split>,
    overflow: Box<[u8]>,
    /// For the call: kept, so that a frame costs no allocation.
    list: HostBuffers,
    used: Vec<(u16, u32)>,
}

impl Receiver {
    pub fn new(queue: DeviceQueue, agreed: Agreed) -> Self {
        Self {
            queue,
            agreed,
            stock: VecDeque::new(),
            stock_bytes: 0,
            stock_buffers: 0,
            split: None,
            overflow: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            list: HostBuffers::default(),
            used: Vec::new(),
        }
    }

    /// Where the guest goes on: chains of the stock are as if they had never been taken.
    pub fn position(&self) -> QueuePosition {
        let position = self.queue.position();
        QueuePosition { next_avail: position.next_avail.wrapping_sub(self.stock.len() as u16), ..position }
    }

    /// Moves a bounded number of frames.
    pub fn serve(&mut self, tap: &dyn Tap, metrics: &NetMetrics) -> Result<Received, QueueError> {
        self.queue.disable_doorbell()?;
        let used_before = self.queue.position().next_used;
        let mut result = Received::More;
        for _ in 0..FRAMES_PER_PASS {
            if let Some(wait) = self.step(tap, metrics)? {
                result = wait;
                break;
            }
        }
        if self.queue.position().next_used != used_before {
            self.queue.notify()?;
        }
        Ok(result)
    }

    /// One frame, or a reason to wait.
    fn step(&mut self, tap: &dyn Tap, metrics: &NetMetrics) -> Result<Option<Received>, QueueError> {
        let longest = (HEADER_BYTES + self.agreed.longest_frame()) as u64;
        // Without mergeable buffers a frame has one chain, however short.
        let wanted = match &self.split {
            Some(split) => split.bytes,
            None if self.agreed.mergeable => longest,
            None => 1,
        };
        self.fetch(wanted)?;
        if let Some(split) = self.split.take() {
            return self.finish(split, metrics);
        }
        self.give_back_useless(metrics)?;
        if self.stock.is_empty() {
            // True when a chain has come meanwhile: the next step takes it.
            return Ok((!self.queue.enable_doorbell()?).then_some(Received::AwaitsBuffers));
        }
        let mut header = [0; HEADER_BYTES];
        let listed = self.lay_out(&mut header);
        // SAFETY: the list is of this moment: header and overflow are ours, and the queue keeps guest memory mapped.
        match unsafe { tap.read_frame(&self.list.0) } {
            Ok(bytes) => self.take_in(FrameHeader::decode(&header), bytes as u64, listed, metrics)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Some(Received::AwaitsFrame)),
            Err(error) => return Ok(Some(Received::TapGone(error))),
        }
        Ok(None)
    }

    /// Takes chains until the stock has room for so many bytes, or the ring is empty.
    fn fetch(&mut self, bytes: u64) -> Result<(), QueueError> {
        // A frame that waits is copied, and needs chains beyond those that a list has room for.
        let is_listed = self.split.is_none();
        while self.stock_bytes < bytes {
            if is_listed && self.stock_buffers + MAX_BUFFERS + OWN_BUFFERS > MAX_LIST {
                break;
            }
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            let mut host = HostBuffers::default();
            let memory = self.queue.memory();
            if !chain.writable.host_buffers(memory, Permissions::Write, 0, &mut host.0) {
                return Err(copy_failed(chain.head));
            }
            let bytes = chain.writable.len();
            self.stock_bytes += bytes;
            self.stock_buffers += host.0.len();
            self.stock.push_back(Ready { chain, bytes, host });
        }
        Ok(())
    }

    fn take_first(&mut self) -> Option<Ready> {
        let ready = self.stock.pop_front()?;
        self.stock_bytes -= ready.bytes;
        self.stock_buffers -= ready.host.0.len();
        Some(ready)
    }

    /// A chain without room for the header cannot begin a frame.
    fn give_back_useless(&mut self, metrics: &NetMetrics) -> Result<(), QueueError> {
        while self.stock.front().is_some_and(|ready| ready.bytes < HEADER_BYTES as u64) {
            if let Some(ready) = self.take_first() {
                add(&metrics.rx_bad_buffers, 1);
                self.queue.complete(ready.chain.head, 0)?;
            }
        }
        Ok(())
    }

    /// The list for one read: the header to us, for it is judged before the guest sees it; the frame behind its place in the
    /// first chain; the overflow.
    fn lay_out(&mut self, header: &mut [u8; HEADER_BYTES]) -> Listed {
        let list = &mut self.list.0;
        let mut listed = Listed { chains: 0, bytes: 0 };
        list.clear();
        list.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
        let mut skip = HEADER_BYTES;
        let most = if self.agreed.mergeable { self.stock.len() } else { 1 };
        for ready in self.stock.iter().take(most) {
            // A frame that waited may have left a stock of more buffers than the kernel takes.
            if list.len() + ready.host.0.len() >= MAX_LIST {
                break;
            }
            listed.chains += 1;
            listed.bytes += ready.bytes;
            for buffer in &ready.host.0 {
                let skipped = skip.min(buffer.iov_len);
                skip -= skipped;
                if skipped < buffer.iov_len {
                    // SAFETY: inside of the buffer.
                    let iov_base = unsafe { buffer.iov_base.add(skipped) };
                    list.push(libc::iovec { iov_base, iov_len: buffer.iov_len - skipped });
                }
            }
        }
        list.push(libc::iovec { iov_base: self.overflow.as_mut_ptr().cast(), iov_len: self.overflow.len() });
        listed
    }

    /// Judges what was read.
    fn take_in(
        &mut self,
        header: FrameHeader,
        bytes: u64,
        listed: Listed,
        metrics: &NetMetrics,
    ) -> Result<(), QueueError> {
        // Before all else: the guest's memory has changed, whatever becomes of the frame.
        self.mark_written(bytes, listed)?;
        let frame_bytes = bytes.saturating_sub(HEADER_BYTES as u64) as usize;
        let limit = if header.is_segmented() { MAX_FRAME_BYTES } else { self.agreed.frame_limit };
        let has_length = (MIN_FRAME_BYTES..=limit).contains(&frame_bytes);
        let fits = self.agreed.mergeable || bytes <= listed.bytes;
        let judged = header.toward_guest(self.agreed.to_guest, frame_bytes);
        let (Ok(header), true, true) = (judged, has_length, fits) else {
            add(&metrics.rx_dropped, 1);
            return Ok(());
        };
        if bytes <= listed.bytes {
            return self.deliver(header, bytes, metrics);
        }
        self.split = Some(Split { header, bytes, filled: listed });
        Ok(())
    }

    fn mark_written(&self, bytes: u64, listed: Listed) -> Result<(), QueueError> {
        let mut left = bytes;
        for ready in self.stock.iter().take(listed.chains) {
            let now = left.min(ready.bytes);
            if !ready.chain.writable.mark_written(self.queue.memory(), now) {
                return Err(copy_failed(ready.chain.head));
            }
            left -= now;
        }
        Ok(())
    }

    /// Goes on with a frame that waits for buffers.
    fn finish(&mut self, split: Split, metrics: &NetMetrics) -> Result<Option<Received>, QueueError> {
        if self.stock_bytes < split.bytes {
            // All that the ring can hold is here, and it is too little: nothing will come.
            if self.queue.outstanding() >= self.queue.size() {
                add(&metrics.rx_dropped, 1);
                return Ok(None);
            }
            self.split = Some(split);
            return Ok((!self.queue.enable_doorbell()?).then_some(Received::AwaitsBuffers));
        }
        let mut rest = &self.overflow[..(split.bytes - split.filled.bytes) as usize];
        for ready in self.stock.iter().skip(split.filled.chains) {
            let (now, later) = rest.split_at(rest.len().min(ready.bytes as usize));
            if !ready.chain.writable.write(self.queue.memory(), now) {
                return Err(copy_failed(ready.chain.head));
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.deliver(split.header, split.bytes, metrics)?;
        Ok(None)
    }

    /// Gives the guest the chains that a frame fills, all at once.
    fn deliver(&mut self, header: FrameHeader, bytes: u64, metrics: &NetMetrics) -> Result<(), QueueError> {
        let mut left = bytes;
        self.used.clear();
        for ready in &self.stock {
            let now = left.min(ready.bytes);
            left -= now;
            self.used.push((ready.chain.head, now as u32));
            if left == 0 {
                break;
            }
        }
        let header = FrameHeader { buffers: self.used.len() as u16, ..header };
        if let Some(first) = self.stock.front()
            && !first.chain.writable.write(self.queue.memory(), &header.encode())
        {
            return Err(copy_failed(first.chain.head));
        }
        for _ in 0..self.used.len() {
            self.take_first();
        }
        self.queue.complete_together(&self.used)?;
        add(&metrics.rx_frames, 1);
        add(&metrics.rx_bytes, bytes - HEADER_BYTES as u64);
        Ok(())
    }
}

fn copy_failed(head: u16) -> QueueError {
    QueueError::Chain { index: super::config::RECEIVE, source: ChainError::Copy { head } }
}

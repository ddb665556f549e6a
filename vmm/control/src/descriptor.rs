//! Descriptors that come with a line: how a running vmm is given the tap of a new network card, and the files of disks.
//!
//! They are sent with `SCM_RIGHTS` in the message that begins the line, and belong to the line whose bytes that message ends with. So a line
//! with descriptors is a message of its own, as [`send_line`] makes it. The vmm takes at most [`MAX_DESCRIPTORS`] a line and closes those
//! that the line does not ask for.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::disk::MAX_BACKING_IMAGES;

/// With one line: the file of a disk, and those under it.
pub const MAX_DESCRIPTORS: usize = 1 + MAX_BACKING_IMAGES;

/// Sends a whole line, with its end, and descriptors with it. Waits for the peer like any write; on a non-blocking socket
/// `WouldBlock` before the first byte means that nothing was sent.
pub fn send_line(mut stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other(format!("more than {MAX_DESCRIPTORS} descriptors with a line")));
    }
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(stream, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL))?;
    // The descriptors went with the first bytes.
    stream.write_all(&line[sent..])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSliceMut, Read, Seek};
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn line_and_descriptor_arrive_together() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"tap").unwrap();
        send_line(&near, b"{}\n", &[file.as_fd()]).unwrap();

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 16];
        let got = recvmsg(&far, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(&bytes[..got.bytes], b"{}\n");
        let received: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        let [received] = <[OwnedFd; 1]>::try_from(received).unwrap();
        let mut same = File::from(received);
        same.rewind().unwrap();
        let mut text = String::new();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "tap");
    }
}

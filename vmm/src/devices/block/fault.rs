//! What an I/O error does, by the disk's policy.

use std::io;

use vmm_control::{DiskFault, OnError};

use super::request::Operation;

/// Told when a disk stops its guest. From the disk's thread; must not wait.
pub trait DiskFaults: Send + Sync {
    fn stopped(&self, fault: DiskFault);
}

/// What becomes of a request that storage failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept, and the guest stands until somebody asks to try again.
    Stop,
    Report,
    /// Answered as if it had succeeded.
    Ignore,
}

/// `errno` is positive.
pub fn verdict(policy: OnError, errno: i32) -> Verdict {
    match policy {
        OnError::Stop => Verdict::Stop,
        OnError::Report => Verdict::Report,
        OnError::Ignore => Verdict::Ignore,
        OnError::Enospc if is_no_space(errno) => Verdict::Stop,
        OnError::Enospc => Verdict::Report,
    }
}

/// A full file system, a full quota, and a full thin pool.
fn is_no_space(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT)
}

/// In words, for those who have to look after the storage.
pub fn describe(disk: &str, operation: Operation, len: u64, errno: i32) -> DiskFault {
    let error = io::Error::from_raw_os_error(errno);
    let what = match operation {
        Operation::Read { offset } => format!("read of {len} bytes at {offset}: {error}"),
        Operation::Write { offset } => format!("write of {len} bytes at {offset}: {error}"),
        Operation::Flush => format!("flush: {error}"),
        Operation::Discard { offset, len } => format!("discard of {len} bytes at {offset}: {error}"),
        Operation::Zero { offset, len, .. } => format!("zeroing of {len} bytes at {offset}: {error}"),
    };
    DiskFault { disk: disk.to_owned(), what, no_space: is_no_space(errno) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_space_stops_under_enospc() {
        assert_eq!(verdict(OnError::Enospc, libc::ENOSPC), Verdict::Stop);
        assert_eq!(verdict(OnError::Enospc, libc::EDQUOT), Verdict::Stop);
        assert_eq!(verdict(OnError::Enospc, libc::EIO), Verdict::Report);
        for errno in [libc::EIO, libc::ENOSPC] {
            assert_eq!(verdict(OnError::Stop, errno), Verdict::Stop);
            assert_eq!(verdict(OnError::Report, errno), Verdict::Report);
            assert_eq!(verdict(OnError::Ignore, errno), Verdict::Ignore);
        }
    }

    #[test]
    fn a_fault_says_what_and_where() {
        let fault = describe("vda", Operation::Write { offset: 8192 }, 4096, libc::ENOSPC);
        assert!(fault.no_space);
        assert!(fault.what.starts_with("write of 4096 bytes at 8192: No space left"), "{}", fault.what);
    }
}

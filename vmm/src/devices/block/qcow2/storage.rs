//! The file under an image, as `imago` sees it: positioned I/O, with O_DIRECT where that works, and a fence.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use super::super::backend::DISCARD_MODE;
use super::super::disk::AlignedBuffer;
use super::tables::ReadAt;

thread_local! {
    /// Writes of this thread are durable one by one.
    static IN_ORDER: Cell<bool> = const { Cell::new(false) };
}

/// While `work` runs, each of its writes is on stable storage before the next one begins.
///
/// `imago` writes refcounts before the tables that rely on them, and leaves it at that: without this the order holds in the page
/// cache and not on the medium, and a host that loses power could leave tables that point to clusters which count as free.
pub fn in_order<T>(work: impl FnOnce() -> T) -> T {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            IN_ORDER.set(self.0);
        }
    }
    let _reset = Reset(IN_ORDER.replace(true));
    work()
}

/// An open file of a chain, shared by the image on it and by those who fence it.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    /// What O_DIRECT asks for; 1 without it.
    align: usize,
    fenced: AtomicBool,
    failures: AtomicU64,
    /// Stands for a file system that is full.
    #[cfg(test)]
    pub(super) full: AtomicBool,
}

impl ImageFile {
    pub fn new(file: File, path: PathBuf, align: Option<usize>) -> Arc<Self> {
        Arc::new(Self {
            file,
            path,
            align: align.unwrap_or(1),
            fenced: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            #[cfg(test)]
            full: AtomicBool::new(false),
        })
    }

    /// No write of this process reaches the file any more, whatever is still in memory.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
    }

    /// I/O that the system refused. An error of `imago` without one is the image's own fault.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::SeqCst)
    }

    pub fn bytes(&self) -> io::Result<u64> {
        // Also right for block devices, whose metadata has no length.
        (&self.file).seek(SeekFrom::End(0))
    }

    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the descriptor is ours.
        self.checked(unsafe { libc::fdatasync(self.file.as_raw_fd()) } as i64).map(drop)
    }

    /// Gives a range back to the file system. It is a favour: not every one can.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(DISCARD_MODE, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn checked(&self, result: i64) -> io::Result<usize> {
        if result >= 0 {
            return Ok(result as usize);
        }
        Err(self.failed(io::Error::last_os_error()))
    }

    fn failed(&self, error: io::Error) -> io::Error {
        // A file system without an operation is no failure: it is done in another way then.
        if error.kind() != io::ErrorKind::Unsupported {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        error
    }

    fn may_write(&self) -> io::Result<()> {
        if self.fenced.load(Ordering::SeqCst) {
            return Err(self.failed(io::Error::from_raw_os_error(libc::EIO)));
        }
        Ok(())
    }

    #[cfg(test)]
    fn has_space(&self, end: u64) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) && end > self.bytes()? {
            return Err(self.failed(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        Ok(())
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests have a file system that is full")]
    fn has_space(&self, _end: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        self.may_write()?;
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        self.has_space(end)?;
        let (offset, len) = (file_offset(offset)?, file_offset(len)?);
        // SAFETY: the descriptor is ours.
        self.checked(i64::from(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) })).map(drop)
    }

    /// Moves all of `list`, which lies at `offset`. Stops early only where a read meets the end of the file; returns the bytes moved.
    fn transfer(
        &self,
        mut list: Vec<libc::iovec>,
        offset: u64,
        mut step: impl FnMut(&[libc::iovec], i64) -> isize,
    ) -> io::Result<u64> {
        let mut done = 0;
        loop {
            list.retain(|buffer| buffer.iov_len > 0);
            if list.is_empty() {
                return Ok(done);
            }
            let at = file_offset(offset.checked_add(done).ok_or(io::ErrorKind::InvalidInput)?)?;
            let batch = &list[..list.len().min(libc::UIO_MAXIOV as usize)];
            let moved = match self.checked(step(batch, at) as i64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                moved => moved?,
            };
            done += moved as u64;
            if moved == 0 || !moved.is_multiple_of(self.align) {
                return Ok(done);
            }
            advance(&mut list, moved);
        }
    }
}

fn file_offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Takes the first `bytes` off the buffers.
fn advance(list: &mut [libc::iovec], mut bytes: usize) {
    for buffer in list {
        let taken = bytes.min(buffer.iov_len);
        // SAFETY: not beyond the end of the buffer.
        buffer.iov_base = unsafe { buffer.iov_base.cast::<u8>().add(taken) }.cast();
        buffer.iov_len -= taken;
        bytes -= taken;
    }
}

impl ReadAt for ImageFile {
    fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let align = self.align as u64;
        let start = offset / align * align;
        let skip = (offset - start) as usize;
        let Some(mut buffer) = AlignedBuffer::new((skip + len).next_multiple_of(self.align)) else {
            return Ok(Vec::new());
        };
        let list = vec![libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        self.transfer(list, start, |list, at| {
            // SAFETY: the buffer outlives the call.
            unsafe { libc::preadv(self.file.as_raw_fd(), list.as_ptr(), list.len() as i32, at) }
        })?;
        Ok(buffer.bytes()[skip..skip + len].to_vec())
    }
}

/// What `imago` is given.
#[derive(Debug)]
pub struct ImageStorage {
    file: Arc<ImageFile>,
    helper: CommonStorageHelper,
}

impl ImageStorage {
    pub fn new(file: Arc<ImageFile>) -> Self {
        Self { file, helper: CommonStorageHelper::default() }
    }

    pub fn file(&self) -> &ImageFile {
        &self.file
    }
}

impl fmt::Display for ImageStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.path.display().fmt(f)
    }
}

impl Storage for ImageStorage {
    fn mem_align(&self) -> usize {
        self.file.align
    }

    fn req_align(&self) -> usize {
        self.file.align
    }

    fn size(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let file = &*self.file;
        // SAFETY: `bufv` outlives the list.
        let list = unsafe { bufv.as_iovec() }.to_vec();
        let done = file.transfer(list, offset, |list, at| {
            // SAFETY: as above.
            unsafe { libc::preadv(file.file.as_raw_fd(), list.as_ptr(), list.len() as i32, at) }
        })?;
        if done < bufv.len() {
            let (_, mut rest) = bufv.split_at(done);
            rest.fill(0);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let file = &*self.file;
        file.may_write()?;
        file.has_space(offset.saturating_add(bufv.len()))?;
        let flags = if IN_ORDER.get() { libc::RWF_DSYNC } else { 0 };
        // SAFETY: `bufv` outlives the list.
        let list = unsafe { bufv.as_iovec() }.to_vec();
        let done = file.transfer(list, offset, |list, at| {
            // SAFETY: as above.
            unsafe { libc::pwritev2(file.file.as_raw_fd(), list.as_ptr(), list.len() as i32, at, flags) }
        })?;
        if done < bufv.len() {
            return Err(file.failed(io::ErrorKind::WriteZero.into()));
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.allocate(libc::FALLOC_FL_ZERO_RANGE, offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.allocate(libc::FALLOC_FL_ZERO_RANGE, offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

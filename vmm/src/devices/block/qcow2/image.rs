//! An open image, and its requests. Called by several worker threads at once.
//!
//! The library never sees guest memory: data goes through a buffer of ours. A guest that changes a buffer while it is decompressed
//! into, or written from, changes its own data and nothing else.

use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::{FormatAccess, Mapping};

use super::super::disk::AlignedBuffer;
use super::super::worker::{Medium, Work};
use super::header::Header;
use super::storage::{ImageFile, ImageStorage, in_order};

/// What one worker moves at a time.
const CHUNK_BYTES: usize = 1 << 20;

pub struct Image {
    /// Written by those who free clusters: the library hands out their places again, and a request that looked one up before would
    /// meet another's data there. Read by everybody else.
    access: RwLock<ManuallyDrop<FormatAccess<ImageStorage>>>,
    file: Arc<ImageFile>,
    bytes: u64,
    cluster_bytes: u64,
    /// The library failed in a way after which its state cannot be trusted. Nothing is written any more.
    broken: AtomicBool,
}

impl Image {
    pub(super) fn new(access: FormatAccess<ImageStorage>, file: Arc<ImageFile>, header: &Header) -> Self {
        Self {
            access: RwLock::new(ManuallyDrop::new(access)),
            file,
            bytes: header.size,
            cluster_bytes: header.cluster_bytes(),
            broken: AtomicBool::new(false),
        }
    }

    /// Size of the disk that the guest sees.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    fn break_down(&self, why: &str) {
        self.file.fence();
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::error!(file = ?self.file, why, "the image is not used any more; check it with qemu-img");
        }
    }

    /// Runs the library. Its panics end here.
    fn guarded<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_broken() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            self.break_down("the qcow2 library panicked");
            Err(io::Error::from_raw_os_error(libc::EIO))
        })
    }

    fn shared<T>(&self, work: impl FnOnce(&FormatAccess<ImageStorage>) -> io::Result<T>) -> io::Result<T> {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        self.guarded(|| work(&access))
    }

    fn exclusive<T>(&self, work: impl FnOnce(&mut FormatAccess<ImageStorage>) -> io::Result<T>) -> io::Result<T> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        self.guarded(|| work(&mut access))
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.shared(|access| access.read(buffer, offset))
    }

    pub fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.shared(|access| access.write(buffer, offset))
    }

    /// Data and tables of all writes that have ended are on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        self.shared(|access| in_order(|| access.flush()))?;
        self.file.sync()
    }

    /// A flush after which nothing of this process reaches the file, whatever the image is like. Tables that an image cannot take
    /// are given up with the image: waiting for them would never end, and the host would be reset for one bad file.
    pub fn settle(&self) -> io::Result<()> {
        if !self.is_broken() {
            let failures = self.file.failures();
            match self.flush() {
                Ok(()) => return Ok(()),
                Err(error) if self.file.failures() != failures && !self.is_broken() => return Err(error),
                Err(error) => self.break_down(&error.to_string()),
            }
        }
        self.file.sync()
    }

    pub fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.shared(|access| access.write_zeroes(offset, len))
    }

    /// Zeros, and the space is free.
    pub fn unmap_to_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.exclusive(|access| {
            let freed = self.places(access, offset, len)?;
            access.discard_to_zero(offset, len)?;
            self.punch(&freed)
        })
    }

    /// The space is free. What the guest reads there afterwards is of no matter.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.exclusive(|access| {
            let freed = self.places(access, offset, len)?;
            access.discard_to_any(offset, len)?;
            self.punch(&freed)
        })
    }

    /// Where in the file the whole clusters of a range are, those that belong to this range alone. The library frees clusters for
    /// its own use; the file system learns of it from us.
    fn places(&self, access: &FormatAccess<ImageStorage>, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        let end = (offset + len) / self.cluster_bytes * self.cluster_bytes;
        let mut at = offset.next_multiple_of(self.cluster_bytes);
        let mut found = Vec::new();
        while at < end {
            let (mapping, len) = access.get_mapping(at, end - at)?;
            if len == 0 {
                break;
            }
            if let Mapping::Raw { offset, writable: true, .. } = mapping {
                found.push((offset, len));
            }
            at += len;
        }
        Ok(found)
    }

    fn punch(&self, places: &[(u64, u64)]) -> io::Result<()> {
        places.iter().try_for_each(|(offset, len)| self.file.punch(*offset, *len))
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let access = self.access.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the image is being dropped: nobody uses the access after this.
        let access = unsafe { ManuallyDrop::take(access) };
        // The library flushes when it is dropped. What was to be kept is on the disk already, by a flush or a drain; a file that
        // another host may own by now must not be touched.
        self.file.fence();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(access)));
    }
}

impl Medium for Image {
    fn name(&self) -> &'static str {
        "qcow2 on worker threads"
    }

    fn carry_out(&self, work: &Work) -> i64 {
        let result = match work {
            Work::Read { offset, buffers } => self.read_into(*offset, &buffers.0),
            Work::Write { offset, buffers, durable } => self.write_from(*offset, &buffers.0, *durable),
            Work::Flush => self.flush().map(|()| 0),
            Work::Settle => self.settle().map(|()| 0),
            Work::Discard { offset, len } => self.discard(*offset, *len).map(|()| 0),
            Work::Zero { offset, len, unmap: true } => self.unmap_to_zeros(*offset, *len).map(|()| 0),
            Work::Zero { offset, len, unmap: false } => self.write_zeros(*offset, *len).map(|()| 0),
        };
        result.unwrap_or_else(|error| -i64::from(errno_of(&error)))
    }
}

impl Image {
    fn read_into(&self, offset: u64, buffers: &[libc::iovec]) -> io::Result<i64> {
        let mut cursor = Cursor::new(buffers);
        let mut chunk = cursor.chunk()?;
        let mut done = 0;
        while let Some(len) = cursor.next_len() {
            let part = &mut chunk.bytes_mut()[..len];
            self.read(offset + done, part)?;
            cursor.fill(part);
            done += len as u64;
        }
        Ok(done as i64)
    }

    fn write_from(&self, offset: u64, buffers: &[libc::iovec], durable: bool) -> io::Result<i64> {
        let mut cursor = Cursor::new(buffers);
        let mut chunk = cursor.chunk()?;
        let mut done = 0;
        while let Some(len) = cursor.next_len() {
            let part = &mut chunk.bytes_mut()[..len];
            cursor.take(part);
            self.write(offset + done, part)?;
            done += len as u64;
        }
        if durable {
            self.flush()?;
        }
        Ok(done as i64)
    }
}

/// Goes along the buffers of a request. They are valid until its end: the contract of `Backend::start`.
struct Cursor<'a> {
    buffers: &'a [libc::iovec],
    /// Bytes of the first buffer that are done.
    skip: usize,
    left: usize,
}

impl<'a> Cursor<'a> {
    fn new(buffers: &'a [libc::iovec]) -> Self {
        Self { buffers, skip: 0, left: buffers.iter().map(|b| b.iov_len).sum() }
    }

    /// A buffer for what is moved at a time.
    fn chunk(&self) -> io::Result<AlignedBuffer> {
        AlignedBuffer::new(self.left.clamp(1, CHUNK_BYTES)).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn next_len(&self) -> Option<usize> {
        (self.left > 0).then_some(self.left.min(CHUNK_BYTES))
    }

    /// Copies into the buffers.
    fn fill(&mut self, from: &[u8]) {
        self.walk(from.len(), |guest, done, len| {
            // SAFETY: `guest` has `len` bytes, and `from` has them at `done`; the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from[done..done + len].as_ptr(), guest, len) };
        });
    }

    /// Copies out of the buffers.
    fn take(&mut self, into: &mut [u8]) {
        self.walk(into.len(), |guest, done, len| {
            // SAFETY: as in `fill`.
            unsafe { std::ptr::copy_nonoverlapping(guest, into[done..done + len].as_mut_ptr(), len) };
        });
    }

    fn walk(&mut self, len: usize, mut copy: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        while done < len {
            let Some(first) = self.buffers.first() else {
                return;
            };
            let now = (first.iov_len - self.skip).min(len - done);
            // SAFETY: inside of the buffer.
            copy(unsafe { first.iov_base.cast::<u8>().add(self.skip) }, done, now);
            done += now;
            self.skip += now;
            if self.skip == first.iov_len {
                self.buffers = &self.buffers[1..];
                self.skip = 0;
            }
        }
        self.left -= done;
    }
}

/// The library keeps the system's error number in most cases, and the kind of the error in all.
fn errno_of(error: &io::Error) -> i32 {
    match (error.raw_os_error(), error.kind()) {
        (Some(errno), _) if errno > 0 => errno,
        (_, io::ErrorKind::StorageFull) => libc::ENOSPC,
        (_, io::ErrorKind::QuotaExceeded) => libc::EDQUOT,
        (_, io::ErrorKind::Unsupported) => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::super::exercise::open_bytes;
    use super::super::hostile_tests::image;
    use super::*;

    #[test]
    fn a_panic_of_the_library_breaks_the_image_and_not_the_process() {
        let image = open_bytes(&image()).unwrap();
        let error = image.shared(|_| -> io::Result<()> { panic!("as a hostile image might cause") }).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(image.is_broken());
        let mut buffer = [0; 512];
        assert!(image.read(0, &mut buffer).is_err() && image.write(0, &buffer).is_err() && image.flush().is_err());
        // And the guest's lease can still end: nothing can reach the file.
        image.settle().unwrap();
    }

    #[test]
    fn tables_that_storage_refuses_are_not_given_up() {
        let image = open_bytes(&image()).unwrap();
        image.write(4096, &[1; 512]).unwrap();
        image.file.fence();
        assert!(image.settle().is_err());
        assert!(!image.is_broken());
    }

    #[test]
    fn buffers_of_any_shape_are_walked_whole() {
        let image = open_bytes(&image()).unwrap();
        let mut source: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
        let list = |bytes: &mut [u8], cuts: &[usize]| {
            let mut rest = bytes;
            let mut list = Vec::new();
            for cut in cuts {
                let (part, more) = rest.split_at_mut(*cut);
                list.push(libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
                rest = more;
            }
            list
        };
        let from = list(&mut source, &[1, 0, 700, 11, 3384]);
        assert_eq!(image.write_from(512, &from, true).unwrap(), 4096);
        let mut back = vec![0; 4096];
        let into = list(&mut back, &[4000, 3, 93]);
        assert_eq!(image.read_into(512, &into).unwrap(), 4096);
        assert_eq!(back, source);
    }

    #[test]
    fn errors_keep_their_number() {
        assert_eq!(errno_of(&io::Error::from_raw_os_error(libc::ENOSPC)), libc::ENOSPC);
        assert_eq!(errno_of(&io::Error::new(io::ErrorKind::StorageFull, "with words")), libc::ENOSPC);
        assert_eq!(errno_of(&io::Error::new(io::ErrorKind::Unsupported, "with words")), libc::EOPNOTSUPP);
        assert_eq!(errno_of(&io::Error::other("anything")), libc::EIO);
    }
}

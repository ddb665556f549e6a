//! Disks.

use serde::Deserialize;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Name within the VM; the guest sees it as the disk's serial.
    pub id: String,
    pub path: String,
    #[serde(default)]
    pub read_only: bool,
    /// More than one VM may write it (S2's exception).
    #[serde(default)]
    pub shareable: bool,
    #[serde(default)]
    pub format: DiskFormat,
    /// The chain under a qcow2 image, nearest first. It is only read. What the image's header names is opened only if it is here.
    #[serde(default)]
    pub backing: Vec<BackingImage>,
    #[serde(default)]
    pub on_error: OnError,
    #[serde(default)]
    pub rate_limit: Option<RateLimit>,
    /// Where the guest finds it, 1 to [`VmSpec::SLOTS`](super::VmSpec::SLOTS). `None`: the first slot that is free.
    #[serde(default)]
    pub slot: Option<u8>,
}

impl Disk {
    /// What the vmm opens at most; each image costs memory and time.
    pub const MAX_BACKING: usize = 32;

    /// A raw disk of one writer, with everything else as it is by default.
    pub fn raw(id: &str, path: &str) -> Disk {
        Disk {
            id: id.to_owned(),
            path: path.to_owned(),
            read_only: false,
            shareable: false,
            format: DiskFormat::Raw,
            backing: Vec::new(),
            on_error: OnError::Stop,
            rate_limit: None,
            slot: None,
        }
    }

    /// The files that it opens.
    pub fn volumes(&self) -> impl Iterator<Item = Volume<'_>> {
        let own = Volume { path: &self.path, read_only: self.read_only, shareable: self.shareable };
        let below = self.backing.iter().map(|image| Volume { path: &image.path, read_only: true, shareable: false });
        std::iter::once(own).chain(below)
    }
}

/// A file or device as one disk uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume<'a> {
    pub path: &'a str,
    pub read_only: bool,
    pub shareable: bool,
}

impl Volume<'_> {
    /// S2: a volume has one writer, unless all who use it say that they share it. A path is taken as one volume wherever it is: two
    /// hosts may see the same device under it.
    pub fn clashes(&self, other: &Volume<'_>) -> bool {
        let both = |of: fn(&Volume<'_>) -> bool| of(self) && of(other);
        self.path == other.path && !both(|volume| volume.read_only) && !both(|volume| volume.shareable)
    }
}

/// What the bytes of a file are. Never found out by looking: a guest can write the header of any format into its raw disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    #[default]
    Raw,
    Qcow2,
}

/// An image under a qcow2 disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingImage {
    pub path: String,
    pub format: DiskFormat,
}

/// What happens when storage fails a request of the guest: oVirt's error policy. A file system that sees one error turns read-only
/// and stays so, while a guest that was stopped goes on when the storage is back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The guest is paused; the request is tried again until it succeeds.
    #[default]
    Stop,
    /// The guest is told.
    Report,
    /// The guest is told that it went well.
    Ignore,
    /// `stop` when there is no space, `report` otherwise.
    Enospc,
}

/// How much a disk may do. What is left out has no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Requests a second.
    pub iops: Option<u64>,
    /// Bytes read and written a second.
    pub bytes_per_second: Option<u64>,
    /// Requests that may go at once after a pause; by default what a tenth of a second gives.
    pub burst_iops: Option<u64>,
    /// Bytes likewise.
    pub burst_bytes: Option<u64>,
}

impl RateLimit {
    pub const MAX_IOPS: u64 = 100_000_000;
    /// The largest request takes four minutes at this rate; a slower disk would look dead to its guest.
    pub const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
    pub const MAX_BYTES_PER_SECOND: u64 = 1 << 40;
    /// A burst is at least what the rate gives in a hundredth of a second, the step of the vmm's timer.
    pub const MIN_BURST_OF_RATE: u64 = 100;
}

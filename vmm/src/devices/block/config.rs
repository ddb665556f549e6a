//! What the VM's definition says of a disk, and what of it the driver reads as device configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use vmm_control::{BackingImage, DiskConfig, DiskFormat, OnError, RateLimit};

/// Virtio counts disk space in sectors of 512 bytes, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Places of the one queue. Part of the machine type.
pub const QUEUE_SIZE: u16 = 256;
/// Data buffers of one request: header and status take the other two.
pub const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one data buffer that we ask drivers to keep to; together with [`MAX_SEGMENTS`] it bounds a request.
pub const MAX_SEGMENT_BYTES: u32 = 64 << 10;
/// The largest request that is carried out; a driver that keeps to the limits above never reaches it.
pub const MAX_REQUEST_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
/// 2 GiB in one discard.
pub const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// 64 MiB in one write of zeros: a device without such a command writes them one by one.
pub const MAX_ZERO_SECTORS: u32 = 128 << 10;
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const CONFIG_BYTES: usize = 60;

/// Logical block size that the guest sees. It decides which storage can be used with O_DIRECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum BlockSize {
    #[default]
    #[serde(rename = "512")]
    B512,
    #[serde(rename = "4096")]
    B4096,
}

impl BlockSize {
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// A disk as its definition describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The name in logs, metrics and errors.
    pub name: String,
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    /// Shown to the guest (`/dev/disk/by-id`), cut to 20 bytes.
    #[serde(default)]
    pub serial: String,
    #[serde(default)]
    pub block_size: BlockSize,
    #[serde(default)]
    pub format: DiskFormat,
    /// Under a qcow2 image, nearest first.
    #[serde(default)]
    pub backing: Vec<BackingImage>,
    #[serde(default)]
    pub on_error: OnError,
    #[serde(default)]
    pub rate_limit: Option<RateLimit>,
}

impl From<&DiskConfig> for BlockConfig {
    fn from(disk: &DiskConfig) -> Self {
        Self {
            name: disk.id.clone(),
            path: disk.path.clone(),
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            block_size: BlockSize::default(),
            format: disk.format,
            backing: disk.backing.clone(),
            on_error: disk.on_error,
            rate_limit: disk.rate_limit,
        }
    }
}

/// What requests are checked against: the disk as the driver knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    pub capacity_sectors: u64,
    pub block_bytes: u32,
    pub read_only: bool,
    pub serial: [u8; SERIAL_BYTES],
}

impl Geometry {
    pub fn new(config: &BlockConfig, bytes: u64) -> Self {
        let block_bytes = config.block_size.bytes();
        let mut serial = [0; SERIAL_BYTES];
        let len = config.serial.len().min(SERIAL_BYTES);
        serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
        Self {
            capacity_sectors: bytes / u64::from(block_bytes) * (u64::from(block_bytes) / SECTOR_BYTES),
            block_bytes,
            read_only: config.read_only,
            serial,
        }
    }

    pub fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    /// The device configuration structure (virtio 1.2, 5.2.4).
    pub fn config_bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.capacity_sectors.to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &self.block_bytes.to_le_bytes());
        put(34, &1u16.to_le_bytes());
        if !self.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &(self.block_bytes / SECTOR_BYTES as u32).to_le_bytes());
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        bytes
    }
}

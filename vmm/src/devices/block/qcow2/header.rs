//! The header of a qcow2 image, read by ourselves and before anybody else: pure, every number checked.
//!
//! `imago` reads it again. What it does not check (encryption, sizes against the file, the length of feature names, which makes it
//! panic) is refused here.

use super::ImageError;
use std::path::Path;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The largest cluster that QEMU and `imago` take.
pub const MAX_CLUSTER_BITS: u32 = 21;
const MIN_CLUSTER_BITS: u32 = 9;
/// Bytes from the start of the file that hold any header: it ends within the first cluster.
pub const HEADER_REGION_BYTES: usize = 1 << MAX_CLUSTER_BITS;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// 32 MiB of table, as in QEMU.
pub const MAX_L1_ENTRIES: u64 = 4 << 20;
/// 8 MiB of table, as in QEMU.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME_BYTES: u32 = 1023;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_REFCOUNT_ORDER: u32 = 6;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_BYTES: u32 = 48;

/// What the header says, as far as anybody acts on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Bytes of the disk that the guest sees.
    pub size: u64,
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u64,
    pub refcount_order: u32,
    pub backing_name: Option<String>,
    pub backing_format: Option<String>,
}

impl Header {
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// Big-endian fields of a slice that may be too short.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(usize::try_from(len).ok()?)?;
        self.0.get(at..end)
    }

    fn u32(&self, at: u64) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(at, 4)?.try_into().ok()?))
    }

    fn u64(&self, at: u64) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(at, 8)?.try_into().ok()?))
    }
}

/// Reads a header. `start` is the beginning of the file, up to [`HEADER_REGION_BYTES`]; `file_bytes` is its length.
pub fn parse(path: &Path, start: &[u8], file_bytes: u64) -> Result<Header, ImageError> {
    let fields = Fields(start);
    if fields.bytes(0, 4) != Some(&MAGIC) {
        return Err(ImageError::NotQcow2 { path: path.to_owned() });
    }
    Reader { path, fields, file_bytes }.header()
}

struct Reader<'a> {
    path: &'a Path,
    fields: Fields<'a>,
    file_bytes: u64,
}

impl Reader<'_> {
    fn malformed(&self, what: impl Into<String>) -> ImageError {
        ImageError::Malformed { path: self.path.to_owned(), what: what.into() }
    }

    fn unsupported(&self, what: impl Into<String>) -> ImageError {
        ImageError::Unsupported { path: self.path.to_owned(), what: what.into() }
    }

    fn u32(&self, at: u64) -> Result<u32, ImageError> {
        self.fields.u32(at).ok_or_else(|| self.malformed("the header is cut off"))
    }

    fn u64(&self, at: u64) -> Result<u64, ImageError> {
        self.fields.u64(at).ok_or_else(|| self.malformed("the header is cut off"))
    }

    fn header(&self) -> Result<Header, ImageError> {
        let version = self.u32(4)?;
        if !matches!(version, 2 | 3) {
            return Err(self.unsupported(format!("qcow2 version {version}")));
        }
        let cluster_bits = self.u32(20)?;
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(self.malformed(format!("clusters of 2^{cluster_bits} bytes")));
        }
        if self.u32(32)? != 0 {
            return Err(self.unsupported("encryption"));
        }
        if self.u32(60)? > MAX_SNAPSHOTS {
            return Err(self.malformed("too many snapshots"));
        }
        let (refcount_order, header_bytes) = self.version_3_fields(version, cluster_bits)?;
        let backing_format = self.extensions(version, cluster_bits, header_bytes)?;
        let header = Header {
            version,
            cluster_bits,
            size: self.u64(24)?,
            l1_offset: self.u64(40)?,
            l1_entries: u64::from(self.u32(36)?),
            reftable_offset: self.u64(48)?,
            reftable_clusters: u64::from(self.u32(56)?),
            refcount_order,
            backing_name: self.backing_name(cluster_bits)?,
            backing_format,
        };
        self.check_tables(&header)?;
        Ok(header)
    }

    /// The width of refcounts and the length of the header.
    fn version_3_fields(&self, version: u32, cluster_bits: u32) -> Result<(u32, u32), ImageError> {
        if version == 2 {
            return Ok((4, V2_BYTES as u32));
        }
        let incompatible = self.u64(72)?;
        if incompatible & DIRTY != 0 {
            let what = "it was not closed, and its reference counts may be wrong".to_owned();
            return Err(ImageError::Damaged { path: self.path.to_owned(), what });
        }
        if incompatible & CORRUPT != 0 {
            let what = "it is marked as corrupt".to_owned();
            return Err(ImageError::Damaged { path: self.path.to_owned(), what });
        }
        if incompatible != 0 {
            let names = ["external data file", "compression other than deflate", "extended L2 entries"];
            let known = names.iter().enumerate().filter(|(i, _)| incompatible & 1 << (i + 2) != 0).map(|(_, n)| *n);
            let what = known.collect::<Vec<_>>().join(", ");
            return Err(self.unsupported(format!("incompatible features {incompatible:#x} ({what})")));
        }
        let refcount_order = self.u32(96)?;
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(self.malformed(format!("reference counts of 2^{refcount_order} bits")));
        }
        let header_bytes = self.u32(100)?;
        let fits = header_bytes >= V3_BYTES as u32 && u64::from(header_bytes) <= 1 << cluster_bits;
        if !fits || !header_bytes.is_multiple_of(8) {
            return Err(self.malformed(format!("a header of {header_bytes} bytes")));
        }
        Ok((refcount_order, header_bytes))
    }

    /// Walks the extensions, and returns what they say of the backing file.
    fn extensions(&self, version: u32, cluster_bits: u32, start: u32) -> Result<Option<String>, ImageError> {
        let cluster = 1u64 << cluster_bits;
        let mut backing_format = None;
        let mut at = u64::from(start);
        // Each step moves on by 8 bytes or more, so the cluster bounds the loop.
        while at + 8 <= cluster {
            let (kind, len) = (self.u32(at)?, self.u32(at + 4)?);
            if kind == EXTENSION_END {
                return Ok(backing_format);
            }
            if at + 8 + u64::from(len) > cluster {
                return Err(self.malformed("a header extension leaves the first cluster"));
            }
            match kind {
                EXTENSION_FEATURE_NAMES if !len.is_multiple_of(FEATURE_NAME_BYTES) => {
                    return Err(self.malformed(format!("a table of feature names of {len} bytes")));
                }
                EXTENSION_BACKING_FORMAT => {
                    let name = self.fields.bytes(at + 8, u64::from(len)).unwrap_or_default();
                    let name =
                        std::str::from_utf8(name).map_err(|_| self.malformed("a backing format that is no text"))?;
                    if backing_format.replace(name.to_owned()).is_some() {
                        return Err(self.malformed("two backing formats"));
                    }
                }
                _ => {}
            }
            at += 8 + u64::from(len.next_multiple_of(8));
        }
        // Version 2 may leave the end out; whoever reads version 3 looks for it.
        if version == 2 { Ok(backing_format) } else { Err(self.malformed("header extensions without an end")) }
    }

    fn backing_name(&self, cluster_bits: u32) -> Result<Option<String>, ImageError> {
        let (offset, len) = (self.u64(8)?, self.u32(16)?);
        if offset == 0 {
            return Ok(None);
        }
        let end = offset.checked_add(u64::from(len)).filter(|end| *end < 1 << cluster_bits);
        if len == 0 || len > MAX_BACKING_NAME_BYTES || end.is_none() {
            return Err(self.malformed("the name of the backing file leaves the first cluster"));
        }
        let name = self.fields.bytes(offset, u64::from(len)).ok_or_else(|| self.malformed("the header is cut off"))?;
        let name = std::str::from_utf8(name).map_err(|_| self.malformed("a backing file's name that is no text"))?;
        Ok(Some(name.to_owned()))
    }

    fn check_tables(&self, header: &Header) -> Result<(), ImageError> {
        let cluster = header.cluster_bytes();
        if header.size == 0 || !header.size.is_multiple_of(super::super::config::SECTOR_BYTES) {
            return Err(self.malformed(format!("a disk of {} bytes", header.size)));
        }
        // One L2 table has an eighth of a cluster's bytes as entries, each for one cluster.
        let bytes_by_l1_entry = cluster / 8 * cluster;
        let wanted = header.size.div_ceil(bytes_by_l1_entry);
        if header.l1_entries > MAX_L1_ENTRIES || wanted > header.l1_entries {
            let what = format!("{} L1 entries for a disk of {} bytes", header.l1_entries, header.size);
            return Err(self.malformed(what));
        }
        self.check_table("L1 table", header.l1_offset, header.l1_entries * 8, cluster)?;
        let reftable_bytes = header.reftable_clusters * cluster;
        if reftable_bytes == 0 || reftable_bytes > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(self.malformed(format!("a refcount table of {reftable_bytes} bytes")));
        }
        self.check_table("refcount table", header.reftable_offset, reftable_bytes, cluster)
    }

    fn check_table(&self, name: &str, offset: u64, bytes: u64, cluster: u64) -> Result<(), ImageError> {
        if offset == 0 || !offset.is_multiple_of(cluster) {
            return Err(self.malformed(format!("the {name} is at {offset}")));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > self.file_bytes) {
            return Err(self.malformed(format!("the {name} lies beyond the end of the file")));
        }
        Ok(())
    }
}

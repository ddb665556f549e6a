//! The disks of a guest, as hostd describes them: what is in the file, what an I/O error does, how fast it may be.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, MAX_DISK_SERIAL_BYTES, MAX_NAME_BYTES, check_path, check_text, invalid};

/// Images under one disk. Each holds its tables in memory, so a chain costs memory as well as time.
pub const MAX_BACKING_IMAGES: usize = 32;
/// The largest request takes four minutes at this rate; a slower disk would look dead to its guest.
pub const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
pub const MAX_BYTES_PER_SECOND: u64 = 1 << 40;
pub const MAX_IOPS: u64 = 100_000_000;
/// A burst is at least what the rate gives in a hundredth of a second: the timer of a disk counts milliseconds, and a smaller one
/// would keep the disk below its rate.
pub const MIN_BURST_OF_RATE: u64 = 100;

/// What the bytes of a file are. Never found out by looking: a guest can write the header of any format into its raw disk, and
/// would choose with it which files of the host are opened at the next start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    #[default]
    Raw,
    Qcow2,
}

/// An image under a qcow2 disk. It is only read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingImage {
    pub path: PathBuf,
    pub format: DiskFormat,
}

/// What happens when storage fails a request of the guest. QEMU's `werror` and `rerror` in one word, as oVirt gives it.
///
/// `stop` is the default, as in oVirt and KubeVirt and unlike in QEMU (`enospc`): a file system that sees one error turns read-only
/// and stays so, while a guest that was stopped goes on when the storage is back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The guest is paused; the request is kept, and tried again at `resume`.
    #[default]
    Stop,
    /// The guest is told.
    Report,
    /// The guest is told that it went well.
    Ignore,
    /// `stop` when there is no space, `report` otherwise: what oVirt does for a disk that propagates errors.
    Enospc,
}

/// How much a disk may do, in the words of libvirt's `total_iops_sec` and `total_bytes_sec`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Requests a second. A flush counts for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may go at once after a pause. A tenth of a second's worth when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_iops: Option<u64>,
    /// Bytes read and written a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Bytes that may go at once after a pause. A tenth of a second's worth when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
}

/// One disk of the guest, in the order of its root ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name in logs, metrics and errors.
    pub id: String,
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    /// What the guest sees as the disk's serial number.
    #[serde(default)]
    pub serial: String,
    /// Whether another host can open the same storage. Those disks are closed when the lease ends.
    #[serde(default)]
    pub shared: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub format: DiskFormat,
    /// The chain under a qcow2 disk, nearest first. What the image's header names is opened only if it is here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingImage>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_error: OnError,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// Where the guest finds the disk ([`slots`](crate::slots)). The first free slot when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl DiskConfig {
    /// Every bound of a disk by itself. `field` names a field of it.
    pub(crate) fn check(&self, field: impl Fn(&str) -> String) -> Result<(), ConfigError> {
        check_text(&field("id"), &self.id, MAX_NAME_BYTES)?;
        check_text(&field("serial"), &self.serial, MAX_DISK_SERIAL_BYTES)?;
        check_path(&field("path"), &self.path)?;
        self.check_backing(&field)?;
        match &self.rate_limit {
            Some(limit) => limit.check(|name| field(&format!("rate_limit.{name}"))),
            None => Ok(()),
        }
    }

    fn check_backing(&self, field: &impl Fn(&str) -> String) -> Result<(), ConfigError> {
        if self.backing.len() > MAX_BACKING_IMAGES {
            return Err(invalid(field("backing"), format!("more than {MAX_BACKING_IMAGES} images")));
        }
        let mut formats = vec![self.format];
        let mut seen = BTreeSet::from([self.path.as_path()]);
        for (at, image) in self.backing.iter().enumerate() {
            let name = field(&format!("backing[{at}].path"));
            check_path(&name, &image.path)?;
            if !seen.insert(Path::new(&image.path)) {
                return Err(invalid(name, "the same image is in the chain already"));
            }
            formats.push(image.format);
        }
        // Only the last one may be raw: nothing is ever under a raw image.
        if formats.split_last().is_some_and(|(_, above)| above.contains(&DiskFormat::Raw)) {
            return Err(invalid(field("backing"), "a raw image has no backing image"));
        }
        Ok(())
    }
}

impl RateLimit {
    fn check(&self, field: impl Fn(&str) -> String) -> Result<(), ConfigError> {
        check_rate(&field, ("iops", self.iops, 1, MAX_IOPS), ("burst_iops", self.burst_iops))?;
        check_rate(
            &field,
            ("bytes_per_second", self.bytes_per_second, MIN_BYTES_PER_SECOND, MAX_BYTES_PER_SECOND),
            ("burst_bytes", self.burst_bytes),
        )
    }
}

fn check_rate(
    field: &impl Fn(&str) -> String,
    (name, rate, least, most): (&str, Option<u64>, u64, u64),
    (burst_name, burst): (&str, Option<u64>),
) -> Result<(), ConfigError> {
    let Some(rate) = rate else {
        return match burst {
            Some(_) => Err(invalid(field(burst_name), format!("is nothing without {name}"))),
            None => Ok(()),
        };
    };
    if !(least..=most).contains(&rate) {
        return Err(invalid(field(name), format!("must be {least} to {most}")));
    }
    let smallest_burst = (rate / MIN_BURST_OF_RATE).max(1);
    if burst.is_some_and(|burst| !(smallest_burst..=most).contains(&burst)) {
        return Err(invalid(field(burst_name), format!("must be {smallest_burst} to {most} for this {name}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(disk: Value) -> Result<DiskConfig, String> {
        let disk: DiskConfig = serde_json::from_value(disk).map_err(|e| e.to_string())?;
        disk.check(str::to_owned).map_err(|e| e.to_string())?;
        Ok(disk)
    }

    #[test]
    fn a_disk_of_before_formats_is_raw_and_is_written_as_before() {
        let disk = check(json!({"id": "root", "path": "/x"})).unwrap();
        assert_eq!((disk.format, disk.on_error), (DiskFormat::Raw, OnError::Stop));
        let written = serde_json::to_value(&disk).unwrap();
        assert_eq!(written, json!({"id": "root", "path": "/x", "read_only": false, "serial": "", "shared": false}));
    }

    #[test]
    fn a_whole_disk_survives_being_written_and_read() {
        let disk = json!({
            "id": "root", "path": "/x", "format": "qcow2", "on_error": "enospc",
            "backing": [{"path": "/y", "format": "qcow2"}, {"path": "/z", "format": "raw"}],
            "rate_limit": {"iops": 500, "bytes_per_second": 1 << 20, "burst_bytes": 1 << 22},
        });
        let disk = check(disk).unwrap();
        assert_eq!(check(serde_json::to_value(&disk).unwrap()).unwrap(), disk);
    }

    #[test]
    fn bounds_are_kept() {
        let backing = |images: &[(&str, &str)]| {
            images.iter().map(|(path, format)| json!({"path": path, "format": format})).collect::<Vec<_>>()
        };
        let many: Vec<_> = (0..33).map(|i| json!({"path": format!("/b{i}"), "format": "qcow2"})).collect();
        for (field, value) in [
            ("format", json!("vmdk")),
            ("on_error", json!("panic")),
            ("backing", json!(backing(&[("relative", "raw")]))),
            ("backing", json!(backing(&[("/x", "qcow2")]))),
            ("backing", json!(backing(&[("/y", "qcow2"), ("/y", "qcow2")]))),
            ("backing", json!(backing(&[("/y", "raw"), ("/z", "raw")]))),
            ("backing", json!([{"path": "/y"}])),
            ("backing", json!(many)),
            ("rate_limit", json!({"iops": 0})),
            ("rate_limit", json!({"bytes_per_second": 100})),
            ("rate_limit", json!({"burst_bytes": 1 << 20})),
            ("rate_limit", json!({"iops": 1000, "burst_iops": 9})),
            ("rate_limit", json!({"ops": 1})),
        ] {
            let mut disk = json!({"id": "root", "path": "/x", "format": "qcow2"});
            disk[field] = value;
            check(disk.clone()).expect_err(&disk.to_string());
        }
    }

    #[test]
    fn a_raw_disk_has_nothing_under_it() {
        let disk = json!({"id": "root", "path": "/x", "backing": [{"path": "/y", "format": "raw"}]});
        assert!(check(disk).unwrap_err().contains("backing"));
    }
}

//! Disks and network cards as people type them: `name=value` words with commas between.

use hostd_api::spec::BackingImageBody;
use hostd_api::spec::DiskBody;
use hostd_api::spec::NicBody;
use hostd_api::spec::RateLimitBody;
use statemachine::state::DiskFormat;
use statemachine::state::OnError;

/// `id=root,path=/srv/vm/root.qcow2,format=qcow2,backing=/srv/base.raw:raw,on-error=enospc,iops=500,ro,shareable`.
pub fn parse_disk(text: &str) -> Result<DiskBody, String> {
    let wrong = |why: String| {
        format!("{why}; write id=NAME,path=PATH[,OPTION...], `quorate vm create --help` lists the options")
    };
    let (mut id, mut path) = (None, None);
    let mut disk = DiskBody::default();
    let mut limit = RateLimitBody::default();
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => id = Some(value),
            Some(("path", value)) => path = Some(value),
            Some(("format", value)) => disk.format = parse_format(value).map_err(wrong)?,
            Some(("backing", value)) => disk.backing.push(parse_backing(value).map_err(wrong)?),
            Some(("on-error", value)) => disk.on_error = parse_policy(value).map_err(wrong)?,
            Some(("slot", value)) => disk.slot = Some(parse_slot(value).map_err(wrong)?),
            Some(("iops", value)) => limit.iops = Some(parse_number(value).map_err(wrong)?),
            Some(("mib-per-second", value)) => {
                let mib = parse_number(value).map_err(wrong)?;
                let too_many = || wrong(format!("{value} MiB are too many"));
                limit.bytes_per_second = Some(mib.checked_mul(1 << 20).ok_or_else(too_many)?);
            }
            None if part == "ro" => disk.read_only = true,
            None if part == "shareable" => disk.shareable = true,
            _ => return Err(wrong(format!("{part:?} is not understood"))),
        }
    }
    disk.id = id.ok_or_else(|| wrong("the disk has no id".to_owned()))?.to_owned();
    disk.path = path.ok_or_else(|| wrong("the disk has no path".to_owned()))?.to_owned();
    disk.rate_limit = (limit != RateLimitBody::default()).then_some(limit);
    Ok(disk)
}

fn parse_format(text: &str) -> Result<DiskFormat, String> {
    match text {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!("{text:?} is no format of disks; there are raw and qcow2")),
    }
}

fn parse_policy(text: &str) -> Result<OnError, String> {
    match text {
        "stop" => Ok(OnError::Stop),
        "report" => Ok(OnError::Report),
        "ignore" => Ok(OnError::Ignore),
        "enospc" => Ok(OnError::Enospc),
        _ => Err(format!("{text:?} is no policy for errors; there are stop, report, ignore and enospc")),
    }
}

/// The format is behind the last colon, so a path may have others.
fn parse_backing(text: &str) -> Result<BackingImageBody, String> {
    let (path, format) =
        text.rsplit_once(':').ok_or_else(|| format!("{text:?} has no format; write PATH:raw or PATH:qcow2"))?;
    Ok(BackingImageBody { path: path.to_owned(), format: parse_format(format)? })
}

fn parse_slot(text: &str) -> Result<u8, String> {
    text.parse().map_err(|_| format!("{text:?} is no slot"))
}

fn parse_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

/// `id=lan,bridge=br0,mac=52:54:00:12:34:56`.
pub fn parse_nic(text: &str) -> Result<NicBody, String> {
    let wrong = |why: String| format!("{why}; write id=NAME,bridge=BRIDGE[,mac=ADDRESS][,slot=N]");
    let (mut id, mut bridge, mut mac, mut slot) = (None, None, None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("bridge", value)) => bridge = Some(value.to_owned()),
            Some(("slot", value)) => slot = Some(parse_slot(value).map_err(wrong)?),
            Some(("mac", value)) => {
                let address = value.parse().map_err(|_| wrong(format!("{value:?} is not a hardware address")))?;
                mac = Some(address);
            }
            _ => return Err(wrong(format!("{part:?} is not understood"))),
        }
    }
    let id = id.ok_or_else(|| wrong("the card has no id".to_owned()))?;
    let bridge = bridge.ok_or_else(|| wrong("the card has no bridge".to_owned()))?;
    Ok(NicBody { id, bridge, mac, slot })
}

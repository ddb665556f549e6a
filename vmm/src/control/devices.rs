//! What hostd may ask of the guest's disks and network cards.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Value, json};
use vmm_control::{Call, ErrorCode, Reply};

use crate::machine::device_manager::DeviceManager;

/// Answers a call that concerns devices, at once: storage and the guest are waited for by others, and notices tell of them.
pub(super) fn answer(devices: &Arc<DeviceManager>, id: u64, call: Call, mut descriptors: Vec<OwnedFd>) -> Reply {
    let done = match call {
        Call::PlugDisk { config } => devices.plug_disk(*config, descriptors).map(|device| json!(device)),
        Call::PlugNic { config } => {
            let tap = descriptors.pop().filter(|_| descriptors.is_empty());
            devices.plug_nic(*config, tap).map(|device| json!(device))
        }
        Call::Unplug { id, force } => devices.unplug(&id, force).map(|device| json!(device)),
        Call::SetLink { nic, up } => devices.set_link(&nic, up).map(|()| json!({})),
        Call::DiskFiles { disk, .. } => devices.hand_files(&disk, descriptors).map(|()| json!({})),
        _ => return Reply::error(id, ErrorCode::BadRequest, "the request is not about a device"),
    };
    match done {
        Ok(result) => Reply::ok(id, result),
        Err(refusal) => Reply { id, result: None, error: Some(refusal.fault()) },
    }
}

pub(super) fn disk_counters(devices: &DeviceManager) -> Value {
    devices.disks().iter().map(|disk| (disk.name().to_owned(), json!(disk.metrics().counters()))).collect()
}

pub(super) fn nic_counters(devices: &DeviceManager) -> Value {
    devices.nics().iter().map(|nic| (nic.name().to_owned(), json!(nic.metrics().counters()))).collect()
}

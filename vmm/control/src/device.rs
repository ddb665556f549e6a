//! Disks and network cards as a running vmm shows them.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    Disk,
    Nic,
}

/// Where a device is on its way into the guest or out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// Its slot is taken, its storage or tap is being opened.
    Plugging,
    Present,
    /// The guest was asked to give it up, or it was taken away and its last I/O has not ended.
    Unplugging,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    pub id: String,
    pub kind: DeviceKind,
    /// For the definition: a guest that finds the device here again has not moved it.
    pub slot: u8,
    /// Bus, device and function as firmware numbers them; a guest may number buses otherwise for itself.
    pub address: String,
    pub state: DeviceState,
    /// Of a network card: whether its cable is plugged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_up: Option<bool>,
}

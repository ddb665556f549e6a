//! Random steps about devices that come and leave, memory, processors, and how guests may be moved.

use pnet_base::MacAddr;
use statemachine::command::Command;
use statemachine::command::ReportId;
use statemachine::command::VmChange;
use statemachine::command::VmSpecChange;
use statemachine::ids::ClusterId;
use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::state::CpuModel;
use statemachine::state::DeviceWord;
use statemachine::state::Devices;
use statemachine::state::Disk;
use statemachine::state::HostProcessor;
use statemachine::state::MigrationPolicy;
use statemachine::state::Nic;
use statemachine::state::State;

use super::Step;

pub enum Said {
    User(Command),
    Host(Command),
}

pub fn step(state: &State, step: &Step, vm: VmId, epoch: Epoch, report: ReportId) -> Said {
    let Step { action, a, b, .. } = *step;
    let change = |spec| Said::User(Command::VmChange { vm, change: VmChange { spec, ..VmChange::default() } });
    match action {
        53 | 54 => change(VmSpecChange { plug: plug(a, b), ..VmSpecChange::default() }),
        55 => {
            let spec = state.vms.get(&vm).map(|vm| vm.spec.clone());
            let ids: Vec<String> = spec.iter().flat_map(|spec| spec.device_ids()).map(str::to_owned).collect();
            let one = ids.get(usize::from(b) % ids.len().max(1)).cloned();
            change(VmSpecChange { unplug: one.into_iter().collect(), ..VmSpecChange::default() })
        }
        56 | 57 => {
            let plugs = state.plugs.get(&vm).cloned().unwrap_or_default();
            let about: Vec<&String> = plugs.leaving.iter().chain(&plugs.coming).collect();
            let device = about.get(usize::from(a) % about.len().max(1)).map_or("root", |device| device.as_str());
            let words = || "not now".to_owned();
            let word = match b % 5 {
                0 => DeviceWord::Plugged,
                1 => DeviceWord::NotPlugged(words()),
                2 => DeviceWord::Kept(words()),
                _ => DeviceWord::Unplugged,
            };
            let epoch = if b.is_multiple_of(9) { Epoch(epoch.0.saturating_sub(1)) } else { epoch };
            Said::Host(Command::ReportVmDevice { report, vm, epoch, device: device.to_owned(), word })
        }
        58 if a.is_multiple_of(2) => Said::User(Command::VmMemory { vm, mib: 64 + u64::from(b % 4) * 64 }),
        58 => {
            let policy = MigrationPolicy { downtime_ms: Some(u32::from(b % 50)), ..MigrationPolicy::default() };
            Said::User(Command::ClusterMigrationPolicy { cluster: ClusterId(1), policy })
        }
        _ => {
            let models = CpuModel::NAMED[usize::from(a % 3).min(2)..].to_vec();
            let processor = HostProcessor {
                vendor: "GenuineIntel".to_owned(),
                model_name: "a processor".to_owned(),
                models,
                fingerprint: (b % 2).to_string(),
                tsc_khz: 2_000_000,
                scales_tsc: false,
            };
            Said::Host(Command::ReportProcessor { report, processor })
        }
    }
}

/// Few disks, so that two VMs ask for the same one.
fn plug(a: u16, b: u16) -> Devices {
    match b % 4 {
        0 => {
            let mac = b.is_multiple_of(8).then(|| MacAddr::new(2, 0, 0, 0, 0, (a % 4) as u8));
            let nic = Nic { id: format!("nic{}", a % 3), bridge: "br0".to_owned(), mac, slot: None };
            Devices { disks: Vec::new(), nics: vec![nic] }
        }
        _ => {
            let slot = b.is_multiple_of(7).then_some((b % 25) as u8);
            let disk = Disk { slot, ..Disk::raw(&format!("more{}", a % 3), &format!("/srv/disk{}", b % 12)) };
            Devices { disks: vec![disk], nics: Vec::new() }
        }
    }
}

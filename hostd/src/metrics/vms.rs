//! `/metrics/vms`: series of the guests that this host has permits for. Made anew at each scrape: a guest that is gone
//! leaves nothing behind.

use prometheus::IntGaugeVec;
use prometheus::Opts;
use prometheus::Registry;
use statemachine::HostId;
use statemachine::State;
use statemachine::view::vm_status;

use crate::agent::GuestView;
use crate::lease::clock::Boottime;

const LABELS: [&str; 2] = ["vm", "name"];

/// The text of a scrape.
pub fn text(state: &State, own: HostId, guests: &[GuestView]) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, labels: &[&str]| {
        let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(gauge.clone()))?;
        Ok::<_, prometheus::Error>(gauge)
    };
    let status =
        gauge("quorate_vm_status", "Status of the VM; the series of its status is 1.", &["vm", "name", "status"])?;
    let epoch = gauge("quorate_vm_epoch", "Fencing token of the VM's run permit.", &LABELS)?;
    let vcpus = gauge("quorate_vm_vcpus", "vCPUs that the VM runs with.", &LABELS)?;
    let memory = gauge("quorate_vm_memory_mib", "Memory that the VM runs with.", &LABELS)?;
    let overhead =
        gauge("quorate_vm_overhead_bytes", "Resident memory of the VM's process that is not guest RAM.", &LABELS)?;
    let lease = gauge("quorate_vm_lease_remaining_ms", "Until the VM's lease deadline; negative after it.", &LABELS)?;
    for (vm_id, vm, permit) in state.permits_on(own) {
        let id = vm_id.to_string();
        let spec = vm.granted_spec.as_ref().unwrap_or(&vm.spec);
        let labels = [id.as_str(), vm.name.as_str()];
        status
            .with_label_values(&[id.as_str(), vm.name.as_str(), vm_status(state, vm_id, vm).to_string().as_str()])
            .set(1);
        epoch.with_label_values(&labels).set(permit.epoch.0 as i64);
        vcpus.with_label_values(&labels).set(i64::from(spec.vcpus));
        memory.with_label_values(&labels).set(spec.memory_mib as i64);
    }
    for guest in guests {
        let name = state.vms.get(&guest.vm).map_or("", |vm| vm.name.as_str());
        let (id, now) = (guest.vm.to_string(), Boottime::now());
        let labels = [id.as_str(), name];
        if let Some(bytes) = guest.overhead_bytes {
            overhead.with_label_values(&labels).set(bytes as i64);
        }
        if let Some(deadline) = guest.deadline {
            let left_ms = deadline.ms_since(now) as i64 - now.ms_since(deadline) as i64;
            lease.with_label_values(&labels).set(left_ms);
        }
    }
    prometheus::TextEncoder::new().encode_to_string(&registry.gather())
}

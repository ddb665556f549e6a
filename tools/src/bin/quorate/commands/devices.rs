//! `vm plug`, `vm unplug`, `vm memory`: what comes to a guest and leaves it while it runs.

use hostd_api::vm::PlugBody;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmView;

use super::Context;
use super::vm::wait_for;
use crate::args::Wait;
use crate::exit::Failure;
use crate::output;
use crate::wait::Look;

pub async fn plug(context: &Context, vm: &str, plug: PlugBody, wait: Wait) -> Result<(), Failure> {
    let ids: Vec<String> =
        plug.disks.iter().map(|disk| disk.id.clone()).chain(plug.nics.iter().map(|nic| nic.id.clone())).collect();
    let patch = VmPatch { plug: Some(plug), ..VmPatch::default() };
    let answer = context.client.vm_change(vm, &patch).await?;
    let names = ids.join(", ");
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} gets {names} (seq {})", answer.seq));
    }
    wait_for(context, vm, &answer, wait, |vm, _| has_all(vm, &ids)).await?;
    output::done(context.format, &answer, &format!("vm {vm} has {names} (seq {})", answer.seq))
}

pub async fn unplug(context: &Context, vm: &str, devices: Vec<String>, wait: Wait) -> Result<(), Failure> {
    let patch = VmPatch { unplug: devices.clone(), ..VmPatch::default() };
    let answer = context.client.vm_change(vm, &patch).await?;
    let names = devices.join(", ");
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} is to give up {names} (seq {})", answer.seq));
    }
    wait_for(context, vm, &answer, wait, |vm, _| has_none(vm, &devices)).await?;
    output::done(context.format, &answer, &format!("vm {vm} has given up {names} (seq {})", answer.seq))
}

pub async fn memory(context: &Context, vm: &str, mib: u64) -> Result<(), Failure> {
    let answer = context.client.vm_memory(vm, mib).await?;
    output::done(context.format, &answer, &format!("vm {vm} is to make do with {mib} MiB (seq {})", answer.seq))
}

fn has_all(vm: &VmView, ids: &[String]) -> Look<()> {
    let missing = vm.devices.iter().find(|device| ids.contains(&device.id) && device.state != "plugged");
    match missing {
        Some(device) => Look::NotYet(state_of(&device.id, &device.state, device.why.as_deref())),
        None => Look::Done(()),
    }
}

fn has_none(vm: &VmView, ids: &[String]) -> Look<()> {
    match vm.devices.iter().find(|device| ids.contains(&device.id)) {
        Some(device) => Look::NotYet(state_of(&device.id, &device.state, device.why.as_deref())),
        None => Look::Done(()),
    }
}

fn state_of(id: &str, state: &str, why: Option<&str>) -> String {
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    format!("{id} is {}{why}", state.replace('_', " "))
}

//! The part of a process's life that only a guest from elsewhere has: it moves in, waits for its permit, and is let run.

use std::sync::Arc;

use vmm_control::{ExitReason, Notice};

use super::{Outcome, Prepared, mark};
use crate::cpu::gate::Stop;
use crate::devices::net::announce;
use crate::lease;
use crate::machine::{self, Beginning, Machine, MachineError};
use crate::saved::incoming::{Incoming, RunOrder};

/// Returns the machine with the guest in it: loaded, permitted, its disks open and its epoch used up. It stands until [`let_go`].
pub(super) fn receive(prepared: &Prepared, incoming: &Arc<Incoming>) -> Result<Machine, Outcome> {
    let context = &prepared.context;
    let mut machine = machine::build(context, Beginning::Incoming).map_err(start_failed)?;
    let source = match incoming.wait_source() {
        Ok(Some(source)) => source,
        Ok(None) => return Err(not_wanted()),
        Err(error) => return Err(Outcome::not_started(ExitReason::Internal, &error)),
    };
    let given = match incoming.load(source, &mut machine) {
        Ok(given) => given,
        // Its connection was cut because it is not wanted.
        Err(_) if incoming.has_ended() => return Err(not_wanted()),
        Err(error) => return Err(Outcome::not_started(ExitReason::RestoreFailed, &error)),
    };
    // Nobody else sets it.
    let _ = context.given_cpuid.set(given);
    tracing::info!("the guest is loaded, and waits for its permit");
    incoming.is_loaded();
    let Some(order) = incoming.wait_order() else {
        return Err(not_wanted());
    };
    permit(prepared, incoming, &machine, &order)?;
    Ok(machine)
}

/// The guest's vCPUs stand at the gate: nothing keeps them any more.
pub(super) fn let_go(prepared: &Prepared) {
    let (context, Some(incoming)) = (&prepared.context, &prepared.incoming) else {
        return;
    };
    if incoming.is_running() {
        context.disk_gate.release();
        context.gate.open(Stop::Incoming);
        announce::start(context.devices.cables());
        tracing::info!(epoch = context.lease.epoch(), "the guest goes on here");
        prepared.control.notify(Notice::Resumed);
    }
}

/// Everything that can fail, and last what cannot be undone: the epoch is used up.
fn permit(prepared: &Prepared, incoming: &Incoming, machine: &Machine, order: &RunOrder) -> Result<(), Outcome> {
    let lease = &prepared.context.lease;
    let failed = |error: &(dyn std::error::Error + 'static)| Outcome::not_started(ExitReason::StartFailed, error);
    lease.grant(order.epoch, order.deadline_ns).map_err(|error| failed(&error))?;
    if order.deadline_ns.is_some() {
        lease::thread::start(Arc::clone(lease)).map_err(|error| failed(&error))?;
    }
    if !prepared.context.devices.wait_for_files(|| incoming.has_ended()) {
        return Err(not_wanted());
    }
    machine.open_disks().map_err(|error| failed(&error))?;
    mark(&order.started_marker, order.epoch)
}

fn start_failed(error: MachineError) -> Outcome {
    Outcome::not_started(ExitReason::StartFailed, &error)
}

fn not_wanted() -> Outcome {
    Outcome { reason: ExitReason::PoweredOff, detail: String::new(), ran: false, drained: true, panics: 0 }
}

//! The thread of one vCPU: enter the guest, carry out what it left for, enter again.
//!
//! Before each entry it passes the gate and looks at the lease's deadline; its own timer takes it out of the guest at the deadline.
//! So the lease holds though every other thread of the process hangs (DESIGN §5, hazard C6b). For the same reason nothing
//! that is called from here may wait: devices only change registers, fill rings and write to event descriptors.

use std::fmt::Write as _;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::errand::Errands;
use super::gate::{Passage, RunGate, Ticket};
use crate::bus::{MmioBus, PioBus};
use crate::lease::Lease;
use crate::metrics::ExitCounters;
use crate::sys::ImmediateExit;

/// What a vCPU tells the owner of the machine. Each ends the machine as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// Triple fault, or KVM's reset event.
    Reset,
    PowerOff,
    /// KVM cannot go on; a description with registers.
    Fault(String),
}

/// Where vCPUs report. Must not wait.
pub trait VcpuEvents: Send + Sync {
    fn report(&self, event: VcpuEvent);
}

/// What all vCPUs of a machine share.
pub struct Shared {
    pub pio: Arc<PioBus>,
    pub mmio: Arc<MmioBus>,
    pub gate: Arc<RunGate>,
    pub lease: Arc<Lease>,
    pub events: Arc<dyn VcpuEvents>,
    pub exits: Arc<ExitCounters>,
    pub errands: Errands,
}

pub struct Vcpu {
    index: u16,
    fd: VcpuFd,
    /// As it was set.
    cpuid: CpuId,
    shared: Arc<Shared>,
}

/// What to do after an exit.
enum Next {
    /// KVM has an access to finish.
    Enter,
    /// The guest is between two instructions.
    Stand,
    Report(VcpuEvent),
}

/// Accesses of one instruction: KVM hands a long one over in pieces of eight bytes.
const MAX_PIECES: usize = 64;

impl Vcpu {
    pub fn new(index: u16, fd: VcpuFd, cpuid: CpuId, shared: Arc<Shared>) -> Self {
        Self { index, fd, cpuid, shared }
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    /// The vCPU, before its thread runs.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// What is told later as the CPUID that it was made with.
    pub fn set_cpuid(&mut self, cpuid: CpuId) {
        self.cpuid = cpuid;
    }

    /// Runs until the gate says end. `ready` is called once the thread can be stopped.
    pub fn run(mut self, ready: impl FnOnce()) {
        let gate = Arc::clone(&self.shared.gate);
        let flag: *mut u8 = &mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the byte is in the vCPU's mapping, which `self.fd` keeps to the end of this function; it runs here alone.
        let immediate = unsafe { ImmediateExit::install(flag) };
        let ticket = gate.enlist();
        let timer = match self.shared.lease.watch_this_thread() {
            Ok(timer) => timer,
            Err(error) => {
                // Without its timer the vCPU must not run: nothing would stop it at the deadline.
                let what = format!("vCPU {}: cannot arm the lease timer: {error}", self.index);
                self.shared.events.report(VcpuEvent::Fault(what));
                ready();
                return;
            }
        };
        ready();
        loop {
            immediate.clear();
            // From here on a kick makes KVM_RUN return at once.
            match self.pass(&ticket) {
                Passage::End => break,
                Passage::Enter => {}
                Passage::Errand => {
                    self.run_errand(&immediate);
                    continue;
                }
            }
            if self.shared.lease.is_over() {
                self.shared.lease.expire();
                continue;
            }
            let next = self.enter();
            self.report(next);
        }
        drop(timer);
    }

    fn pass(&self, ticket: &Ticket<'_>) -> Passage {
        let stood = !self.shared.gate.is_open();
        let passage = ticket.pass();
        if stood && passage == Passage::Enter {
            // Tells the guest that it was stopped, or its watchdog takes the time that has passed for a lock-up. Refused where the guest does
            // not use KVM's clock.
            let _ = self.fd.kvmclock_ctrl();
        }
        passage
    }

    fn report(&self, next: Next) {
        if let Next::Report(event) = next {
            self.shared.events.report(event);
            // The owner ends the machine; until then this vCPU stays out of the guest.
            self.shared.gate.shut(super::gate::Stop::End);
        }
    }

    /// Has KVM finish the access that it left the guest for, without running the guest, and does what is asked. A register that the guest
    /// has read is in the guest only after that.
    fn run_errand(&mut self, immediate: &ImmediateExit) {
        let Some(errand) = self.shared.errands.take(self.index) else {
            return;
        };
        for _ in 0..MAX_PIECES {
            immediate.set();
            match self.enter() {
                Next::Enter => {}
                Next::Stand => break,
                event @ Next::Report(_) => return self.report(event),
            }
        }
        errand(&self.fd, &self.cpuid);
    }

    fn enter(&mut self) -> Next {
        let exits = &self.shared.exits;
        // String instructions transfer several elements to one port; KVM tells the size of one beside the exit.
        let run: *const kvm_bindings::kvm_run = self.fd.get_kvm_run();
        let fault = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.port.add(1);
                // SAFETY: the exit is an I/O exit, so `io` is the live member; the mapping lives as long as `self.fd`.
                let size = unsafe { (*run).__bindgen_anon_1.io.size };
                for element in data.chunks(usize::from(size.max(1))) {
                    self.shared.pio.write(port, element);
                }
                return Next::Enter;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.port.add(1);
                // SAFETY: as above.
                let size = unsafe { (*run).__bindgen_anon_1.io.size };
                for element in data.chunks_mut(usize::from(size.max(1))) {
                    self.shared.pio.read(port, element);
                }
                return Next::Enter;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.memory.add(1);
                self.shared.mmio.read(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.memory.add(1);
                self.shared.mmio.write(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                exits.interrupted.add(1);
                return Next::Stand;
            }
            Ok(VcpuExit::Shutdown) => return Next::Report(VcpuEvent::Reset),
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => return Next::Report(VcpuEvent::Reset),
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => {
                    return Next::Report(VcpuEvent::PowerOff);
                }
                other => format!("KVM reports system event {other}"),
            },
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit is an internal error, so `internal` is the live member.
                let internal = unsafe { (*run).__bindgen_anon_1.internal };
                let used = (internal.ndata as usize).min(internal.data.len());
                format!(
                    "KVM cannot carry out what the guest does (internal error {}, data {:x?})",
                    internal.suberror,
                    &internal.data[..used]
                )
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("the processor refuses to enter the guest (reason {reason:#x}, host CPU {cpu})")
            }
            Ok(other) => format!("KVM leaves the guest for a reason that is not handled: {other:?}"),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    exits.interrupted.add(1);
                    return Next::Stand;
                }
                _ => format!("KVM cannot run the guest: {error}"),
            },
        };
        exits.faults.add(1);
        Next::Report(VcpuEvent::Fault(self.describe(&fault)))
    }

    /// The fault with this vCPU's registers, for the log and the exit report.
    fn describe(&self, fault: &str) -> String {
        let mut text = format!("vCPU {}: {fault}", self.index);
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => {
                // Writing to a String cannot fail.
                let _ = write!(
                    text,
                    "\nrip={:016x} rsp={:016x} rflags={:08x} cs={:04x} ss={:04x}\n\
                     rax={:016x} rbx={:016x} rcx={:016x} rdx={:016x}\n\
                     rsi={:016x} rdi={:016x} rbp={:016x} r8 ={:016x}\n\
                     r9 ={:016x} r10={:016x} r11={:016x} r12={:016x}\n\
                     r13={:016x} r14={:016x} r15={:016x}\n\
                     cr0={:016x} cr2={:016x} cr3={:016x} cr4={:016x} efer={:x}",
                    r.rip,
                    r.rsp,
                    r.rflags,
                    s.cs.selector,
                    s.ss.selector,
                    r.rax,
                    r.rbx,
                    r.rcx,
                    r.rdx,
                    r.rsi,
                    r.rdi,
                    r.rbp,
                    r.r8,
                    r.r9,
                    r.r10,
                    r.r11,
                    r.r12,
                    r.r13,
                    r.r14,
                    r.r15,
                    s.cr0,
                    s.cr2,
                    s.cr3,
                    s.cr4,
                    s.efer,
                );
            }
            (Err(error), _) | (_, Err(error)) => {
                let _ = write!(text, "\n(registers cannot be read: {error})");
            }
        }
        text
    }
}

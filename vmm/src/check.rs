//! `vmm check`: runs three tiny guests and says in one sentence what this host's KVM can do.
//!
//! A KVM that is itself emulated by software (the PVM kind) opens like any other and runs small flat guests, but not a stock
//! kernel; so opening /dev/kvm proves little. The guests, in rising order: 16-bit code that is started as a processor starts; 32-bit
//! code without paging, as PVH enters a kernel; 64-bit code with page tables, that takes an exception and reads an MSR.

use std::arch::global_asm;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_control::{CpuConfig, CpuModel};

use crate::boot::Entry;
use crate::cpu::{cpuid, msr, regs};
use crate::machine::kvm::{self, KvmVm};
use crate::machine::layout::Layout;
use crate::memory::{self, GuestMemory};
use crate::sys::{ImmediateExit, KickTimer, ThreadId, boottime_ns};

/// Where the guests' code goes, and the port that they answer on.
const CODE: u64 = 0x10_0000;
const CODE_16: u64 = 0x1000;
const IDT: u64 = 0x20_0000;
const PORT: u16 = 0xf4;
/// What a guest that got to its end writes.
const PASSED: u8 = b'Q';
const MEMORY_BYTES: u64 = 16 << 20;
/// Far more than a few instructions need, under emulation too.
const PATIENCE: Duration = Duration::from_secs(5);
const BREAKPOINT: u64 = 3;
/// The code selector that `cpu::regs` sets up.
const CODE_SELECTOR: u64 = 0x10;

global_asm!(
    ".pushsection .rodata",
    // Real mode: arithmetic, memory, a port.
    ".code16",
    ".global quorate_check_16",
    "quorate_check_16:",
    "mov ax, 0x51",
    "mov word ptr [0x2000], ax",
    "mov ax, word ptr [0x2000]",
    "out 0xf4, al",
    "1: hlt",
    "jmp 1b",
    ".global quorate_check_16_end",
    "quorate_check_16_end:",
    // Protected mode, flat: a call through memory, a port.
    ".code32",
    ".global quorate_check_32",
    "quorate_check_32:",
    "mov esp, 0x180000",
    "call 2f",
    "1: hlt",
    "jmp 1b",
    "2: mov eax, 0x51",
    "out 0xf4, al",
    "ret",
    ".global quorate_check_32_end",
    "quorate_check_32_end:",
    // Long mode: CPUID, an MSR, new page tables, an exception and the way back from it.
    ".code64",
    ".global quorate_check_64",
    "quorate_check_64:",
    "mov rsp, 0x180000",
    "mov eax, 1",
    "cpuid",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "test eax, 0x400",
    "jz 3f",
    "mov rax, cr3",
    "mov cr3, rax",
    "push 0x200000",
    "sub rsp, 2",
    "mov word ptr [rsp], 0x3ff",
    "lidt [rsp]",
    "xor ebx, ebx",
    "int3",
    "cmp ebx, 1",
    "jne 3f",
    "mov al, 0x51",
    "out 0xf4, al",
    "3: hlt",
    "jmp 3b",
    ".global quorate_check_64_handler",
    "quorate_check_64_handler:",
    "inc ebx",
    "iretq",
    ".global quorate_check_64_end",
    "quorate_check_64_end:",
    ".popsection",
);

unsafe extern "C" {
    static quorate_check_16: u8;
    static quorate_check_16_end: u8;
    static quorate_check_32: u8;
    static quorate_check_32_end: u8;
    static quorate_check_64: u8;
    static quorate_check_64_handler: u8;
    static quorate_check_64_end: u8;
}

/// The bytes between two labels of the assembly above.
fn code_between(start: *const u8, end: *const u8) -> &'static [u8] {
    let len = end as usize - start as usize;
    // SAFETY: both labels are in one read-only section, `end` after `start`, as the assembly above lays them out.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// How a test guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestResult {
    Passed,
    /// In words, for the person who asked.
    Failed(String),
}

impl GuestResult {
    pub fn passed(&self) -> bool {
        *self == Self::Passed
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Why KVM does not open, if so.
    pub unusable: Option<String>,
    /// Kernel modules that implement KVM here.
    pub modules: Vec<&'static str>,
    pub real_mode: GuestResult,
    pub protected_mode: GuestResult,
    pub long_mode: GuestResult,
}

impl Report {
    /// Whether a stock Linux kernel can be expected to boot.
    pub fn runs_linux(&self) -> bool {
        self.unusable.is_none() && self.hardware().is_some() && self.protected_mode.passed() && self.long_mode.passed()
    }

    /// Whether small guests without paging run: enough for tests.
    pub fn runs_flat_guests(&self) -> bool {
        self.unusable.is_none() && self.protected_mode.passed()
    }

    fn hardware(&self) -> Option<&'static str> {
        self.modules.iter().find_map(|module| match *module {
            "kvm_intel" => Some("Intel VT-x"),
            "kvm_amd" => Some("AMD-V"),
            _ => None,
        })
    }

    fn guests(&self) -> [(&'static str, &GuestResult); 3] {
        [("16-bit", &self.real_mode), ("32-bit flat", &self.protected_mode), ("64-bit paged", &self.long_mode)]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.unusable {
            return write!(f, "No guest runs on this host: {why}.");
        }
        if self.runs_linux() {
            let by = self.hardware().unwrap_or("this processor");
            return write!(f, "This host runs any guest: KVM uses {by}, and all test guests passed.");
        }
        let passed: Vec<&str> = self.guests().iter().filter(|(_, r)| r.passed()).map(|(name, _)| *name).collect();
        if passed.is_empty() {
            f.write_str("This host's KVM opens but runs none of the test guests")?;
        } else {
            write!(
                f,
                "This host's KVM runs small guests ({}) and cannot be relied on for a stock Linux kernel",
                passed.join(", ")
            )?;
        }
        if self.modules.contains(&"kvm_pvm") {
            f.write_str(", because it emulates a processor in software (kvm_pvm)")?;
        }
        for (name, result) in self.guests() {
            if let GuestResult::Failed(why) = result {
                write!(f, "; {name}: {why}")?;
            }
        }
        f.write_str(". For Linux guests use a host with VT-x or AMD-V, or the lab (`lab up`).")
    }
}

/// Runs the test guests.
pub fn run() -> Report {
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .filter(|name| std::path::Path::new("/sys/module").join(name).exists())
        .collect();
    let not_run = || GuestResult::Failed("not run".to_owned());
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            return Report {
                unusable: Some(error.to_string()),
                modules,
                real_mode: not_run(),
                protected_mode: not_run(),
                long_mode: not_run(),
            };
        }
    };
    Report {
        unusable: None,
        modules,
        real_mode: run_guest(&kvm, Mode::Real),
        protected_mode: run_guest(&kvm, Mode::Protected),
        long_mode: run_guest(&kvm, Mode::Long),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Long,
}

fn run_guest(kvm: &Kvm, mode: Mode) -> GuestResult {
    match prepare(kvm, mode) {
        Ok((vm, memory, mut vcpu)) => {
            let result = run_to_answer(&mut vcpu);
            // The vCPU goes first, then the VM, then the memory that both use.
            drop(vcpu);
            drop(vm);
            drop(memory);
            result
        }
        Err(error) => GuestResult::Failed(error.to_string()),
    }
}

type PrepareError = Box<dyn std::error::Error>;

fn prepare(kvm: &Kvm, mode: Mode) -> Result<(Arc<KvmVm>, GuestMemory, VcpuFd), PrepareError> {
    let memory = memory::allocate(&Layout::new(MEMORY_BYTES, MEMORY_BYTES), None)?;
    let vm = KvmVm::new(kvm, &memory)?;
    let vcpu = vm.create_vcpu(0)?;
    let supported = cpuid::supported(kvm)?;
    let told = cpuid::for_vcpu(&supported, CpuConfig::of(CpuModel::Host, 1), 0);
    vcpu.set_cpuid2(&told.to_kvm().ok_or("more leaves of CPUID than KVM takes")?)?;
    msr::set_boot_msrs(&vcpu)?;
    match mode {
        Mode::Real => {
            let code = code_between(&raw const quorate_check_16, &raw const quorate_check_16_end);
            memory.write_slice(code, GuestAddress(CODE_16))?;
            let mut sregs = vcpu.get_sregs()?;
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs)?;
            let mut regs = vcpu.get_regs()?;
            (regs.rip, regs.rflags) = (CODE_16, 2);
            vcpu.set_regs(&regs)?;
        }
        Mode::Protected => {
            let code = code_between(&raw const quorate_check_32, &raw const quorate_check_32_end);
            memory.write_slice(code, GuestAddress(CODE))?;
            regs::set_entry(&vcpu, &memory, Entry::Pvh { rip: CODE, start_info: 0 })?;
        }
        Mode::Long => {
            let start = &raw const quorate_check_64;
            let code = code_between(start, &raw const quorate_check_64_end);
            memory.write_slice(code, GuestAddress(CODE))?;
            let handler = code_between(start, &raw const quorate_check_64_handler).len() as u64;
            write_gate(&memory, CODE + handler)?;
            regs::set_entry(&vcpu, &memory, Entry::Long { rip: CODE, zero_page: 0 })?;
        }
    }
    Ok((vm, memory, vcpu))
}

/// An interrupt gate for the breakpoint exception.
fn write_gate(memory: &GuestMemory, handler: u64) -> Result<(), PrepareError> {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
    let low =
        (handler & 0xffff) | (CODE_SELECTOR << 16) | (PRESENT_INTERRUPT_GATE << 32) | ((handler >> 16 & 0xffff) << 48);
    let at = IDT + BREAKPOINT * 16;
    memory.write_obj(low, GuestAddress(at))?;
    memory.write_obj(handler >> 32, GuestAddress(at + 8))?;
    Ok(())
}

fn run_to_answer(vcpu: &mut VcpuFd) -> GuestResult {
    let failed = |why: &str| GuestResult::Failed(why.to_owned());
    let flag: *mut u8 = &mut vcpu.get_kvm_run().immediate_exit;
    // SAFETY: the byte is in the vCPU's mapping, which outlives this function; the vCPU runs on this thread alone.
    let immediate = unsafe { ImmediateExit::install(flag) };
    immediate.clear();
    let deadline_ns = boottime_ns() + PATIENCE.as_nanos() as u64;
    let timer = KickTimer::new(ThreadId::current());
    if let Err(error) =
        timer.as_ref().map_err(ToString::to_string).and_then(|t| t.arm(deadline_ns).map_err(|e| e.to_string()))
    {
        return GuestResult::Failed(format!("no timer: {error}"));
    }
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [PASSED])) => return GuestResult::Passed,
            Ok(VcpuExit::IoOut(..)) => return failed("answers something else"),
            Ok(VcpuExit::Shutdown) => return failed("resets at once (triple fault)"),
            Ok(VcpuExit::InternalError) => return failed("KVM reports an internal error"),
            Ok(VcpuExit::FailEntry(..)) => return failed("the processor refuses to enter it"),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return GuestResult::Failed(format!("leaves with {other:?}")),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return GuestResult::Failed(error.to_string()),
        }
        if boottime_ns() >= deadline_ns {
            return failed("hangs");
        }
        immediate.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(module: &'static str, long_mode: GuestResult) -> Report {
        Report {
            unusable: None,
            modules: vec![module],
            real_mode: GuestResult::Passed,
            protected_mode: GuestResult::Passed,
            long_mode,
        }
    }

    #[test]
    fn the_sentence_says_what_to_do() {
        let good = report("kvm_amd", GuestResult::Passed);
        assert!(good.runs_linux());
        assert!(good.to_string().contains("AMD-V"));
        let pvm = report("kvm_pvm", GuestResult::Failed("hangs".into()));
        assert!(!pvm.runs_linux());
        let text = pvm.to_string();
        assert!(text.contains("kvm_pvm") && text.contains("64-bit paged: hangs") && text.contains("lab up"), "{text}");
        let none = Report { unusable: Some("it is not there".into()), ..pvm };
        assert!(!none.runs_flat_guests());
        assert_eq!(none.to_string(), "No guest runs on this host: it is not there.");
    }
}

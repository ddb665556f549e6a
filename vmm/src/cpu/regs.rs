//! Registers at the first instruction. Only the boot processor gets them; the others wait for INIT and SIPI, which KVM's
//! interrupt controllers deliver.

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::Entry;
use crate::machine::kvm::{KvmError, refused};
use crate::memory::GuestMemory;

/// The processor's tables, below what `boot` uses.
const GDT: u64 = 0x500;
const IDT: u64 = 0x540;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// One page directory a GiB, four in all: what the kernel needs before it has its own.
const PAGE_DIRECTORIES: u64 = 0xb000;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

// Selectors, as the Linux boot protocol numbers them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 0b100 << 8;
const DELIVERY_EXTINT: u32 = 0b111 << 8;

#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("cannot write the processor's first tables into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

#[derive(Clone, Copy)]
struct Segment {
    selector: u16,
    kind: u8,
    code_64: bool,
    default_32: bool,
    system: bool,
}

impl Segment {
    fn kvm(self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: if self.system { 0x67 } else { 0xffff_ffff },
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(self.default_32),
            s: u8::from(!self.system),
            l: u8::from(self.code_64),
            g: u8::from(!self.system),
            ..Default::default()
        }
    }

    /// The same as an entry of the descriptor table.
    fn descriptor(self) -> u64 {
        let limit: u64 = if self.system { 0x67 } else { 0xf_ffff };
        let flags = u64::from(!self.system) << 3 | u64::from(self.default_32) << 2 | u64::from(self.code_64) << 1;
        let access = 1 << 7 | u64::from(!self.system) << 4 | u64::from(self.kind);
        (limit & 0xffff) | (access << 40) | ((limit >> 16) << 48) | (flags << 52)
    }
}

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;

fn segments(long: bool) -> [Segment; 3] {
    let code = Segment { selector: CODE, kind: TYPE_CODE, code_64: long, default_32: !long, system: false };
    let data = Segment { selector: DATA, kind: TYPE_DATA, code_64: false, default_32: true, system: false };
    let task = Segment { selector: TASK, kind: TYPE_TASK, code_64: false, default_32: false, system: true };
    [code, data, task]
}

/// Writes the tables and sets the boot processor's registers.
pub fn set_entry(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), RegsError> {
    let long = matches!(entry, Entry::Long { .. });
    let mut sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
    set_segments(memory, &mut sregs, long)?;
    sregs.cr0 = CR0_PE | CR0_ET;
    let regs = match entry {
        Entry::Long { rip, zero_page } => {
            write_page_tables(memory)?;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs { rip, rsi: zero_page, rsp: STACK, rbp: STACK, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
        Entry::Pvh { rip, start_info } => {
            sregs.cr4 = 0;
            sregs.efer = 0;
            kvm_regs { rip, rbx: start_info, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(refused("set the control registers"))?;
    vcpu.set_regs(&regs).map_err(refused("set registers"))?;
    Ok(())
}

fn set_segments(memory: &GuestMemory, sregs: &mut kvm_sregs, long: bool) -> Result<(), RegsError> {
    let [code, data, task] = segments(long);
    // Entries 0 and 1 are empty: the selectors start at 0x10.
    let table = [0, 0, code.descriptor(), data.descriptor(), task.descriptor(), 0];
    for (at, descriptor) in table.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * at as u64))?;
    }
    memory.write_obj(0u64, GuestAddress(IDT))?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (8 * table.len() - 1) as u16;
    sregs.idt.base = IDT;
    sregs.idt.limit = 7;
    sregs.cs = code.kvm();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data.kvm();
    }
    sregs.tr = task.kvm();
    Ok(())
}

/// The first 4 GiB, as they are.
fn write_page_tables(memory: &GuestMemory) -> Result<(), RegsError> {
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4u64 {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT + 8 * gib))?;
        for at in 0..512u64 {
            let page = (gib << 30) | (at << 21) | PRESENT_WRITABLE | LARGE_PAGE;
            memory.write_obj(page, GuestAddress(directory + 8 * at))?;
        }
    }
    Ok(())
}

/// The local interrupt pins, as the MADT and a BIOS have them: LINT0 from the PIC, LINT1 for NMIs.
pub fn set_local_pins(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().map_err(refused("read the local interrupt controller"))?;
    set_delivery(&mut lapic, LAPIC_LINT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, LAPIC_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic).map_err(refused("set the local interrupt controller"))
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const DELIVERY_MASK: u32 = 0b111 << 8;
    let bytes = &mut lapic.regs[register..register + 4];
    let mut raw = [0; 4];
    for (to, from) in raw.iter_mut().zip(bytes.iter()) {
        *to = *from as u8;
    }
    let value = (u32::from_le_bytes(raw) & !DELIVERY_MASK) | mode;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        let long = segments(true).map(Segment::descriptor);
        assert_eq!(long, [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]);
        let flat = segments(false)[0].descriptor();
        assert_eq!(flat, 0x00cf_9b00_0000_ffff);
    }
}

//! A guest of some dozen instructions: 32-bit flat code in an ELF file with a PVH note, so that it runs on any KVM that opens.
//!
//! The first letter of its command line says what it does after it has printed `up`:
//! `o` powers off by S5, `c` prints dots for ever, `r` resets by 0xCF9, `k` by the keyboard controller, `b` waits for the power button,
//! `p` says that it has panicked and prints dots, `w` starts its watchdog, with two seconds, and prints dots, `x` prints `y` or `n` for
//! each of the devices 00:1b.0 to 00:1f.0 and powers off.
//!
//! Guests that can be moved tell whether anything of them was lost: `m` counts in a register, in memory and in a register of COM1, compares
//! the three, and prints the alphabet for ever; `f` does the same without a rest, so that it is nearly always at a port; `2` does so on
//! one vCPU and counts in digits on a second, whose APIC id is the digit that follows (1 without one); `t` waits in HLT for its timer and prints a letter at each interrupt; `i` keeps interrupts off
//! until something is typed, and prints `P` when the power button was pressed meanwhile; `q` writes to one page after the other of two mebibytes,
//! which must hold what it wrote there a turn before (zero in one turn of 16), and prints a letter at each turn. What does not compare
//! prints `!`.
//! `g` prints the first byte of its generation, then dots, and the byte again when it is told that there is another one.

use std::arch::global_asm;

const LOAD_ADDRESS: u32 = 0x10_0000;

global_asm!(
    ".pushsection .rodata",
    ".code32",
    ".global quorate_test_guest",
    "quorate_test_guest:",
    "mov esp, 0x180000",
    // The start info is in EBX; its command line at offset 24.
    "mov esi, [ebx + 24]",
    "mov dx, 0x3f8",
    "mov al, 0x75", // u
    "out dx, al",
    "mov al, 0x70", // p
    "out dx, al",
    "mov al, 0x0a",
    "out dx, al",
    // The boot timer.
    "mov dx, 0x5f0",
    "mov al, 123",
    "out dx, al",
    "mov al, [esi]",
    "cmp al, 0x6f", // o
    "je 10f",
    "cmp al, 0x63", // c
    "je 20f",
    "cmp al, 0x72", // r
    "je 30f",
    "cmp al, 0x6b", // k
    "je 40f",
    "cmp al, 0x62", // b
    "je 50f",
    "cmp al, 0x6d", // m
    "mov ebp, 20000",
    "je .Lquorate_mover",
    "mov ebp, 1",
    "cmp al, 0x66", // f
    "je .Lquorate_mover",
    "mov ebp, 20000",
    "cmp al, 0x32", // 2
    "je .Lquorate_two",
    "cmp al, 0x74", // t
    "je .Lquorate_timer",
    "cmp al, 0x69", // i
    "je .Lquorate_interrupt",
    "cmp al, 0x67", // g
    "je .Lquorate_generation",
    "cmp al, 0x70", // p
    "je 60f",
    "cmp al, 0x77", // w
    "je 70f",
    "cmp al, 0x78", // x
    "je 80f",
    "cmp al, 0x71", // q
    "je .Lquorate_writer",
    "ud2",
    // S5.
    "10: mov dx, 0x604",
    "mov ax, 0x2000",
    "out dx, ax",
    "11: jmp 11b",
    // A dot every half million turns.
    "20: mov ecx, 500000",
    "21: dec ecx",
    "jnz 21b",
    "mov dx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    "jmp 20b",
    "30: mov dx, 0xcf9",
    "mov al, 0x0f",
    "out dx, al",
    "31: jmp 31b",
    "40: mov al, 0xfe",
    "out 0x64, al",
    "41: jmp 41b",
    // Enable the button's event, wait for its status, power off.
    "50: mov dx, 0x602",
    "mov ax, 0x100",
    "out dx, ax",
    "51: mov ecx, 100000",
    "52: dec ecx",
    "jnz 52b",
    "mov dx, 0x600",
    "in ax, dx",
    "test ax, 0x100",
    "jz 51b",
    ".Lquorate_off:",
    "jmp 10b",
    "60: mov dx, 0x505",
    "mov al, 1",
    "out dx, al",
    "jmp 20b",
    // Registers 0x60 and 0x68 of 00:1b.0: the fast clock, on. Both timers are as long as they can be.
    "70: mov dx, 0xcf8",
    "mov eax, 0x8000d860",
    "out dx, eax",
    "mov dx, 0xcfc",
    "mov ax, 4",
    "out dx, ax",
    "mov dx, 0xcf8",
    "mov eax, 0x8000d868",
    "out dx, eax",
    "mov dx, 0xcfc",
    "mov al, 2",
    "out dx, al",
    "jmp 20b",
    "80: mov ecx, 0x1b",
    "81: mov eax, ecx",
    "shl eax, 11",
    "or eax, 0x80000000",
    "mov dx, 0xcf8",
    "out dx, eax",
    "mov dx, 0xcfc",
    "in eax, dx",
    "mov bl, 0x6e", // n
    "cmp ax, 0xffff",
    "je 82f",
    "mov bl, 0x79", // y
    "82: mov dx, 0x3f8",
    "mov al, bl",
    "out dx, al",
    "inc ecx",
    "cmp ecx, 0x20",
    "jne 81b",
    "jmp .Lquorate_off",
    // Enables general purpose event 5, and looks for it in the status register.
    ".Lquorate_generation:",
    "mov dx, 0x628",
    "mov al, 0x20",
    "out dx, al",
    ".Lquorate_generation_told:",
    "mov al, byte ptr [0xef000]",
    "mov dx, 0x3f8",
    "out dx, al",
    ".Lquorate_generation_turn:",
    "mov ecx, 100000",
    ".Lquorate_generation_wait:",
    "dec ecx",
    "jnz .Lquorate_generation_wait",
    "mov dx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    "mov dx, 0x620",
    "in al, dx",
    "test al, 0x20",
    "jz .Lquorate_generation_turn",
    "mov al, 0x20",
    "out dx, al",
    "jmp .Lquorate_generation_told",
    // The counts: EDI, a word at 2 MiB, the scratch register of COM1.
    ".Lquorate_mover:",
    "xor edi, edi",
    "mov dword ptr [0x200000], 0",
    // The rest comes first: a guest is nearly always stopped in it, and then compares.
    ".Lquorate_mover_turn:",
    "mov ecx, ebp",
    ".Lquorate_mover_wait:",
    "dec ecx",
    "jnz .Lquorate_mover_wait",
    "cmp edi, dword ptr [0x200000]",
    "jne .Lquorate_wrong",
    "mov dx, 0x3ff",
    "in al, dx",
    "mov ebx, edi",
    "cmp al, bl",
    "jne .Lquorate_wrong",
    "inc edi",
    "inc dword ptr [0x200000]",
    "mov eax, edi",
    "mov dx, 0x3ff",
    "out dx, al",
    "mov ecx, 26",
    "mov ebx, 0x61", // a
    "call .Lquorate_print_count",
    "jmp .Lquorate_mover_turn",
    ".Lquorate_wrong:",
    "mov al, 0x21", // !
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp .Lquorate_off",
    // EDI modulo ECX, as a character that counts from EBX.
    ".Lquorate_print_count:",
    "mov eax, edi",
    "xor edx, edx",
    "div ecx",
    "mov eax, edx",
    "add eax, ebx",
    "mov dx, 0x3f8",
    "out dx, al",
    "ret",
    // The second processor starts at 0x8000.
    ".Lquorate_two:",
    "xor ebx, ebx",
    "mov bl, [esi + 1]",
    "sub bl, 0x30", // 0
    "cmp bl, 9",
    "jbe .Lquorate_two_id",
    "mov ebx, 1",
    ".Lquorate_two_id:",
    "shl ebx, 24",
    ".byte 0xbe", // mov esi, the address
    ".long .Lquorate_second_16 - quorate_test_guest + 0x100000",
    "mov edi, 0x8000",
    ".byte 0xb9", // mov ecx, the length
    ".long .Lquorate_second_end - .Lquorate_second_16",
    "cld",
    "rep movsb",
    "mov dword ptr [0xfee000f0], 0x1ff",
    "mov dword ptr [0xfee00310], ebx",
    "mov dword ptr [0xfee00300], 0x4500", // INIT
    "mov ecx, 1000000",
    ".Lquorate_two_wait:",
    "dec ecx",
    "jnz .Lquorate_two_wait",
    "mov dword ptr [0xfee00310], ebx",
    "mov dword ptr [0xfee00300], 0x4608", // SIPI at page 8
    "jmp .Lquorate_mover",
    ".code16",
    ".Lquorate_second_16:",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    // lgdt of what is below, at its place in the copy.
    ".byte 0x0f, 0x01, 0x16",
    ".word 0x8000 + (.Lquorate_second_gdt - .Lquorate_second_16)",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    // A far jump to the 32-bit part.
    ".byte 0x66, 0xea",
    ".long .Lquorate_second_32 - quorate_test_guest + 0x100000",
    ".word 0x10",
    ".Lquorate_second_gdt:",
    ".word 0x2f",
    ".long 0x500",
    ".Lquorate_second_end:",
    ".code32",
    ".Lquorate_second_32:",
    "mov ax, 0x18",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov esp, 0x190000",
    "xor edi, edi",
    "mov dword ptr [0x200100], 0",
    ".Lquorate_second_turn:",
    "mov ecx, 30000",
    ".Lquorate_second_wait:",
    "dec ecx",
    "jnz .Lquorate_second_wait",
    "cmp edi, dword ptr [0x200100]",
    "jne .Lquorate_wrong",
    "inc edi",
    "inc dword ptr [0x200100]",
    "mov ecx, 10",
    "mov ebx, 0x30", // 0
    "call .Lquorate_print_count",
    "jmp .Lquorate_second_turn",
    // An interrupt gate for vector ESI to the code at EAX; the interrupt controllers of old are silent.
    ".Lquorate_gate:",
    "mov dword ptr [esi * 8 + 0x210000], eax",
    "mov word ptr [esi * 8 + 0x210002], 0x10",
    "mov dword ptr [esi * 8 + 0x210004], eax",
    "mov word ptr [esi * 8 + 0x210004], 0x8e00",
    "mov word ptr [0x20fff0], 0x7ff",
    "mov dword ptr [0x20fff2], 0x210000",
    "lidt [0x20fff0]",
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    "mov dword ptr [0xfee000f0], 0x1ff",
    "ret",
    ".Lquorate_timer:",
    "xor edi, edi",
    "mov dword ptr [0x200000], 0",
    ".byte 0xb8", // mov eax, the address
    ".long .Lquorate_tick - quorate_test_guest + 0x100000",
    "mov esi, 0x40",
    "call .Lquorate_gate",
    "mov dword ptr [0xfee003e0], 0xb",     // by 1
    "mov dword ptr [0xfee00320], 0x20040", // periodic
    "mov dword ptr [0xfee00380], 2000000",
    ".Lquorate_timer_turn:",
    "cmp edi, dword ptr [0x200000]",
    "jne .Lquorate_wrong",
    "sti",
    "hlt",
    "jmp .Lquorate_timer_turn",
    ".Lquorate_tick:",
    "inc edi",
    "inc dword ptr [0x200000]",
    "mov ecx, 26",
    "mov ebx, 0x61",
    "call .Lquorate_print_count",
    "mov dword ptr [0xfee000b0], 0",
    // A KVM without VT-x or AMD-V knows no IRET outside of real mode; there is nothing to return to but the loop.
    "mov esp, 0x180000",
    "jmp .Lquorate_timer_turn",
    ".Lquorate_interrupt:",
    ".byte 0xb8", // mov eax, the address
    ".long .Lquorate_pressed - quorate_test_guest + 0x100000",
    "mov esi, 0x50",
    "call .Lquorate_gate",
    "mov dword ptr [0xfec00000], 0x23",
    "mov dword ptr [0xfec00010], 0",
    "mov dword ptr [0xfec00000], 0x22",
    "mov dword ptr [0xfec00010], 0x8050", // GSI 9: vector 0x50, level
    "mov dx, 0x602",
    "mov ax, 0x100",
    "out dx, ax",
    // A mark on the other devices: a byte of the CMOS memory, the reset port, a root port's bridge control.
    "mov al, 0x40",
    "out 0x70, al",
    "mov al, 0xa5",
    "out 0x71, al",
    "mov dx, 0xcf9",
    "mov al, 0x02",
    "out dx, al",
    "mov dx, 0xcf8",
    "mov eax, 0x8000183c",
    "out dx, eax",
    "mov dx, 0xcfc",
    "mov eax, 0x10000",
    "out dx, eax",
    ".Lquorate_interrupt_turn:",
    "mov ecx, 100000",
    ".Lquorate_interrupt_wait:",
    "dec ecx",
    "jnz .Lquorate_interrupt_wait",
    "mov dx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    "mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz .Lquorate_interrupt_turn",
    "sti",
    "nop",
    "nop",
    "jmp .Lquorate_wrong",
    // EDI counts turns, ESI is the page.
    ".Lquorate_writer:",
    "xor edi, edi",
    ".Lquorate_writer_turn:",
    "mov esi, 0x400000",
    ".Lquorate_writer_page:",
    // 50 microseconds of the PM timer, so that no machine is too fast to be slowed down.
    "mov dx, 0x608",
    "in eax, dx",
    "mov ecx, eax",
    ".Lquorate_writer_wait:",
    "in eax, dx",
    "sub eax, ecx",
    "and eax, 0xffffff",
    "cmp eax, 179",
    "jb .Lquorate_writer_wait",
    "mov eax, edi",
    "and eax, 15",
    "cmp eax, dword ptr [esi]",
    "jne .Lquorate_wrong",
    "inc eax",
    "and eax, 15",
    "mov dword ptr [esi], eax",
    "add esi, 4096",
    "cmp esi, 0x600000",
    "jb .Lquorate_writer_page",
    "inc edi",
    "mov ecx, 26",
    "mov ebx, 0x61",
    "call .Lquorate_print_count",
    "jmp .Lquorate_writer_turn",
    // The button's status is what raised it.
    ".Lquorate_pressed:",
    "mov dx, 0x600",
    "in ax, dx",
    "test ax, 0x100",
    "jz .Lquorate_wrong",
    "mov dx, 0x3f8",
    "mov al, 0x50", // P
    "out dx, al",
    "jmp .Lquorate_off",
    ".global quorate_test_guest_end",
    "quorate_test_guest_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static quorate_test_guest: u8;
    static quorate_test_guest_end: u8;
}

fn code() -> &'static [u8] {
    let start = &raw const quorate_test_guest;
    let len = (&raw const quorate_test_guest_end) as usize - start as usize;
    // SAFETY: the labels enclose the code above, in one read-only section.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// The guest as a kernel file.
pub fn elf() -> Vec<u8> {
    elf_of(code())
}

/// Flat 32-bit code as a kernel file. It starts at its first byte.
pub fn elf_of(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note = note();
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + note.len() as u64;

    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    file.extend([0; 8]);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [u64::from(LOAD_ADDRESS), HEADER, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    program_header(&mut file, 4, note_at, 0, note.len() as u64);
    program_header(&mut file, 1, code_at, u64::from(LOAD_ADDRESS), code.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, offset: u64, address: u64, len: u64) {
    for word in [kind, 5] {
        file.extend(word.to_le_bytes());
    }
    for word in [offset, address, address, len, len, 4] {
        file.extend(word.to_le_bytes());
    }
}

/// XEN_ELFNOTE_PHYS32_ENTRY.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    note
}

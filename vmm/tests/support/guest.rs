//! A guest of some dozen instructions: 32-bit flat code in an ELF file with a PVH note, so that it runs on any KVM that opens.
//!
//! The first letter of its command line says what it does after it has printed `up`:
//! `o` powers off by S5, `c` prints dots for ever, `r` resets by 0xCF9, `k` by the keyboard controller, `b` waits for the power button.

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
    "jmp 10b",
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

//! A guest that drives one hot-plug slot and the disk in it: 32-bit flat code, as [`guest`](super::guest).
//!
//! It finds port 00:04.0 (slot 1) and what is behind it in the ECAM window, as firmware left them. Again and again: it waits for presence,
//! powers the slot on, places BAR 0 at the start of the port's window, starts the virtio disk, reads its first sector and prints eight
//! bytes of it; then it waits for the attention button, blinks, resets the disk, powers the slot off, and prints `gone`.

use std::arch::global_asm;

use super::guest::elf_of;

global_asm!(
    ".pushsection .rodata",
    ".code32",
    ".global quorate_plug_guest",
    "quorate_plug_guest:",
    "mov esp, 0x180000",
    // The port's registers, and those of the function behind it: ECAM + (bus << 20 | device << 15).
    "mov esi, 0xb0020000",
    "mov ebp, 0xb0200000",
    "mov dx, 0x3f8",
    "mov al, 0x75", // u
    "out dx, al",
    "mov al, 0x70", // p
    "out dx, al",
    "mov al, 0x0a",
    "out dx, al",
    // Slot status at 0x5a: presence. Then clear the events.
    "10: test word ptr [esi + 0x5a], 0x40",
    "jz 10b",
    "mov word ptr [esi + 0x5a], 0x11f",
    // Slot control at 0x58: power, indicator on. Link status at 0x52: active.
    "mov word ptr [esi + 0x58], 0x1c0",
    "11: test word ptr [esi + 0x52], 0x2000",
    "jz 11b",
    "cmp word ptr [ebp], 0x1af4",
    "jne 90f",
    // BAR 0 at the port's memory base; memory and bus master.
    "movzx edi, word ptr [esi + 0x20]",
    "and edi, 0xfff0",
    "shl edi, 16",
    "mov dword ptr [ebp + 0x10], edi",
    "mov dword ptr [ebp + 0x14], 0",
    "mov word ptr [ebp + 4], 6",
    // The rings of the last disk are used up.
    "push edi",
    "mov edi, 0x190000",
    "mov ecx, 0x1400",
    "xor eax, eax",
    "rep stosd",
    "pop edi",
    // Common configuration: acknowledge, driver, VERSION_1, features ok.
    "mov byte ptr [edi + 20], 1",
    "mov byte ptr [edi + 20], 3",
    "mov dword ptr [edi + 8], 1",
    "mov dword ptr [edi + 12], 1",
    "mov byte ptr [edi + 20], 11",
    // Queue 0: eight places, descriptors, available and used ring.
    "mov word ptr [edi + 22], 0",
    "mov word ptr [edi + 24], 8",
    "mov dword ptr [edi + 32], 0x190000",
    "mov dword ptr [edi + 36], 0",
    "mov dword ptr [edi + 40], 0x191000",
    "mov dword ptr [edi + 44], 0",
    "mov dword ptr [edi + 48], 0x192000",
    "mov dword ptr [edi + 52], 0",
    "mov word ptr [edi + 28], 1",
    "mov byte ptr [edi + 20], 15",
    // Three descriptors: a header of zeros (read sector 0), 512 bytes to fill, a status.
    "mov dword ptr [0x190000], 0x193000",
    "mov dword ptr [0x190008], 16",
    "mov dword ptr [0x19000c], 0x10001",
    "mov dword ptr [0x190010], 0x194000",
    "mov dword ptr [0x190018], 512",
    "mov dword ptr [0x19001c], 0x20003",
    "mov dword ptr [0x190020], 0x193010",
    "mov dword ptr [0x190028], 1",
    "mov dword ptr [0x19002c], 2",
    // One chain available, at descriptor 0. The doorbell. Wait until it is used.
    "mov word ptr [0x191002], 1",
    "mov word ptr [edi + 0x3000], 0",
    "20: cmp word ptr [0x192002], 1",
    "jne 20b",
    "mov ebx, 0x194000",
    "mov ecx, 8",
    "21: mov al, [ebx]",
    "out dx, al",
    "inc ebx",
    "dec ecx",
    "jnz 21b",
    "mov al, 0x0a",
    "out dx, al",
    // The button. Clear it, blink.
    "30: test word ptr [esi + 0x5a], 1",
    "jz 30b",
    "mov word ptr [esi + 0x5a], 0x11f",
    "mov word ptr [esi + 0x58], 0x2c0",
    "mov byte ptr [edi + 20], 0",
    "31: cmp byte ptr [edi + 20], 0",
    "jne 31b",
    // Power off, indicator off. Wait until the slot is empty.
    "mov word ptr [esi + 0x58], 0x6c0",
    "mov word ptr [esi + 0x58], 0x7c0",
    "32: test word ptr [esi + 0x5a], 0x40",
    "jnz 32b",
    "mov al, 0x67", // g
    "out dx, al",
    "mov al, 0x6f", // o
    "out dx, al",
    "mov al, 0x6e", // n
    "out dx, al",
    "mov al, 0x65", // e
    "out dx, al",
    "mov al, 0x0a",
    "out dx, al",
    "jmp 10b",
    "90: mov al, 0x3f", // ?
    "out dx, al",
    "91: jmp 91b",
    ".global quorate_plug_guest_end",
    "quorate_plug_guest_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static quorate_plug_guest: u8;
    static quorate_plug_guest_end: u8;
}

/// The guest as a kernel file.
pub fn elf() -> Vec<u8> {
    let start = &raw const quorate_plug_guest;
    let len = (&raw const quorate_plug_guest_end) as usize - start as usize;
    // SAFETY: the labels enclose the code above, in one read-only section.
    elf_of(unsafe { std::slice::from_raw_parts(start, len) })
}

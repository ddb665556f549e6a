//! The PCI hierarchy under a guest that writes anywhere, in any width, while devices come, go, interrupt and move.
#![no_main]

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::machine::ECAM;
use fuzz::machine::FIXED;
use fuzz::machine::Machine;
use fuzz::machine::SLOTS;
use libfuzzer_sys::fuzz_target;
use vmm::pci::PciFunction;

/// A register of a function: bus and device, register, width, value; read or written.
const CONFIG: u8 = 0;
/// The ports: the address register, which of them, width, value.
const PORTS: u8 = 1;
/// A BAR where it is now: whose, offset, width, value.
const BAR: u8 = 2;
/// Any address: width, address, value.
const ANYWHERE: u8 = 3;
/// The driver of a device goes all the way: whose, features left out, where queues are.
const START: u8 = 4;
/// The device interrupts, changes, breaks, or takes time for its reset: whose, what.
const DEVICE: u8 = 5;
/// A slot: which, what of it.
const SLOT: u8 = 6;
/// The machine is reset.
const RESET: u8 = 7;
/// The guest goes on in another machine.
const MOVE: u8 = 8;
const TAGS: u8 = 9;

const WRITE: u8 = 1;
const WIDTHS: [usize; 8] = [1, 2, 4, 8, 1, 2, 4, 3];
const BAR_BYTES: u64 = 0x8000;
/// Of one input: a move takes as long as everything else.
const MOST_MOVES: usize = 2;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut machine = Machine::new(&[0, 1]);
    let mut moves = 0;
    for (tag, body) in Pieces(data) {
        let tag = tag % TAGS;
        moves += usize::from(tag == MOVE);
        if tag != MOVE || moves <= MOST_MOVES {
            act(&mut machine, tag, Fields(body));
            machine.check();
        }
    }
});

fn access(machine: &Machine, address: u64, how: u8, value: u64) {
    let mut bytes = value.to_le_bytes();
    let width = WIDTHS[usize::from(how >> 1) % WIDTHS.len()];
    if how & WRITE != 0 {
        machine.mmio.write(address, &bytes[..width]);
    } else {
        machine.mmio.read(address, &mut bytes[..width]);
    }
}

fn which(machine: &Machine, number: u8) -> u8 {
    let slots: Vec<u8> = machine.functions.keys().copied().collect();
    slots[usize::from(number) % slots.len()]
}

fn act(machine: &mut Machine, tag: u8, mut fields: Fields) {
    match tag {
        CONFIG => {
            let (bus, device, register) = (u64::from(fields.u8()), u64::from(fields.u8()), u64::from(fields.u16()));
            let at = ECAM + (bus << 20 | device << 12 | register & 0xfff);
            access(machine, at, fields.u8(), fields.u64());
        }
        PORTS => {
            machine.pio.write(0xcf8, &fields.u32().to_le_bytes());
            let (port, how) = (0xcf8 + u16::from(fields.u8() & 7), fields.u8());
            let mut bytes = fields.u64().to_le_bytes();
            let width = WIDTHS[usize::from(how >> 1) % WIDTHS.len()].min(4);
            if how & WRITE != 0 {
                machine.pio.write(port, &bytes[..width]);
            } else {
                machine.pio.read(port, &mut bytes[..width]);
            }
        }
        BAR => {
            let function = &machine.functions[&which(machine, fields.u8())];
            let Some(range) = function.decoded().first().copied() else { return };
            let at = range.base.wrapping_add(u64::from(fields.u16()) % BAR_BYTES);
            access(machine, at, fields.u8(), fields.u64());
        }
        ANYWHERE => {
            let how = fields.u8();
            access(machine, fields.u64(), how, fields.u64());
        }
        START => start(machine, fields),
        DEVICE => {
            let device = &machine.devices[&which(machine, fields.u8())];
            let what = fields.u8();
            match (what, device.interrupt()) {
                (0..64, Some(interrupt)) => interrupt.queue_used(u16::from(what % 4)),
                (64..96, Some(interrupt)) => interrupt.config_changed(),
                (96..128, Some(interrupt)) => interrupt.needs_reset(),
                (128..192, _) => device.hold_at_reset(what & 1 != 0),
                _ => device.let_go(),
            }
        }
        SLOT => {
            let slot = SLOTS[usize::from(fields.u8()) % SLOTS.len()];
            match fields.u8() % 3 {
                0 => machine.insert(slot),
                1 => machine.bus.ask_removal(slot).expect("there is a port"),
                _ => machine.take_out(slot),
            }
        }
        RESET => machine.bus.reset().expect("the windows are as large as before"),
        _ => {
            // Devices that wait for their reset are drained first.
            machine.devices.values().for_each(|device| device.let_go());
            let moved = machine.moved(machine.save()).expect("what was saved is taken back");
            // A restore raises interrupts once more, whose traces are the only change.
            let saved = moved.save();
            let again = moved.moved(saved.clone()).expect("what was saved is taken back");
            assert_eq!(again.save(), saved, "a state that is taken is saved again");
            for (slot, device) in &machine.devices {
                let is_active = device.is_active();
                assert!(is_active || !moved.devices[slot].is_active(), "no driver begins by being moved");
            }
            *machine = moved;
        }
    }
}

/// As a driver does, through the function itself, so that it does not matter where the BAR is.
fn start(machine: &Machine, mut fields: Fields) {
    let function = &machine.functions[&which(machine, fields.u8())];
    let (features, rings, size) = (fields.u64(), u64::from(fields.u16()) << 4, 1u16 << (fields.u8() % 8));
    let write = |offset: u64, bytes: &[u8]| function.bar_write(0, offset, bytes);
    write(20, &[0]);
    write(20, &[3]);
    for select in [0u32, 1] {
        write(8, &select.to_le_bytes());
        let mut offered = [0; 4];
        write(0, &select.to_le_bytes());
        function.bar_read(0, 4, &mut offered);
        let wanted = u32::from_le_bytes(offered) & !((features >> (32 * select)) as u32);
        write(12, &wanted.to_le_bytes());
    }
    write(20, &[11]);
    for queue in 0..2u16 {
        write(22, &queue.to_le_bytes());
        write(24, &size.to_le_bytes());
        write(26, &(queue + 1).to_le_bytes());
        let at = rings + u64::from(queue) * 0x2000;
        for (field, part) in [(32, 0), (40, 0x1000), (48, 0x1800)] {
            write(field, &(at + part).to_le_bytes());
        }
        write(28, &1u16.to_le_bytes());
        let entry = 0x4000 + u64::from(queue + 1) * 16;
        write(entry, &0xfee0_0000u64.to_le_bytes());
        write(entry + 12, &0u32.to_le_bytes());
    }
    write(20, &[15]);
}

fn samples() -> Vec<Vec<u8>> {
    let config = |bus: u8, device: u8, register: u16, how: u8, value: u64| {
        (CONFIG, [&[bus, device << 3][..], &register.to_le_bytes(), &[how], &value.to_le_bytes()].concat())
    };
    let bar = |device: u8, offset: u16, how: u8, value: u64| {
        (BAR, [&[device][..], &offset.to_le_bytes(), &[how], &value.to_le_bytes()].concat())
    };
    let (write_2, write_4, write_1) = (3, 5, 1);
    let start = |device: u8| (START, [&[device][..], &[0; 8], &[0, 1, 4]].concat());
    let device = |device: u8, what: u8| (DEVICE, vec![device, what]);
    let slot = |slot: u8, what: u8| (SLOT, vec![slot, what]);
    let step = |tag: u8| (tag, vec![]);
    let _ = FIXED;
    let all: Vec<Vec<(u8, Vec<u8>)>> = vec![
        vec![
            config(1, 0, 0x40 + 2, write_2, 0xc000),
            start(0),
            device(0, 1),
            step(MOVE),
            device(0, 64),
            device(0, 100),
            step(MOVE),
        ],
        // A BAR that moves, a port that closes its window, a bus of another number.
        vec![
            start(1),
            config(1, 0, 0x10, write_4, 0x10_0000),
            config(1, 0, 0x14, write_4, 0x41),
            config(0, 3, 0x24, write_2, 0xfff1),
            config(0, 4, 0x19, write_1, 9),
            config(9, 0, 4, write_2, 6),
            step(MOVE),
        ],
        // A device that is asked for: button, blinking, power off.
        vec![
            start(0),
            slot(0, 1),
            config(0, 3, 0x40 + 0x1a, write_2, 0x1ff),
            config(0, 3, 0x40 + 0x18, write_2, 0x2c0),
            config(0, 3, 0x40 + 0x18, write_2, 0x7c0),
            slot(0, 0),
            step(MOVE),
        ],
        vec![
            slot(2, 0),
            config(0, 5, 0x40 + 0x18, write_2, 0x1c0),
            config(3, 0, 4, write_2, 6),
            step(RESET),
            slot(2, 2),
        ],
        vec![start(0), device(0, 129), bar(0, 20, write_1, 0), device(0, 200), bar(0, 20, 0, 0), start(0), step(MOVE)],
        // The window into the BAR.
        vec![(PORTS, vec![0xa4, 0, 1, 0x80, 4, 5, 20]), (PORTS, vec![0x10, 0, 1, 0x80, 4, 5, 255, 255, 255, 255])],
        // Both sides of the end of the table of vectors.
        vec![
            bar(2, 0x4000, 7, u64::MAX),
            bar(2, 0x402c, write_4, 0),
            bar(2, 0x4030, write_4, 0),
            bar(2, 0x4030, 6, 0),
            bar(2, 0x5000, 6, 0),
            bar(2, 0x1000, 0, 0),
            (ANYWHERE, vec![7; 17]),
        ],
    ];
    all.iter().map(|pieces| joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))).collect()
}

//! A saved guest whose states were changed: each is refused in words, or taken, and what was taken is saved again as it is.
//!
//! The input changes values in the states of a guest that was saved once, and bytes of the file around them.
#![no_main]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::machine::Machine;
use fuzz::saved::change;
use fuzz::saved::fixture;
use fuzz::saved::frame;
use fuzz::saved::here;
use fuzz::saved::layout;
use fuzz::saved::preamble;
use fuzz::states;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use vmm::pci::PciFunction;
use vmm::saved::header::Header;
use vmm::saved::payload::Payload;
use vmm::saved::payload::PayloadKind;
use vmm::saved::stream::GuestReader;
use vmm::saved::stream::Item;

/// A value of a state: which state, which value, how it changes.
const CHANGE: u8 = 0;
/// The file ends here.
const CUT: u8 = 1;
/// Bytes of the file: where, which.
const OVERWRITE: u8 = 2;
const TAGS: u8 = 3;

/// What can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Header,
    Payload(PayloadKind),
    Disk,
    Nic,
    Console,
    Watchdog,
    Balloon,
}

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let (all, mut changed, mut damage) = (subjects(), BTreeMap::new(), Vec::new());
    for (tag, body) in Pieces(data) {
        let mut fields = Fields(body);
        if tag % TAGS == CHANGE {
            let (subject, state) = &all[usize::from(fields.u8()) % all.len()];
            change(changed.entry(*subject).or_insert_with(|| state.clone()), fields);
        } else {
            damage.push((tag % TAGS, body));
        }
    }
    for (subject, state) in &changed {
        take(*subject, state);
    }
    if !damage.is_empty() {
        read(&damaged(&changed, &damage));
    }
});

/// All of them, as a guest has them that was saved in order.
fn subjects() -> &'static [(Subject, Value)] {
    static SUBJECTS: OnceLock<Vec<(Subject, Value)>> = OnceLock::new();
    SUBJECTS.get_or_init(|| {
        let header = serde_json::to_value(&fixture().header).expect("a header is JSON");
        let mut subjects = vec![(Subject::Header, header)];
        let of_kvm = fixture().payloads.iter().filter(|payload| payload.kind != PayloadKind::Pci);
        subjects.extend(of_kvm.map(|payload| (Subject::Payload(payload.kind), payload.data.clone())));
        let machine = Machine::new(&[0, 1]);
        for slot in [0, fuzz::machine::FIXED] {
            start(&*machine.functions[&slot]);
        }
        let pci = serde_json::to_value(machine.save()).expect("a state is JSON");
        subjects.extend([
            (Subject::Payload(PayloadKind::Pci), pci),
            (Subject::Disk, states::disk()),
            (Subject::Nic, states::nic()),
            (Subject::Console, states::console()),
            (Subject::Watchdog, states::watchdog()),
            (Subject::Balloon, states::balloon()),
        ]);
        for (subject, state) in &subjects {
            assert!(take(*subject, state), "{subject:?} is what it was saved as");
        }
        subjects
    })
}

/// A driver that has agreed and given one queue.
fn start(function: &dyn PciFunction) {
    let write = |offset: u64, bytes: &[u8]| function.bar_write(0, offset, bytes);
    write(20, &[3]);
    write(8, &1u32.to_le_bytes());
    write(12, &1u32.to_le_bytes());
    write(20, &[11]);
    for (field, part) in [(32, 0x1000u64), (40, 0x2000), (48, 0x3000)] {
        write(field, &part.to_le_bytes());
    }
    write(28, &1u16.to_le_bytes());
    write(20, &[15]);
}

/// True when the state is taken.
fn take(subject: Subject, state: &Value) -> bool {
    match subject {
        Subject::Header => {
            let Ok(header) = Header::decode(state.to_string().as_bytes()) else { return false };
            assert_eq!(
                Header::decode(&header.encode()).ok().as_ref(),
                Some(&header),
                "a header survives being written"
            );
            header.check(&here()).is_ok()
        }
        Subject::Payload(PayloadKind::Pci) => pci(state),
        Subject::Payload(kind) => states::payload(kind, state),
        Subject::Disk => states::take_disk(state),
        Subject::Nic => states::take_nic(state),
        Subject::Console => states::take_console(state),
        Subject::Watchdog => states::take_watchdog(state),
        Subject::Balloon => states::take_balloon(state),
    }
}

fn pci(state: &Value) -> bool {
    let Ok(saved) = serde_json::from_value(state.clone()) else { return false };
    let Ok(mut machine) = Machine::new(&[0, 1]).moved(saved) else { return false };
    machine.check();
    let saved = machine.save();
    let again = machine.moved(saved.clone()).expect("what was saved is taken back");
    assert_eq!(again.save(), saved, "a state that is taken is saved again");
    true
}

/// The whole file, with what was changed, and what has happened to its bytes.
fn damaged(changed: &BTreeMap<Subject, Value>, damage: &[(u8, &[u8])]) -> Vec<u8> {
    let header = changed.get(&Subject::Header).map(|header| header.to_string().into_bytes());
    let mut file = preamble();
    file.extend(frame(1, 0, &header.unwrap_or_else(|| fixture().header.encode())));
    let mut sequence = 1;
    for payload in &fixture().payloads {
        let data = changed.get(&Subject::Payload(payload.kind)).unwrap_or(&payload.data).clone();
        let payload = Payload { data, ..payload.clone() };
        file.extend(frame(4, sequence, &serde_json::to_vec(&payload).expect("a state is JSON")));
        sequence += 1;
    }
    file.extend(frame(5, sequence, &[0; 16]));
    for (tag, body) in damage {
        let mut fields = Fields(body);
        let at = usize::try_from(fields.u32()).unwrap_or(usize::MAX) % file.len().max(1);
        if *tag == CUT {
            file.truncate(at);
        } else {
            for (byte, new) in file.iter_mut().skip(at).zip(fields.rest()) {
                *byte = *new;
            }
        }
    }
    file
}

/// Reads a file to its end, if it has one.
fn read(file: &[u8]) -> Option<()> {
    let (header, mut reader) = GuestReader::start(file).ok()?;
    header.check(&here()).ok()?;
    reader.accept(&layout(&header));
    loop {
        match reader.item().ok()? {
            Item::State(payload) => drop(states::payload(payload.kind, &payload.data)),
            Item::End => break,
            Item::Pages { .. } | Item::Zeros { .. } => {}
        }
    }
    reader.nothing_follows().ok()
}

fn samples() -> Vec<Vec<u8>> {
    let all = subjects();
    // Of each subject some values, each in some ways.
    let mut samples: Vec<Vec<u8>> = (0..all.len() as u8)
        .map(|subject| {
            let changes = (0..12u8).map(|nth| vec![subject, nth.wrapping_mul(7), 0, nth, 1, 2, 3]);
            let changes: Vec<Vec<u8>> = changes.collect();
            joined(changes.iter().map(|body| (CHANGE, body.as_slice())))
        })
        .collect();
    samples.push(joined([(CUT, &[0, 1, 0, 0][..])]));
    samples.push(joined([(OVERWRITE, &[30, 0, 0, 0, 7, 7][..])]));
    samples.push(joined([(CHANGE, &[2, 1, 0, 4, 9][..]), (OVERWRITE, &[0, 0, 0, 0][..])]));
    samples
}

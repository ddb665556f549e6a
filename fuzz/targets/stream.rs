//! A guest that comes over a connection, from somebody who may lie: the frames are right, what they say is anything.
//!
//! What is taken is in memory as it was sent, and is a guest that can be saved and taken once more.
#![no_main]

use std::collections::BTreeMap;

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::saved::MEMORY_BYTES;
use fuzz::saved::fixture;
use fuzz::saved::frame;
use fuzz::saved::here;
use fuzz::saved::layout;
use fuzz::saved::pages_frame;
use fuzz::saved::preamble;
use libfuzzer_sys::fuzz_target;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vmm::memory::GuestMemory;
use vmm::saved::frame::PAGE_BYTES;
use vmm::saved::header::Header;
use vmm::saved::memory::put_pages;
use vmm::saved::memory::put_zeros;
use vmm::saved::memory::send_all;
use vmm::saved::payload::Payload;
use vmm::saved::payload::PayloadKind;
use vmm::saved::payload::Payloads;
use vmm::saved::stream::GuestReader;
use vmm::saved::stream::GuestWriter;
use vmm::saved::stream::Item;

/// The header that fits here.
const HEADER: u8 = 0;
/// A header; the piece is its JSON.
const OTHER_HEADER: u8 = 1;
/// Pages: of which address, how many, how many there are, what is in them.
const PAGES: u8 = 2;
/// Pages of zeros: of which address, how many.
const ZEROS: u8 = 3;
/// A state: whose, number, version, JSON, or what the fixture has.
const STATE: u8 = 4;
/// The end, with counts that are right, or off by so many.
const END: u8 = 5;
/// A frame of any kind.
const FRAME: u8 = 6;
/// Bytes, as they are.
const BYTES: u8 = 7;
const TAGS: u8 = 8;
/// Of a tag: the frame is out of order.
const SKIPS: u8 = 64;
/// Of a tag: the frame has lost a bit.
const DAMAGED: u8 = 128;

const HEADER_KIND: u32 = 1;
const OLD_PAGES_KIND: u32 = 2;
const ZEROS_KIND: u32 = 3;
const STATE_KIND: u32 = 4;
const END_KIND: u32 = 5;
const MOST_PAGES: usize = 8;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let Some(guest) = take(&written(data)) else { return };
    let mut writer = GuestWriter::start(Vec::new(), &guest.header).expect("memory takes it");
    send_all(&guest.memory, &mut writer, |_, _| true).expect("memory takes it");
    for payload in guest.payloads.values() {
        writer.state(payload).expect("what came in a frame goes into one");
    }
    writer.end().expect("memory takes it");
    let again = take(&writer.into_inner()).expect("what was taken once is taken again");
    assert!(again.header == guest.header && again.payloads == guest.payloads);
    assert!(contents(&again.memory) == contents(&guest.memory), "memory is the same");
});

struct Taken {
    header: Header,
    memory: GuestMemory,
    payloads: BTreeMap<(PayloadKind, u32), Payload>,
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut contents = vec![0; MEMORY_BYTES as usize];
    memory.read_slice(&mut contents, GuestAddress(0)).expect("all of it is memory");
    contents
}

/// As a process does that waits for a guest, but for KVM's part.
fn take(stream: &[u8]) -> Option<Taken> {
    let (header, mut reader) = GuestReader::start(stream).ok()?;
    header.check(&here()).ok()?;
    reader.accept(&layout(&header));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).expect("a small memory");
    let mut expected = vec![0; MEMORY_BYTES as usize];
    let (mut payloads, mut kept) = (Payloads::default(), BTreeMap::new());
    loop {
        match reader.item().ok()? {
            Item::Pages { address, data } => {
                put_pages(&memory, address, data).expect("a run of memory");
                expected[address as usize..][..data.len()].copy_from_slice(data);
            }
            Item::Zeros { address, pages } => {
                put_zeros(&memory, address, pages).expect("a run of memory");
                expected[address as usize..][..(pages * PAGE_BYTES) as usize].fill(0);
            }
            Item::State(payload) => {
                payloads.add(payload.clone()).ok()?;
                kept.insert((payload.kind, payload.instance), payload);
            }
            Item::End => break,
        }
    }
    reader.nothing_follows().ok()?;
    assert_eq!(reader.bytes(), stream.len() as u64);
    assert!(contents(&memory) == expected, "memory is what was sent");
    for (kind, instance) in kept.keys() {
        // Of a version that is not known, perhaps: taken is taken.
        let _ = payloads.take::<serde_json::Value>(*kind, *instance);
    }
    payloads.finish().expect("each was taken once");
    Some(Taken { header, memory, payloads: kept })
}

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    sequence: u32,
    pages: u64,
    zeros: u64,
}

fn written(data: &[u8]) -> Vec<u8> {
    let mut stream = Stream { bytes: preamble(), ..Stream::default() };
    for (tag, body) in Pieces(data) {
        if tag & SKIPS != 0 {
            stream.sequence = stream.sequence.wrapping_add(1);
        }
        let start = stream.bytes.len();
        stream.add(tag % TAGS, Fields(body));
        if let (true, Some(first)) = (tag & DAMAGED != 0, stream.bytes.get_mut(start + body.len() % 16)) {
            *first ^= 1;
        }
    }
    stream.bytes
}

impl Stream {
    fn frame(&mut self, kind: u32, body: &[u8]) {
        self.bytes.extend(frame(kind, self.sequence, body));
        self.sequence = self.sequence.wrapping_add(1);
    }

    fn run(&mut self, kind: u32, address: u64, pages: u64, data: &[u8]) {
        let head = [address.to_le_bytes(), pages.to_le_bytes()].concat();
        self.frame(kind, &[&head, data].concat());
    }

    fn add(&mut self, tag: u8, mut fields: Fields) {
        match tag {
            HEADER => self.frame(HEADER_KIND, &fixture().header.encode()),
            OTHER_HEADER => self.frame(HEADER_KIND, fields.rest()),
            PAGES => {
                let address = address(&mut fields);
                let (how, lie) = (usize::from(fields.u8()), u64::from(fields.u8()));
                let pages = how % MOST_PAGES;
                let seed = fields.rest();
                let data: Vec<u8> =
                    seed.iter().chain(&[0]).cycle().take(pages * PAGE_BYTES as usize).copied().collect();
                self.pages += pages as u64;
                let said = (pages as u64).wrapping_add(lie << (8 * (lie % 8)));
                if how & MOST_PAGES == 0 {
                    self.bytes.extend(pages_frame(self.sequence, [address, said], &data));
                    self.sequence = self.sequence.wrapping_add(1);
                } else {
                    self.run(OLD_PAGES_KIND, address, said, &data);
                }
            }
            ZEROS => {
                let (address, pages) = (address(&mut fields), fields.u64());
                self.zeros = self.zeros.wrapping_add(pages);
                self.run(ZEROS_KIND, address, pages, &[]);
            }
            STATE => {
                let kind = PayloadKind::ALL[usize::from(fields.u8()) % PayloadKind::ALL.len()];
                let (instance, version) = (u32::from(fields.u8()), u32::from(fields.u8()).wrapping_add(1));
                let of_fixture = || fixture().payloads.iter().find(|payload| payload.kind == kind);
                let data = serde_json::from_slice(fields.rest()).ok();
                let data = data.or_else(|| of_fixture().map(|payload| payload.data.clone())).unwrap_or_default();
                let payload = Payload { kind, instance, version, data };
                self.frame(STATE_KIND, &serde_json::to_vec(&payload).expect("a state is JSON"));
            }
            END => {
                let (pages, zeros) = (self.pages, self.zeros);
                let (more_pages, more_zeros) = (fields.u64(), fields.u64());
                self.run(END_KIND, pages.wrapping_add(more_pages), zeros.wrapping_add(more_zeros), &[]);
            }
            FRAME => {
                let kind = u32::from(fields.u8());
                self.frame(kind, fields.rest());
            }
            _ => self.bytes.extend(fields.rest()),
        }
    }
}

/// A page, or any number.
fn address(fields: &mut Fields) -> u64 {
    match fields.u8() {
        255 => fields.u64(),
        page => u64::from(page) * PAGE_BYTES,
    }
}

fn samples() -> Vec<Vec<u8>> {
    let pages = |first: u8, count: u8, fill: u8| (PAGES, vec![first, count, 0, fill]);
    let zeros = |first: u8, count: u8| (ZEROS, vec![first, count]);
    let states = || (0..PayloadKind::ALL.len() as u8).map(|kind| (STATE, vec![kind, 0, 0]));
    let small = || vec![(STATE, vec![2, 0, 0, b'7']), (STATE, [&[3, 1, 0][..], b"{\"a\":[1]}"].concat())];
    let whole = |middle: Vec<(u8, Vec<u8>)>, end: &[u8]| {
        let mut pieces = vec![(HEADER, vec![])];
        pieces.extend(middle);
        pieces.push((END, end.to_vec()));
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    let old = MOST_PAGES as u8;
    let run = || vec![pages(1, 2, 7), zeros(2, 3), pages(1, old | 1, 8), pages(63, 1, 9)];
    let header = String::from_utf8(fixture().header.encode()).expect("JSON is text");
    let short = header.replace(&serde_json::to_string(&fixture().header.cpuid).expect("JSON"), "[]");
    vec![
        whole([run(), states().collect()].concat(), &[]),
        whole([run(), small()].concat(), &[]),
        whole(small(), &[]),
        whole([run(), small(), run()].concat(), &[1]),
        joined([(OTHER_HEADER, header.as_bytes()), (STATE, &[2, 0, 0, b'7']), (END, &[])]),
        joined([(OTHER_HEADER, short.as_bytes()), (STATE, &[2, 0, 0, b'7']), (END, &[])]),
        whole([small(), vec![(BYTES, vec![0; 40]), (FRAME, vec![16]), (FRAME, vec![18, b'n', b'o'])]].concat(), &[]),
    ]
}

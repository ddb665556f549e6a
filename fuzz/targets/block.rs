//! A disk under a hostile driver and storage that fails: requests of any kind, resets, drains, saves, raw and as a qcow2 image.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use fuzz::Fields;
use fuzz::Pieces;
use fuzz::disk::SharedScript;
use fuzz::disk::Storage;
use fuzz::disk::locked;
use fuzz::disk::memory_file;
use fuzz::guest;
use fuzz::guest::Buffer;
use fuzz::guest::Guest;
use fuzz::guest::OWN;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::qcow2;
use libfuzzer_sys::fuzz_target;
use vmm::devices::block::BlockConfig;
use vmm::devices::block::BlockMetrics;
use vmm::devices::block::BlockSize;
use vmm::devices::block::config::Geometry;
use vmm::devices::block::config::MAX_SEGMENTS;
use vmm::devices::block::config::QUEUE_SIZE;
use vmm::devices::block::engine::Engine;
use vmm::devices::block::qcow2::exercise::open_bytes;
use vmm::devices::block::state::SavedBlock;
use vmm::devices::block::worker::Medium;
use vmm::lease::quiesce::DiskGate;
use vmm::virtio::device::QueuePosition;
use vmm_control::DiskFormat;
use vmm_control::OnError;
use vmm_control::RateLimit;

/// A request: kind, sector, form, place of the header, of the status, then data as of a chain.
const REQUEST: u8 = OWN;
/// A request with a range: kind, sector, count, flags.
const RANGE: u8 = OWN + 1;
/// The disk's thread wakes: milliseconds later.
const SERVE: u8 = OWN + 2;
/// What becomes of the next requests in storage.
const SCRIPT: u8 = OWN + 3;
const RESET: u8 = OWN + 4;
/// The lease ends, or the guest is saved: the gate closes, the disk drains, its file is closed.
const CLOSE: u8 = OWN + 5;
const OPEN: u8 = OWN + 6;
const RETRY: u8 = OWN + 7;
/// The guest goes on in another process; the state's pending requests are changed on the way, or not.
const MOVE: u8 = OWN + 8;
/// A state of another process, as it comes: JSON of requests.
const STATE: u8 = OWN + 9;
/// The file under a raw disk is cut: kibibytes.
const SHORTEN: u8 = OWN + 10;
const TAGS: u8 = OWN + 11;

const RAW_BYTES: u64 = 64 << 10;
const HEADER_BYTES: u32 = 16;
const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, u32::MAX];
/// More than any sequence of fates delays a request.
const MAX_TURNS: usize = 2000;

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    qcow2::let_the_library_panic();
    let mut pieces = Pieces(data);
    let (shape, settings) = pieces.next().unwrap_or((0, &[]));
    let mut disk = Disk::new(shape, Fields(settings));
    for (tag, body) in pieces {
        disk.act(tag % TAGS, body);
    }
    disk.end();
});

struct Disk {
    guest: Guest,
    config: BlockConfig,
    geometry: Geometry,
    gate: Arc<DiskGate>,
    script: SharedScript,
    medium: Arc<dyn Medium>,
    file: Option<Arc<std::fs::File>>,
    direct: Option<usize>,
    write_through: bool,
    engine: Engine,
    now: Duration,
    /// The driver broke the protocol, and has not reset the device.
    needs_reset: bool,
}

/// A raw file that can be cut while it is a disk.
struct Shared(Arc<std::fs::File>);

impl Medium for Shared {
    fn name(&self) -> &'static str {
        "a file"
    }
    fn carry_out(&self, work: &vmm::devices::block::worker::Work) -> i64 {
        self.0.carry_out(work)
    }
}

impl Disk {
    fn new(shape: u8, mut settings: Fields) -> Self {
        let is_image = shape & 1 != 0;
        let on_error = [OnError::Stop, OnError::Report, OnError::Ignore, OnError::Enospc];
        let limit = settings.u8();
        let rate_limit = (limit != 0).then(|| RateLimit {
            iops: Some(u64::from(limit)),
            bytes_per_second: (limit & 1 != 0).then_some(u64::from(limit) << 10),
            ..RateLimit::default()
        });
        let config = BlockConfig {
            name: "vda".into(),
            path: "/disk".into(),
            read_only: shape & 2 != 0,
            serial: "disk-0001".into(),
            block_size: if shape & 4 != 0 { BlockSize::B4096 } else { BlockSize::B512 },
            format: if is_image { DiskFormat::Qcow2 } else { DiskFormat::Raw },
            backing: Vec::new(),
            on_error: on_error[usize::from(shape >> 3 & 3)],
            rate_limit,
        };
        let (medium, bytes, file): (Arc<dyn Medium>, _, _) = if is_image {
            let image = open_bytes(&qcow2::image()).expect("an image that is right");
            (Arc::new(image), qcow2::DISK_BYTES, None)
        } else {
            let file = Arc::new(memory_file(RAW_BYTES));
            (Arc::new(Shared(Arc::clone(&file))), RAW_BYTES, Some(file))
        };
        let geometry = Geometry::new(&config, bytes);
        let direct = (shape & 32 != 0 && !is_image).then_some(512);
        let (gate, script) = (DiskGate::new(), SharedScript::default());
        let engine = Engine::new(&config, geometry.clone(), Arc::clone(&gate), Arc::new(BlockMetrics::default()));
        let guest = Guest::new(&[QUEUE_SIZE], shape & 64 != 0);
        let write_through = shape & 128 != 0;
        let (now, needs_reset) = (Duration::ZERO, false);
        let mut disk = Self {
            guest,
            config,
            geometry,
            gate,
            script,
            medium,
            file,
            direct,
            write_through,
            engine,
            now,
            needs_reset,
        };
        disk.open();
        disk.activate(QueuePosition::default());
        disk
    }

    fn open(&mut self) {
        let bytes = self.geometry.capacity_sectors * 512;
        let storage = Storage::new(Arc::clone(&self.medium), bytes, Arc::clone(&self.script));
        self.engine.open(Box::new(storage), self.direct);
    }

    fn activate(&mut self, at: QueuePosition) {
        let queue = self.guest.device_queue(0, at, MAX_SEGMENTS as usize + 2);
        self.engine.activate(queue, self.write_through);
        self.needs_reset = false;
    }

    fn act(&mut self, tag: u8, body: &[u8]) {
        if self.guest.act(tag, body) {
            return;
        }
        let mut fields = Fields(body);
        match tag {
            REQUEST => self.request(fields),
            RANGE => self.range(fields),
            SERVE => {
                self.now += Duration::from_millis(fields.u16().into());
                self.wake();
            }
            SCRIPT => locked(&self.script).extend(body),
            RESET => self.reset(),
            CLOSE => {
                self.gate.close();
                self.engine.begin_drain();
                self.settle();
                assert_eq!(self.engine.close(), self.engine.in_flight() == 0);
            }
            OPEN => {
                self.gate.open();
                if self.engine.backend().is_none() {
                    self.open();
                }
            }
            RETRY => self.engine.retry(),
            MOVE => self.move_to(|saved| saved),
            STATE => {
                let Ok(pending) = serde_json::from_slice::<serde_json::Value>(body) else { return };
                self.move_to(|mut saved| {
                    saved["pending"] = pending;
                    saved
                });
            }
            _ => {
                if let Some(file) = &self.file {
                    let _ = file.set_len(u64::from(fields.u8()) << 10);
                }
            }
        }
    }

    /// As the disk's thread does.
    fn wake(&mut self) {
        let Self { guest, engine, .. } = self;
        let reaped = guest.step(|| engine.reap());
        self.judge(reaped);
        let Self { guest, engine, now, .. } = self;
        let served = guest.step(|| engine.serve(*now));
        self.judge(served.map(drop));
        self.engine.take_fault();
        if let Some(position) = self.engine.standing().and_then(|standing| standing.position) {
            self.guest.check_position(0, position);
        }
    }

    fn judge<E>(&mut self, result: Result<(), E>) {
        if result.is_err() {
            self.engine.stop_serving();
            self.needs_reset = true;
        }
    }

    fn reset(&mut self) {
        self.engine.reset();
        self.settle();
        self.guest.restart();
        self.activate(QueuePosition::default());
    }

    /// Until storage has nothing, which takes as long as the script has fates.
    fn settle(&mut self) {
        for _ in 0..MAX_TURNS {
            if self.engine.in_flight() == 0 {
                return;
            }
            let Self { guest, engine, .. } = self;
            let reaped = guest.step(|| engine.reap());
            self.judge(reaped);
        }
        locked(&self.script).forget();
        let reaped = self.engine.reap();
        self.judge(reaped);
        let reaped = self.engine.reap();
        self.judge(reaped);
        assert_eq!(self.engine.in_flight(), 0, "what storage has done has ended");
    }

    fn request(&mut self, mut fields: Fields) {
        let kind = fields.u8();
        let kind = if kind < 250 { KINDS[usize::from(kind) % KINDS.len()] } else { fields.u32() };
        let sector = match fields.u8() {
            255 => fields.u64(),
            near => u64::from(near),
        };
        let (form, header_at, status_at) = (fields.u8(), fields.u16(), fields.u16());
        let data = guest::buffers(&mut fields);
        self.submit(kind, sector, form, header_at, status_at, &data, &[]);
    }

    fn range(&mut self, mut fields: Fields) {
        let kind = if fields.u8() & 1 == 0 { 11 } else { 13 };
        let (sector, count, flags) = (u64::from(fields.u16()), u32::from(fields.u16()), u32::from(fields.u8()));
        let mut range = Vec::new();
        range.extend(sector.to_le_bytes());
        range.extend(count.to_le_bytes());
        range.extend(flags.to_le_bytes());
        let at = Buffer { address: 0x1_0200, len: 16, write: false };
        self.submit(kind, 0, fields.u8(), 0, 0, &[at], &range);
    }

    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        form: u8,
        header_at: u16,
        status_at: u16,
        data: &[Buffer],
        out: &[u8],
    ) {
        let (header_at, status_at) =
            (0x1_0000 + u64::from(header_at % 0x7ff0), 0x2_0000 + u64::from(status_at % 0x7fff));
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.guest.poke(header_at, &header);
        if let Some(first) = data.first() {
            self.guest.poke(first.address, out);
        }
        let mut chain = vec![Buffer { address: header_at, len: HEADER_BYTES, write: false }];
        chain.extend(data);
        chain.push(Buffer { address: status_at, len: 1, write: true });
        self.guest.chain(0, None, form, &chain);
    }

    /// Saves the disk, and goes on in another engine, if that takes the state.
    fn move_to(&mut self, change: impl FnOnce(serde_json::Value) -> serde_json::Value) {
        let Some(standing) = self.engine.standing() else { return };
        let saved = SavedBlock::of(&self.geometry, &standing.pending);
        let value = serde_json::to_value(&saved).expect("a state is JSON");
        let Ok(moved) = serde_json::from_value::<SavedBlock>(change(value.clone())) else { return };
        let is_same = moved == saved;
        assert!(moved.check(&self.geometry).is_ok(), "the disk is the same one");
        let pending = moved.clone().requests();
        let memory = &self.guest.memory;
        let fits = |request: &vmm::devices::block::request::Request| {
            request.head < QUEUE_SIZE && request.fits(&self.geometry, memory)
        };
        let takes_all = pending.len() <= usize::from(QUEUE_SIZE) && pending.iter().all(fits);
        assert!(takes_all || !is_same, "what was saved is taken back: {moved:?}");
        if !takes_all {
            return;
        }
        let metrics = Arc::new(BlockMetrics::default());
        let new = Engine::new(&self.config, self.geometry.clone(), Arc::clone(&self.gate), metrics);
        std::mem::replace(&mut self.engine, new).abandon();
        if let Some(position) = standing.position {
            self.activate(position);
            self.engine.adopt(pending);
            let again = self.engine.standing().expect("nothing is in storage");
            assert_eq!(again.position, Some(position));
            assert_eq!(SavedBlock::of(&self.geometry, &again.pending), moved, "a state that is taken is saved again");
            if !is_same {
                // Its requests are none of the driver's: where they write is not in the book.
                self.guest.trust_nobody();
            }
        } else {
            self.needs_reset = true;
        }
        if self.gate.is_open() {
            self.open();
        }
    }

    fn end(mut self) {
        self.gate.open();
        if self.engine.backend().is_none() {
            self.open();
        }
        self.engine.reset();
        self.settle();
        self.gate.close();
        self.engine.begin_drain();
        self.settle();
        assert!(self.engine.close(), "nothing is in storage");
    }
}

fn samples() -> Vec<Vec<u8>> {
    let request = |kind: u8, sector: u8, form: u8, data: &[Vec<u8>]| {
        let body = [&[kind, sector, form, 0, 1, 0, 2], data.concat().as_slice()].concat();
        (REQUEST, body)
    };
    let (out, back) = (guest::buffer_bytes(0, 0x1000, 512), guest::buffer_bytes(guest::WRITE, 0x2000, 512));
    let large = guest::buffer_bytes(guest::HIGH | guest::WRITE, 0x1001, 4096);
    let serve = || (SERVE, vec![1, 0]);
    let work = || {
        vec![
            request(1, 2, 0, std::slice::from_ref(&out)),
            serve(),
            serve(),
            request(0, 2, 0, &[back.clone(), back.clone()]),
            request(0, 8, guest::INDIRECT, std::slice::from_ref(&large)),
            // The last sectors of a raw disk.
            request(0, 126, 0, &[back.clone(), back.clone()]),
            request(2, 0, 0, &[]),
            request(3, 0, 0, std::slice::from_ref(&back)),
            (RANGE, vec![0, 8, 0, 8, 0, 0, 0]),
            (RANGE, vec![1, 8, 0, 8, 0, 1, 0]),
            serve(),
            serve(),
        ]
    };
    let sample = |shape: u8, settings: &[u8], script: &[u8], more: Vec<(u8, Vec<u8>)>| {
        let mut pieces = vec![(shape, settings.to_vec()), (SCRIPT, script.to_vec())];
        pieces.extend(work());
        pieces.extend(more);
        pieces.extend(work());
        joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())))
    };
    let turn = |tags: &[u8]| tags.iter().map(|tag| (*tag, vec![])).collect::<Vec<_>>();
    // A write of as many buffers as a chain has, the first of them with the header too, which storage fails and the guest waits for.
    let most = || {
        let mut header = [0; HEADER_BYTES as usize + 3];
        header[3] = 1;
        let mut chain = vec![0, 0, 0];
        chain.extend(guest::buffer_bytes(0, 0, HEADER_BYTES as u16 + 4));
        (0..254).for_each(|_| chain.extend(guest::buffer_bytes(0, 0x100, 2)));
        chain.extend(guest::buffer_bytes(guest::HIGH | guest::WRITE, 0, 1));
        vec![(guest::POKE, header.to_vec()), (guest::CHAIN, chain)]
    };
    let pieces =
        [vec![(0, vec![]), (SCRIPT, vec![5])], most(), turn(&[SERVE, SERVE, MOVE, OPEN, RETRY, SERVE])].concat();
    let most = joined(pieces.iter().map(|(tag, body)| (*tag, body.as_slice())));
    vec![
        most,
        sample(64, &[], &[], turn(&[CLOSE, MOVE, OPEN])),
        sample(65, &[], &[], turn(&[RESET])),
        sample(32 | 8, &[], &[1, 2, 3, 4, 5, 6, 7], turn(&[RESET, SERVE])),
        sample(2, &[9], &[0, 5], turn(&[RETRY, SERVE, MOVE, OPEN, SERVE])),
        sample(0, &[], &[5, 5, 5], turn(&[MOVE, SERVE, RETRY, SERVE])),
        sample(4 | 16, &[], &[], vec![(SHORTEN, vec![1])]),
        sample(
            8,
            &[],
            &[],
            vec![(
                STATE,
                br#"[{"head":3,"operation":{"read":{"offset":0}},"data":[[65536,512]],"status":[[66000,1]]}]"#.to_vec(),
            )],
        ),
    ]
}

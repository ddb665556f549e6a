//! A disk that goes to another process with requests that nobody has answered yet.

use std::sync::Arc;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use super::tests::{DISK_BYTES, Faults, Guest, NO_ANSWER, OK, config, pattern};
use super::tests_of_faults::guest_under;
use super::*;
use crate::interrupt::fake::{FakeIoEvents, FakeMsi};
use crate::lease::quiesce::{DiskGate, Quiesce, QuiesceError};
use crate::pci::PciFunction;
use crate::virtio::VirtioPci;
use crate::virtio::testing::Buffer;
use vmm_control::OnError;

/// The disk at the other end: not open yet, behind a gate that is held.
struct Moved {
    function: Arc<VirtioPci>,
    handle: Arc<BlockHandle>,
    gate: Arc<DiskGate>,
}

impl Moved {
    fn new(guest: &Guest) -> Self {
        let gate = DiskGate::new();
        gate.hold();
        let faults = Arc::new(Faults::default());
        let (block, handle) = Block::closed(config(&guest.path), DiskFiles::by_path(), gate.clone(), faults).unwrap();
        let function =
            VirtioPci::new(block, guest.driver.memory.clone(), &*FakeMsi::new(), FakeIoEvents::new()).unwrap();
        Self { function, handle, gate }
    }
}

/// A guest whose two writes have failed or wait, and its saved disk.
fn with_two_writes() -> (Guest, [super::tests::Asked; 2], Value) {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let asked = [8, 9].map(|sector| {
        let at = guest.driver.buffer(&pattern(512, sector as u8));
        guest.ask(VIRTIO_BLK_T_OUT, sector, &[Buffer::Out(at, 512)])
    });
    guest.wait_stops(1);
    guest.gate.hold();
    // A drain syncs what the failed write left in the page cache, which needs the storage.
    sky.is_well();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    let saved = guest.driver.function.save().unwrap();
    (guest, asked, saved)
}

#[test]
fn requests_that_failed_are_tried_again_at_the_other_end() {
    let (mut guest, asked, saved) = with_two_writes();
    let moved = Moved::new(&guest);
    moved.function.restore(saved).unwrap();
    assert_eq!(guest.driver.try_used(0), None);
    moved.handle.reopen().unwrap();
    moved.gate.release();
    moved.handle.kick();
    guest.driver.function = moved.function.clone();
    let mut heads = [guest.driver.used(0).0, guest.driver.used(0).0];
    heads.sort_unstable();
    assert_eq!(asked.map(|asked| guest.status(asked)), [OK, OK]);
    let file = std::fs::read(&guest.path).unwrap();
    assert_eq!(file[8 * 512..9 * 512], pattern(512, 8));
    assert_eq!(file[9 * 512..10 * 512], pattern(512, 9));
    // And the ring goes on behind them.
    assert_eq!(guest.write_disk(3, &pattern(512, 3)), OK);
}

#[test]
fn a_guest_that_does_not_go_tries_again_itself() {
    let (mut guest, sky) = guest_under(OnError::Stop);
    sky.fails_with(libc::EIO);
    let at = guest.driver.buffer(&pattern(512, 1));
    let asked = guest.ask(VIRTIO_BLK_T_OUT, 8, &[Buffer::Out(at, 512)]);
    guest.wait_stops(1);
    guest.gate.hold();
    sky.is_well();
    guest.handle.cancel_and_drain(guest.soon()).unwrap();
    guest.driver.function.save().unwrap();
    assert_eq!(guest.status(asked), NO_ANSWER);
    guest.gate.release();
    guest.handle.retry();
    guest.driver.used(0);
    assert_eq!(guest.status(asked), OK);
}

#[test]
fn requests_that_no_driver_can_have_made_are_refused() {
    let (guest, _, saved) = with_two_writes();
    let pending = &saved["device"]["pending"];
    assert!(!pending.as_array().unwrap().is_empty());
    let refused = |change: fn(&mut Value)| {
        let mut hostile = saved.clone();
        change(&mut hostile["device"]["pending"]);
        let moved = Moved::new(&guest);
        moved.function.restore(hostile).unwrap_err().to_string()
    };
    let changes: [fn(&mut Value); 9] = [
        |pending| pending[0]["head"] = json!(0xffff),
        |pending| pending[0]["operation"] = json!({"write": {"offset": 1u64 << 40}}),
        |pending| pending[0]["operation"] = json!({"write": {"offset": u64::MAX}}),
        |pending| pending[0]["operation"] = json!({"read": {"offset": 511}}),
        |pending| pending[0]["operation"] = json!({"discard": {"offset": 0, "len": 512}}),
        |pending| pending[0]["data"] = json!([[u64::MAX, 512]]),
        |pending| pending[0]["status"] = json!([]),
        |pending| pending[0]["status"] = json!([[u64::MAX - 1, 1]]),
        |pending| {
            let one = pending[0].clone();
            *pending = Value::Array(vec![one; 70_000]);
        },
    ];
    for change in changes {
        let words = refused(change);
        assert!(words.contains("none of this disk"), "{words}");
    }
    // One twice, and one more than the ring says was taken.
    let twice = refused(|pending| pending[1] = pending[0].clone());
    let more = refused(|pending| {
        let mut more = pending[0].clone();
        more["head"] = json!(200);
        pending.as_array_mut().unwrap().push(more);
    });
    for words in [twice, more] {
        assert!(words.contains("none of this disk"), "{words}");
    }
    let words = refused(|pending| pending[0]["operation"] = json!({"format": {}}));
    assert!(words.contains("cannot be read"), "{words}");
}

#[test]
fn a_disk_that_changed_while_the_guest_was_on_its_way_is_not_opened() {
    let (guest, _, saved) = with_two_writes();
    let moved = Moved::new(&guest);
    moved.function.restore(saved).unwrap();
    std::fs::File::options().write(true).open(&guest.path).unwrap().set_len(4096).unwrap();
    let refused = moved.handle.reopen();
    assert!(matches!(refused, Err(QuiesceError::Changed { .. })), "{refused:?}");
}

/// KVM sees nothing of what a disk puts into the guest's memory.
#[test]
fn what_a_disk_reads_between_two_rounds_of_a_live_copy_is_in_the_next_one() {
    use crate::machine::kvm::{self, KvmVm};
    use crate::saved::dirty::DirtyLog;

    let Ok(kvm) = kvm::open() else {
        eprintln!("skipped: no KVM");
        return;
    };
    let mut guest = Guest::started(|_| {});
    std::fs::write(&guest.path, vec![7; DISK_BYTES as usize]).unwrap();
    let memory = guest.driver.memory.clone();
    let vm = KvmVm::new(&kvm, &memory).unwrap();
    let mut log = DirtyLog::start(&vm, &memory).unwrap();
    let at = crate::virtio::testing::MEMORY_BYTES as u64 - 4096;
    assert_eq!(guest.carry_out(virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN, 0, &[Buffer::In(at, 4096)]).0, OK);
    log.collect().unwrap();
    let sent_again = log.take(1).any(|run| run.address == at);
    assert!(sent_again && guest.driver.bytes(at, 4096) == [7; 4096]);
}

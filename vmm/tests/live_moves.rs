//! Guests that are copied while they run, on whatever KVM this machine has.

mod support;

use std::io::Read;
use std::thread::JoinHandle;

use support::moving::{load, run, source, target};
use support::{TestVm, flat_guests_run, wait_for};
use vmm_control::{Call, LiveLimits, Notice, PauseReason, RunState, SaveState, SaveStatus};

/// The guest has about 2 MiB that are not zero, and writes to them over and over.
const MIB: u64 = 1 << 20;

fn limits(bytes_per_second: u64) -> LiveLimits {
    LiveLimits { downtime_ms: 10, bytes_per_second: Some(bytes_per_second), timeout_ms: None }
}

/// Asks for a live copy. The stream of it is the thread's result.
fn copy(vm: &TestVm, live: LiveLimits) -> JoinHandle<Vec<u8>> {
    let mut client = vm.client();
    let reply = client.ask(Call::SaveAttach { migration: Some(9), live: Some(live) });
    assert!(reply.error.is_none(), "{reply:?}");
    std::thread::spawn(move || {
        let mut saved = Vec::new();
        client.reader.read_to_end(&mut saved).unwrap();
        saved
    })
}

fn ended(vm: &TestVm) -> SaveStatus {
    let mut client = vm.client();
    wait_for("the copy to end", || {
        let saving = client.status().saving.unwrap();
        (saving.state != SaveState::Saving).then_some(saving)
    })
}

fn letters(vm: &TestVm) -> String {
    vm.console().replace("up\n", "")
}

fn goes_on(vm: &TestVm) {
    let before = letters(vm).len();
    wait_for("the guest to go on", || (letters(vm).len() > before + 3).then_some(()));
    assert!(!vm.console().contains('!'), "{}", vm.console());
}

/// The guest arrives, is the same, and goes on with the next letter.
fn arrives(saved: &[u8], first: &TestVm, behaviour: &str) -> TestVm {
    let mut second = target(behaviour);
    second.start();
    load(&second, saved);
    run(&second, 42);
    goes_on(&second);
    let all = letters(first) + &letters(&second);
    let next = |c: u8| if c == b'z' { b'a' } else { c + 1 };
    assert!(all.as_bytes().windows(2).all(|pair| pair[1] == next(pair[0])), "{all}");
    second
}

#[test]
fn a_guest_that_hardly_writes_moves_in_few_rounds() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("m");
    vm.start();
    vm.wait_console("xyz");
    let saved = copy(&vm, LiveLimits::default()).join().unwrap();
    let saving = ended(&vm);
    assert_eq!((saving.state, saving.error.as_deref(), saving.migration), (SaveState::Saved, None, Some(9)));
    assert_eq!((saving.round, saving.throttle_percent, saving.remaining_bytes), (1, 0, 0));
    assert_eq!((saving.pages_done, saving.bytes_sent), (saving.pages_total, saved.len() as u64));
    assert!(saving.settled_us > 0 && saving.downtime_us > saving.settled_us, "{saving:?}");
    let mut client = vm.client();
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Saved });
    arrives(&saved, &vm, "m");

    // What went is a copy: its source goes on as well when it is told that the migration came to nothing, and not before.
    assert!(client.ask(Call::Resume).error.is_none());
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Saved });
    assert!(client.ask(Call::GoOn { migration: 9 }).error.is_none());
    assert_eq!(client.status().saving, None);
    goes_on(&vm);
}

#[test]
fn a_guest_that_writes_faster_than_it_is_copied_is_slowed_down_and_arrives_whole() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("q");
    vm.start();
    vm.wait_console("bcd");
    let mut watcher = vm.client();
    let stream = copy(&vm, limits(4 * MIB));
    wait_for("the copy to begin", || {
        let status = watcher.status();
        let saving = status.saving.unwrap();
        // While the guest runs, or there would be nothing to wait for.
        (saving.round >= 2 && status.run == RunState::Running && saving.dirty_bytes_per_second > 0).then_some(())
    });
    watcher.wait_notice(|notice| *notice == Notice::Paused { reason: PauseReason::Saved, quiesced: false });
    let saved = stream.join().unwrap();
    let saving = ended(&vm);
    assert_eq!(saving.state, SaveState::Saved, "{saving:?}");
    assert!(saving.round >= 3 && saving.throttle_percent >= 20, "{saving:?}");
    assert!(saving.pages_sent > 3 * 512 && saving.downtime_us > 0, "{saving:?}");
    let second = arrives(&saved, &vm, "q");

    // And on, from a process that got it so.
    let saved = copy(&second, limits(4 * MIB)).join().unwrap();
    assert_eq!(ended(&second).state, SaveState::Saved);
    let mut third = target("q");
    third.start();
    load(&third, &saved);
    run(&third, 43);
    goes_on(&third);
}

#[test]
fn a_copy_that_is_given_up_leaves_the_guest_running() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("q");
    vm.start();
    vm.wait_console("bcd");
    let stream = copy(&vm, LiveLimits { timeout_ms: Some(1500), ..limits(4 * MIB) });
    let saving = ended(&vm);
    assert_eq!((saving.state, saving.throttle_percent), (SaveState::Failed, 0));
    assert!(saving.error.clone().unwrap().contains("within 1 second"), "{saving:?}");
    assert!(saving.round >= 2, "{saving:?}");
    stream.join().unwrap();
    let mut client = vm.client();
    assert_eq!(client.status().run, RunState::Running);
    goes_on(&vm);

    // It is told until somebody has taken note.
    assert!(client.ask(Call::GoOn { migration: 9 }).error.is_none());
    assert_eq!(client.status().saving, None);
    // The next copy begins anew, and loses nothing that the first one took from the log.
    let saved = copy(&vm, limits(4 * MIB)).join().unwrap();
    assert_eq!(ended(&vm).state, SaveState::Saved);
    arrives(&saved, &vm, "q");
}

#[test]
fn a_client_that_leaves_cancels_the_copy_and_the_guest_runs_on() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("q");
    vm.start();
    vm.wait_console("bcd");
    let mut client = vm.client();
    let mut lost = vm.client();
    // Half a minute for the first pass.
    let live = Some(limits(64 << 10));
    assert!(lost.ask(Call::SaveAttach { migration: None, live }).error.is_none());
    wait_for("the first pages", || (client.status().saving?.pages_sent > 0).then_some(()));
    assert!(client.ask(Call::Pause).error.is_none());
    assert!(client.ask(Call::Resume).error.is_none(), "a pause may end meanwhile");
    drop(lost);
    let saving = ended(&vm);
    assert_eq!((saving.state, saving.error.as_deref()), (SaveState::Failed, Some("the client is gone")));
    assert_eq!(client.status().run, RunState::Running);
    goes_on(&vm);
}

#[test]
fn a_guest_resets_and_ends_in_the_middle_of_a_copy() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("q");
    vm.start();
    vm.wait_console("bcd");
    let mut client = vm.client();
    let mut copying = || {
        let stream = copy(&vm, limits(64 << 10));
        wait_for("the first pages", || (client.status().saving?.pages_sent > 0).then_some(()));
        stream
    };
    let stream = copying();
    vm.client().ask(Call::Reset { id: 1 });
    wait_for("the guest to begin again", || (vm.console().matches("up\nbcd").count() == 2).then_some(()));
    stream.join().unwrap();
    let saving = ended(&vm);
    assert_eq!((saving.state, saving.error.as_deref()), (SaveState::Failed, Some("the machine was taken down")));
    assert_eq!(vm.client().status().run, RunState::Running);
    let stream = copying();
    vm.client().ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
    stream.join().unwrap();
}

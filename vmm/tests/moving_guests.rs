//! Guests that are saved by one process and go on in another, on whatever KVM this machine has.

mod support;

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::{Value, json};
use support::moving::{hand_over, load, run, run_call, save, source, target};
use support::{TestVm, flat_guests_run, wait_for};
use vmm::machine::layout::Layout;
use vmm::saved::frame::FrameKind;
use vmm::saved::payload::PayloadKind;
use vmm::saved::stream::{GuestReader, Item};
use vmm::sys::boottime_ns;
use vmm_control::{Call, ErrorCode, ExitReason, IncomingState, Notice, PauseReason, RunState, SaveState};

const SECOND_NS: u64 = 1_000_000_000;

/// Whether these characters count round and round, one by one.
fn counts(text: &str, first: char, last: char) -> bool {
    let next = |c: char| if c == last { first } else { (c as u8 + 1) as char };
    let chars: Vec<char> = text.chars().filter(|c| (first..=last).contains(c)).collect();
    chars.windows(2).all(|pair| pair[1] == next(pair[0]))
}

fn printed(vm: &TestVm) -> String {
    vm.console().replace("up\n", "")
}

/// What the guest printed here and there.
fn all_printed(vms: &[&TestVm]) -> String {
    vms.iter().map(|vm| printed(vm)).collect()
}

#[test]
fn a_guest_goes_on_in_another_process_where_it_stopped() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);
    let status = first.client().status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::Saved });
    let saving = status.saving.unwrap();
    assert_eq!((saving.pages_total, saving.pages_done), (4096, 4096));
    assert_eq!(saving.bytes_sent, saved.len() as u64);
    assert!(saving.pages_sent < 200, "zero pages are not sent: {saving:?}");

    let mut second = target("m");
    second.start();
    let mut client = second.client();
    let waiting = client.status();
    assert_eq!(waiting.incoming.unwrap().state, IncomingState::Waiting);
    let early = client.ask(run_call(&second, 42)).error.unwrap();
    assert_eq!(early.code, ErrorCode::NotNow, "{early}");
    assert_eq!(client.ask(Call::SaveAttach { migration: None, live: None }).error.unwrap().code, ErrorCode::NotNow);
    load(&second, &saved);
    assert!(!second.path("started-42").exists(), "nothing is marked started");
    assert_eq!(second.console(), "", "nothing runs");
    let mut client = run(&second, 42);
    assert!(second.path("started-42").exists());
    wait_for("the alphabet", || (printed(&second).len() > 60).then_some(()));
    let status = client.status();
    assert_eq!((status.run, status.incoming), (RunState::Running, None));
    assert_eq!(client.ask(Call::Hello).result.unwrap()["epoch"], json!(42));
    assert!(client.ask(run_call(&second, 43)).error.is_some());

    client.ask(Call::PowerOff);
    assert_eq!(second.wait_exit().code(), Some(0));
    let report = second.report().unwrap();
    assert_eq!((report.reason, report.epoch, report.ran), (ExitReason::PoweredOff, 42, true));
    let text = all_printed(&[&first, &second]);
    assert!(counts(&text, 'a', 'z') && !text.contains('!'), "{text}");
}

#[test]
fn a_guest_that_was_only_saved_goes_on_itself() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("m");
    vm.start();
    vm.wait_console("xyz");
    for _ in 0..5 {
        let saved = save(&vm);
        let len = vm.console().len();
        let mut client = vm.client();
        assert!(client.ask(Call::Resume).error.is_none());
        wait_for("the guest to go on", || (vm.console().len() > len + 30).then_some(()));
        assert_eq!(client.status().saving, None);
        // And what was saved goes on as well, from the earlier moment.
        let mut copy = target("m");
        copy.start();
        load(&copy, &saved);
        run(&copy, 42);
        wait_for("the copy to run", || (printed(&copy).len() > 30).then_some(()));
        assert!(counts(&printed(&copy), 'a', 'z') && !copy.console().contains('!'));
    }
    assert!(counts(&printed(&vm), 'a', 'z') && !vm.console().contains('!'), "{}", vm.console());
}

#[test]
fn a_guest_moves_again_and_again() {
    if !flat_guests_run() {
        return;
    }
    let mut all = vec![source("m")];
    // The second processor is one that nobody has started.
    all[0].set("vcpus", json!(2)).start();
    all[0].wait_console("xyz");
    for epoch in 42..48 {
        let saved = save(all.last().unwrap());
        let mut next = target("m");
        next.set("vcpus", json!(2)).start();
        load(&next, &saved);
        run(&next, epoch);
        wait_for("some letters", || (printed(&next).len() > 20).then_some(()));
        all.push(next);
    }
    let text = all_printed(&all.iter().collect::<Vec<_>>());
    assert!(counts(&text, 'a', 'z') && !text.contains('!'), "{text}");
}

#[test]
fn a_guest_that_is_stopped_in_an_access_neither_repeats_nor_loses_it() {
    if !flat_guests_run() {
        return;
    }
    let mut all = vec![source("f")];
    all[0].start();
    all[0].wait_console("xyz");
    for epoch in 42..47 {
        let saved = save(all.last().unwrap());
        let mut next = target("f");
        next.start();
        load(&next, &saved);
        run(&next, epoch);
        wait_for("some letters", || (printed(&next).len() > 100).then_some(()));
        all.push(next);
    }
    let text = all_printed(&all.iter().collect::<Vec<_>>());
    assert!(counts(&text, 'a', 'z') && !text.contains('!'), "{text}");
}

#[test]
fn both_processors_go_on() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("2");
    first.set("vcpus", json!(2)).start();
    wait_for("both to count", || {
        let text = first.console();
        (text.contains('z') && text.contains('9')).then_some(())
    });
    let saved = save(&first);
    let mut second = target("2");
    second.set("vcpus", json!(2)).start();
    load(&second, &saved);
    run(&second, 42);
    wait_for("both to count", || {
        let text = printed(&second);
        (text.contains('z') && text.contains('9')).then_some(())
    });
    let text = all_printed(&[&first, &second]);
    assert!(counts(&text, 'a', 'z') && counts(&text, '0', '9') && !text.contains('!'), "{text}");
}

#[test]
fn a_guest_that_waits_in_hlt_is_woken_by_its_timer() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("t");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);
    let mut second = target("t");
    second.start();
    load(&second, &saved);
    run(&second, 42);
    wait_for("interrupts", || (printed(&second).len() > 60).then_some(()));
    let text = all_printed(&[&first, &second]);
    assert!(counts(&text, 'a', 'z') && !text.contains('!'), "{text}");
}

#[test]
fn an_interrupt_that_waits_is_delivered_in_the_other_process() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("i");
    first.start();
    first.wait_console("....");
    first.client().ask(Call::PowerButton);
    let saved = save(&first);
    assert!(!first.console().contains('P'));
    let mut second = target("i");
    second.start();
    load(&second, &saved);
    run(&second, 42);
    wait_for("the guest to go on", || second.console().contains("..").then_some(()));
    let mut console = second.client();
    assert!(console.ask(Call::ConsoleAttach).error.is_none());
    console.reader.get_mut().write_all(b"x").unwrap();
    assert_eq!(second.wait_exit().code(), Some(0));
    assert!(second.console().ends_with('P'), "{}", second.console());
    assert_eq!(second.report().unwrap().reason, ExitReason::GuestPoweredOff);
}

/// Memory, and the states by kind and number.
fn contents(saved: &[u8]) -> (Vec<u8>, BTreeMap<(PayloadKind, u32), Value>) {
    let (header, mut reader) = GuestReader::start(saved).unwrap();
    let bytes = header.shape.memory_bytes;
    reader.accept(&Layout::new(bytes, bytes));
    let (mut memory, mut states) = (vec![0; bytes as usize], BTreeMap::new());
    loop {
        match reader.item().unwrap() {
            Item::Pages { address, data } => memory[address as usize..][..data.len()].copy_from_slice(data),
            Item::Zeros { .. } => {}
            Item::State(payload) => drop(states.insert((payload.kind, payload.instance), payload.data)),
            Item::End => return (memory, states),
        }
    }
}

/// Takes away what goes on by itself while a guest stands: its clocks.
fn without_clocks(states: &mut BTreeMap<(PayloadKind, u32), Value>) {
    states.remove(&(PayloadKind::Clock, 0));
    states.remove(&(PayloadKind::Pit, 0));
    states.get_mut(&(PayloadKind::PowerManagement, 0)).unwrap()["timer_ns"] = json!(0);
    states.get_mut(&(PayloadKind::Vcpu, 0)).unwrap()["msrs"]["16"] = json!(0);
}

#[test]
fn a_guest_that_is_saved_where_it_went_before_it_ran_is_the_same() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("i");
    first.start();
    first.wait_console("....");
    first.client().ask(Call::PowerButton);
    let saved = save(&first);
    let mut second = target("i");
    second.start();
    let mut client = second.client();
    client.ask(Call::Pause);
    load(&second, &saved);
    assert!(client.ask(run_call(&second, 42)).error.is_none());
    client.wait_notice(|notice| *notice == Notice::Resumed);
    assert_eq!(client.status().run, RunState::Paused { reason: PauseReason::Requested });
    let again = save(&second);
    assert_eq!(second.console(), "");

    let ((memory, mut states), (memory_again, mut states_again)) = (contents(&saved), contents(&again));
    // The guest has left its mark on each device, so that one that was not restored is another.
    assert_eq!(states[&(PayloadKind::ResetPort, 0)]["value"], json!(2));
    assert_eq!(states[&(PayloadKind::RealTimeClock, 0)]["memory"][0x40], json!(0xa5));
    assert_eq!(states[&(PayloadKind::PowerManagement, 0)]["status"], json!(0x100));
    assert!(memory == memory_again, "the guest's memory is another");
    without_clocks(&mut states);
    without_clocks(&mut states_again);
    assert_eq!(states.keys().collect::<Vec<_>>(), states_again.keys().collect::<Vec<_>>());
    for (kind, state) in &states {
        assert_eq!(&states_again[kind], state, "{kind:?}");
    }
}

#[test]
fn disks_are_opened_when_the_guest_may_run_and_not_before() {
    if !flat_guests_run() {
        return;
    }
    let with_disk = |vm: &mut TestVm| {
        let path = vm.path("disk");
        std::fs::write(&path, [7; 8192]).unwrap();
        vm.set("disks", json!([{"id": "root", "path": path, "shared": true}])).start();
    };
    let has_open = |vm: &TestVm| {
        let open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()).any(|path| path == vm.path("disk"))
    };
    let mut first = source("m");
    with_disk(&mut first);
    first.wait_console("xyz");
    assert!(has_open(&first));
    let saved = save(&first);

    let mut second = target("m");
    with_disk(&mut second);
    load(&second, &saved);
    assert!(!has_open(&second), "the source still has it");
    run(&second, 42);
    assert!(has_open(&second));
    wait_for("the guest to go on", || (printed(&second).len() > 30).then_some(()));

    // A disk that is another one by then: the guest does not run, and its permit is not used up.
    let mut third = target("m");
    with_disk(&mut third);
    load(&third, &saved);
    std::fs::write(third.path("disk"), [7; 4096]).unwrap();
    third.client().ask(run_call(&third, 43));
    assert_eq!(third.wait_exit().code(), Some(i32::from(ExitReason::StartFailed.exit_code())));
    let report = third.report().unwrap();
    assert!(!report.ran && report.detail.contains("is not the disk that was closed"), "{}", report.detail);
    assert!(!third.path("started-43").exists());
}

#[test]
fn a_guest_resets_where_it_went() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);
    let mut second = target("m");
    second.start();
    load(&second, &saved);
    let mut client = run(&second, 42);
    client.ask(Call::Reset { id: 1 });
    second.wait_console("up\nbcd");
    assert_eq!(client.status().resets, 1);
}

#[test]
fn a_client_that_disappears_leaves_the_guest_stopped_until_it_is_resumed() {
    if !flat_guests_run() {
        return;
    }
    let mut vm = source("m");
    vm.start();
    vm.wait_console("xyz");
    let mut client = vm.client();
    let mut lost = vm.client();
    assert!(lost.ask(Call::SaveAttach { migration: None, live: None }).error.is_none());
    let second = vm.client().ask(Call::SaveAttach { migration: None, live: None });
    if let Some(refused) = second.error {
        assert_eq!(refused.code, ErrorCode::Taken);
    }
    drop(lost);
    let ended = wait_for("the save to end", || {
        let saving = client.status().saving.unwrap();
        (saving.state != SaveState::Saving).then_some(saving)
    });
    let status = client.status();
    assert_eq!(status.run, RunState::Paused { reason: PauseReason::Saved }, "{ended:?}");
    let len = vm.console().len();
    assert!(client.ask(Call::Resume).error.is_none());
    wait_for("the guest to go on", || (vm.console().len() > len).then_some(()));
    client.ask(Call::PowerOff);
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn what_does_not_fit_is_refused_in_words_and_never_runs() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);

    let refused = |target: &mut TestVm, saved: &[u8], accepted: bool, words: &str| {
        target.start();
        let answers = hand_over(target, saved);
        assert_eq!(target.wait_exit().code(), Some(i32::from(ExitReason::RestoreFailed.exit_code())));
        let report = target.report().unwrap();
        assert_eq!((report.reason, report.ran), (ExitReason::RestoreFailed, false));
        assert!(report.detail.contains(words), "{} does not say {words}", report.detail);
        assert_eq!(target.console(), "");
        assert!(!target.path("started-42").exists());
        assert_eq!(answers.first().map(|(kind, _)| *kind == FrameKind::Accepted), Some(accepted), "{answers:?}");
        assert_eq!(
            answers.last().map(|(kind, words)| (*kind, words.clone())),
            Some((FrameKind::Refused, report.detail))
        );
    };
    refused(target("m").set("memory_bytes", json!(32u64 << 20)), &saved, false, "memory in bytes is 16777216");
    refused(target("m").set("vcpus", json!(2)), &saved, false, "number of vCPUs is 1, here it is 2");
    let other = "00000000-0000-4000-8000-000000000001";
    refused(target("m").set("vm", json!(other)), &saved, false, other);
    let disk = target("m");
    std::fs::write(disk.path("disk"), [0; 4096]).unwrap();
    let mut with_disk = disk;
    let path = with_disk.path("disk");
    with_disk.set("disks", json!([{"id": "root", "path": path}]));
    refused(&mut with_disk, &saved, false, "device in slot 1 is none, here it is a disk of 4096 bytes");

    let cut = &saved[..saved.len() - 100];
    refused(&mut target("m"), cut, true, "ends in the middle");
    let mut flipped = saved.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    refused(&mut target("m"), &flipped, true, "is damaged");
    let mut longer = saved.clone();
    longer.push(0);
    refused(&mut target("m"), &longer, true, "something follows the end");
    refused(&mut target("m"), b"no saved guest at all", false, "this is not a saved guest");

    // The source still has its guest.
    let mut client = first.client();
    client.ask(Call::Resume);
    assert_eq!(client.status().run, RunState::Running);
}

#[test]
fn a_used_permit_and_a_missing_deadline_are_refused() {
    if !flat_guests_run() {
        return;
    }
    let mut first = source("m");
    first.start();
    first.wait_console("xyz");
    let saved = save(&first);

    let mut used = target("m");
    std::fs::write(used.path("started-42"), b"").unwrap();
    used.start();
    load(&used, &saved);
    used.client().ask(run_call(&used, 42));
    assert_eq!(used.wait_exit().code(), Some(i32::from(ExitReason::AlreadyStarted.exit_code())));
    assert_eq!((used.report().unwrap().ran, used.console()), (false, String::new()));

    let mut leased = target("m");
    leased.set("release", json!("lease")).start();
    load(&leased, &saved);
    let mut client = leased.client();
    assert_eq!(client.ask(run_call(&leased, 42)).error.unwrap().code, ErrorCode::BadDeadline);
    let run = |deadline_ns| Call::Run {
        epoch: 42,
        deadline_ns: Some(deadline_ns),
        started_marker: leased.path("started-42"),
    };
    assert_eq!(client.ask(run(1)).error.unwrap().code, ErrorCode::BadDeadline);
    assert!(client.ask(run(boottime_ns() + 2 * SECOND_NS)).error.is_none());
    let expired = Notice::Paused { reason: PauseReason::LeaseExpired, quiesced: true };
    client.wait_notice(|notice| *notice == expired);
    let confirm = |epoch| Call::Confirm { epoch, deadline_ns: boottime_ns() + 10 * SECOND_NS };
    assert_eq!(client.ask(confirm(41)).error.unwrap().code, ErrorCode::WrongEpoch);
    let len = leased.console().len();
    assert!(client.ask(confirm(42)).error.is_none());
    wait_for("the guest to go on", || (leased.console().len() > len).then_some(()));
}

#[test]
fn a_guest_that_is_not_wanted_ends_the_process_that_waits() {
    if !flat_guests_run() {
        return;
    }
    let mut waiting = target("m");
    waiting.start();
    let mut client = waiting.client();
    // One that has begun to come, too.
    let mut half = waiting.client();
    assert!(half.ask(Call::RestoreAttach).error.is_none());
    half.reader.get_mut().write_all(b"QUORSA").unwrap();
    wait_for("it to come", || (client.status().incoming?.state == IncomingState::Loading).then_some(()));
    assert_eq!(client.ask(Call::RestoreAttach).error.unwrap().code, ErrorCode::Taken);
    client.ask(Call::PowerOff);
    assert_eq!(waiting.wait_exit().code(), Some(0));
    let report = waiting.report().unwrap();
    assert_eq!((report.reason, report.ran), (ExitReason::PoweredOff, false));
}

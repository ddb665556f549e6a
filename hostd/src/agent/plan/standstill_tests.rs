//! Guests that stand still: by their user's wish, or because an error of a disk holds them.

use super::*;

fn see(agent: &mut Agent, vm: VmId, status: GuestStatus) {
    agent.guests.get_mut(&vm).unwrap().phase = Phase::Alive { status, quiesced: false };
}

/// What was ordered in each second of a minute, all of it carried out in vain.
fn orders_of_a_minute(agent: &mut Agent) -> Vec<(u64, Order)> {
    let start = agent.now;
    let mut log = Vec::new();
    for second in 0..60 {
        agent.now = start.plus_ms(second * 1_000);
        log.extend(agent.carry_out_orders().into_iter().map(|order| (second, order)));
    }
    log
}

#[test]
fn a_guest_stands_and_goes_as_its_user_said_last() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    agent.site.root(Command::VmPause { vm, paused: true });
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::Pause]);
    assert_eq!(agent.orders(), [], "its status will tell");
    see(&mut agent, vm, GuestStatus::PausedUser);
    agent.now = agent.now.plus_ms(10_000);
    assert_eq!(agent.orders(), []);
    let wish = agent.site.root(Command::VmPause { vm, paused: false }).seq;
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::Resume { wish }]);
    see(&mut agent, vm, GuestStatus::Up);
    agent.now = agent.now.plus_ms(10_000);
    assert_eq!(agent.orders(), []);
}

#[test]
fn a_guest_that_stands_still_is_set_going_to_shut_down() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    let wish = agent.site.root(Command::VmPause { vm, paused: true }).seq;
    see(&mut agent, vm, GuestStatus::PausedUser);
    agent.site.root(Command::VmStop { vm, mode: StopMode::Shutdown });
    agent.catch_up();
    assert_eq!(agent.carry_out_orders(), [Order::PowerButton, Order::Resume { wish }]);
}

#[test]
fn what_an_error_stopped_is_tried_again_at_growing_distances() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    see(&mut agent, vm, GuestStatus::PausedIo);
    let tries: Vec<u64> = orders_of_a_minute(&mut agent).into_iter().map(|(second, _)| second).collect();
    assert_eq!(tries, [0, 2, 6, 14, 30]);
}

#[test]
fn a_user_who_knows_better_than_to_wait_is_obeyed_at_once() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    see(&mut agent, vm, GuestStatus::PausedIo);
    let report = statemachine::command::ReportId { host: agent.host(), boot: boot(2), counter: 1_000 };
    let told = Command::ReportVmStatus { report, vm, epoch, status: GuestStatus::PausedIo };
    agent.site.must(Actor::Host(agent.host()), told);
    agent.catch_up();
    orders_of_a_minute(&mut agent);
    for _ in 0..2 {
        assert_eq!(agent.orders(), []);
        let wish = agent.site.root(Command::VmPause { vm, paused: false }).seq;
        agent.catch_up();
        assert_eq!(agent.carry_out_orders(), [Order::Resume { wish }]);
    }
}

#[test]
fn a_guest_that_its_user_wants_to_stand_is_not_tried_again() {
    let mut agent = Agent::new();
    let (vm, _) = agent.running(ReleaseClass::Operator);
    agent.site.root(Command::VmPause { vm, paused: true });
    see(&mut agent, vm, GuestStatus::PausedIo);
    agent.catch_up();
    assert_eq!(orders_of_a_minute(&mut agent), []);
}

#[test]
fn the_error_that_holds_a_guest_is_reported_and_so_is_its_end() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Operator);
    let fault = DiskFault { disk: "root".to_owned(), what: "no space".to_owned(), no_space: true };
    agent.guests.get_mut(&vm).unwrap().fault = Some(fault.clone());
    let news = |agent: &Agent| {
        let fault = |action| match action {
            Action::Report { news: News::DiskFault(fault), .. } => Some(fault),
            _ => None,
        };
        agent.plan().into_iter().filter_map(fault).collect::<Vec<_>>()
    };
    assert_eq!(news(&agent), [Some(fault.clone())]);
    let report = statemachine::command::ReportId { host: agent.host(), boot: boot(2), counter: 1_000 };
    let told = Command::ReportVmDiskFault { report, vm, epoch, fault: Some(fault) };
    agent.site.must(Actor::Host(agent.host()), told);
    agent.catch_up();
    assert_eq!(news(&agent), []);
    agent.guests.get_mut(&vm).unwrap().fault = None;
    assert_eq!(news(&agent), [None]);
}

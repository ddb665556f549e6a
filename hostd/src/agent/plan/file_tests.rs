//! Disks whose files a guest's process wants.

use super::*;

fn wants(agent: &mut Agent, vm: VmId, disks: &[&str]) {
    let wanted = disks.iter().map(|disk| (*disk).to_owned()).collect();
    agent.guests.get_mut(&vm).unwrap().see_files_wanted(wanted);
}

/// What is planned to be handed over, noted as begun.
fn handed(agent: &mut Agent) -> Vec<(Epoch, String)> {
    let now = agent.now;
    let mut handed = Vec::new();
    for action in agent.plan() {
        if let Action::HandFiles { vm, epoch, disk } = action {
            agent.guests.get_mut(&vm).unwrap().begin_handing(&disk, now);
            handed.push((epoch, disk));
        }
    }
    handed
}

fn answered(agent: &mut Agent, vm: VmId, disk: &str) {
    agent.guests.get_mut(&vm).unwrap().handing.remove(disk);
}

#[test]
fn files_are_handed_over_while_a_grant_names_the_guest_and_one_hand_at_a_time() {
    let mut agent = Agent::new();
    let (vm, epoch) = agent.running(ReleaseClass::Lease);
    wants(&mut agent, vm, &["root"]);
    assert_eq!(handed(&mut agent), [], "no grant names it");
    agent.be_granted();
    assert_eq!(handed(&mut agent), [(epoch, "root".to_owned())]);
    wants(&mut agent, vm, &["data", "root"]);
    assert_eq!(handed(&mut agent), [(epoch, "data".to_owned())], "the other is on its way, however long");
    agent.now = agent.now.plus_ms(60_000);
    agent.be_granted();
    assert_eq!(handed(&mut agent), []);
    answered(&mut agent, vm, "root");
    answered(&mut agent, vm, "data");
    wants(&mut agent, vm, &["data"]);
    assert_eq!(handed(&mut agent), [(epoch, "data".to_owned())], "it did not come about");
    answered(&mut agent, vm, "data");
    assert_eq!(handed(&mut agent), [], "not again at once");
    wants(&mut agent, vm, &[]);
    wants(&mut agent, vm, &["data"]);
    assert_eq!(handed(&mut agent), [(epoch, "data".to_owned())], "it had them in between");
}

#[test]
fn a_guest_from_elsewhere_gets_its_files_when_its_permit_is_here() {
    let mut agent = Agent::new();
    let (vm, id) = agent.coming();
    agent.take_in(vm, id, true);
    agent.catch_up();
    agent.be_granted();
    wants(&mut agent, vm, &["root"]);
    assert_eq!(handed(&mut agent), [], "another host has the permit (R4)");
    let epoch = agent.commit(vm, id, agent.host());
    agent.catch_up();
    assert_eq!(handed(&mut agent), [], "no grant names it");
    agent.be_granted();
    assert_eq!(handed(&mut agent), [(epoch, "root".to_owned())]);
    // It runs before the answer is heard, which is lost with the number that it went by; later its lease ends, and is renewed.
    agent.guests.get_mut(&vm).unwrap().runs_as(epoch);
    wants(&mut agent, vm, &[]);
    wants(&mut agent, vm, &["root"]);
    assert_eq!(handed(&mut agent), [(epoch, "root".to_owned())]);
}

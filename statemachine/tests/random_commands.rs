//! Property tests over random command sequences: R2, R3, S1, S2, E2 (DESIGN §5).
//!
//! A sequence of small random steps is resolved against the state as it grows, so that most commands are
//! about things that exist and some are not. After every batch the invariants are checked, and at the end
//! the log is replayed from its bytes.

mod world;

use std::collections::BTreeMap;

use proptest::prelude::*;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::fold::Applied;
use statemachine::fold::Decision;
use statemachine::fold::Fold;
use statemachine::fold::FoldImage;
use statemachine::ids::Epoch;
use statemachine::ids::VmId;
use statemachine::invariants;
use world::Step;
use world::World;

/// What a run left behind.
struct Run {
    fold: Fold,
    log: Vec<SealedBatch>,
    accepted: usize,
}

fn run(steps: &[Step]) -> Run {
    let mut world = World::new();
    let mut fold = Fold::default();
    let mut log = Vec::new();
    let mut accepted = 0;
    let mut highest_epoch: BTreeMap<VmId, Epoch> = BTreeMap::new();
    for step in steps {
        let request = world.resolve(step, &fold);
        let decision = fold.decide(&request, world.wall_ms());
        assert_eq!(decision, fold.decide(&request, world.wall_ms()), "decide is a function");
        let Decision::Batch { batch, sealed, answer } = decision else { continue };
        let before = fold.clone();
        fold.append(&batch, &sealed);
        accepted += 1;
        assert_eq!(answer.seq, before.head.seq.next(), "seqs are gapless");
        let mut found = invariants::check_step(&before.state, &fold.state);
        found.extend(invariants::check(&fold.state));
        assert!(found.is_empty(), "after {request:?}: {found:?}");
        for (id, vm) in fold.state.vms.iter() {
            let Some(permit) = vm.permit else { continue };
            let last = highest_epoch.entry(*id).or_insert(permit.epoch);
            assert!(permit.epoch >= *last, "R2: epochs of {id} fell from {last} to {}", permit.epoch);
            *last = permit.epoch;
        }
        log.push(sealed);
    }
    Run { fold, log, accepted }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_every_batch_and_replay_gives_the_same_state(
        steps in prop::collection::vec(world::step(), 1..160)
    ) {
        let run = run(&steps);
        let mut replayed = Fold::default();
        for sealed in &run.log {
            let applied = replayed.apply_sealed(sealed).expect("what was decided applies");
            prop_assert_eq!(applied, Applied::Applied(replayed.head.seq));
        }
        prop_assert_eq!(&replayed, &run.fold);
        prop_assert_eq!(replayed.state.digest(), run.fold.state.recompute_digest());
    }

    #[test]
    fn a_batch_that_does_not_follow_the_head_changes_nothing(
        steps in prop::collection::vec(world::step(), 20..80), pick in any::<prop::sample::Index>()
    ) {
        let run = run(&steps);
        let stray = pick.get(&run.log);
        let mut fold = run.fold.clone();
        prop_assert_eq!(fold.apply_sealed(stray), Ok(Applied::Superseded));
        prop_assert_eq!(fold, run.fold);
    }

    #[test]
    fn a_snapshot_in_the_middle_is_the_same_as_replay(
        steps in prop::collection::vec(world::step(), 20..80), pick in any::<prop::sample::Index>()
    ) {
        let run = run(&steps);
        let cut = pick.index(run.log.len());
        let mut fold = Fold::default();
        for sealed in &run.log[..cut] {
            fold.apply_sealed(sealed).expect("what was decided applies");
        }
        let image = codec::encode(&FoldImage::from(&fold));
        let mut restored = Fold::from(codec::decode::<FoldImage>(&image).expect("an image decodes"));
        for sealed in &run.log[cut..] {
            restored.apply_sealed(sealed).expect("what was decided applies");
        }
        prop_assert_eq!(restored.state.digest(), run.fold.state.digest());
        prop_assert_eq!(restored, run.fold);
    }

    #[test]
    fn no_bytes_make_a_host_panic(
        steps in prop::collection::vec(world::step(), 5..20),
        pick in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), mask in 1..=255u8
    ) {
        let run = run(&steps);
        let good = pick.get(&run.log);
        let mut bytes = good.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= mask;
        let damaged = SealedBatch::from_bytes(bytes);
        prop_assert!(damaged.open().is_err(), "one changed byte is always found");
        let _ = SealedBatch::from_bytes(good.as_bytes()[..at].to_vec()).open();
    }
}

#[test]
fn random_sequences_reach_permits_exits_and_reboots() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = prop::collection::vec(world::step(), 150);
    let mut names: BTreeMap<&'static str, usize> = BTreeMap::new();
    for _ in 0..100 {
        let steps = strategy.new_tree(&mut runner).expect("a strategy without filters").current();
        let run = run(&steps);
        assert!(run.accepted > 20, "most steps are meaningful");
        for sealed in &run.log {
            for event in sealed.open().expect("what was decided decodes").events {
                *names.entry(event.name()).or_default() += 1;
            }
        }
    }
    // A site that this build begins is at its level; how an older one gets there is told in `rules.rs`.
    let all = statemachine::Event::KINDS.iter().map(|(_, name)| *name).filter(|name| *name != "FeatureLevelActivated");
    let missing: Vec<_> = all.filter(|name| !names.contains_key(name)).collect();
    assert!(missing.is_empty(), "no random sequence ever decided {missing:?}; seen: {names:?}");
}

use proptest::strategy::ValueTree;

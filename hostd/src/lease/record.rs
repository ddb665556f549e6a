//! What this host knows of its own lease: when it sent which heartbeat, and the last grant that answers one of them.
//!
//! Every deadline is this host's own send time plus the lease. Nothing that came over the wire enters it: an echoed clock
//! value from before a reboot would grant a day (hazard C6b). [`ConfirmedGrant::allows`] is the one place that says whether
//! a guest may be started, resumed or extended (DESIGN §5 *Start*, hazard C5).

use std::collections::BTreeSet;
use std::collections::VecDeque;

use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use thiserror::Error;

use super::clock::Boottime;
use crate::grants::wire::Grant;
use crate::grants::wire::Nonce;

/// Heartbeats that may still be answered. More than a lease's worth of them at four a second.
const SENT_MAX: usize = 64;

/// A grant that answers a heartbeat which this very process sent in this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfirmedGrant {
    /// Own send time of the heartbeat, plus the lease.
    pub deadline: Boottime,
    /// The leader's applied seq.
    pub applied: Seq,
    pub epochs: BTreeSet<Epoch>,
    pub session: u64,
}

impl ConfirmedGrant {
    /// May the guest of this epoch be started, resumed or extended by a host that has applied the log up to `applied`?
    pub fn allows(&self, epoch: Epoch, applied: Seq, now: Boottime) -> bool {
        now < self.deadline && applied >= self.applied && self.epochs.contains(&epoch)
    }
}

/// Why a grant gives nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GrantFault {
    #[error("the grant is for host {0}")]
    OtherHost(HostId),
    #[error("the grant is for another incarnation of this host")]
    OtherBoot,
    #[error("the grant answers no heartbeat that is open: it is late, repeated, or not ours")]
    UnknownNonce,
    #[error("the grant came after the end of the lease that it gives")]
    TooLate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sent {
    nonce: Nonce,
    at: Boottime,
}

#[derive(Debug, Clone)]
pub struct LeaseRecord {
    host: HostId,
    boot: BootId,
    lease_ms: u64,
    /// Open heartbeats, oldest first.
    sent: VecDeque<Sent>,
    grant: Option<ConfirmedGrant>,
}

impl LeaseRecord {
    pub fn new(host: HostId, boot: BootId, lease_ms: u64) -> LeaseRecord {
        LeaseRecord { host, boot, lease_ms, sent: VecDeque::with_capacity(SENT_MAX), grant: None }
    }

    /// Notes a heartbeat. Called before its bytes leave, so that the noted time is never too late.
    pub fn send(&mut self, nonce: Nonce, now: Boottime) {
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back(Sent { nonce, at: now });
    }

    /// Takes a grant. Heartbeats sent before the one that it answers are closed: their answers would be older news.
    pub fn accept(&mut self, grant: &Grant, now: Boottime) -> Result<&ConfirmedGrant, GrantFault> {
        if grant.host != self.host {
            return Err(GrantFault::OtherHost(grant.host));
        }
        if grant.boot != self.boot {
            return Err(GrantFault::OtherBoot);
        }
        let open = self.sent.iter().position(|sent| sent.nonce == grant.nonce).ok_or(GrantFault::UnknownNonce)?;
        let sent = self.sent[open];
        self.sent.drain(..=open);
        let from = if mutant::is_on(Mutant::LeaseFromReceive) { now } else { sent.at };
        let deadline = from.plus_ms(self.lease_ms);
        if now >= deadline {
            return Err(GrantFault::TooLate);
        }
        let confirmed = ConfirmedGrant {
            deadline,
            applied: grant.applied,
            epochs: grant.epochs.iter().copied().collect(),
            session: grant.session,
        };
        Ok(self.grant.insert(confirmed))
    }

    /// The last grant, also when its deadline has passed.
    pub fn grant(&self) -> Option<&ConfirmedGrant> {
        self.grant.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    const LEASE_MS: u64 = 12_000;
    const HOST: HostId = HostId(5);

    fn boot(n: u128) -> BootId {
        BootId(Uuid::from_u128(n))
    }

    fn record() -> LeaseRecord {
        LeaseRecord::new(HOST, boot(1), LEASE_MS)
    }

    fn grant(nonce: u64) -> Grant {
        Grant { host: HOST, boot: boot(1), nonce: Nonce(nonce), epochs: vec![Epoch(7)], applied: Seq(9), session: 1 }
    }

    #[test]
    fn a_deadline_counts_from_the_hosts_own_send_time() {
        let mut record = record();
        record.send(Nonce(1), Boottime::from_ms(1_000));
        let deadline = record.accept(&grant(1), Boottime::from_ms(4_000)).unwrap().deadline;
        assert_eq!(deadline, Boottime::from_ms(13_000));
    }

    #[test]
    fn a_grant_of_another_boot_or_host_or_of_an_unsent_nonce_gives_nothing() {
        let mut record = record();
        record.send(Nonce(1), Boottime::from_ms(1_000));
        let now = Boottime::from_ms(1_100);
        assert_eq!(record.accept(&Grant { boot: boot(2), ..grant(1) }, now), Err(GrantFault::OtherBoot));
        assert_eq!(record.accept(&Grant { host: HostId(6), ..grant(1) }, now), Err(GrantFault::OtherHost(HostId(6))));
        assert_eq!(record.accept(&grant(2), now), Err(GrantFault::UnknownNonce));
        assert_eq!(record.grant(), None);
    }

    #[test]
    fn a_repeated_answer_gives_nothing_and_an_older_one_cannot_replace_a_newer() {
        let mut record = record();
        record.send(Nonce(1), Boottime::from_ms(1_000));
        record.send(Nonce(2), Boottime::from_ms(2_000));
        let now = Boottime::from_ms(2_100);
        record.accept(&Grant { epochs: vec![], ..grant(2) }, now).unwrap();
        assert_eq!(record.accept(&grant(2), now), Err(GrantFault::UnknownNonce));
        assert_eq!(record.accept(&grant(1), now), Err(GrantFault::UnknownNonce), "epoch 7 was released in between");
        assert!(!record.grant().unwrap().allows(Epoch(7), Seq(9), now));
    }

    #[test]
    fn a_grant_that_comes_after_its_own_end_gives_nothing() {
        let mut record = record();
        record.send(Nonce(1), Boottime::from_ms(1_000));
        assert_eq!(record.accept(&grant(1), Boottime::from_ms(13_000)), Err(GrantFault::TooLate));
    }

    #[test]
    fn nothing_is_allowed_before_the_log_of_the_grant_is_applied() {
        let mut record = record();
        record.send(Nonce(1), Boottime::from_ms(1_000));
        let now = Boottime::from_ms(1_100);
        let grant = record.accept(&grant(1), now).unwrap();
        assert!(!grant.allows(Epoch(7), Seq(8), now));
        assert!(grant.allows(Epoch(7), Seq(9), now));
        assert!(!grant.allows(Epoch(8), Seq(9), now), "an epoch that is not named");
        assert!(!grant.allows(Epoch(7), Seq(9), grant.deadline));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Send,
        /// An answer to the nth nonce ever sent (or invented), with a boot and a host that may be wrong.
        Answer {
            nonce: u64,
            boot: u128,
            host: u64,
        },
    }

    fn step() -> impl Strategy<Value = (u64, Step)> {
        let answer = (0..40u64, 1..3u128, 5..7u64).prop_map(|(nonce, boot, host)| Step::Answer { nonce, boot, host });
        (0..9_000u64, prop_oneof![Just(Step::Send), answer])
    }

    proptest! {
        /// R1, R4: whatever arrives, a deadline is the send time of a heartbeat of this boot plus the lease, and a
        /// later grant never rests on an earlier heartbeat.
        #[test]
        fn no_answer_moves_the_deadline_past_a_send_plus_the_lease(steps in proptest::collection::vec(step(), 1..60)) {
            let mut record = record();
            let mut now = Boottime::from_ms(0);
            let mut sends: Vec<Boottime> = Vec::new();
            let mut last = None;
            for (gap, step) in steps {
                now = now.plus_ms(gap);
                match step {
                    Step::Send => {
                        record.send(Nonce(sends.len() as u64), now);
                        sends.push(now);
                    }
                    Step::Answer { nonce, boot: boot_number, host } => {
                        let answer = Grant { boot: boot(boot_number), host: HostId(host), ..grant(nonce) };
                        let Ok(accepted) = record.accept(&answer, now) else { continue };
                        let own = sends.get(nonce as usize).copied();
                        prop_assert_eq!(Some(accepted.deadline), own.map(|at| at.plus_ms(LEASE_MS)));
                        prop_assert!(boot_number == 1 && host == HOST.0);
                        prop_assert!(now < accepted.deadline);
                        prop_assert!(last.is_none_or(|last| last < nonce), "each heartbeat is answered once, in order");
                        last = Some(nonce);
                    }
                }
            }
        }
    }
}

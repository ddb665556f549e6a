//! Leases as hosts hold them: each rests on a heartbeat of its own, on a log no older than that, and on a host that is not lost.

use consensus::decider::Leadership;
use statemachine::Seq;

use super::Checker;
use crate::sim::STEP_MS;
use crate::sim::host::Host;
use crate::sim::host::Hostd;
use crate::sim::host::LEASE;
use crate::sim::network::Network;

impl Checker {
    /// DESIGN §5, *Grant*: a lease ends one lease after the send of the heartbeat that it answers, by the host's own clock;
    /// its ground is no older than that heartbeat (hazard C4), and the host was not lost there (C3).
    pub(super) fn look_at_lease(&mut self, host: &Host, hostd: &Hostd, network: &Network) {
        let Some(seen) = self.seen.get_mut(&host.id) else { return };
        // A leader's own heartbeats do not cross the network. One that stood still may be deposed in the moment in which it is
        // granted what it asked for while it led.
        let leads = matches!(*hostd.node.leadership().borrow(), Leadership::Leading { .. });
        if leads {
            seen.led_ms = Some(self.now_ms);
        }
        let led_ms = seen.led_ms;
        let Some(grant) = hostd.lease.grant().borrow().clone() else { return };
        let deadline = grant.deadline;
        if deadline.as_ns() == seen.granted_deadline_ns {
            return;
        }
        seen.granted_deadline_ns = deadline.as_ns();
        let unreachable = seen.unreachable.clone();
        let sent_ns = deadline.as_ns().saturating_sub(LEASE.as_nanos() as u64);
        let asked_itself = led_ms.is_some_and(|led_ms| host.oscillator.true_ms(sent_ns) <= led_ms + STEP_MS);
        if !asked_itself && !network.heartbeat_left(host.id, sent_ns) {
            let what =
                format!("host {} holds a lease until {deadline} that no heartbeat of its own asked for", host.id);
            return self.violate("R4", what);
        }
        let is_in = grant.applied;
        if unreachable.iter().any(|(from, to)| *from <= is_in && to.is_none_or(|to| is_in < to)) {
            let what = format!("host {} was granted a lease at {is_in}, where the log calls it unreachable", host.id);
            return self.violate("R4", what);
        }
        let head = self.head_at(host.oscillator.true_ms(sent_ns));
        if is_in < head {
            let what =
                format!("host {} was granted a lease as of {is_in}, asked for when the log was at {head}", host.id);
            return self.violate("R4", what);
        }
        self.granted.extend(grant.epochs.iter().map(|epoch| (host.id, *epoch)));
    }

    /// What was surely in the log before this moment.
    fn head_at(&self, at_ms: u64) -> Seq {
        let older = self.heads.partition_point(|(seen_ms, _)| seen_ms + STEP_MS <= at_ms);
        older.checked_sub(1).and_then(|last| self.heads.get(last)).map_or(Seq(0), |(_, seq)| *seq)
    }
}

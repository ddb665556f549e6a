//! Commands on their way from a host that does not lead: those that wait go together in one message, as the leader's group commit
//! takes them.
//!
//! Each leader has a lane. Whoever finds fewer than [`SENDERS`] messages under way in it sends what waits; everybody else is taken
//! along by the next message. So a command alone goes at once, and under load a message carries what came while those before it were
//! committed. A leader that answers no more holds up its own lane and nobody else's.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use bytes::Bytes;
use openraft::AsyncRuntime;
use statemachine::HostId;
use statemachine::codec;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Answer;
use tokio::sync::oneshot;

use super::Inner;
use crate::decider::ProposeError;
use crate::forwarded;
use crate::forwarded::EncodedCommand;
use crate::forwarded::TOGETHER;
use crate::transport::Channel;
use crate::transport::Peer;
use crate::transport::Refusal;

/// Messages to one leader at once: while one is committed the next gathers.
const SENDERS: usize = 2;
/// Bytes of one message, but for a single command that is larger.
const TOGETHER_BYTES: usize = 256 << 10;
/// Commands that wait in one lane.
const WAITING: usize = 4096;

type Outcome = Result<Answer, ProposeError>;

struct Waiting {
    request: EncodedCommand,
    reply: oneshot::Sender<Outcome>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Waiting>,
    senders: usize,
}

/// Lanes by leader; one that is empty is forgotten.
#[derive(Default)]
pub(super) struct Lanes(Mutex<BTreeMap<HostId, Lane>>);

/// What came of entering a lane.
#[derive(Debug, PartialEq, Eq)]
enum Entered {
    /// Nobody takes it along: the caller sends.
    Sends,
    TakenAlong,
    Full,
}

impl Lanes {
    fn lanes(&self) -> MutexGuard<'_, BTreeMap<HostId, Lane>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, leader: HostId, waiting: Waiting) -> Entered {
        let mut lanes = self.lanes();
        let lane = lanes.entry(leader).or_default();
        if lane.waiting.len() >= WAITING {
            return Entered::Full;
        }
        lane.waiting.push_back(waiting);
        if lane.senders >= SENDERS {
            return Entered::TakenAlong;
        }
        lane.senders += 1;
        Entered::Sends
    }

    /// What the next message carries; none when the lane is empty, and its sender has left.
    fn next(&self, leader: HostId) -> Vec<Waiting> {
        let mut lanes = self.lanes();
        let Some(lane) = lanes.get_mut(&leader) else { return Vec::new() };
        let (mut together, mut bytes) = (Vec::new(), 0);
        while let Some(next) = lane.waiting.front()
            && together.len() < TOGETHER
            && (together.is_empty() || bytes + next.request.bytes() <= TOGETHER_BYTES)
        {
            bytes += next.request.bytes();
            // Whoever gave up has been told that the outcome is unknown; it need not be done any more.
            together.extend(lane.waiting.pop_front().filter(|waiting| !waiting.reply.is_closed()));
        }
        if together.is_empty() {
            lane.senders -= 1;
            if lane.senders == 0 {
                lanes.remove(&leader);
            }
        }
        together
    }
}

impl<R: AsyncRuntime> Inner<R> {
    pub(super) async fn forward(self: &Arc<Self>, leader: HostId, request: Request) -> Outcome {
        let Some(peer) = self.peer(leader) else {
            return Err(ProposeError::NoLeader);
        };
        let (reply, outcome) = oneshot::channel();
        let waiting = Waiting { request: EncodedCommand::of(&request), reply };
        if let Command::HostRemove { .. } = request.command {
            // It waits for a change of the members; nobody waits with it.
            let _ = self.send_together(&peer, vec![waiting]).await;
        } else {
            match self.lanes.enter(leader, waiting) {
                Entered::Full => return Err(ProposeError::Busy { queued: WAITING }),
                Entered::TakenAlong => {}
                Entered::Sends => {
                    // A task of its own: it goes on for others when this caller gives up.
                    let sending = self.clone().empty_lane(peer);
                    tokio::spawn(self.stop.clone().run_until_cancelled_owned(sending));
                }
            }
        }
        match tokio::time::timeout(self.config.propose_timeout(), outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(ProposeError::retry("this host is stopping")),
            Err(_) => Err(ProposeError::retry(format!("host {leader} did not answer in time"))),
        }
    }

    async fn empty_lane(self: Arc<Self>, peer: Peer) {
        loop {
            let together = self.lanes.next(peer.host);
            if together.is_empty() {
                return;
            }
            self.send_together(&peer, together).await;
        }
    }

    async fn send_together(&self, peer: &Peer, together: Vec<Waiting>) {
        let (requests, replies): (Vec<EncodedCommand>, Vec<_>) =
            together.into_iter().map(|waiting| (waiting.request, waiting.reply)).unzip();
        let body = Bytes::from(forwarded::encode(&requests));
        let answer = self.transport.call(peer.clone(), Channel::Propose, body, self.config.propose_timeout()).await;
        let outcomes = answer.map_err(|error| error.to_string()).and_then(|answer| {
            let outcomes: Vec<Outcome> = codec::decode(&answer).map_err(|error| error.to_string())?;
            match outcomes.len() == replies.len() {
                true => Ok(outcomes),
                false => Err(format!("{} answers to {} commands", outcomes.len(), replies.len())),
            }
        });
        // A caller that gave up hears nothing.
        match outcomes {
            Ok(outcomes) => replies.into_iter().zip(outcomes).for_each(|(reply, outcome)| drop(reply.send(outcome))),
            Err(why) => {
                let why = format!("host {}: {why}", peer.host);
                replies.into_iter().for_each(|reply| drop(reply.send(Err(ProposeError::retry(&*why)))));
            }
        }
    }

    /// On the leader: forwarded commands, decided in their order or not at all, and answered together.
    pub(super) async fn serve_forwarded(&self, from: HostId, body: &[u8]) -> Result<Bytes, Refusal> {
        let requests = forwarded::decode(body).map_err(Refusal::new)?;
        if !requests.iter().all(|request| request.may_come_from(from)) {
            return Err(Refusal::new(format!("host {from} forwarded a request in another's name")));
        }
        let outcomes = requests.into_iter().map(|request| self.propose_forwarded(Request { origin: from, ..request }));
        let outcomes: Vec<Outcome> = futures::future::join_all(outcomes).await;
        Ok(Bytes::from(codec::encode(&outcomes)))
    }
}

#[cfg(test)]
mod tests {
    use statemachine::command::Actor;
    use statemachine::state::TokenPurpose;

    use super::*;

    fn waiting(bytes: usize) -> (Waiting, oneshot::Receiver<Outcome>) {
        let (reply, outcome) = oneshot::channel();
        let note = "x".repeat(bytes);
        let actor = Actor::Root(HostId(1));
        let command = Command::TokenCreate { purpose: TokenPurpose::Join, secret_hash: [0; 32], ttl_ms: 1, note };
        let request = Request { actor, origin: HostId(1), idempotency: None, command };
        (Waiting { request: EncodedCommand::of(&request), reply }, outcome)
    }

    const LEADER: HostId = HostId(3);

    #[test]
    fn the_first_two_send_and_take_along_who_comes_meanwhile() {
        let lanes = Lanes::default();
        let entered: Vec<_> =
            (0..5).map(|_| waiting(10)).map(|(it, outcome)| (lanes.enter(LEADER, it), outcome)).collect();
        let how: Vec<_> = entered.iter().map(|(entered, _)| entered).collect();
        use Entered::*;
        assert_eq!(how, [&Sends, &Sends, &TakenAlong, &TakenAlong, &TakenAlong]);
        assert_eq!(lanes.next(LEADER).len(), 5);
        assert!(lanes.next(LEADER).is_empty() && lanes.next(LEADER).is_empty(), "both senders leave");
        assert!(lanes.lanes().is_empty(), "an empty lane is forgotten");
    }

    #[test]
    fn a_message_is_bounded_and_a_large_command_goes_alone() {
        let lanes = Lanes::default();
        let mut kept = Vec::new();
        for bytes in [TOGETHER_BYTES * 2, 10, TOGETHER_BYTES] {
            let (it, outcome) = waiting(bytes);
            lanes.enter(LEADER, it);
            kept.push(outcome);
        }
        let sizes: Vec<usize> = (0..3).map(|_| lanes.next(LEADER).len()).collect();
        assert_eq!(sizes, [1, 1, 1]);
        for _ in 0..TOGETHER + 1 {
            let (it, outcome) = waiting(1);
            lanes.enter(LEADER, it);
            kept.push(outcome);
        }
        assert_eq!(lanes.next(LEADER).len(), TOGETHER);
        assert_eq!(lanes.next(LEADER).len(), 1);
    }

    #[test]
    fn who_gave_up_is_not_sent_and_a_full_lane_says_so() {
        let lanes = Lanes::default();
        let mut kept = Vec::new();
        for at in 0..WAITING {
            let (it, outcome) = waiting(1);
            lanes.enter(LEADER, it);
            if at % 2 == 0 {
                kept.push(outcome);
            }
        }
        assert_eq!(lanes.enter(LEADER, waiting(1).0), Entered::Full);
        assert_eq!(lanes.enter(HostId(4), waiting(1).0), Entered::Sends, "another leader's lane is its own");
        let mut sent = 0;
        loop {
            match lanes.next(LEADER).len() {
                0 => break,
                together => sent += together,
            }
        }
        assert_eq!(sent, kept.len());
    }
}

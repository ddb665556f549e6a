//! The task around a [`Session`]: queue, barrier, proposals, deadlines, leadership.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use openraft::AsyncRuntime;
use openraft::Raft;
use openraft::async_runtime::WatchReceiver;
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use openraft::storage::RaftStateMachine;
use openraft::type_config::alias::OneshotReceiverOf;
use openraft::vote::RaftLeaderId;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::mutant;
use statemachine::mutant::Mutant;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Leadership;
use super::ProposeError;
use super::session::Session;
use crate::feed::Outlook;
use crate::platform::Clock;
use crate::store::snapshot::SnapshotHandle;
use crate::types::CommittedLeaderId;
use crate::types::Proposal;
use crate::types::TypeConfig;

/// Commands that wait for the decider; one more is shed.
pub const QUEUE: usize = 4096;
/// Entries proposed and not yet applied; beyond this the group of the next one grows instead.
const ENTRIES_IN_FLIGHT: usize = 16;
/// Pause before the next session when one ended while this host still leads, so that a leader without a quorum does not
/// spin on refused barriers.
const NEXT_SESSION_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy)]
pub struct DeciderLimits {
    /// An entry that is not applied this long after it was proposed ends the session: openraft's responder may stay
    /// silent for minutes (hazard H26).
    pub entry: Duration,
}

struct Queued {
    request: Request,
    reply: Reply,
}

type Reply = oneshot::Sender<Result<Answer, ProposeError>>;
type Completion<R> = OneshotReceiverOf<TypeConfig<R>, ClientWriteResult<TypeConfig<R>>>;

/// The door to the decider's queue. Cloning is cheap.
#[derive(Clone)]
pub struct Decider {
    queue: mpsc::Sender<Queued>,
    leadership: watch::Receiver<Leadership>,
}

impl Decider {
    /// Starts the task; it ends when raft does, or when the last door is dropped.
    pub fn start<R, SM>(
        raft: Raft<TypeConfig<R>, SM>,
        fold: watch::Receiver<Arc<Fold>>,
        told: watch::Receiver<Option<Outlook>>,
        clock: Arc<dyn Clock>,
        limits: DeciderLimits,
    ) -> Decider
    where
        R: AsyncRuntime,
        SM: RaftStateMachine<TypeConfig<R>, SnapshotData = SnapshotHandle>,
    {
        let (queue, commands) = mpsc::channel(QUEUE);
        let (announce, leadership) = watch::channel(Leadership::Following { leader: None });
        let shell = Shell { raft, fold, told, clock, limits, commands, announce, session: 0, ended: String::new() };
        tokio::spawn(shell.run());
        Decider { queue, leadership }
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Commands that wait.
    pub fn queued(&self) -> usize {
        QUEUE - self.queue.capacity()
    }

    /// Queues a command and waits for its answer. Bounded by the decider's own deadlines.
    pub async fn propose(&self, request: Request) -> Result<Answer, ProposeError> {
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Queued { request, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ProposeError::Busy { queued: QUEUE },
            mpsc::error::TrySendError::Closed(_) => ProposeError::NoLeader,
        })?;
        answer.await.unwrap_or_else(|_| Err(ProposeError::retry("this host is stopping")))
    }
}

struct Shell<R: AsyncRuntime, SM: RaftStateMachine<TypeConfig<R>, SnapshotData = SnapshotHandle>> {
    raft: Raft<TypeConfig<R>, SM>,
    fold: watch::Receiver<Arc<Fold>>,
    /// On a host that is no member: what members say.
    told: watch::Receiver<Option<Outlook>>,
    clock: Arc<dyn Clock>,
    limits: DeciderLimits,
    commands: mpsc::Receiver<Queued>,
    announce: watch::Sender<Leadership>,
    session: u64,
    /// Why the last session ended: a leader without a quorum ends one each [`NEXT_SESSION_PAUSE`], and says so once.
    ended: String,
}

/// The task is to end: raft stopped, or nobody can propose any more.
struct Stop;

/// Who leads, by the full vote.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    Leader(CommittedLeaderId),
    Other(Option<HostId>),
}

struct Flight<R: AsyncRuntime> {
    completion: Completion<R>,
    deadline: Instant,
}

impl<R, SM> Shell<R, SM>
where
    R: AsyncRuntime,
    SM: RaftStateMachine<TypeConfig<R>, SnapshotData = SnapshotHandle>,
{
    async fn run(mut self) {
        while self.follow().await.is_ok() {
            let View::Leader(leader) = self.view() else {
                continue;
            };
            self.session += 1;
            self.announce(Leadership::Leading { session: self.session, ready: false });
            let why = match self.begin(leader).await {
                Ok(session) => {
                    self.announce(Leadership::Leading { session: self.session, ready: true });
                    tracing::info!(session = self.session, "this host leads and decides");
                    self.ended.clear();
                    self.lead(leader, session).await
                }
                Err(why) => why,
            };
            if why == self.ended {
                tracing::debug!(session = self.session, "a decider session ended as the one before: {why}");
            } else {
                tracing::info!(session = self.session, "a decider session ended: {why}");
            }
            self.announce_following();
            self.drain(&why);
            self.ended = why;
            tokio::time::sleep(NEXT_SESSION_PAUSE).await;
        }
        self.commands.close();
        self.drain("this host is stopping");
    }

    fn view(&self) -> View {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let local = HostId(metrics.id);
        let vote = &metrics.vote;
        if metrics.state.is_leader() && vote.is_committed() && HostId(*vote.leader_id.node_id()) == local {
            return View::Leader(vote.leader_id.to_committed());
        }
        let told = || self.told.borrow().as_ref().and_then(|outlook| outlook.leader);
        // openraft goes on naming the leader that it last heard, also on a host that hears none any more.
        View::Other(told().or(metrics.current_leader.map(HostId)).filter(|leader| *leader != local))
    }

    fn announce(&self, leadership: Leadership) {
        self.announce.send_if_modified(|current| std::mem::replace(current, leadership) != leadership);
    }

    fn announce_following(&self) {
        let leader = match self.view() {
            View::Leader(_) => None,
            View::Other(leader) => leader,
        };
        self.announce(Leadership::Following { leader });
    }

    /// Returns when this host leads. Commands that come meanwhile are told who does.
    async fn follow(&mut self) -> Result<(), Stop> {
        let mut metrics = self.raft.metrics();
        loop {
            let View::Other(leader) = self.view() else {
                return Ok(());
            };
            self.announce(Leadership::Following { leader });
            tokio::select! {
                biased;
                changed = metrics.changed() => changed.map_err(|_| Stop)?,
                Ok(()) = self.told.changed() => {}
                command = self.commands.recv() => {
                    let Queued { reply, .. } = command.ok_or(Stop)?;
                    let _ = reply.send(Err(ProposeError::NotLeader { leader }));
                }
            }
        }
    }

    /// Proposes the barrier and waits for it to be applied: from here on the fold holds everything that any earlier
    /// leader, and this one's former life, may have committed.
    async fn begin(&mut self, leader: CommittedLeaderId) -> Result<Session<Reply>, String> {
        if mutant::is_on(Mutant::DeciderWithoutBarrier) {
            return Ok(Session::begin(&self.fold.borrow().clone()));
        }
        let mut flight = self.propose(Proposal::barrier(), leader).await?;
        let mut metrics = self.raft.metrics();
        loop {
            tokio::select! {
                biased;
                completed = &mut flight.completion => {
                    completed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
                    return Ok(Session::begin(&self.fold.borrow().clone()));
                }
                _ = metrics.changed() => self.still(leader)?,
                () = tokio::time::sleep_until(flight.deadline) => return Err("its barrier was not applied in time".into()),
            }
        }
    }

    fn still(&self, leader: CommittedLeaderId) -> Result<(), String> {
        if self.view() == View::Leader(leader) { Ok(()) } else { Err("this host leads no more".to_owned()) }
    }

    async fn propose(&self, proposal: Proposal, leader: CommittedLeaderId) -> Result<Flight<R>, String> {
        let (responder, completion) = ProgressResponder::complete_only();
        let deadline = Instant::now() + self.limits.entry;
        let write = self.raft.write(proposal).responder(responder).with_leader(leader);
        write.await.map_err(|error| error.to_string())?;
        Ok(Flight { completion, deadline })
    }

    /// Decides until something ends the session; returns what.
    async fn lead(&mut self, leader: CommittedLeaderId, mut session: Session<Reply>) -> String {
        let why = match self.serve(leader, &mut session).await {
            Ok(never) => match never {},
            Err(why) => why,
        };
        for reply in session.end() {
            let _ = reply.send(Err(ProposeError::retry(why.clone())));
        }
        why
    }

    async fn serve(
        &mut self,
        leader: CommittedLeaderId,
        session: &mut Session<Reply>,
    ) -> Result<std::convert::Infallible, String> {
        let mut metrics = self.raft.metrics();
        let mut flights: VecDeque<Flight<R>> = VecDeque::new();
        loop {
            while let Some((reply, outcome)) = session.release() {
                let _ = reply.send(outcome.map_err(ProposeError::from));
            }
            let room = session.entries_in_flight() < ENTRIES_IN_FLIGHT;
            tokio::select! {
                biased;
                completed = oldest(&mut flights) => {
                    flights.pop_front();
                    let result = completed?;
                    session.entry_applied(&result).map_err(|broken| broken.to_string())?;
                }
                _ = metrics.changed() => self.still(leader)?,
                command = self.commands.recv(), if room => {
                    let command = command.ok_or("this host is stopping")?;
                    self.decide_group(session, command);
                    if let Some(batches) = session.take_entry() {
                        flights.push_back(self.propose(Proposal::new(batches), leader).await?);
                    }
                }
            }
        }
    }

    /// Decides this command and all that wait with it, up to the size of one entry.
    fn decide_group(&mut self, session: &mut Session<Reply>, first: Queued) {
        let wall_ms = self.clock.wall_ms();
        let mut next = Some(first);
        while let Some(Queued { request, reply }) = next {
            // Nobody waits for it any more: its caller timed out while it was queued, and will retry.
            if !reply.is_closed() {
                session.decide(&request, wall_ms, reply);
            }
            next = if session.is_full() { None } else { self.commands.try_recv().ok() };
        }
    }

    fn drain(&mut self, why: &str) {
        while let Ok(Queued { reply, .. }) = self.commands.try_recv() {
            let _ = reply.send(Err(ProposeError::retry(why)));
        }
    }
}

/// The result of the oldest proposal; never returns while there is none. openraft answers in the order of the log.
async fn oldest<R: AsyncRuntime>(
    flights: &mut VecDeque<Flight<R>>,
) -> Result<Vec<statemachine::fold::Applied>, String> {
    let Some(flight) = flights.front_mut() else {
        return std::future::pending().await;
    };
    let completed = tokio::time::timeout_at(flight.deadline, &mut flight.completion).await;
    let completed = completed.map_err(|_| "a proposal was not applied in time".to_owned())?;
    let response = completed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    Ok(response.data.applied)
}

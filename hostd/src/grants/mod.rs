//! Grants, on the leader: every host's heartbeats arrive here, and one component answers them and says which hosts are silent
//! (DESIGN §5, hazard C3).
//!
//! [`keeper`] holds the rules and is pure; [`wire`] is what travels; this module is the task around the keeper: it queues
//! heartbeats, has ReadIndex rounds made, reads applied state after each, and proposes what the keeper has to say about hosts.
//! It runs on every host and grants on the one that leads.

pub mod keeper;
pub mod wire;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use consensus::decider::Leadership;
use consensus::node::PeerHandler;
use consensus::transport::PeerKind;
use consensus::transport::Refusal as PeerRefusal;
use futures::FutureExt;
use futures::future::BoxFuture;
use statemachine::command::Actor;
use statemachine::command::Request;
use statemachine::fold::Fold;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::keeper::HostLease;
use self::keeper::Keeper;
use self::keeper::Mono;
use self::keeper::Outcome;
use self::keeper::Round;
use self::keeper::Ticket;
use self::keeper::Timers;
use self::keeper::Verdict;
use self::keeper::Word;
use self::wire::Grant;
use self::wire::GrantAnswer;
use self::wire::Heartbeat;
use self::wire::Refusal;
use crate::agent::cluster::Cluster;
use crate::config::Config;

/// Heartbeats on their way to the keeper. It takes each at once, so more than this is a flood.
const ARRIVALS_MAX: usize = 1024;
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A look that comes this late says that this process did not run.
const STALL: Duration = Duration::from_secs(1);
/// A leader whose clock is further than this from the median hands over (hazard H17).
const CLOCK_ERROR_MAX_MS: i64 = 2_000;
const CLOCK_LOOK_EVERY: Duration = Duration::from_secs(10);

impl From<&Config> for Timers {
    fn from(config: &Config) -> Self {
        Timers { suspect: config.timers.suspect(), lost: config.timers.lost(), ..Timers::default() }
    }
}

#[derive(Debug, Default)]
pub struct GrantCounters {
    pub granted: AtomicU64,
    pub refused: AtomicU64,
    pub rounds: AtomicU64,
    pub rounds_failed: AtomicU64,
    /// Hosts suspected, lost and recovered by this leader's word.
    pub suspected: AtomicU64,
    pub lost: AtomicU64,
    pub recovered: AtomicU64,
}

struct Arrival {
    heartbeat: Heartbeat,
    answer: oneshot::Sender<Result<Grant, Refusal>>,
}

/// The keeper of grants of this host.
pub struct Grants {
    arrivals: mpsc::Sender<Arrival>,
    counters: Arc<GrantCounters>,
    keeper: Arc<Mutex<Keeper>>,
    cluster: Arc<dyn Cluster>,
    began: Instant,
    shutdown: CancellationToken,
}

impl Grants {
    pub fn spawn(timers: Timers, cluster: Arc<dyn Cluster>) -> Arc<Grants> {
        let (arrivals, inbox) = mpsc::channel(ARRIVALS_MAX);
        let (rounds, round_news) = mpsc::channel(4);
        let (words, word_news) = mpsc::channel(64);
        let counters = Arc::new(GrantCounters::default());
        let keeper = Arc::new(Mutex::new(Keeper::new(timers)));
        let shutdown = CancellationToken::new();
        let began = Instant::now();
        let task = Task {
            cluster: cluster.clone(),
            keeper: keeper.clone(),
            counters: counters.clone(),
            began,
            waiting: HashMap::new(),
            rounds,
            words,
            clock_looked: began,
            looked: began,
        };
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(task.run(inbox, round_news, word_news)));
        Arc::new(Grants { arrivals, counters, keeper, cluster, began, shutdown })
    }

    /// Answers the body of one [`wire::HEARTBEAT`] call. `from` is proven by the caller's certificate.
    pub async fn handle(&self, from: HostId, body: Bytes) -> Bytes {
        let outcome = match Heartbeat::decode(&body) {
            Ok(heartbeat) if heartbeat.host == from => self.ask(heartbeat).await,
            Ok(_) => Err(Refusal::WrongSender),
            Err(error) => {
                tracing::warn!(%from, "a heartbeat does not decode: {error}");
                Err(Refusal::Malformed)
            }
        };
        let counter = if outcome.is_ok() { &self.counters.granted } else { &self.counters.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(grant) => GrantAnswer::Granted(grant).encode(),
            Err(refusal) => GrantAnswer::Refused(refusal).encode(),
        }
    }

    async fn ask(&self, heartbeat: Heartbeat) -> Result<Grant, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.arrivals.try_send(Arrival { heartbeat, answer }).map_err(|_| Refusal::Busy)?;
        answered.await.unwrap_or(Err(Refusal::NotLeader))
    }

    pub fn counters(&self) -> &GrantCounters {
        &self.counters
    }

    /// Every host's lease as this leader sees it; empty on a host that does not lead.
    pub fn leases(&self) -> Vec<HostLease> {
        let fold = self.cluster.fold();
        lock(&self.keeper).leases(&fold, self.began.elapsed())
    }

    pub fn shutdown(&self) {
        self.shutdown.cancel();
    }
}

/// The keeper as the handler of [`wire::HEARTBEAT`] calls.
pub struct Door(pub Arc<Grants>);

impl PeerHandler for Door {
    fn call(&self, from: HostId, _kind: PeerKind, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerRefusal>> {
        let grants = self.0.clone();
        async move { Ok(grants.handle(from, body).await) }.boxed()
    }
}

fn lock(keeper: &Mutex<Keeper>) -> std::sync::MutexGuard<'_, Keeper> {
    keeper.lock().unwrap_or_else(PoisonError::into_inner)
}

type WordNews = (HostId, Word, Outcome);

struct Task {
    cluster: Arc<dyn Cluster>,
    keeper: Arc<Mutex<Keeper>>,
    counters: Arc<GrantCounters>,
    began: Instant,
    waiting: HashMap<Ticket, oneshot::Sender<Result<Grant, Refusal>>>,
    rounds: mpsc::Sender<(Round, Option<Seq>)>,
    words: mpsc::Sender<WordNews>,
    clock_looked: Instant,
    looked: Instant,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Arrival>,
        mut rounds: mpsc::Receiver<(Round, Option<Seq>)>,
        mut words: mpsc::Receiver<WordNews>,
    ) {
        let mut leadership = self.cluster.leadership();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let led = *leadership.borrow_and_update();
            self.follow_leadership(led);
            self.begin_round();
            let next_round = lock(&self.keeper).next_round_at().map(|at| self.began + at);
            // In this order, so that a flood of heartbeats starves nothing, and a simulation repeats.
            tokio::select! {
                biased;
                _ = look.tick() => self.look_at_hosts(),
                changed = leadership.changed() => if changed.is_err() { return },
                Some((round, read)) = rounds.recv() => self.end_round(round, read),
                Some((host, word, outcome)) = words.recv() => self.settle(host, word, outcome),
                () = sleep_until(next_round) => {}
                arrival = inbox.recv() => match arrival {
                    Some(arrival) => self.arrive(arrival),
                    None => return,
                },
            }
        }
    }

    fn now(&self) -> Mono {
        self.began.elapsed()
    }

    fn follow_leadership(&mut self, leadership: Leadership) {
        let verdicts = match leadership {
            Leadership::Leading { session, ready } => {
                let mut keeper = lock(&self.keeper);
                if keeper.leads() != Some(session) {
                    tracing::info!(session, "this host keeps the grants");
                }
                keeper.lead(session, ready, self.now())
            }
            Leadership::Following { .. } => lock(&self.keeper).follow(),
        };
        self.answer(verdicts);
    }

    fn arrive(&mut self, arrival: Arrival) {
        let wall_ms = self.cluster.platform().clock.wall_ms();
        let (ticket, verdicts) = lock(&self.keeper).heartbeat(arrival.heartbeat, self.now(), wall_ms);
        self.waiting.insert(ticket, arrival.answer);
        self.answer(verdicts);
    }

    /// The round is begun in the keeper first and made after: whoever arrives from here on waits for the next.
    fn begin_round(&mut self) {
        let Some((round, session)) = lock(&self.keeper).begin_round(self.now()) else { return };
        self.counters.rounds.fetch_add(1, Ordering::Relaxed);
        let (cluster, rounds) = (self.cluster.clone(), self.rounds.clone());
        tokio::spawn(async move {
            let read = cluster.confirm_lead(session).await;
            if let Err(error) = &read {
                tracing::debug!(session, "a round of grants proved nothing: {error}");
            }
            let _ = rounds.send((round, read.ok())).await;
        });
    }

    fn end_round(&mut self, round: Round, read: Option<Seq>) {
        if read.is_none() {
            self.counters.rounds_failed.fetch_add(1, Ordering::Relaxed);
        }
        let fold = self.cluster.fold();
        let verdicts = lock(&self.keeper).end_round(round, read, &fold, self.now());
        self.answer(verdicts);
    }

    fn answer(&mut self, verdicts: Vec<Verdict>) {
        for verdict in verdicts {
            if let Some(answer) = self.waiting.remove(&verdict.ticket) {
                // A host that hung up asks again.
                let _ = answer.send(verdict.outcome);
            }
        }
    }

    fn look_at_hosts(&mut self) {
        let (fold, now) = (self.cluster.fold(), self.now());
        let gap = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let due = {
            let mut keeper = lock(&self.keeper);
            if gap >= STALL {
                tracing::warn!(
                    gap_ms = gap.as_millis() as u64,
                    "hostd stood still; that time is not counted as silence of hosts"
                );
                keeper.stalled(gap);
            }
            keeper.observe(&fold);
            keeper.due(&fold, now)
        };
        for (host, word) in due {
            self.say(host, word, &fold);
        }
        if self.clock_looked.elapsed() >= CLOCK_LOOK_EVERY {
            self.clock_looked = Instant::now();
            self.look_at_clock();
        }
    }

    fn say(&self, host: HostId, word: Word, fold: &Fold) {
        let name = fold.state.hosts.get(&host).map_or_else(String::new, |host| host.name.clone());
        match word {
            Word::Suspect => tracing::warn!(%host, name, "the host is silent; it is suspected"),
            Word::Lost => tracing::error!(%host, name, "the host is silent for too long; it is unreachable"),
            Word::Recover => tracing::info!(%host, name, "the host is heard again"),
        }
        let counter = match word {
            Word::Suspect => &self.counters.suspected,
            Word::Lost => &self.counters.lost,
            Word::Recover => &self.counters.recovered,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let own = self.cluster.host();
        let command = word.command(host);
        let request = Request { actor: Actor::Duty(own), origin: own, idempotency: None, command };
        let (cluster, words) = (self.cluster.clone(), self.words.clone());
        tokio::spawn(async move {
            let outcome = match cluster.propose(request).await {
                Ok(answer) => Outcome::Settled(answer.seq),
                Err(error) => {
                    tracing::debug!(%host, ?word, "not decided: {error}");
                    Outcome::Unsettled
                }
            };
            let _ = words.send((host, word, outcome)).await;
        });
    }

    fn settle(&mut self, host: HostId, word: Word, outcome: Outcome) {
        let fold = self.cluster.fold();
        lock(&self.keeper).settle(host, word, outcome, &fold, self.now());
    }

    fn look_at_clock(&self) {
        let Some((error_ms, nearest)) = lock(&self.keeper).clock_error(self.now()) else { return };
        if error_ms.abs() <= CLOCK_ERROR_MAX_MS || nearest == self.cluster.host() {
            return;
        }
        tracing::error!(
            error_ms,
            "this leader's clock is off; the lead goes to host {nearest}; check time synchronisation"
        );
        let cluster = self.cluster.clone();
        tokio::spawn(async move {
            if let Err(error) = cluster.transfer_leader(nearest).await {
                tracing::warn!("the lead was not handed over: {error}");
            }
        });
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "grants_tests.rs"]
mod tests;

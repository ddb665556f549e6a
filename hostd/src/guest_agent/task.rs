//! The task beside one guest's agent: connects when a program in the guest has its port open, asks what the observer wants asked,
//! reports facts, carries out orders, and never leaves the guest frozen.

use std::future::Future;
use std::time::Duration;
use std::time::SystemTime;

use statemachine::state::GuestFacts;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::Instant;

use super::AgentError;
use super::answers::FilesystemUse;
use super::client::GuestAgent;
use super::commands::Command;
use super::commands::FREEZE_WITHIN;
use super::commands::ShutdownMode;
use super::exec::ExecRequest;
use super::exec::ExecStatus;
use super::exec::GuestPid;
use super::freeze::At;
use super::freeze::Freeze;
use super::freeze::FrozenGuard;
use super::freeze::ThawReply;
use super::observer::Answer;
use super::observer::Ask;
use super::observer::NoAnswer;
use super::observer::Observer;

/// Orders under way to one guest.
const ORDERS_MAX: usize = 16;
/// After a connection that was refused or ended.
const RECONNECT_EVERY: Duration = Duration::from_secs(2);

/// When the last report was not taken yet.
const REPORT_AGAIN: Duration = Duration::from_secs(1);

/// Where an order's answer goes. Its sender may have left.
type ReplyTo<T> = oneshot::Sender<Result<T, AgentError>>;

#[derive(Debug)]
enum Order {
    Shutdown(ShutdownMode, ReplyTo<()>),
    SetTime(ReplyTo<()>),
    Exec(Box<ExecRequest>, ReplyTo<GuestPid>),
    ExecStatus(GuestPid, ReplyTo<ExecStatus>),
    Freeze(Duration, ReplyTo<FrozenGuard>),
}

/// Whether the agent can be asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Health {
    /// No program in the guest has the port open.
    #[default]
    Absent,
    Up,
    /// Connected, and does not answer.
    Silent,
}

/// The agent as others may see it. None of it is an event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentView {
    pub health: Health,
    pub version: Option<String>,
    pub frozen: bool,
    pub filesystems: Vec<FilesystemUse>,
}

/// Orders for one guest's agent. Without [`Attendant`] each is answered [`AgentError::Absent`].
#[derive(Debug, Clone)]
pub struct AgentOrders(mpsc::Sender<Order>);

impl AgentOrders {
    /// Asks the guest to stop or to restart; more reliable than the power button, which a guest may ignore.
    pub async fn shutdown(&self, mode: ShutdownMode) -> Result<(), AgentError> {
        self.order(|reply| Order::Shutdown(mode, reply)).await
    }

    /// Sets the guest's clock to this host's. For a guest that stood: its own clock did too.
    pub async fn set_time(&self) -> Result<(), AgentError> {
        self.order(Order::SetTime).await
    }

    pub async fn exec(&self, request: ExecRequest) -> Result<GuestPid, AgentError> {
        request.check()?;
        self.order(|reply| Order::Exec(Box::new(request), reply)).await
    }

    pub async fn exec_status(&self, program: GuestPid) -> Result<ExecStatus, AgentError> {
        self.order(|reply| Order::ExecStatus(program, reply)).await
    }

    /// Freezes the guest's file systems, for `limit` at most ([`super::freeze::MAX_FROZEN`]).
    pub async fn freeze(&self, limit: Duration) -> Result<FrozenGuard, AgentError> {
        self.order(|reply| Order::Freeze(limit, reply)).await
    }

    async fn order<T>(&self, order: impl FnOnce(ReplyTo<T>) -> Order) -> Result<T, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.0.send(order(reply)).await.map_err(|_| AgentError::Absent)?;
        answer.await.unwrap_or(Err(AgentError::Absent))
    }
}

/// What the task beside a guest needs, and tells.
#[derive(Debug)]
pub struct Attendant<C> {
    connect: C,
    /// A program in the guest has the port open, as the vmm's status says.
    open: watch::Receiver<bool>,
    facts: mpsc::Sender<GuestFacts>,
    view: watch::Sender<AgentView>,
    orders: mpsc::Receiver<Order>,
    observer: Observer,
    freeze: Freeze,
    released: Option<oneshot::Receiver<ThawReply>>,
    started: Instant,
}

/// What an attendant is told by.
#[derive(Debug)]
pub struct Ends {
    pub orders: AgentOrders,
    pub view: watch::Receiver<AgentView>,
    /// Facts to report: rare, and each differs from the one before.
    pub facts: mpsc::Receiver<GuestFacts>,
}

/// The guest is gone, and so is whoever wanted to know.
struct NobodyLeft;

/// What comes up while the agent is not asked.
enum Woken {
    Order(Order),
    /// The guard was released, or dropped when there is nobody to answer.
    Released(Option<ThawReply>),
    PortMoved,
    Time,
}

impl<C, F, S, E> Attendant<C>
where
    C: FnMut() -> F,
    F: Future<Output = Result<S, E>>,
    S: AsyncRead + AsyncWrite + Unpin,
    E: std::fmt::Display,
{
    /// `connect` makes a stream to the agent's port, `known` is what was reported of this guest before.
    pub fn new(connect: C, open: watch::Receiver<bool>, known: Option<GuestFacts>) -> (Attendant<C>, Ends) {
        let (orders_sender, orders) = mpsc::channel(ORDERS_MAX);
        let (view, view_receiver) = watch::channel(AgentView::default());
        // One report may wait; the next comes half a minute later.
        let (facts, facts_receiver) = mpsc::channel(1);
        let observer = Observer::new(known);
        let (freeze, released, started) = (Freeze::default(), None, Instant::now());
        let attendant = Attendant { connect, open, facts, view, orders, observer, freeze, released, started };
        (attendant, Ends { orders: AgentOrders(orders_sender), view: view_receiver, facts: facts_receiver })
    }

    /// Until the other side of `open` or all receivers of what it tells are gone.
    pub async fn run(mut self) {
        let _ = self.attend().await;
    }

    async fn attend(&mut self) -> Result<(), NobodyLeft> {
        loop {
            self.refuse_orders_until_open().await?;
            match (self.connect)().await {
                Ok(stream) => {
                    let mut agent = GuestAgent::new(stream);
                    let ended = self.converse(&mut agent).await;
                    self.disconnected();
                    let ended = ended?;
                    tracing::debug!("the conversation with the guest agent ended: {ended}");
                }
                Err(error) => tracing::debug!("the guest agent's port cannot be reached: {error}"),
            }
            let again = tokio::time::sleep(RECONNECT_EVERY);
            tokio::pin!(again);
            loop {
                tokio::select! {
                    () = &mut again => break,
                    order = self.orders.recv() => self.refuse(order)?,
                }
            }
        }
    }

    async fn refuse_orders_until_open(&mut self) -> Result<(), NobodyLeft> {
        while !*self.open.borrow_and_update() {
            tokio::select! {
                moved = self.open.changed() => moved.map_err(|_| NobodyLeft)?,
                order = self.orders.recv() => self.refuse(order)?,
            }
        }
        Ok(())
    }

    fn refuse(&self, order: Option<Order>) -> Result<(), NobodyLeft> {
        // Dropping its reply answers it.
        order.map(drop).ok_or(NobodyLeft)
    }

    fn now(&self) -> At {
        self.started.elapsed()
    }

    fn disconnected(&mut self) {
        self.observer.disconnected();
        self.freeze.disconnected(self.now());
        // Its holder learns that it cannot rely on it.
        self.released = None;
        let frozen = self.freeze.is_frozen();
        self.view.send_modify(|view| *view = AgentView { frozen, ..AgentView::default() });
    }

    /// Talks until the connection ends; says how.
    async fn converse(&mut self, agent: &mut GuestAgent<S>) -> Result<AgentError, NobodyLeft> {
        self.observer.connected(self.now());
        let mut looked = false;
        loop {
            let now = self.now();
            // A frozen agent refuses everything that might touch a disk, and a guest is not frozen for long.
            let ask = self.observer.ask(now).filter(|_| !self.freeze.is_frozen());
            let done = if self.freeze.thaw_is_due(now) {
                self.thaw(agent, None).await
            } else if let Some(ask) = ask {
                let asked = self.ask(agent, ask).await;
                if !looked && ask == Ask::Info && asked.is_ok() {
                    looked = true;
                    self.look_for_frozen(agent).await
                } else {
                    asked
                }
            } else {
                self.tell();
                match self.wait().await? {
                    Woken::Order(order) => self.carry_out(agent, order).await,
                    Woken::Released(reply) => self.thaw(agent, reply).await,
                    Woken::PortMoved if !*self.open.borrow() => return Ok(AgentError::Closed),
                    Woken::PortMoved | Woken::Time => Ok(()),
                }
            };
            match done {
                Err(error) if error.is_the_end() => return Ok(error),
                _ => {}
            }
        }
    }

    /// Publishes what is new.
    fn tell(&mut self) {
        let health = if self.observer.is_silent() { Health::Silent } else { Health::Up };
        let frozen = self.freeze.is_frozen();
        self.view.send_if_modified(|view| {
            let changed = (view.health, view.frozen) != (health, frozen);
            (view.health, view.frozen) = (health, frozen);
            changed
        });
        // A reader that has not taken the last report gets this one later.
        if let Ok(permit) = self.facts.try_reserve()
            && let Some(facts) = self.observer.report(self.started.elapsed())
        {
            permit.send(facts);
        }
    }

    async fn wait(&mut self) -> Result<Woken, NobodyLeft> {
        let now = self.now();
        let asks = self.observer.next().filter(|_| !self.freeze.is_frozen());
        let next = asks.into_iter().chain(self.freeze.next()).min().unwrap_or(now + RECONNECT_EVERY);
        // A report that nobody takes yet is due all the time.
        let pause = if self.facts.capacity() == 0 { REPORT_AGAIN } else { Duration::ZERO };
        let next = next.max(now + pause);
        let time = tokio::time::sleep_until(self.started + next);
        let released = async {
            match &mut self.released {
                Some(released) => released.await.ok(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = self.orders.recv() => order.map(Woken::Order).ok_or(NobodyLeft),
            reply = released => {
                self.released = None;
                Ok(Woken::Released(reply))
            }
            moved = self.open.changed() => moved.map(|()| Woken::PortMoved).map_err(|_| NobodyLeft),
            () = time => Ok(Woken::Time),
        }
    }

    async fn ask(&mut self, agent: &mut GuestAgent<S>, ask: Ask) -> Result<(), AgentError> {
        let answer = match ask {
            Ask::Info => agent.info().await.map(|info| {
                self.view.send_if_modified(|view| {
                    std::mem::replace(&mut view.version, info.version.clone()) != info.version
                });
                Answer::Info(info.supported)
            }),
            Ask::Ping => agent.ping().await.map(|()| Answer::Pong),
            Ask::HostName => agent.host_name().await.map(Answer::HostName),
            Ask::Os => agent.os().await.map(Answer::Os),
            Ask::Interfaces => agent.interfaces().await.map(Answer::Interfaces),
            Ask::Filesystems => agent.filesystems().await.map(|(filesystems, uses)| {
                self.view.send_if_modified(|view| std::mem::replace(&mut view.filesystems, uses.clone()) != uses);
                Answer::Filesystems(filesystems)
            }),
        };
        let now = self.now();
        match answer {
            Ok(answer) => {
                self.observer.answered(answer, now);
                Ok(())
            }
            Err(error) => {
                let silent = matches!(error, AgentError::Silent { .. });
                self.observer.failed(ask, if silent { NoAnswer::Silent } else { NoAnswer::Refused }, now);
                tracing::debug!("the guest agent has no answer: {error}");
                Err(error)
            }
        }
    }

    /// What an earlier conversation froze, of this hostd or of one before it.
    async fn look_for_frozen(&mut self, agent: &mut GuestAgent<S>) -> Result<(), AgentError> {
        match agent.is_frozen().await {
            Ok(frozen) => {
                if frozen {
                    tracing::warn!("a guest was found with frozen file systems; they are thawed");
                }
                self.freeze.found(frozen, self.now());
                Ok(())
            }
            // Nothing that cannot be frozen by its agent was.
            Err(AgentError::Unsupported { .. }) => {
                self.freeze.thawed();
                Ok(())
            }
            Err(error) => {
                // Not known: a thaw harms nobody.
                self.freeze.ends(self.now());
                Err(error)
            }
        }
    }

    async fn carry_out(&mut self, agent: &mut GuestAgent<S>, order: Order) -> Result<(), AgentError> {
        if self.freeze.is_frozen() {
            order.refuse_frozen();
            return Ok(());
        }
        match order {
            Order::Shutdown(mode, reply) => answer_to(reply, agent.shutdown(mode).await),
            Order::SetTime(reply) => answer_to(reply, agent.set_time(SystemTime::now()).await),
            Order::Exec(request, reply) => answer_to(reply, agent.exec(&request).await),
            Order::ExecStatus(program, reply) => answer_to(reply, agent.exec_status(program).await),
            Order::Freeze(limit, reply) => self.freeze(agent, limit, reply).await,
        }
    }

    async fn freeze(
        &mut self,
        agent: &mut GuestAgent<S>,
        limit: Duration,
        reply: ReplyTo<FrozenGuard>,
    ) -> Result<(), AgentError> {
        // Nothing is frozen that could not be thawed.
        if let Some(command) = [Command::Freeze, Command::Thaw].into_iter().find(|command| !agent.supports(*command)) {
            let _ = reply.send(Err(AgentError::Unsupported { command }));
            return Ok(());
        }
        self.freeze.begins(self.now(), FREEZE_WITHIN, limit);
        match agent.freeze().await {
            Ok(filesystems) => {
                self.freeze.holds(self.now(), limit);
                let (guard, released) = FrozenGuard::new(filesystems);
                self.released = Some(released);
                // Where nobody waits any more the guard is dropped here, and that is heard like any other end of it.
                let _ = reply.send(Ok(guard));
                Ok(())
            }
            Err(error) => {
                // Some of its file systems may be frozen.
                self.freeze.ends(self.now());
                answer_to(reply, Err(error))
            }
        }
    }

    /// Thaws, and asks everything anew afterwards: the frozen agent refused most of it.
    async fn thaw(&mut self, agent: &mut GuestAgent<S>, reply: Option<ThawReply>) -> Result<(), AgentError> {
        // From here on a guard cannot be relied on.
        self.released = None;
        self.freeze.ends(self.now());
        let thawed = agent.thaw().await;
        let now = self.now();
        match &thawed {
            Ok(_) => {
                self.freeze.thawed();
                self.observer.connected(now);
            }
            // What cannot thaw has not frozen.
            Err(AgentError::Unsupported { .. }) => self.freeze.thawed(),
            Err(error) => {
                tracing::warn!("a guest's file systems may still be frozen; thawing is tried again: {error}");
                self.freeze.thaw_failed(now);
            }
        }
        match reply {
            Some(reply) => answer_to(reply, thawed),
            None => thawed.map(|_| ()),
        }
    }
}

impl Order {
    fn refuse_frozen(self) {
        match self {
            Order::Shutdown(_, reply) | Order::SetTime(reply) => drop(reply.send(Err(AgentError::Frozen))),
            Order::Exec(_, reply) => drop(reply.send(Err(AgentError::Frozen))),
            Order::ExecStatus(_, reply) => drop(reply.send(Err(AgentError::Frozen))),
            Order::Freeze(_, reply) => drop(reply.send(Err(AgentError::Frozen))),
        }
    }
}

/// Answers whoever asked. The conversation is told only of its own end.
fn answer_to<T>(reply: ReplyTo<T>, result: Result<T, AgentError>) -> Result<(), AgentError> {
    let ended = result.as_ref().is_err_and(AgentError::is_the_end);
    let _ = reply.send(result);
    if ended { Err(AgentError::Closed) } else { Ok(()) }
}

//! The task beside a whole guest that plays along, hangs, restarts or freezes. Time is paused: a test waits for nothing.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;
use statemachine::state::GuestFacts;
use tokio::io::DuplexStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio::time::sleep;

use super::AgentError;
use super::commands::ShutdownMode;
use super::exec::ExecRequest;
use super::exec::ExecStatus;
use super::fake_guest::FakeGuest;
use super::fake_guest::pair;
use super::task::Attendant;
use super::task::Ends;
use super::task::Health;

const COMMANDS: [&str; 13] = [
    "guest-ping",
    "guest-info",
    "guest-network-get-interfaces",
    "guest-get-osinfo",
    "guest-get-host-name",
    "guest-get-fsinfo",
    "guest-shutdown",
    "guest-fsfreeze-status",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-thaw",
    "guest-set-time",
    "guest-exec",
    "guest-exec-status",
];
/// What a frozen agent still does.
const WHILE_FROZEN: [&str; 4] = ["guest-ping", "guest-info", "guest-fsfreeze-status", "guest-fsfreeze-thaw"];

/// A guest: what it is, and what it was told. Outlives its connections.
#[derive(Default)]
struct Guest {
    name: String,
    used: u64,
    frozen: bool,
    hangs: bool,
    thaw_fails: u32,
    told: Vec<(Duration, String)>,
}

struct World {
    guest: Arc<Mutex<Guest>>,
    open: watch::Sender<bool>,
    ends: Ends,
    started: Instant,
    agent: Arc<Mutex<Option<JoinHandle<()>>>>,
    /// Connections that are refused first.
    refusals: Arc<Mutex<VecDeque<()>>>,
    task: JoinHandle<()>,
}

async fn serve(guest: Arc<Mutex<Guest>>, mut wire: FakeGuest, started: Instant) {
    while let Some(request) = wire.try_request().await {
        let command = request["execute"].as_str().unwrap().to_owned();
        if guest.lock().unwrap().hangs {
            continue;
        }
        if command == "guest-sync-delimited" {
            wire.answer_sync(&request["arguments"]).await;
            continue;
        }
        let answer = guest.lock().unwrap().answer(&command, started.elapsed());
        match answer {
            Some(Ok(value)) => wire.answer(value).await,
            Some(Err(words)) => wire.refuse(words).await,
            None => {}
        }
    }
}

impl Guest {
    fn answer(&mut self, command: &str, now: Duration) -> Option<Result<Value, &'static str>> {
        self.told.push((now, command.to_owned()));
        if self.frozen && !WHILE_FROZEN.contains(&command) {
            return Some(Err("Command is disabled: the agent is in frozen state"));
        }
        Some(Ok(match command {
            "guest-info" => {
                let commands =
                    COMMANDS.map(|name| json!({"name": name, "enabled": !self.frozen || WHILE_FROZEN.contains(&name)}));
                json!({"version": "8.2.0", "supported_commands": commands})
            }
            "guest-get-host-name" => json!({"host-name": self.name}),
            "guest-get-osinfo" => json!({"id": "debian", "kernel-release": "6.1.0"}),
            "guest-network-get-interfaces" => json!([{"name": "eth0", "hardware-address": "52:54:00:01:02:03"}]),
            "guest-get-fsinfo" => {
                json!([{"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": self.used, "total-bytes": 100}])
            }
            "guest-fsfreeze-status" => json!(if self.frozen { "frozen" } else { "thawed" }),
            "guest-fsfreeze-freeze" => {
                self.frozen = true;
                json!(1)
            }
            "guest-fsfreeze-thaw" if self.thaw_fails > 0 => {
                self.thaw_fails -= 1;
                return Some(Err("not now"));
            }
            "guest-fsfreeze-thaw" => json!(u64::from(std::mem::take(&mut self.frozen))),
            "guest-shutdown" => return None,
            "guest-exec" => json!({"pid": 5}),
            "guest-exec-status" => json!({"exited": true, "exitcode": 0, "out-data": "aGk="}),
            _ => json!({}),
        }))
    }
}

impl World {
    fn new(known: Option<GuestFacts>) -> World {
        let guest = Arc::new(Mutex::new(Guest { name: "web".into(), ..Guest::default() }));
        let (open, is_open) = watch::channel(true);
        let started = Instant::now();
        let agent = Arc::new(Mutex::new(None));
        let refusals = Arc::new(Mutex::new(VecDeque::new()));
        let (in_guest, runs, refused) = (guest.clone(), agent.clone(), refusals.clone());
        let connect = move || {
            let connected: io::Result<DuplexStream> = match refused.lock().unwrap().pop_front() {
                Some(()) => Err(io::ErrorKind::ConnectionRefused.into()),
                None => {
                    let (near, wire) = pair();
                    *runs.lock().unwrap() = Some(tokio::spawn(serve(in_guest.clone(), wire, started)));
                    Ok(near)
                }
            };
            std::future::ready(connected)
        };
        let (attendant, ends) = Attendant::new(connect, is_open, known);
        let task = tokio::spawn(attendant.run());
        World { guest, open, ends, started, agent, refusals, task }
    }

    fn guest(&self) -> std::sync::MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    fn told(&self, command: &str) -> Vec<u64> {
        self.guest().told.iter().filter(|(_, told)| told == command).map(|(at, _)| at.as_secs()).collect()
    }

    /// The agent's program ends, as when the guest resets.
    fn cut(&self) {
        let agent = self.agent.lock().unwrap().take();
        agent.expect("an agent runs").abort();
    }

    async fn facts(&mut self) -> (u64, GuestFacts) {
        let facts = self.ends.facts.recv().await.expect("the task lives");
        (self.started.elapsed().as_secs(), facts)
    }

    fn no_facts(&mut self) {
        assert!(self.ends.facts.try_recv().is_err(), "nothing to report");
    }
}

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn facts_are_reported_once_and_then_when_they_change() {
    let mut world = World::new(None);
    let (at, facts) = world.facts().await;
    assert_eq!((at, facts.hostname.as_deref()), (0, Some("web")));
    facts.check().unwrap();
    assert_eq!((facts.interfaces.len(), facts.filesystems.len()), (1, 1));
    let view = world.ends.view.borrow().clone();
    assert_eq!((view.health, view.version.as_deref(), view.filesystems[0].used_bytes), (Health::Up, Some("8.2.0"), 0));

    world.guest().used = 50;
    sleep(s(899)).await;
    world.no_facts();
    assert_eq!(world.ends.view.borrow().filesystems[0].used_bytes, 50, "a sample");

    world.guest().name = "db".into();
    let (at, facts) = world.facts().await;
    assert_eq!((at, facts.hostname.as_deref()), (900, Some("db")));
    assert_eq!(world.told("guest-get-host-name"), [0, 300, 600, 900]);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_asked_while_the_port_is_closed() {
    let mut world = World::new(None);
    world.facts().await;
    world.open.send(false).unwrap();
    sleep(s(5)).await;
    assert_eq!(world.ends.view.borrow().health, Health::Absent);
    let told = world.guest().told.len();
    assert!(matches!(world.ends.orders.set_time().await, Err(AgentError::Absent)));
    sleep(s(1000)).await;
    assert_eq!(world.guest().told.len(), told);
    world.open.send(true).unwrap();
    sleep(s(1)).await;
    assert_eq!(world.ends.view.borrow().health, Health::Up);
    world.no_facts();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_restarts_is_found_again_and_asked_anew() {
    let mut world = World::new(None);
    world.facts().await;
    world.guest().name = "renamed".into();
    world.refusals.lock().unwrap().extend([(), ()]);
    world.cut();
    let (_, facts) = world.facts().await;
    assert_eq!(facts.hostname.as_deref(), Some("renamed"));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_hangs_is_seen_and_comes_back() {
    let mut world = World::new(None);
    world.facts().await;
    world.guest().hangs = true;
    sleep(s(60)).await;
    assert_eq!(world.ends.view.borrow().health, Health::Silent);
    let silent = world.ends.orders.set_time().await;
    assert!(matches!(silent, Err(AgentError::Silent { .. })), "{silent:?}");
    world.guest().hangs = false;
    sleep(s(301)).await;
    assert_eq!(world.ends.view.borrow().health, Health::Up);
}

#[tokio::test(start_paused = true)]
async fn orders_reach_the_guest() {
    let mut world = World::new(None);
    world.facts().await;
    let orders = world.ends.orders.clone();
    orders.set_time().await.unwrap();
    let program = orders.exec(ExecRequest { path: "/bin/true".into(), ..ExecRequest::default() }).await.unwrap();
    let ExecStatus::Exited(outcome) = orders.exec_status(program).await.unwrap() else { panic!("it ended") };
    assert_eq!(outcome.output.bytes, b"hi");
    orders.shutdown(ShutdownMode::PowerOff).await.unwrap();
    assert_eq!([world.told("guest-set-time").len(), world.told("guest-shutdown").len()], [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_is_frozen_while_the_guard_lives() {
    let mut world = World::new(None);
    world.facts().await;
    let guard = world.ends.orders.freeze(s(20)).await.unwrap();
    assert!(world.guest().frozen);
    assert_eq!(guard.filesystems(), 1);
    assert!(matches!(world.ends.orders.set_time().await, Err(AgentError::Frozen)));
    sleep(s(15)).await;
    assert!(world.ends.view.borrow().frozen && world.guest().frozen);
    guard.thaw().await.unwrap();
    assert!(!world.guest().frozen);
    world.ends.orders.set_time().await.unwrap();
    sleep(s(100)).await;
    assert!(!world.ends.view.borrow().frozen);
    world.no_facts();
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_is_dropped_thaws() {
    let mut world = World::new(None);
    world.facts().await;
    drop(world.ends.orders.freeze(s(20)).await.unwrap());
    sleep(s(1)).await;
    assert!(!world.guest().frozen);
    assert_eq!(world.told("guest-fsfreeze-thaw").len(), 1);
    // Nobody waits for the guard.
    let orders = world.ends.orders.clone();
    let asked = tokio::time::timeout(Duration::ZERO, orders.freeze(s(20))).await;
    assert!(asked.is_err());
    sleep(s(1)).await;
    assert_eq!(world.told("guest-fsfreeze-freeze").len(), 2);
    assert!(!world.guest().frozen);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_is_kept_too_long_is_worth_nothing_and_the_guest_runs() {
    let mut world = World::new(None);
    world.facts().await;
    world.guest().thaw_fails = 3;
    let guard = world.ends.orders.freeze(s(10_000)).await.unwrap();
    sleep(s(59)).await;
    assert!(world.guest().frozen);
    sleep(s(10)).await;
    assert!(!world.guest().frozen, "the longest limit, and three thaws that failed");
    assert!(matches!(guard.thaw().await, Err(AgentError::ThawedEarly)));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_while_frozen_ends_in_a_thaw() {
    let mut world = World::new(None);
    world.facts().await;
    let guard = world.ends.orders.freeze(s(60)).await.unwrap();
    world.cut();
    // The guest's next words are a thaw.
    sleep(s(70)).await;
    assert!(!world.guest().frozen);
    assert!(matches!(guard.thaw().await, Err(AgentError::ThawedEarly)));
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_hostd_left_frozen_is_thawed_and_then_asked() {
    let mut world = World::new(None);
    world.guest().frozen = true;
    let (at, facts) = world.facts().await;
    assert!(!world.guest().frozen);
    assert_eq!((at, facts.hostname.as_deref()), (0, Some("web")));
}

#[tokio::test(start_paused = true)]
async fn a_freeze_whose_answer_is_lost_is_thawed() {
    let mut world = World::new(None);
    world.facts().await;
    let orders = world.ends.orders.clone();
    world.guest().hangs = true;
    let freezing = tokio::spawn(async move { orders.freeze(s(20)).await.map(drop) });
    sleep(s(1)).await;
    // It did it, and did not say so.
    world.guest().frozen = true;
    let result = freezing.await.unwrap();
    assert!(matches!(result, Err(AgentError::Silent { .. })), "{result:?}");
    world.guest().hangs = false;
    sleep(s(31)).await;
    assert!(!world.guest().frozen);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_those_who_listen() {
    let World { open, ends, task, .. } = World::new(None);
    drop(ends);
    drop(open);
    task.await.unwrap();
}

//! Clients: they define, start and stop VMs through whatever host answers, keep their idempotency keys while they retry, and
//! remember what they were told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use consensus::decider::ProposeError;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::TokenId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::IdempotencyKey;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::state::GuestStatus;
use statemachine::state::ReleaseClass;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::state::Vm;
use statemachine::state::VmSpec;

use super::checker::Checker;
use super::coverage::Met;
use super::host::Host;
use super::random::Dice;
use super::trace::Trace;

const RETRY_MS: u64 = 400;
/// A client that got no answer for so long asks another host.
const PATIENCE_MS: u64 = 6_000;
const GIVE_UP: u32 = 12;
const AT_ONCE: usize = 6;
const BURST: usize = 30;

enum News {
    Answered { id: u64, through: HostId, outcome: Result<Answer, ProposeError> },
    Read { host: HostId, seen: Seq, acknowledged: Seq },
}

struct Asked {
    request: Request,
    tries: u32,
    /// When to ask (again).
    due_ms: u64,
    under_way: bool,
    asked_ms: u64,
    /// Where the log was when it was first asked.
    asked_at: Seq,
    /// What it defines, if it defines something: then an acceptance has a batch of its own.
    name: Option<String>,
}

#[derive(Default)]
pub struct Clients {
    open: BTreeMap<u64, Asked>,
    news: Arc<Mutex<Vec<News>>>,
    next: u64,
    next_at_ms: u64,
    acknowledged: Seq,
    /// Whose name they bear; root makes it first.
    pub token: TokenId,
    /// They wish for new things, besides asking again for old ones.
    pub wishes: bool,
    /// Among them, that guests move.
    pub moves: bool,
    /// Or that they sleep.
    pub sleeps: bool,
}

fn key(request: &Request) -> &str {
    request.idempotency.as_ref().map_or("", |idempotency| &idempotency.key)
}

fn define(dice: &mut Dice, id: u64) -> Command {
    let release = if dice.one_in(3) { ReleaseClass::Operator } else { ReleaseClass::Lease };
    let spec = VmSpec {
        vcpus: 1,
        memory_mib: 2 * dice.range(32..200),
        kernel: "/srv/vmlinuz".to_owned(),
        cmdline: "x".repeat(dice.range(0..400) as usize),
        release: Some(release),
        ..VmSpec::default()
    };
    // Some names are wanted twice: whoever comes second is refused, and must be refused on grounds that stay.
    let id = if dice.one_in(3) { id.saturating_sub(dice.below(4)) } else { id };
    let run_strategy = if dice.one_in(2) { RunStrategy::Always } else { RunStrategy::Manual };
    Command::VmDefine { name: format!("vm{id}"), cluster: None, spec, run_strategy }
}

/// What somebody might want next of a site in this state.
fn wish(dice: &mut Dice, fold: &Fold, id: u64) -> Command {
    let vms: Vec<_> = fold.state.vms.iter().map(|(vm, _)| *vm).collect();
    let Some(vm) = dice.pick(&vms).copied().filter(|_| vms.len() >= 3) else { return define(dice, id) };
    match dice.below(12) {
        0..3 if vms.len() < 24 => define(dice, id),
        3..6 => Command::VmStart { vm, host: None },
        6 => Command::VmStop { vm, mode: StopMode::PowerOff },
        7 => Command::VmStop { vm, mode: StopMode::Shutdown },
        8 => Command::VmDelete { vm },
        9 => Command::VmReset { vm },
        _ => Command::TokenCreate {
            purpose: statemachine::state::TokenPurpose::Viewer,
            secret_hash: *blake3::hash(&id.to_le_bytes()).as_bytes(),
            ttl_ms: 60_000,
            note: "n".repeat(dice.range(0..100) as usize),
        },
    }
}

/// A guest that is up should run elsewhere, or one on its way should stay after all.
fn wish_move(dice: &mut Dice, fold: &Fold) -> Option<Command> {
    if dice.one_in(12) {
        let moving: Vec<_> = fold.state.all_moving().map(|(vm, _)| vm).collect();
        return dice.pick(&moving).map(|vm| Command::VmCancelMigration { vm: *vm });
    }
    if !dice.one_in(3) {
        return None;
    }
    let up = |vm: &Vm| vm.observed.is_some_and(|observed| observed.status == GuestStatus::Up);
    let up: Vec<_> = fold.state.vms.iter().filter(|(_, vm)| up(vm)).map(|(id, _)| *id).collect();
    dice.pick(&up).map(|vm| Command::VmMigrate { vm: *vm, host: None })
}

/// A guest that is up should sleep, or one that sleeps should go on, or be given up.
fn wish_sleep(dice: &mut Dice, fold: &Fold) -> Option<Command> {
    let asleep: Vec<_> =
        fold.state.suspensions.iter().filter(|(_, it)| it.asleep().is_some()).map(|(vm, _)| *vm).collect();
    let wakes = dice.one_in(2);
    if let Some(vm) = dice.pick(&asleep).copied().filter(|_| wakes) {
        return Some(match dice.one_in(6) {
            true => Command::VmStop { vm, mode: StopMode::PowerOff },
            false => Command::VmStart { vm, host: None },
        });
    }
    if !dice.one_in(3) {
        return None;
    }
    let up = |vm: &Vm| vm.observed.is_some_and(|observed| observed.status == GuestStatus::Up);
    let up: Vec<_> = fold.state.vms.iter().filter(|(_, vm)| up(vm)).map(|(id, _)| *id).collect();
    dice.pick(&up).map(|vm| Command::VmSuspend { vm: *vm })
}

impl Clients {
    pub fn ask(&mut self, command: Command, now_ms: u64) {
        let id = self.next;
        self.next += 1;
        let name = match &command {
            Command::VmDefine { name, .. } => Some(name.clone()),
            _ => None,
        };
        let body_hash = *blake3::hash(format!("{command:?}").as_bytes()).as_bytes();
        let idempotency = Some(IdempotencyKey { key: format!("k{id}"), body_hash });
        let request = Request { actor: Actor::Token(self.token), origin: HostId(1), idempotency, command };
        let asked = Asked { request, tries: 0, due_ms: now_ms, under_way: false, asked_ms: 0, asked_at: Seq(0), name };
        self.open.insert(id, asked);
    }

    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Hears answers, asks again, and wishes for more.
    pub fn step(
        &mut self,
        hosts: &BTreeMap<HostId, Host>,
        checker: &mut Checker,
        dice: &mut Dice,
        trace: &Trace,
        now_ms: u64,
    ) {
        self.hear(checker, trace, now_ms);
        if self.wishes && now_ms >= self.next_at_ms && self.open.len() < AT_ONCE {
            self.next_at_ms = now_ms + dice.range(20..500);
            // Now and then many at once, so that a leader has several entries in flight when something breaks.
            for _ in 0..if dice.one_in(12) { BURST } else { 1 } {
                let moved = if self.moves { wish_move(dice, &checker.fold) } else { None };
                let slept = if self.sleeps { wish_sleep(dice, &checker.fold) } else { None };
                let command = moved.or(slept).unwrap_or_else(|| wish(dice, &checker.fold, self.next));
                self.ask(command, now_ms);
            }
            if dice.one_in(3) {
                self.read(hosts, dice);
            }
        }
        let up: Vec<&Host> = hosts.values().filter(|host| host.runs() && host.hostd().is_some()).collect();
        for (id, asked) in &mut self.open {
            if asked.under_way && now_ms > asked.asked_ms + PATIENCE_MS {
                // Its host may be gone; the answer, if it ever comes, is as good as another's.
                asked.under_way = false;
                asked.due_ms = now_ms;
            }
            if asked.under_way || now_ms < asked.due_ms {
                continue;
            }
            let Some(host) = dice.pick(&up) else { continue };
            let Some(hostd) = host.hostd() else { continue };
            if asked.tries == 0 {
                asked.asked_at = checker.fold.head.seq;
            }
            asked.tries += 1;
            asked.under_way = true;
            asked.asked_ms = now_ms;
            let request = Request { origin: host.id, ..asked.request.clone() };
            let (news, id, through) = (self.news.clone(), *id, host.id);
            host.spawn(async move {
                let outcome = hostd.node.propose(request).await;
                news.lock().unwrap_or_else(PoisonError::into_inner).push(News::Answered { id, through, outcome });
            });
        }
    }

    fn read(&self, hosts: &BTreeMap<HostId, Host>, dice: &mut Dice) {
        let up: Vec<&Host> = hosts.values().filter(|host| host.runs() && host.hostd().is_some()).collect();
        let Some(host) = dice.pick(&up) else { return };
        let Some(hostd) = host.hostd() else { return };
        let (news, acknowledged, host_id) = (self.news.clone(), self.acknowledged, host.id);
        host.spawn(async move {
            if let Ok(seen) = hostd.node.read_index().await {
                let read = News::Read { host: host_id, seen, acknowledged };
                news.lock().unwrap_or_else(PoisonError::into_inner).push(read);
            }
        });
    }

    fn hear(&mut self, checker: &mut Checker, trace: &Trace, now_ms: u64) {
        let news = std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner));
        for news in news {
            match news {
                News::Read { host, seen, acknowledged } => checker.read(host, seen, acknowledged),
                News::Answered { id, through, outcome } => self.answered(id, through, outcome, checker, trace, now_ms),
            }
        }
    }

    fn answered(
        &mut self,
        id: u64,
        through: HostId,
        outcome: Result<Answer, ProposeError>,
        checker: &mut Checker,
        trace: &Trace,
        now_ms: u64,
    ) {
        let Some(asked) = self.open.get_mut(&id) else { return };
        match outcome {
            Ok(answer) => {
                trace.note(now_ms, format_args!("{} is {}", key(&asked.request), answer.seq));
                // What changed nothing has no batch of its own.
                if asked.name.is_some() {
                    checker.acknowledged(key(&asked.request), answer.seq);
                }
                checker.answered(key(&asked.request), asked.asked_at, answer.seq);
                self.acknowledged = self.acknowledged.max(answer.seq);
                self.open.remove(&id);
            }
            Err(ProposeError::Rejected(why)) => {
                trace.note(now_ms, format_args!("{} is refused: {why}", key(&asked.request)));
                let request = Request { origin: through, ..asked.request.clone() };
                checker.refused(&request, asked.asked_at, &why);
                self.open.remove(&id);
            }
            Err(_) => {
                checker.coverage.add(Met::UnknownOutcomes, 1);
                asked.under_way = false;
                asked.due_ms = now_ms + RETRY_MS;
                if asked.tries >= GIVE_UP {
                    self.open.remove(&id);
                }
            }
        }
    }
}

//! The target's side: lets the host that a guest leaves reach the process that waits for it. The first connection is let in when that
//! process waits, the others when the first is here. Only when all are, the process is given what comes over them: it takes one stream,
//! and ends with it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::io;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use axum::extract::Path as UrlPath;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hyper::upgrade::OnUpgrade;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use statemachine::Fold;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::copy;
use tokio::io::sink;
use tokio::io::split;
use tokio::sync::mpsc;
use tokio::time::timeout;
use vmm_control::Call;

use super::Lane;
use super::MIGRATION_PROTOCOL;
use super::lanes::MAX_LANES;
use super::lanes::gather;
use crate::agent::vmm_client::VmmClient;
use crate::agent::vmm_client::raw_stream;
use crate::api::Asked;
use crate::api::Failure;
use crate::api::Params;
use crate::auth::Caller;

/// Between the first connection and the last: longer than the source tries.
const ALL_WITHIN: Duration = Duration::from_secs(90);

type Far = TokioIo<Upgraded>;

/// Guests whose first connection is here, and that wait for the others.
pub struct Arrivals<L = Far> {
    waiting: Mutex<HashMap<MigrationId, mpsc::Sender<(u16, L)>>>,
}

impl<L> Default for Arrivals<L> {
    fn default() -> Self {
        Arrivals { waiting: Mutex::default() }
    }
}

/// One of them; forgotten when this is dropped.
struct Arrival<L = Far> {
    arrivals: Arc<Arrivals<L>>,
    migration: MigrationId,
    of: u16,
    give: mpsc::Sender<(u16, L)>,
    take: mpsc::Receiver<(u16, L)>,
}

impl<L> Arrivals<L> {
    fn waiting(&self) -> MutexGuard<'_, HashMap<MigrationId, mpsc::Sender<(u16, L)>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first is here.
    fn expect(self: &Arc<Self>, migration: MigrationId, of: u16) -> Arrival<L> {
        let (give, take) = mpsc::channel(usize::from(MAX_LANES));
        self.waiting().insert(migration, give.clone());
        Arrival { arrivals: self.clone(), migration, of, give, take }
    }

    fn first(&self, migration: MigrationId) -> Option<mpsc::Sender<(u16, L)>> {
        self.waiting().get(&migration).cloned()
    }
}

impl<L> Arrival<L> {
    /// Waits for the others.
    async fn all(&mut self, first: L) -> io::Result<Vec<L>> {
        let mut lanes = BTreeMap::from([(0, first)]);
        while lanes.len() < usize::from(self.of) {
            let Some((nth, lane)) = self.take.recv().await else { return Err(ErrorKind::BrokenPipe.into()) };
            if nth == 0 || nth >= self.of {
                return Err(io::Error::other(format!("connection {nth} came, and there are {}", self.of)));
            }
            // One that comes again has not heard that it was let in.
            lanes.insert(nth, lane);
        }
        Ok(lanes.into_values().collect())
    }
}

impl<L> Drop for Arrival<L> {
    fn drop(&mut self) {
        let mut waiting = self.arrivals.waiting();
        // The next attempt may have begun.
        if waiting.get(&self.migration).is_some_and(|give| give.same_channel(&self.give)) {
            waiting.remove(&self.migration);
        }
    }
}

/// `GET /v1/vms/{vm}/migrations/{migration}?lane=N&of=N`, upgraded: the guest's stream, from the host that the log names.
pub async fn take_in(
    asked: Asked,
    UrlPath((vm, migration)): UrlPath<(VmId, MigrationId)>,
    Params(lane): Params<Lane>,
    mut request: Request,
) -> Result<Response, Failure> {
    let Asked { member, caller } = asked;
    may_send(&member.fold(), caller, member.own(), vm, migration)?;
    let Lane { lane, of } = lane;
    if of > MAX_LANES || lane >= of {
        let words = format!("connection {lane} of {of}: they are counted from 0, and {MAX_LANES} is the most");
        return Err(Problem::new(Code::BadRequest, words).into());
    }
    let not_yet = |why: &str| Problem::new(Code::Retry, format!("vm {vm} cannot be taken in yet: {why}"));
    let work = member.work().ok_or_else(|| not_yet("this host is starting"))?;
    let upgrade = hyper::upgrade::on(&mut request);
    let cancel = member.cancel().clone();
    if lane == 0 {
        let socket = work.agent.incoming_socket(vm, migration).ok_or_else(|| not_yet("no process waits for it"))?;
        VmmClient::connect(&socket).await.map_err(|error| not_yet(&error.to_string()))?;
        let arrival = work.arrivals.expect(migration, of);
        tokio::spawn(async move {
            let arrived = cancel.run_until_cancelled(arrive(upgrade, arrival, &socket));
            if let Some(Err(error)) = arrived.await {
                tracing::warn!(%vm, %migration, "the stream of a guest that comes here broke: {error}");
            }
        });
    } else {
        let first = work.arrivals.first(migration).ok_or_else(|| not_yet("its first connection is not here"))?;
        tokio::spawn(cancel.run_until_cancelled_owned(async move {
            match upgrade.await {
                // Its first connection may have ended meanwhile, and this ends with it.
                Ok(upgraded) => drop(first.send((lane, TokioIo::new(upgraded))).await),
                Err(error) => {
                    tracing::warn!(%vm, %migration, lane, "a connection of a guest that comes here broke: {error}")
                }
            }
        }));
    }
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, MIGRATION_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Only the host that the guest is leaving, for the migration that is under way.
fn may_send(fold: &Fold, caller: Caller, own: HostId, vm: VmId, migration: MigrationId) -> Result<(), Problem> {
    let Caller::Host(from) = caller else {
        let words = "guests come from other hosts, and from nobody else";
        return Err(Problem::new(Code::Forbidden, words).action(format!("`quorate vm migrate {vm}`")));
    };
    let moving = fold.state.moving(vm);
    match moving.filter(|moving| moving.id == migration && moving.to == own) {
        Some(moving) if moving.from == from => Ok(()),
        Some(_) => Err(Problem::new(Code::Forbidden, format!("vm {vm} does not come from host {from}"))),
        None if fold.head.seq < migration.into() => {
            Err(Problem::new(Code::Retry, format!("migration {migration} is not known here yet")))
        }
        None => Err(Problem::new(Code::NotRunning, format!("migration {migration} of vm {vm} is over"))),
    }
}

async fn arrive(upgrade: OnUpgrade, mut arrival: Arrival, socket: &Path) -> io::Result<()> {
    let first = TokioIo::new(upgrade.await.map_err(io::Error::other)?);
    let lanes = timeout(ALL_WITHIN, arrival.all(first)).await;
    let lanes = lanes.map_err(|_| io::Error::other("not all of its connections came"))??;
    drop(arrival);
    let guest = raw_stream(socket, Call::RestoreAttach).await.map_err(io::Error::other)?;
    hand_over(lanes, guest).await
}

/// From the source's connections to the process that waits, until that hangs up. What it answers is not for the source, which asks its
/// own; that it hangs up early is: the connections end with it.
async fn hand_over<L>(lanes: Vec<L>, guest: impl AsyncRead + AsyncWrite) -> io::Result<()>
where
    L: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut answers, mut out) = split(guest);
    let mut nowhere = sink();
    let mut said = Box::pin(copy(&mut answers, &mut nowhere));
    tokio::select! {
        biased;
        gathered = gather(lanes, &mut out) => gathered?,
        _ = &mut said => return Err(io::Error::other("its process takes no more")),
    }
    out.shutdown().await?;
    said.await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use statemachine::command::Command;
    use statemachine::state::GuestStatus;
    use statemachine::state::ReleaseClass;

    use tokio::io::AsyncReadExt;

    use super::super::lanes::spread;
    use super::*;
    use crate::test_site::Site;
    use crate::test_site::spec;

    const MIGRATION: MigrationId = MigrationId(7);

    /// Connections of the numbers `0` and `others`, of so many; what is waiting at the end too.
    fn arrived(of: u16, others: &[u16]) -> (Option<io::Result<Vec<u16>>>, usize) {
        let arrivals: Arc<Arrivals<u16>> = Arc::default();
        assert!(arrivals.first(MIGRATION).is_none(), "the first finds the process");
        let mut arrival = arrivals.expect(MIGRATION, of);
        for nth in others {
            arrivals.first(MIGRATION).unwrap().try_send((*nth, *nth)).unwrap();
        }
        let all = futures::FutureExt::now_or_never(arrival.all(0));
        // A second attempt is not forgotten with the first.
        let again = arrivals.expect(MIGRATION, of);
        drop(arrival);
        assert!(arrivals.first(MIGRATION).is_some());
        drop(again);
        let left = arrivals.waiting().len();
        (all, left)
    }

    #[test]
    fn a_guest_is_put_together_when_all_of_its_connections_are_here() {
        assert!(matches!(arrived(1, &[]), (Some(Ok(lanes)), 0) if lanes == [0]));
        assert!(matches!(arrived(3, &[2, 1]), (Some(Ok(lanes)), 0) if lanes == [0, 1, 2]));
        assert!(matches!(arrived(3, &[2]), (None, 0)));
        assert!(matches!(arrived(3, &[1, 1, 2]), (Some(Ok(lanes)), 0) if lanes == [0, 1, 2]));
        for others in [&[3][..], &[0]] {
            assert!(matches!(arrived(3, others), (Some(Err(_)), 0)), "{others:?}");
        }
    }

    #[tokio::test]
    async fn a_process_that_hangs_up_ends_the_connections() {
        let (mut source, lane) = tokio::io::duplex(64);
        let (process, guest) = tokio::io::duplex(64);
        drop(process);
        assert!(hand_over(vec![lane], guest).await.unwrap_err().to_string().contains("takes no more"));
        assert_eq!(source.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_process_has_all_the_time_that_it_needs_for_its_answer() {
        let (source, lane) = tokio::io::duplex(64);
        let (mut process, guest) = tokio::io::duplex(64);
        let takes = async {
            let mut came = Vec::new();
            process.read_to_end(&mut came).await.unwrap();
            process.write_all(b"loaded").await.unwrap();
            drop(process);
            came
        };
        let (handed, sent, came) =
            tokio::join!(hand_over(vec![lane], guest), spread(&b"a guest"[..], vec![source]), takes);
        handed.unwrap();
        sent.unwrap();
        assert_eq!(came, b"a guest");
    }

    #[test]
    fn only_the_host_that_a_guest_leaves_may_send_it_and_only_while_it_leaves() {
        let site = Site::with_hosts(3);
        let [from, to, third] = site.hosts[..] else { panic!("three hosts") };
        let vm = site.define("web", spec(ReleaseClass::Operator));
        site.start(vm, from);
        site.status(vm, from, GuestStatus::Up);
        let before = site.now();
        let migration: MigrationId = site.root(Command::VmMigrate { vm, host: Some(to) }).seq.into();
        let code = |fold: &Fold, caller, own| {
            may_send(fold, caller, own, vm, migration).map_err(|problem| problem.code().to_owned())
        };
        let now = site.now();
        assert_eq!(code(&now, Caller::Host(from), to), Ok(()));
        assert_eq!(code(&now, Caller::Host(third), to), Err(Code::Forbidden.as_str().to_owned()));
        assert_eq!(code(&now, Caller::Root, to), Err(Code::Forbidden.as_str().to_owned()));
        assert_eq!(code(&now, Caller::Host(from), third), Err(Code::NotRunning.as_str().to_owned()));
        assert_eq!(code(&before, Caller::Host(from), to), Err(Code::Retry.as_str().to_owned()), "it will hear of it");
        site.root(Command::VmCancelMigration { vm });
        assert_eq!(code(&site.now(), Caller::Host(from), to), Err(Code::NotRunning.as_str().to_owned()));
    }
}

//! How hostd talks to hostd on other hosts: small requests over the Raft transport ([`Router`]), and bulk over HTTPS on
//! tcp ([`PeerClients`]), so that a console never waits in the socket of heartbeats (DESIGN §4).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consensus::node::PeerHandler;
use consensus::pki::Identity;
use consensus::pki::server_name;
use consensus::transport::PeerKind;
use consensus::transport::Refusal;
use futures::FutureExt;
use futures::future::BoxFuture;
use hostd_api::Problem;
use hostd_api::problem::Code;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::Fold;
use statemachine::HostId;

/// Numbers of requests between hostds. Append-only; heartbeats have 0x0101, in `grants::wire`.
pub mod kind {
    use consensus::transport::PeerKind;

    /// A join that another host received; the leader decides and signs.
    pub const JOIN: PeerKind = PeerKind(0x0201);
    /// A new voter asks for the authority's key.
    pub const CA_KEY: PeerKind = PeerKind(0x0202);
}

/// One handler a kind; the node knows only this router.
#[derive(Default)]
pub struct Router {
    routes: BTreeMap<PeerKind, Arc<dyn PeerHandler>>,
}

impl Router {
    pub fn new() -> Router {
        Router::default()
    }

    pub fn route(mut self, kind: PeerKind, handler: Arc<dyn PeerHandler>) -> Router {
        self.routes.insert(kind, handler);
        self
    }
}

impl PeerHandler for Router {
    fn call(&self, from: HostId, kind: PeerKind, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        match self.routes.get(&kind) {
            Some(handler) => handler.call(from, kind, body),
            None => {
                let why = format!("request {:#06x} is unknown to this version; upgrade this host", kind.0);
                async move { Err(Refusal::new(why)) }.boxed()
            }
        }
    }
}

/// Largest JSON answer of a peer that is read.
const ANSWER_MAX: usize = 4 << 20;

/// HTTPS to other hosts, each proven by the name in its certificate.
#[derive(Clone)]
pub struct PeerClients {
    identity: Identity,
}

impl PeerClients {
    pub fn new(identity: Identity) -> PeerClients {
        PeerClients { identity }
    }

    pub async fn get_json<T: DeserializeOwned>(&self, fold: &Fold, host: HostId, path: &str) -> Result<T, Problem> {
        let (client, base) = self.client(fold, host)?;
        let failed = |error: reqwest::Error| unreachable_host(fold, host, &error);
        let response = client.get(format!("{base}{path}")).send().await.map_err(failed)?;
        json_of(fold, host, response).await
    }

    /// Asks once: what is asked may not be what can be done twice.
    pub async fn post_json<T: DeserializeOwned>(
        &self,
        fold: &Fold,
        host: HostId,
        path: &str,
        body: &impl Serialize,
        within: Duration,
    ) -> Result<T, Problem> {
        let (client, base) = self.client(fold, host)?;
        let request = client.post(format!("{base}{path}")).json(body).timeout(within);
        let response = request.send().await.map_err(|error| unreachable_host(fold, host, &error))?;
        json_of(fold, host, response).await
    }

    /// Opens a stream on another host: raw bytes after its 101.
    pub async fn upgraded(
        &self,
        fold: &Fold,
        host: HostId,
        path: &str,
        protocol: &str,
    ) -> Result<reqwest::Upgraded, Problem> {
        let (client, base) = self.client(fold, host)?;
        let failed = |error: reqwest::Error| unreachable_host(fold, host, &error);
        let request = client.get(format!("{base}{path}")).header("connection", "upgrade").header("upgrade", protocol);
        let response = request.send().await.map_err(failed)?;
        if response.status() != reqwest::StatusCode::SWITCHING_PROTOCOLS {
            return Err(problem_of(fold, host, response).await);
        }
        response.upgrade().await.map_err(failed)
    }

    fn client(&self, fold: &Fold, host: HostId) -> Result<(reqwest::Client, String), Problem> {
        let unknown = || Problem::new(Code::HostUnreachable, format!("the address of host {host} is not known here"));
        let known = fold.state.hosts.get(&host).ok_or_else(unknown)?;
        let address: SocketAddr = known.address.parse().map_err(|_| unknown())?;
        let broken = |error: String| Problem::new(Code::Internal, format!("a TLS client cannot be made: {error}"));
        let tls = self.identity.client_config(&[b"http/1.1"]).map_err(|error| broken(error.to_string()))?;
        let name = server_name(self.identity.site(), host);
        let client = reqwest::Client::builder()
            .use_preconfigured_tls(tls)
            .http1_only()
            .no_proxy()
            .resolve(&name, address)
            .connect_timeout(std::time::Duration::from_secs(2))
            .build()
            .map_err(|error| broken(error.to_string()))?;
        Ok((client, format!("https://{name}:{}", address.port())))
    }
}

fn unreachable_host(fold: &Fold, host: HostId, error: &reqwest::Error) -> Problem {
    let name = fold.state.hosts.get(&host).map_or_else(|| host.to_string(), |host| host.name.clone());
    let why = chain(error);
    if why.contains("received fatal alert") {
        let words = format!(
            "host {name} refuses the certificate of this host: it belongs to another cluster, or the certificate has expired"
        );
        return Problem::new(Code::HostUnreachable, words)
            .action("compare the sites in `quorate status` on both; join the one that is wrong with a new token");
    }
    let words = format!("host {name} does not answer: {why}");
    Problem::new(Code::HostUnreachable, words).action("try again when it is back; `quorate host list` shows it")
}

async fn json_of<T: DeserializeOwned>(fold: &Fold, host: HostId, response: reqwest::Response) -> Result<T, Problem> {
    if !response.status().is_success() {
        return Err(problem_of(fold, host, response).await);
    }
    if response.content_length().is_some_and(|length| length > ANSWER_MAX as u64) {
        let words = format!("host {host} answered with more than {ANSWER_MAX} bytes");
        return Err(Problem::new(Code::Internal, words));
    }
    response.json().await.map_err(|error| unreachable_host(fold, host, &error))
}

/// A peer's own problem, or words for an answer that is none.
async fn problem_of(fold: &Fold, host: HostId, response: reqwest::Response) -> Problem {
    let status = response.status();
    match response.json::<Problem>().await {
        Ok(problem) => problem,
        Err(_) => {
            let name = fold.state.hosts.get(&host).map_or_else(|| host.to_string(), |host| host.name.clone());
            Problem::new(Code::HostUnreachable, format!("host {name} answered {status} without saying why"))
        }
    }
}

/// An error with its causes in one line; reqwest's own words name only the URL.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !words.ends_with(&more) {
            words = format!("{words}: {more}");
        }
        cause = error.source();
    }
    words
}

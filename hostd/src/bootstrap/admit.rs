//! The site's side of a join: the leader spends the token, certifies the key, and answers.

use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use consensus::node::PeerHandler;
use consensus::pki::ClusterCa;
use consensus::pki::request_fingerprint;
use consensus::transport::PeerKind;
use consensus::transport::Refusal;
use futures::FutureExt;
use futures::future::BoxFuture;
use hostd_api::JoinToken;
use hostd_api::Problem;
use hostd_api::problem::Code;
use hostd_api::site::HostJoinAnswer;
use hostd_api::site::HostJoinRequest;
use hostd_api::site::Peer;
use hostd_api::token_text::TokenTextError;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Decision;
use statemachine::state::Created;

use crate::member::Member;
use crate::peer::chain;
use crate::peer::kind;

const LEADER_ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// Has the join decided where that is possible: here, or on the leader.
pub async fn ask_leader(member: &Arc<Member>, request: HostJoinRequest) -> Result<HostJoinAnswer, Problem> {
    check(member, &request)?;
    match member.raft().leader {
        Some(leader) if leader == member.own() => admit(member, request).await,
        Some(leader) => forward(member, leader, &request).await,
        None => Err(Problem::new(Code::NoLeader, "the site has no leader now, so nobody can join")
            .action("try again in a second")),
    }
}

async fn forward(member: &Member, leader: HostId, request: &HostJoinRequest) -> Result<HostJoinAnswer, Problem> {
    let internal = |error: serde_json::Error| Problem::new(Code::Internal, error.to_string());
    let body = serde_json::to_vec(request).map_err(internal)?;
    let called = member.node().peer_call(leader, kind::JOIN, Bytes::from(body), LEADER_ANSWERS_WITHIN).await;
    let answer = called.map_err(|error| Problem::new(Code::Retry, format!("the leader did not answer: {error}")))?;
    serde_json::from_slice::<Result<HostJoinAnswer, Problem>>(&answer).map_err(internal)?
}

/// Token of this site, and a signing request by the key that the candidate names. Costs the log nothing.
fn check(member: &Member, request: &HostJoinRequest) -> Result<JoinToken, Problem> {
    let bad = |words: String| Problem::new(Code::BadRequest, words);
    let token = JoinToken::from_text(request.token.expose()).map_err(|error| bad(error.to_string()))?;
    if token.site != member.site() {
        let error = TokenTextError::Foreign { theirs: token.site, ours: member.site() };
        return Err(Problem::new(Code::Forbidden, error.to_string()));
    }
    let key = request_fingerprint(&request.csr).map_err(|error| bad(chain(&error)))?;
    match key == request.candidate.public_key {
        true => Ok(token),
        false => Err(bad("the signing request is by another key than the candidate's".to_owned())),
    }
}

async fn admit(member: &Arc<Member>, request: HostJoinRequest) -> Result<HostJoinAnswer, Problem> {
    let token = check(member, &request)?;
    let command = Command::HostJoin { secret_hash: token.secret.hash(), candidate: request.candidate.clone() };
    // Whoever asks is nobody yet, and must not make the log work: what the rules refuse as of now goes no further.
    let asked = Request { actor: Actor::Joiner, origin: member.own(), idempotency: None, command: command.clone() };
    if let Decision::Rejected(why) = member.read_linearizable().await?.decide(&asked, member.now_ms()) {
        return Err(Problem::from(&why));
    }
    let ca = authority(member).await?;
    let answer = member.propose(Actor::Joiner, None, command).await?;
    let Some(Created::Host(host)) = answer.created else {
        return Err(Problem::new(Code::Internal, "the log answered without a host"));
    };
    let addresses: Vec<String> =
        request.candidate.address.parse::<std::net::SocketAddr>().map(|it| it.ip().to_string()).into_iter().collect();
    let issued = ca
        .sign_request(&request.csr, host, &addresses, member.now_ms())
        .map_err(|error| Problem::new(Code::BadRequest, chain(&error)))?;
    let command = Command::CertificateIssue {
        host,
        serial: issued.serial,
        fingerprint: issued.fingerprint,
        not_after_ms: issued.not_after_ms,
    };
    member.propose(Actor::Duty(member.own()), None, command).await?;
    tracing::info!(%host, name = request.candidate.name, "a host joined");
    let fold = member.fold();
    Ok(HostJoinAnswer {
        site: member.site(),
        site_name: fold.state.site.as_ref().map(|site| site.name.clone()).unwrap_or_default(),
        host,
        certificate: issued.certificate_pem,
        ca_certificate: ca.certificate_pem().to_owned(),
        peers: peers(&fold, host),
    })
}

/// The key is asked for before the token is spent: a join that cannot be certified must not begin.
async fn authority(member: &Member) -> Result<ClusterCa, Problem> {
    let broken = |error| Problem::new(Code::Internal, chain(&error));
    if let Some(ca) = member.authority().load().map_err(broken)? {
        return Ok(ca);
    }
    member.authority().fetch().await.map_err(broken)?.ok_or_else(|| {
        let problem = Problem::new(Code::Retry, "the leader does not have the authority's key yet");
        problem.action("try again in a few seconds; if it stays so, restore identity/ca.key on a voter")
    })
}

fn peers(fold: &Fold, joined: HostId) -> Vec<Peer> {
    let others = fold.state.hosts.iter().filter(|(id, _)| **id != joined);
    others.map(|(id, host)| Peer { host: *id, name: host.name.clone(), address: host.address.clone() }).collect()
}

/// Joins that other hosts received.
pub struct JoinHandler(pub Weak<Member>);

impl PeerHandler for JoinHandler {
    fn call(&self, _: HostId, _: PeerKind, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let member = self.0.clone();
        async move {
            let member = member.upgrade().ok_or_else(|| Refusal::new("this host is stopping"))?;
            let request: HostJoinRequest = serde_json::from_slice(&body).map_err(|_| Refusal::new("not a join"))?;
            // Decided here or not at all, so a join cannot circle between hosts that disagree about the leader.
            let answer = match member.raft().leader == Some(member.own()) {
                true => admit(&member, request).await,
                false => Err(Problem::new(Code::Retry, "the leader changed while the join was on its way")),
            };
            serde_json::to_vec(&answer).map(Bytes::from).map_err(Refusal::new)
        }
        .boxed()
    }
}

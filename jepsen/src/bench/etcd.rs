//! A cluster of three etcd, driven by its gRPC API over TLS. The few messages that are needed of it are written down
//! here by their numbers; a protocol compiler for these would be one more program to install.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use anyhow::bail;
use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::IsCa;
use rcgen::Issuer;
use rcgen::KeyPair;
use tokio::sync::mpsc;
use tonic::client::Grpc;
use tonic::codec::ProstCodec;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Certificate;
use tonic::transport::Channel;
use tonic::transport::ClientTlsConfig;
use tonic::transport::Endpoint;

use super::process::Process;
use super::site::MEMBERS;
use super::site::SUBJECTS;
use super::site::WATCH_AHEAD;

const PROGRAM: &str = "/usr/bin/etcd";
const READY_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// HTTP/2 carries many requests on one connection; so many of them keep one from being the limit.
const CONNECTIONS: usize = 4;

/// `etcdserverpb.PutRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `etcdserverpb.RangeRequest`: one key, linearizable unless it is told otherwise.
#[derive(Clone, PartialEq, prost::Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

/// Any answer of which nothing is read.
#[derive(Clone, PartialEq, prost::Message)]
struct Unread {}

/// `etcdserverpb.StatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

/// `etcdserverpb.StatusResponse`: header.member_id is 1.2, leader is 4.
#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// `etcdserverpb.WatchRequest`, of the kind that begins a watch.
#[derive(Clone, PartialEq, prost::Message)]
struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create_request: Option<WatchCreateRequest>,
}

/// `etcdserverpb.WatchCreateRequest`: all keys from one to before another.
#[derive(Clone, PartialEq, prost::Message)]
struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
}

/// `etcdserverpb.WatchResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct WatchResponse {
    #[prost(message, repeated, tag = "11")]
    events: Vec<WatchEvent>,
}

/// `mvccpb.Event`.
#[derive(Clone, PartialEq, prost::Message)]
struct WatchEvent {
    #[prost(message, optional, tag = "2")]
    kv: Option<KeyValue>,
}

/// `mvccpb.KeyValue`.
#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

/// `etcdserverpb.ResponseHeader`.
#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

pub struct Etcd {
    pub members: Vec<Process>,
    dir: PathBuf,
    /// [member][connection]
    channels: Vec<Vec<Channel>>,
    /// By member.
    endpoints: Vec<Endpoint>,
}

fn key(client: usize) -> Vec<u8> {
    format!("vm{}", client % SUBJECTS).into_bytes()
}

fn client_url(member: usize) -> String {
    format!("https://127.0.0.{}:12379", member + 1)
}

fn peer_url(member: usize) -> String {
    format!("https://127.0.0.{}:12380", member + 1)
}

/// One authority and one certificate for all: who is who is not what is measured.
fn make_certificates(dir: &Path) -> anyhow::Result<String> {
    let mut authority = CertificateParams::new(Vec::<String>::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let names = (1..=MEMBERS).map(|number| format!("127.0.0.{number}"));
    let key = KeyPair::generate()?;
    let issued =
        CertificateParams::new(names.collect::<Vec<_>>())?.signed_by(&key, &Issuer::new(authority, authority_key))?;
    std::fs::write(dir.join("ca.pem"), &authority_pem)?;
    std::fs::write(dir.join("member.pem"), issued.pem())?;
    std::fs::write(dir.join("member.key"), key.serialize_pem())?;
    Ok(authority_pem)
}

fn start_member(dir: &Path, member: usize) -> anyhow::Result<Process> {
    let all: Vec<String> = (0..MEMBERS).map(|member| format!("m{member}={}", peer_url(member))).collect();
    let mut command = Command::new(PROGRAM);
    command.args(["--name", &format!("m{member}"), "--initial-cluster", &all.join(",")]);
    // Quorate's: a heartbeat each 100 ms, elections within 0.6 to 1.2 s of the last one. etcd doubles its time-out at random.
    command.args(["--heartbeat-interval", "100", "--election-timeout", "600"]);
    command.args(["--initial-cluster-state", "new", "--initial-cluster-token", "bench", "--logger", "zap"]);
    command.args(["--listen-client-urls", &client_url(member), "--advertise-client-urls", &client_url(member)]);
    command.args(["--listen-peer-urls", &peer_url(member), "--initial-advertise-peer-urls", &peer_url(member)]);
    command.arg("--data-dir").arg(dir.join(format!("data{member}")));
    for (certificate, key) in [("--cert-file", "--key-file"), ("--peer-cert-file", "--peer-key-file")] {
        command.arg(certificate).arg(dir.join("member.pem")).arg(key).arg(dir.join("member.key"));
    }
    command.arg("--peer-trusted-ca-file").arg(dir.join("ca.pem")).arg("--peer-client-cert-auth");
    Process::start(command, &dir.join(format!("m{member}.log")))
}

/// One question and its answer.
async fn ask<Q, A>(channel: &Channel, path: &'static str, question: Q) -> anyhow::Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await?;
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    let answer = grpc.unary(tonic::Request::new(question), PathAndQuery::from_static(path), codec).await?;
    Ok(answer.into_inner())
}

impl Etcd {
    pub async fn start(dir: &Path) -> anyhow::Result<Etcd> {
        if !Path::new(PROGRAM).exists() {
            bail!("{PROGRAM} is not here: apt-get install etcd-server");
        }
        let authority = make_certificates(dir)?;
        let members = (0..MEMBERS).map(|member| start_member(dir, member)).collect::<anyhow::Result<Vec<_>>>()?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority));
        let (mut channels, mut endpoints) = (Vec::new(), Vec::new());
        for member in 0..MEMBERS {
            let endpoint = Endpoint::from_shared(client_url(member))?.tls_config(tls.clone())?.timeout(ANSWER_WITHIN);
            channels.push((0..CONNECTIONS).map(|_| endpoint.connect_lazy()).collect());
            // A watch lasts; a time-out is for questions.
            endpoints.push(Endpoint::from_shared(client_url(member))?.tls_config(tls.clone())?);
        }
        let site = Etcd { members, dir: dir.to_owned(), channels, endpoints };
        let deadline = tokio::time::Instant::now() + READY_WITHIN;
        while site.commit(0, "first").await.is_err() {
            if tokio::time::Instant::now() > deadline {
                bail!("etcd takes no commit; see the logs in {}", dir.display());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for subject in 0..SUBJECTS {
            site.commit(subject, &"x".repeat(256)).await?;
        }
        Ok(site)
    }

    fn channel(&self, client: usize) -> anyhow::Result<&Channel> {
        let member = &self.channels[client % MEMBERS];
        member.get((client / MEMBERS) % CONNECTIONS).context("no such connection")
    }

    pub async fn commit(&self, client: usize, words: &str) -> anyhow::Result<()> {
        let put = PutRequest { key: key(client), value: words.as_bytes().to_vec() };
        ask::<_, Unread>(self.channel(client)?, "/etcdserverpb.KV/Put", put).await?;
        Ok(())
    }

    pub async fn read(&self, client: usize) -> anyhow::Result<()> {
        let range = RangeRequest { key: key(client) };
        ask::<_, Unread>(self.channel(client)?, "/etcdserverpb.KV/Range", range).await?;
        Ok(())
    }

    pub async fn watch(&self, watcher: usize) -> anyhow::Result<mpsc::Receiver<String>> {
        let create = WatchCreateRequest { key: b"vm".to_vec(), range_end: b"vn".to_vec() };
        let asked = futures::stream::once(async { WatchRequest { create_request: Some(create) } });
        // The question stays open as long as the stream is wanted.
        let asked = futures::StreamExt::chain(asked, futures::stream::pending());
        // A connection of its own, as each of Quorate's watchers has one.
        let endpoint = self.endpoints.get(watcher % MEMBERS).context("no such member")?;
        let mut grpc = Grpc::new(endpoint.connect().await?);
        grpc.ready().await?;
        let codec: ProstCodec<WatchRequest, WatchResponse> = ProstCodec::default();
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let mut answers = grpc.streaming(tonic::Request::new(asked), path, codec).await?.into_inner();
        answers.message().await?.context("the watch ended at once")?;
        let (sender, receiver) = mpsc::channel(WATCH_AHEAD);
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                for pair in answer.events.into_iter().filter_map(|event| event.kv) {
                    if sender.send(String::from_utf8_lossy(&pair.value).into_owned()).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(receiver)
    }

    pub async fn leader(&self) -> anyhow::Result<usize> {
        let mut ids = [None; MEMBERS];
        let mut leader = None;
        for (member, id) in ids.iter_mut().enumerate() {
            let asked = ask::<_, StatusResponse>(
                &self.channels[member][0],
                "/etcdserverpb.Maintenance/Status",
                StatusRequest {},
            );
            let Ok(Ok(status)) = tokio::time::timeout(Duration::from_secs(1), asked).await else { continue };
            *id = status.header.map(|header| header.member_id);
            leader = leader.or((status.leader != 0).then_some(status.leader));
        }
        let found = ids.iter().position(|id| id.is_some() && *id == leader);
        found.context("no member names a leader that answers")
    }

    pub async fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        self.members[member] = start_member(&self.dir, member)?;
        let deadline = tokio::time::Instant::now() + READY_WITHIN;
        while self.commit(member, "again").await.is_err() {
            if tokio::time::Instant::now() > deadline {
                bail!("member {member} takes no commit; see the logs in {}", self.dir.display());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

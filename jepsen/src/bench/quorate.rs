//! A site of three hostd, driven by its API over TLS as any client would.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use anyhow::bail;
use hostd_api::IDEMPOTENCY_KEY_HEADER;
use hostd_api::event::EventsQuery;
use hostd_api::event::StartFrom;
use hostd_api::site::InitRequest;
use hostd_api::site::JoinRequest;
use hostd_api::spec::VmSpecBody;
use hostd_api::token::TokenCreate;
use hostd_api::vm::VmCreate;
use reqwest::Certificate;
use serde_json::json;
use statemachine::state::RunStrategy;
use statemachine::state::TokenPurpose;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tools::client::Client;
use tools::client::Options;
use tools::client::events::StreamItem;
use uuid::Uuid;

use super::process::Process;
use super::site::MEMBERS;
use super::site::SUBJECTS;
use super::site::WATCH_AHEAD;

/// Index of a host that joins later.
pub const NEWCOMER: usize = MEMBERS;
const READY_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const DAY_MS: u64 = 24 * 3_600_000;

pub struct Quorate {
    pub members: Vec<Process>,
    dir: PathBuf,
    http: reqwest::Client,
    token: String,
}

fn url(member: usize) -> String {
    format!("https://127.0.0.{}:17443", member + 1)
}

fn start_member(dir: &Path, member: usize) -> anyhow::Result<Process> {
    let program = std::env::current_exe().context("find this program")?.with_file_name("hostd");
    let mut command = Command::new(program);
    command.arg("--config").arg(dir.join(format!("host{}.toml", member + 1)));
    Process::start(command, &dir.join(format!("host{}.log", member + 1)))
}

fn write_config(dir: &Path, member: usize) -> anyhow::Result<()> {
    let number = member + 1;
    let toml = format!(
        "name = \"host{number}\"\naddress = \"127.0.0.{number}:17443\"\ndata_dir = \"{dir}/data{number}\"\n\
         run_dir = \"{dir}/run{number}\"\nallowed_paths = [\"/srv\"]\n",
        dir = dir.display(),
    );
    Ok(std::fs::write(dir.join(format!("host{number}.toml")), toml)?)
}

/// Starts a member and waits until it answers.
async fn answering_member(dir: &Path, member: usize) -> anyhow::Result<(Process, Client)> {
    let (process, client) = (start_member(dir, member)?, client(dir, member)?);
    until("hostd answers", async || client.status().await.is_ok()).await?;
    Ok((process, client))
}

fn client(dir: &Path, member: usize) -> anyhow::Result<Client> {
    Ok(Client::new(&Options::Socket(dir.join(format!("run{}/hostd.sock", member + 1))))?)
}

/// Looks again until it is so.
async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + READY_WITHIN;
    while !so().await {
        if tokio::time::Instant::now() > deadline {
            bail!("{what}: not within {} s; see the logs beside the data", READY_WITHIN.as_secs());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

impl Quorate {
    pub async fn start(dir: &Path) -> anyhow::Result<Quorate> {
        let mut members = Vec::new();
        for member in 0..MEMBERS {
            write_config(dir, member)?;
            members.push(answering_member(dir, member).await?.0);
        }
        let first = client(dir, 0)?;
        first.init(&InitRequest { name: "bench".to_owned() }).await?;
        for member in 1..MEMBERS {
            let asked = TokenCreate { purpose: TokenPurpose::Join, ttl_ms: DAY_MS, note: String::new() };
            let token = first.token_create(&asked).await?.token;
            client(dir, member)?.join(&JoinRequest { token }).await?;
        }
        let voters = async || {
            let status = first.status().await.ok().and_then(|status| status.member);
            status.is_some_and(|member| member.voters.len() == MEMBERS)
        };
        until("all hosts vote", voters).await?;
        for subject in 0..SUBJECTS {
            let spec = VmSpecBody {
                kernel: Some("/srv/vmlinuz".to_owned()),
                memory_mib: Some(64),
                vcpus: Some(1),
                ..VmSpecBody::default()
            };
            let name = format!("vm{subject}");
            first.vm_create(&VmCreate { name, cluster: None, run_strategy: RunStrategy::Halted, spec }).await?;
        }
        let asked = TokenCreate { purpose: TokenPurpose::Admin, ttl_ms: DAY_MS, note: String::new() };
        let token = first.token_create(&asked).await?.token.expose().to_owned();
        std::fs::write(dir.join("token"), &token)?;
        let ca = std::fs::read(dir.join("data1/identity/ca.pem")).context("read the CA")?;
        let builder = reqwest::Client::builder().tls_built_in_root_certs(false).no_proxy();
        let http =
            builder.timeout(Duration::from_secs(10)).add_root_certificate(Certificate::from_pem(&ca)?).build()?;
        Ok(Quorate { members, dir: dir.to_owned(), http, token })
    }

    pub async fn commit(&self, client: usize, words: &str) -> anyhow::Result<()> {
        let (member, subject) = (client % MEMBERS, client % SUBJECTS);
        let asked = self
            .http
            .patch(format!("{}/v1/vms/vm{subject}", url(member)))
            .bearer_auth(&self.token)
            .header(IDEMPOTENCY_KEY_HEADER, Uuid::new_v4().to_string())
            .json(&json!({"spec": {"cmdline": words}}));
        let answer = asked.send().await?;
        if !answer.status().is_success() {
            bail!("{}: {}", answer.status(), answer.text().await?);
        }
        answer.bytes().await?;
        Ok(())
    }

    pub async fn read(&self, client: usize) -> anyhow::Result<()> {
        let (member, subject) = (client % MEMBERS, client % SUBJECTS);
        let asked = self.http.get(format!("{}/v1/vms/vm{subject}?consistency=linearizable", url(member)));
        let answer = asked.bearer_auth(&self.token).send().await?;
        if !answer.status().is_success() {
            bail!("{}: {}", answer.status(), answer.text().await?);
        }
        answer.bytes().await?;
        Ok(())
    }

    pub async fn watch(&self, watcher: usize) -> anyhow::Result<mpsc::Receiver<String>> {
        let client = Client::new(&Options::Servers {
            urls: vec![url(watcher % MEMBERS)],
            ca_file: self.dir.join("data1/identity/ca.pem"),
            token_file: self.dir.join("token"),
        })?;
        let query = EventsQuery {
            from: Some(StartFrom::Now),
            kind: Some("VmSpecChanged".to_owned()),
            follow: Some(true),
            ..EventsQuery::default()
        };
        let (sender, receiver) = mpsc::channel(WATCH_AHEAD);
        let (opened, is_open) = oneshot::channel();
        tokio::spawn(async move {
            let mut stream = match client.events(query).await {
                Ok(stream) => {
                    let _ = opened.send(Ok(()));
                    stream
                }
                Err(error) => return drop(opened.send(Err(error))),
            };
            while let Ok(Some(item)) = stream.next().await {
                let StreamItem::Event(event) = item else { continue };
                let words = event.data["spec"]["cmdline"].as_str().unwrap_or_default();
                if sender.send(words.to_owned()).await.is_err() {
                    return;
                }
            }
        });
        is_open.await.context("the watcher ended")??;
        Ok(receiver)
    }

    pub async fn leader(&self) -> anyhow::Result<usize> {
        for member in 0..MEMBERS {
            let Ok(status) = client(&self.dir, member)?.status().await else { continue };
            let name = status.member.and_then(|member| member.leader_name);
            let number = name.as_deref().and_then(|name| name.strip_prefix("host")).and_then(|it| it.parse().ok());
            if let Some(number) = number.filter(|number: &usize| (1..=MEMBERS).contains(number)) {
                return Ok(number - 1);
            }
        }
        bail!("no member names a leader")
    }

    /// A fourth host, up to its place in the site; it catches up afterwards.
    pub async fn add_newcomer(&mut self) -> anyhow::Result<()> {
        write_config(&self.dir, NEWCOMER)?;
        let (process, newcomer) = answering_member(&self.dir, NEWCOMER).await?;
        self.members.push(process);
        let asked = TokenCreate { purpose: TokenPurpose::Join, ttl_ms: DAY_MS, note: String::new() };
        let token = client(&self.dir, 0)?.token_create(&asked).await?.token;
        newcomer.join(&JoinRequest { token }).await?;
        Ok(())
    }

    /// The seq up to which a member has applied the log.
    pub async fn applied(&self, member: usize) -> anyhow::Result<u64> {
        let status = client(&self.dir, member)?.status().await?;
        Ok(status.member.map_or(0, |member| member.applied_seq.0))
    }

    pub async fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        self.members[member] = start_member(&self.dir, member)?;
        let client = client(&self.dir, member)?;
        let answers = async || {
            let status = client.status().await.ok().and_then(|status| status.member);
            status.is_some_and(|member| member.leader.is_some())
        };
        until("hostd answers", answers).await
    }
}

//! A client of the cluster beside the hosts, in the lab's network: it writes through every host without pause and
//! prints each answered commit: when, by the lab's clock, its seq, and what it wrote. `lab probe` is the process; [`Probe`] is its reader.

use std::io::BufRead;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::Child;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use hostd_api::IDEMPOTENCY_KEY_HEADER;
use hostd_api::write::WriteAnswer;
use reqwest::Certificate;
use serde_json::json;
use uuid::Uuid;

use super::guest::KERNEL;
use super::stage::Stage;
use crate::clock;
use crate::net;
use crate::state::HostId;
use crate::state::LabState;

/// An attempt that takes longer is given up; the next one asks again. On slow links it has this many crossings more.
const ATTEMPT_MS: u64 = 400;
const CROSSINGS: u64 = 10;
/// Between two attempts through one host.
const PAUSE: Duration = Duration::from_millis(10);
/// The VM whose definition is changed to make commits.
const SUBJECT: &str = "probe";

#[derive(Debug, clap::Args)]
pub struct ProbeOptions {
    /// Hosts to write through, as `https://10.77.0.1:7443`.
    #[arg(long = "server", required = true)]
    servers: Vec<String>,
    #[arg(long)]
    ca: PathBuf,
    #[arg(long)]
    token_file: PathBuf,
    #[arg(long)]
    attempt_ms: u64,
}

/// The process: one task a host, each printing the clock at every answered commit.
pub async fn run(options: ProbeOptions) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let pem = std::fs::read(&options.ca).context("read the CA")?;
    let token = std::fs::read_to_string(&options.token_file).context("read the token")?;
    let builder = reqwest::Client::builder()
        .tls_built_in_root_certs(false)
        .no_proxy()
        .timeout(Duration::from_millis(options.attempt_ms));
    let http = builder.add_root_certificate(Certificate::from_pem(&pem)?).build()?;
    // No two processes write the same words: what changes nothing has no batch.
    let run = clock::now_ns();
    let tasks = options.servers.into_iter().map(|server| {
        let (http, token) = (http.clone(), token.trim().to_owned());
        tokio::spawn(async move {
            for n in 0u64.. {
                let wrote = format!("n={n} run={run} by={server}");
                let attempt = http
                    .patch(format!("{server}/v1/vms/{SUBJECT}"))
                    .bearer_auth(&token)
                    .header(IDEMPOTENCY_KEY_HEADER, Uuid::new_v4().to_string())
                    .json(&json!({"spec": {"cmdline": wrote}}));
                if let Some(answer) = attempt.send().await.ok().filter(|answer| answer.status().is_success())
                    && let Ok(WriteAnswer { seq, .. }) = answer.json().await
                {
                    println!("{} {seq} {wrote}", clock::now_ns());
                }
                tokio::time::sleep(PAUSE).await;
            }
        })
    });
    futures::future::join_all(tasks).await;
    Ok(())
}

/// A commit that was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub t_ns: u64,
    pub seq: u64,
    pub wrote: String,
}

impl Commit {
    fn parse(line: &str) -> Option<Commit> {
        let mut words = line.trim().splitn(3, ' ');
        let (t_ns, seq) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Commit { t_ns, seq, wrote: words.next()?.to_owned() })
    }
}

/// A running probe, ended when dropped.
pub struct Probe {
    child: Child,
    commits: Arc<Mutex<Vec<Commit>>>,
    reader: Option<JoinHandle<()>>,
}

/// What a probe needs to be let in.
pub struct Access {
    ca_file: PathBuf,
    token_file: PathBuf,
}

impl Access {
    /// Defines the subject and gets a token.
    pub async fn make(stage: &Stage) -> Result<Access> {
        let first = HostId(1);
        let define = ["vm", "create", SUBJECT, "--vcpus", "1", "--memory", "64MiB", "--kernel", KERNEL];
        stage.quorate(first, &define).await?;
        let said = stage.query(first, &["token", "create", "--purpose", "admin", "--ttl", "3h"]).await?;
        let token = said["token"].as_str().context("no token was printed")?;
        let ca = stage.sh(first, "cat /var/lib/quorate/identity/ca.pem").await?;
        let (ca_file, token_file) = (stage.dir.root().join("probe-ca.pem"), stage.dir.root().join("probe-token"));
        std::fs::write(&ca_file, ca).context("keep the CA")?;
        std::fs::write(&token_file, token).context("keep the token")?;
        Ok(Access { ca_file, token_file })
    }

    /// Starts writing through all hosts.
    pub fn probe(&self, stage: &Stage) -> Result<Probe> {
        let Access { ca_file, token_file } = self;
        let state = LabState::load(&stage.dir)?.context("the lab is up")?;
        let program = std::env::current_exe().context("find this program")?;
        let mut command = net::inside(&state.config.netns, &program.display().to_string());
        let delay_ms = state.hosts.iter().map(|host| u64::from(host.link.delay_ms)).max().unwrap_or(0);
        let attempt_ms = ATTEMPT_MS + CROSSINGS * delay_ms;
        command
            .arg("probe")
            .arg("--attempt-ms")
            .arg(attempt_ms.to_string())
            .arg("--ca")
            .arg(ca_file)
            .arg("--token-file")
            .arg(token_file);
        for host in stage.hosts() {
            command.arg("--server").arg(format!("https://{}:7443", host.address()));
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start the probe")?;
        let output = child.stdout.take().context("no pipe from the probe")?;
        let commits = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&commits);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let (Some(commit), Ok(mut seen)) = (Commit::parse(&line), seen.lock()) {
                    seen.push(commit);
                }
            }
        });
        Ok(Probe { child, commits, reader: Some(reader) })
    }
}

impl Probe {
    pub async fn start(stage: &Stage) -> Result<Probe> {
        Access::make(stage).await?.probe(stage)
    }

    /// First commit that was answered after `t_ns`. Answers are printed as they come, so they are in order of time
    /// up to the scheduling of this machine; the smallest counts.
    pub fn first_after(&self, t_ns: u64) -> Option<u64> {
        let seen = self.commits.lock().ok()?;
        seen.iter().map(|commit| commit.t_ns).filter(|commit_ns| *commit_ns > t_ns).min()
    }

    /// The longest time without an answer between two moments.
    pub fn largest_gap_ns(&self, from_ns: u64, to_ns: u64) -> u64 {
        let mut moments = vec![from_ns, to_ns];
        if let Ok(seen) = self.commits.lock() {
            moments.extend(seen.iter().map(|commit| commit.t_ns).filter(|t_ns| (from_ns..to_ns).contains(t_ns)));
        }
        moments.sort_unstable();
        moments.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    pub fn commits(&self) -> usize {
        self.commits.lock().map_or(0, |seen| seen.len())
    }

    /// Ends it; everything that it was told.
    pub fn end(mut self) -> Vec<Commit> {
        let _ = self.child.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.commits.lock().map(|mut seen| std::mem::take(&mut *seen)).unwrap_or_default()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

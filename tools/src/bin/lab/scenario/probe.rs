//! A client of the cluster beside the hosts, in the lab's network: it writes through every host without pause and
//! prints when each commit was answered, by the lab's clock. `lab probe` is the process; [`Probe`] is its reader.

use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use hostd_api::IDEMPOTENCY_KEY_HEADER;
use reqwest::Certificate;
use serde_json::json;
use uuid::Uuid;

use super::guest::KERNEL;
use super::stage::Stage;
use crate::clock;
use crate::net;
use crate::state::HostId;
use crate::state::LabState;

/// An attempt that takes longer is given up; the next one asks again.
const ATTEMPT: Duration = Duration::from_millis(400);
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
}

/// The process: one task a host, each printing the clock at every answered commit.
pub async fn run(options: ProbeOptions) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let pem = std::fs::read(&options.ca).context("read the CA")?;
    let token = std::fs::read_to_string(&options.token_file).context("read the token")?;
    let builder = reqwest::Client::builder().tls_built_in_root_certs(false).no_proxy().timeout(ATTEMPT);
    let http = builder.add_root_certificate(Certificate::from_pem(&pem)?).build()?;
    let tasks = options.servers.into_iter().map(|server| {
        let (http, token) = (http.clone(), token.trim().to_owned());
        tokio::spawn(async move {
            for n in 0u64.. {
                let attempt = http
                    .patch(format!("{server}/v1/vms/{SUBJECT}"))
                    .bearer_auth(&token)
                    .header(IDEMPOTENCY_KEY_HEADER, Uuid::new_v4().to_string())
                    .json(&json!({"spec": {"cmdline": format!("n={n} by={server}")}}));
                if attempt.send().await.is_ok_and(|answer| answer.status().is_success()) {
                    println!("{}", clock::now_ns());
                }
                tokio::time::sleep(PAUSE).await;
            }
        })
    });
    futures::future::join_all(tasks).await;
    Ok(())
}

/// A running probe, ended when dropped.
pub struct Probe {
    child: Child,
    commits_ns: Arc<Mutex<Vec<u64>>>,
}

impl Probe {
    /// Defines the subject, gets a token, and starts writing through all hosts.
    pub async fn start(stage: &Stage) -> Result<Probe> {
        let first = HostId(1);
        let define = ["vm", "create", SUBJECT, "--vcpus", "1", "--memory", "64MiB", "--kernel", KERNEL];
        stage.quorate(first, &define).await?;
        let said = stage.query(first, &["token", "create", "--purpose", "admin", "--ttl", "3h"]).await?;
        let token = said["token"].as_str().context("no token was printed")?;
        let ca = stage.sh(first, "cat /var/lib/quorate/identity/ca.pem").await?;
        let (ca_file, token_file) = (stage.dir.root().join("probe-ca.pem"), stage.dir.root().join("probe-token"));
        std::fs::write(&ca_file, ca).context("keep the CA")?;
        std::fs::write(&token_file, token).context("keep the token")?;
        Probe::spawn(stage, &ca_file, &token_file)
    }

    fn spawn(stage: &Stage, ca_file: &Path, token_file: &Path) -> Result<Probe> {
        let state = LabState::load(&stage.dir)?.context("the lab is up")?;
        let program = std::env::current_exe().context("find this program")?;
        let mut command = net::inside(&state.config.netns, &program.display().to_string());
        command.arg("probe").arg("--ca").arg(ca_file).arg("--token-file").arg(token_file);
        for host in stage.hosts() {
            command.arg("--server").arg(format!("https://{}:7443", host.address()));
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start the probe")?;
        let output = child.stdout.take().context("no pipe from the probe")?;
        let commits_ns = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&commits_ns);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let (Ok(t_ns), Ok(mut seen)) = (line.trim().parse(), seen.lock()) {
                    seen.push(t_ns);
                }
            }
        });
        Ok(Probe { child, commits_ns })
    }

    /// First commit that was answered after `t_ns`. Answers are printed as they come, so they are in order of time
    /// up to the scheduling of this machine; the smallest counts.
    pub fn first_after(&self, t_ns: u64) -> Option<u64> {
        let seen = self.commits_ns.lock().ok()?;
        seen.iter().copied().filter(|commit| *commit > t_ns).min()
    }

    pub fn commits(&self) -> usize {
        self.commits_ns.lock().map_or(0, |seen| seen.len())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

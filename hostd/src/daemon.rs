//! The process: from a configuration to a host that serves, and from a bare machine to a member of a site.
//!
//! A hostd is in one of two phases. *Uninitialised*, it serves root's Unix socket alone, and waits for `init` or `join`.
//! As a *member* it runs the node, the agent and the leader's duties, and serves the API over TLS besides. The phase is
//! what the identity directory says, so it survives every restart. Start at [`run`].

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use consensus::pki::Clients;
use consensus::pki::Identity;
use consensus::pki::identity::CERTIFICATE_FILE;
use consensus::recover;
use hostd_api::Problem;
use hostd_api::SecretText;
use hostd_api::problem::Code;
use statemachine::Seq;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::fold::Decision;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::sync::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::bootstrap::BootstrapError;
use crate::bootstrap::init;
use crate::bootstrap::join;
use crate::config::Config;
use crate::member::Member;
use crate::member::now_ms;
use crate::metrics::Metrics;
use crate::notify;
use crate::serve;

/// Stopping ends here, whatever hangs: the guests' leases run on (DESIGN §14, restart below 8 s).
const STOP_WITHIN: Duration = Duration::from_millis(1500);
/// A new host hears of its own join from the leader within this.
const HEARD_WITHIN: Duration = Duration::from_secs(20);

const PORT_WITHIN: Duration = Duration::from_secs(3);

pub struct Daemon {
    config: Arc<Config>,
    member: watch::Sender<Option<Arc<Member>>>,
    /// One change of phase at a time.
    changing: Mutex<()>,
    cancel: CancellationToken,
    own_uid: u32,
}

/// Runs until SIGTERM or SIGINT. Guests are left running.
pub async fn run(config: Config) -> anyhow::Result<()> {
    for directory in [&config.data_dir, &config.run_dir] {
        make_private_dir(directory)?;
    }
    make_private_dir(&config.vms_run_dir())?;
    let _lock = lock(&config.data_dir)?;
    let socket = serve::bind_unix(&config.socket_path())?;
    let cancel = CancellationToken::new();
    let daemon = Daemon::new(config, cancel.clone());
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    // The socket answers while the node starts: `status` is never silent.
    let router = api::router(api::Api::new(daemon.clone()));
    tokio::spawn(serve::unix(socket, router, cancel.clone()));
    let started = tokio::select! {
        resumed = daemon.resume() => resumed,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    started.context("this host cannot go on as a member of its site")?;
    match daemon.member() {
        Some(member) => notify::ready(&format!("host {} of site {}", member.own(), member.site())),
        None => {
            tracing::info!("this host belongs to no site yet; run `quorate init` or `quorate join TOKEN`");
            notify::ready("belongs to no site yet");
        }
    }
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping; guests go on"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping; guests go on"),
    }
    notify::stopping();
    cancel.cancel();
    if let Some(member) = daemon.member()
        && tokio::time::timeout(STOP_WITHIN, member.stop()).await.is_err()
    {
        tracing::warn!("the node did not stop in time; its log is durable anyway");
    }
    Ok(())
}

impl Daemon {
    pub fn new(config: Config, cancel: CancellationToken) -> Arc<Daemon> {
        let own_uid = rustix::process::geteuid().as_raw();
        let member = watch::Sender::new(None);
        Arc::new(Daemon { config: Arc::new(config), member, changing: Mutex::new(()), cancel, own_uid })
    }

    pub fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// `None`: this host belongs to no site.
    pub fn member(&self) -> Option<Arc<Member>> {
        self.member.borrow().clone()
    }

    pub fn cancel(&self) -> CancellationToken {
        self.cancel.clone()
    }

    pub fn own_uid(&self) -> u32 {
        self.own_uid
    }

    /// Goes on as what the identity directory says.
    pub async fn resume(self: &Arc<Self>) -> Result<(), BootstrapError> {
        let _turn = self.changing.lock().await;
        let directory = self.config.identity_dir();
        let half = self.config.data_dir.join(recover::IDENTITY_NEXT);
        if half.exists() {
            return Err(BootstrapError::HalfRecovered { path: half });
        }
        // Written last, so its presence says that the identity is whole.
        if !directory.join(CERTIFICATE_FILE).exists() {
            return Ok(());
        }
        let genesis = init::unfinished(&self.config)?;
        let identity = Identity::load(&directory)?;
        self.become_member(identity, genesis).await.map(|_| ())
    }

    /// `quorate init`.
    pub async fn init(self: &Arc<Self>, name: &str) -> Result<Arc<Member>, BootstrapError> {
        let _turn = self.changing.lock().await;
        self.refuse_member()?;
        // A port that is taken must not leave half a site behind.
        drop(serve::bind_tcp(self.config.address).await?);
        let site = init::prepare(&self.config, name, now_ms())?;
        let member = self.become_member(site.identity, Some(site.genesis)).await?;
        tracing::info!(site = %member.site(), name, "a site begins");
        Ok(member)
    }

    /// `quorate join TOKEN`.
    pub async fn join(self: &Arc<Self>, token: &SecretText) -> Result<Arc<Member>, BootstrapError> {
        let _turn = self.changing.lock().await;
        self.refuse_member()?;
        drop(serve::bind_tcp(self.config.address).await?);
        let identity = join::ask_site(&self.config, token).await?;
        let member = self.become_member(identity, None).await?;
        tracing::info!(site = %member.site(), host = %member.own(), "this host joined");
        let mut fold = member.node().watch_fold();
        let heard = fold.wait_for(|fold| fold.state.hosts.contains(&member.own()));
        match tokio::time::timeout(HEARD_WITHIN, heard).await {
            Ok(Ok(_)) => Ok(member.clone()),
            // A large site over a slow link: the leader is heard, and its snapshot is on the way.
            _ if member.raft().leader.is_some() => {
                tracing::info!("this host catches up with the site still");
                Ok(member.clone())
            }
            _ => Err(BootstrapError::NotHeard {
                host: member.own().0,
                after_s: HEARD_WITHIN.as_secs(),
                port: self.config.address.port(),
            }),
        }
    }

    /// `quorate leave`: out of the site; the state is set aside, not deleted.
    pub async fn leave(self: &Arc<Self>) -> Result<Answer, Problem> {
        let _turn = self.changing.lock().await;
        let member = self.member().ok_or_else(|| Problem::new(Code::Uninitialised, "this host belongs to no site"))?;
        let own = member.own();
        let command = Command::HostRemove { host: own };
        // The rules first: a leader that may not leave must not give up its lead for nothing.
        let request = Request { actor: Actor::Root(own), origin: own, idempotency: None, command: command.clone() };
        if let Decision::Rejected(rejection) = member.fold().decide(&request, now_ms()) {
            return Err(Problem::from(&rejection));
        }
        member.hand_over().await;
        let answer = member.propose(Actor::Root(own), None, command).await?;
        tracing::info!(seq = %answer.seq, "this host left its site");
        let name = format!("left-{}-{}", member.site(), answer.seq);
        member.stop().await;
        self.member.send_replace(None);
        drop(member);
        self.set_aside(&name).map_err(|error| {
            let problem = Problem::new(
                Code::Internal,
                format!("this host left its site, but its state cannot be set aside: {error}"),
            );
            problem.action(format!("stop hostd and move {} away", self.config.data_dir.display()))
        })?;
        self.wait_for_port().await;
        Ok(answer)
    }

    /// Sockets close when the last answer on its way has let go of them; whoever joins next needs the port.
    async fn wait_for_port(&self) {
        let address = self.config.address;
        let free = || std::net::UdpSocket::bind(address).is_ok() && std::net::TcpListener::bind(address).is_ok();
        let deadline = tokio::time::Instant::now() + PORT_WITHIN;
        while !free() {
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(%address, "the port of the site that was left is still open; restart hostd before the next join");
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn set_aside(&self, name: &str) -> std::io::Result<()> {
        let aside = self.config.data_dir.join(name);
        std::fs::create_dir_all(&aside)?;
        // The identity first: without it the rest is nothing.
        for directory in [self.config.identity_dir(), self.config.raft_dir(), self.config.marks_dir()] {
            let Some(name) = directory.file_name() else { continue };
            match std::fs::rename(&directory, aside.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn refuse_member(&self) -> Result<(), BootstrapError> {
        match self.member() {
            None => Ok(()),
            Some(member) => {
                let fold = member.fold();
                let name = fold.state.site.as_ref().map(|site| site.name.clone());
                Err(BootstrapError::AlreadyMember {
                    site: name.unwrap_or_else(|| member.site().to_string()),
                    data_dir: self.config.data_dir.display().to_string(),
                })
            }
        }
    }

    /// Starts everything that a member runs.
    async fn become_member(
        self: &Arc<Self>,
        identity: Identity,
        genesis: Option<Request>,
    ) -> Result<Arc<Member>, BootstrapError> {
        let cancel = self.cancel.child_token();
        let listener = serve::bind_tcp(self.config.address).await?;
        let tls = Arc::new(identity.server_config(Clients::Optional, &[b"http/1.1"])?);
        let metrics = Metrics::new().map_err(|error| Problem::new(Code::Internal, format!("metrics: {error}")))?;
        let begins = genesis.is_some();
        let recovered = recover::begun(&self.config.identity_dir())?;
        let member = Member::start(&self.config, identity, genesis, Arc::new(metrics), cancel.clone()).await?;
        if let Err(error) = member.start_work(&self.config).await {
            member.stop().await;
            return Err(error.into());
        }
        self.member.send_replace(Some(member.clone()));
        let router = api::router(api::Api::new(self.clone()));
        tokio::spawn(serve::tls(listener, tls, member.site(), router, cancel));
        if begins {
            // The first host certified itself before there was a log to say so.
            let command = init::first_certificate(member.identity())?;
            member.propose(Actor::Duty(member.own()), None, command).await?;
            init::finish(&self.config)?;
        }
        if let Some(begun) = recovered {
            let command = Command::SiteRecover { generation: begun.generation, ca: begun.ca };
            // One batch takes out as many of the others as it carries.
            let left = |member: &Member| {
                let state = &member.fold().state;
                let before = state.site.as_ref().map_or(Seq::ZERO, |site| site.recovered_at);
                state.hosts.iter().any(|(id, _)| *id != member.own() && id.0 < before.0)
            };
            member.propose(Actor::Duty(member.own()), None, command.clone()).await?;
            while left(&member) {
                member.propose(Actor::Duty(member.own()), None, command.clone()).await?;
            }
            let command = init::first_certificate(member.identity())?;
            member.propose(Actor::Duty(member.own()), None, command).await?;
            recover::finished(&self.config.identity_dir())?;
            tracing::info!(generation = begun.generation, "the site is recovered; join other hosts with new tokens");
        }
        Ok(member)
    }
}

fn make_private_dir(path: &Path) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot create {}; run hostd as root, or choose another directory", path.display()))
}

/// Two hostd on one data directory would be two hosts with one identity.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("hostd.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    locked.with_context(|| {
        format!("{} is locked: another hostd runs on this data directory; stop it first", path.display())
    })?;
    Ok(file)
}

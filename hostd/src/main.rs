//! `hostd`: the daemon of a host. Everything is in the library; this reads the command line and starts it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hostd::config::Config;
use hostd::config::DEFAULT_PATH;
use hostd::config::LogFormat;
use tracing_subscriber::EnvFilter;

/// A commit allocates a few hundred times over HTTP, TLS, QUIC and the log: with glibc a third of the processor went there.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const HOW_TO: &str = "\
A first site:
  1. write /etc/quorate/hostd.toml on each host: `name` and `address` are enough
  2. systemctl enable --now hostd
  3. on the first host:   quorate init
  4. on the first host:   quorate token create --ttl 3h
     on each other host:  quorate join TOKEN

One port number, 7443: QUIC on udp between hosts, HTTPS on tcp for hosts and API clients.
State is under /var/lib/quorate, sockets under /run/quorate. Root's API is /run/quorate/hostd.sock.
Stopping or restarting hostd leaves its guests running; it finds them again at its next start.";

/// The daemon of a Quorate host: runs its guests, and its part of the cluster.
#[derive(Parser)]
#[command(name = "hostd", version, after_help = HOW_TO)]
struct Arguments {
    /// Configuration of this host.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH, env = "QUORATE_HOSTD_CONFIG")]
    config: PathBuf,
    /// Read the configuration, say whether it is valid, and end.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("hostd: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.check {
        println!("{} is valid", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = start_logging(&config) {
        eprintln!("hostd: {}: log.level is not acceptable: {error}", arguments.config.display());
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("hostd: cannot start its threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(hostd::daemon::run(config));
    // Blocking work that hangs on a disk must not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("hostd ends: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One line an event, on standard error, as text or as JSON.
fn start_logging(config: &Config) -> Result<(), tracing_subscriber::filter::ParseError> {
    // openraft says at every heartbeat that a host is away, which is told once by us; who wants more names it.
    let level = match config.log.level.contains("openraft") {
        true => config.log.level.clone(),
        false => format!("openraft=error,{}", config.log.level),
    };
    let filter = EnvFilter::builder().parse(level)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    match config.log.format {
        LogFormat::Text => lines.with_ansi(false).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}

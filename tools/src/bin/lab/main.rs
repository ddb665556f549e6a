//! `lab`: a data centre of emulated hosts on one machine (DESIGN §13).
//!
//! Each host is a QEMU process with a true /dev/kvm of its own (emulated AMD SVM where the machine
//! has no hardware virtualization), a disk that loses what was not flushed when its power goes,
//! and a tap in a network namespace of the lab's own. A witness outside the hosts records who
//! wrote shared disks and what guests said on their consoles, by a clock that no fault touches.
//!
//! Path of a command: `main` parses it -> `control` carries it to the daemon -> `daemon::hosts`
//! acts through `machine` (QEMU), `qmp`, `agent` (qemu-guest-agent), `net` and `nbd`. Bringing a
//! lab up and down is `lifecycle`; what hosts boot is `image`.

mod agent;
mod clock;
mod console;
mod control;
mod daemon;
mod image;
mod in_host;
mod lifecycle;
mod machine;
mod nbd;
mod net;
mod paths;
mod process;
mod qmp;
mod report;
mod scenario;
mod secrets;
mod state;
mod witness;

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Parser, Subcommand};

use control::{LinkChange, PowerAction, Request};
use machine::AcceleratorChoice;
use paths::LabDir;
use state::{HostId, LabConfig, LabState, MAX_HOSTS};

/// A data centre of emulated hosts with real KVM, on this machine.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Cli {
    /// The lab's directory [default: .lab in the repository].
    #[arg(long, env = "QUORATE_LAB_DIR", global = true)]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the images of hosts and guests; a host takes a new one at its next power on.
    Image {
        /// Where hostd, quorate, vmm and lab are [default: beside this program].
        #[arg(long)]
        binaries: Option<PathBuf>,
    },
    /// Start a lab and wait until all hosts answer.
    Up {
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_HOSTS)))]
        hosts: u8,
        #[arg(long, value_enum, default_value = "auto")]
        accel: AcceleratorChoice,
        /// Memory of a host, in MiB.
        #[arg(long, default_value_t = 2048)]
        memory: u32,
        /// Processors of a host.
        #[arg(long, default_value_t = 2)]
        cpus: u32,
        /// Disks that lie: FLUSH is answered and nothing becomes durable by it.
        #[arg(long)]
        ignore_flush: bool,
        /// Seconds until a host that does not answer is an error.
        #[arg(long, default_value_t = 120)]
        timeout: u64,
        #[arg(long)]
        binaries: Option<PathBuf>,
    },
    /// Hosts, their power, network and disks.
    Status {
        #[arg(long)]
        json: bool,
    },
    /// Run a program in a host; its output and exit code become ours.
    Exec {
        host: HostId,
        /// Seconds to wait for its end.
        #[arg(long, default_value_t = 60)]
        timeout: u64,
        /// Pass standard input on (read to its end first).
        #[arg(long)]
        stdin: bool,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Attach to a host's serial line.
    Console { host: HostId },
    /// Change a host's power.
    Power {
        host: HostId,
        action: PowerAction,
        /// With on and reset: wait this many seconds until the host answers.
        #[arg(long, num_args = 0..=1, default_missing_value = "120", value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Disturb a host's network.
    Net {
        host: HostId,
        #[command(subcommand)]
        change: NetVerb,
    },
    /// Make a disk of a host hang, or answer again.
    Disk {
        host: HostId,
        action: DiskAction,
        /// `disk` (the host's own), `shared`, `shared1` to `shared4`, `root`.
        export: String,
    },
    /// A host's serial log: kernel, init, services.
    Logs { host: HostId },
    /// Copy a file into a host, with its mode.
    Push { host: HostId, file: PathBuf, destination: String },
    /// Run a program of this machine inside the lab's network, as 10.77.0.254.
    Run {
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// The lab's clock in nanoseconds: the one in all witness files.
    Clock,
    /// End the lab and remove its disks and network.
    Down {
        #[arg(long)]
        keep_disks: bool,
    },
    /// The main job on a fresh lab: a cluster, a guest, the loss of the leader.
    Demo {
        #[command(flatten)]
        options: scenario::StoryOptions,
    },
    /// Measure a promise on a fresh lab.
    Show {
        #[arg(value_enum)]
        story: scenario::Story,
        #[command(flatten)]
        options: scenario::StoryOptions,
    },
    /// Writes through every host without pause, and prints when each commit was answered.
    #[command(hide = true)]
    Probe(scenario::probe::ProbeOptions),
    /// The daemon; `lab up` starts it.
    #[command(hide = true)]
    Serve,
    /// What this program does inside a guest of the story `beside`.
    #[command(hide = true)]
    InGuest {
        #[command(subcommand)]
        task: scenario::beside::guest::InGuestTask,
    },
    /// What this program does inside a host.
    #[command(hide = true)]
    InHost {
        #[command(subcommand)]
        task: InHostTask,
    },
}

#[derive(Subcommand)]
enum NetVerb {
    /// Nothing goes in or out.
    Cut,
    /// No cut, no delay, no loss.
    Heal,
    /// Milliseconds added once to each round trip.
    Delay { ms: u32 },
    /// Share of packets lost, each way.
    Loss {
        #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
        percent: u8,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DiskAction {
    Hang,
    Unhang,
}

#[derive(Subcommand)]
enum InHostTask {
    /// CLOCK_BOOTTIME of this host in nanoseconds.
    Clock,
    /// What a guest's vmm says of itself, as JSON.
    VmmStatus {
        /// Id of the VM.
        #[arg(long)]
        vm: String,
    },
    /// The most vmm processes that were there at once, until the file `enough` appears.
    MostVmm {
        #[arg(long)]
        enough: PathBuf,
    },
    /// Look for secrets below directories where none may be.
    Secrets(secrets::SecretsOptions),
    /// Ask another host's API with the certificate of an identity directory.
    Knock {
        #[arg(long)]
        server: String,
        #[arg(long, default_value = "/var/lib/quorate/identity")]
        identity: PathBuf,
    },
    /// One turn of the story `beside`: a guest under one of the programs that are compared, measured; JSON.
    Beside(scenario::beside::turn::TurnOptions),
    /// Send the lines of guests' consoles to the lab.
    Consoles {
        #[arg(long)]
        root: PathBuf,
        #[arg(long)]
        port: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    if let Verb::InHost { task } = &cli.command {
        match task {
            InHostTask::Consoles { root, port } => in_host::follow_consoles(root, port)?,
            InHostTask::Secrets(options) => return secrets::search(options),
            InHostTask::Knock { server, identity } => println!("{}", in_host::knock(server, identity)?),
            InHostTask::Clock => println!("{}", in_host::boottime_ns()),
            InHostTask::MostVmm { enough } => println!("{}", in_host::most_vmm_at_once(enough)?),
            InHostTask::Beside(options) => println!("{}", scenario::beside::turn::take(options)?),
            InHostTask::VmmStatus { vm } => println!("{}", in_host::vmm_status(vm)?),
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Verb::InGuest { task } = &cli.command {
        println!("{}", scenario::beside::guest::perform(task)?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Verb::Clock = cli.command {
        println!("{}", clock::now_ns());
        return Ok(ExitCode::SUCCESS);
    }
    let dir = LabDir::find(cli.dir.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let code = runtime.block_on(perform(dir, cli.command));
    // Standard input may be blocked in a read that nobody will end.
    runtime.shutdown_background();
    code
}

async fn perform(dir: LabDir, verb: Verb) -> Result<ExitCode> {
    let ask =
        async |request: Request| control::ask(&dir.control_socket(), &request, &mut |line| println!("{line}")).await;
    match verb {
        Verb::Image { binaries } => {
            let binaries = binaries.map_or_else(lifecycle::own_directory, Ok)?;
            image::build(&dir, &binaries, false, &mut |line| println!("{line}"))?;
        }
        Verb::Up { hosts, accel, memory, cpus, ignore_flush, timeout, binaries } => {
            let config = LabConfig {
                hosts,
                accelerator: accel.resolve()?,
                memory_mib: memory,
                cpus,
                ignore_flush,
                netns: format!("quorate-lab-{}", dir.tag()),
            };
            let binaries = binaries.map_or_else(lifecycle::own_directory, Ok)?;
            lifecycle::up(&dir, config, &binaries, false, timeout).await?;
        }
        Verb::Status { json } => {
            let status = ask(Request::Status).await?;
            println!("{}", if json { serde_json::to_string_pretty(&status)? } else { report::status_table(&status) });
        }
        Verb::Exec { host, timeout, stdin, command } => {
            let mut input = Vec::new();
            if stdin {
                std::io::stdin().read_to_end(&mut input).context("read standard input")?;
            }
            let request = Request::Exec { host, argv: command, input: BASE64.encode(input), timeout_s: timeout };
            return report::finished(&ask(request).await?);
        }
        Verb::Console { host } => console::attach(&dir, host).await?,
        Verb::Power { host, action, wait } => {
            let answer = ask(Request::Power { host, action, wait_s: wait }).await?;
            if let Some(lost) = answer["unflushed_bytes_lost"].as_u64() {
                println!("{host} is off, {lost} bytes were not flushed and are lost");
            }
        }
        Verb::Net { host, change } => {
            let change = match change {
                NetVerb::Cut => LinkChange::Cut,
                NetVerb::Heal => LinkChange::Heal,
                NetVerb::Delay { ms } => LinkChange::Delay { ms },
                NetVerb::Loss { percent } => LinkChange::Loss { percent },
            };
            ask(Request::Net { host, change }).await?;
        }
        Verb::Disk { host, action, export } => {
            ask(Request::Disk { host, export, hang: matches!(action, DiskAction::Hang) }).await?;
        }
        Verb::Logs { host } => {
            let path = dir.serial_log(host);
            let log = std::fs::read(&path).with_context(|| format!("no log of {host} at {}", path.display()))?;
            std::io::stdout().write_all(&log)?;
        }
        Verb::Push { host, file, destination } => {
            let source = std::path::absolute(&file)?.display().to_string();
            ask(Request::Push { host, source, destination }).await?;
        }
        Verb::Run { command } => {
            let Some(state) = LabState::load(&dir)? else { bail!("no lab is up here: run `lab up`") };
            let (program, arguments) = command.split_first().context("no program to run")?;
            let error = net::inside(&state.config.netns, program).args(arguments).exec();
            return Err(error).context("run ip netns exec");
        }
        Verb::Down { keep_disks } => lifecycle::down(&dir, keep_disks)?,
        Verb::Demo { options } => scenario::tell(&dir, scenario::Story::Demo, &options).await?,
        Verb::Show { story, options } => scenario::tell(&dir, story, &options).await?,
        Verb::Probe(options) => scenario::probe::run(options).await?,
        Verb::Serve => {
            tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
            daemon::serve(dir).await?;
        }
        Verb::Clock | Verb::InHost { .. } | Verb::InGuest { .. } => unreachable!("answered before the runtime started"),
    }
    Ok(ExitCode::SUCCESS)
}

//! What each command asks of hostd, and what it waits for.

mod cluster;
mod console;
mod devices;
mod events;
mod guest;
mod host;
mod recover;
mod site;
mod store;
mod token;
mod vm;

use clap::CommandFactory;
use tools::client::Client;

use crate::args::Cli;
use crate::args::Command;
use crate::args::Format;
use crate::args::StateCommand;
use crate::exit::Failure;
use crate::output;

/// What every command needs.
pub struct Context {
    pub client: Client,
    pub format: Format,
}

pub async fn run(cli: Cli) -> Result<(), Failure> {
    if let Command::Completion { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "quorate", &mut script);
        return output::print(&String::from_utf8_lossy(&script));
    }
    let client = Client::new(&cli.connection.options()?)?;
    let context = Context { client, format: cli.output };
    match cli.command {
        Command::Init(init) => site::init(&context, init).await,
        Command::Join(join) => site::join(&context, join).await,
        Command::Leave => site::leave(&context).await,
        Command::Status => output::show(context.format, &context.client.status().await?),
        Command::Token(command) => token::run(&context, command).await,
        Command::Site(command) => site::run(&context, command).await,
        Command::Cluster(command) => cluster::run(&context, command).await,
        Command::Host(command) => host::run(&context, command).await,
        Command::Vm(command) => vm::run(&context, command).await,
        Command::Guest(command) => guest::run(&context, command).await,
        Command::Events(events) => events::run(&context, events).await,
        Command::Why { vm } => output::show(context.format, &context.client.why(&vm).await?),
        Command::Spm => output::show(context.format, &context.client.spm().await?),
        Command::State(StateCommand::Digest) => site::digest(&context).await,
        Command::Store(command) => store::run(&context, &command),
        Command::Recover { data_dir, all_other_hosts_are_off } => {
            recover::run(&context, &data_dir, all_other_hosts_are_off).await
        }
        Command::Completion { .. } => Ok(()),
    }
}

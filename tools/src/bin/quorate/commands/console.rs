//! `quorate vm console`: the operator's terminal, or a pipe, joined to a guest's serial console.

use std::io;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::time::Instant;
use tools::client::ClientError;

use super::Context;
use crate::exit::Failure;
use crate::output;
use crate::terminal;
use crate::terminal::RawMode;

/// Without `--for`: beyond any session.
const FAR_FUTURE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Why a session ended.
enum End {
    Escape,
    /// `--for` is over, or a signal came.
    Asked,
    /// The guest, or its host, closed the console.
    Closed,
}

/// Leaves on Ctrl-], when the guest ends, or after `--for`. The end of piped input does not end it: output goes on.
pub async fn run(context: &Context, vm: &str, for_duration: Option<Duration>) -> Result<(), Failure> {
    let console = context.client.console(vm).await?;
    let terminal = |source: io::Error| Failure::Local(format!("cannot use the terminal: {source}"));
    let mut hangup = signal(SignalKind::hangup()).map_err(terminal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(terminal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(terminal)?;

    let raw = RawMode::enter().map_err(terminal)?;
    let is_terminal = raw.is_terminal();
    if is_terminal {
        eprint!("console of vm {vm}; Ctrl-] leaves\r\n");
    }
    let (mut output, mut input) = tokio::io::split(console);
    let mut typed = terminal::typed();
    let mut input_open = true;
    let until = Instant::now() + for_duration.unwrap_or(FAR_FUTURE);
    let mut buffer = vec![0; 16 * 1024];
    let end = loop {
        tokio::select! {
            read = output.read(&mut buffer) => match read {
                Ok(0) => break Ok(End::Closed),
                // As they are: whoever opens a console wants the guest's escapes.
                Ok(length) => output::print_bytes(&buffer[..length])?,
                Err(error) => break Err(broken(vm, &error)),
            },
            keys = typed.recv(), if input_open => match keys {
                Some(keys) => {
                    let (keys, escaped) = terminal::before_escape(&keys, is_terminal);
                    if let Err(error) = input.write_all(keys).await {
                        break Err(broken(vm, &error));
                    }
                    if escaped {
                        break Ok(End::Escape);
                    }
                }
                None => input_open = false,
            },
            _ = tokio::time::sleep_until(until) => break Ok(End::Asked),
            _ = hangup.recv() => break Ok(End::Asked),
            _ = terminate.recv() => break Ok(End::Asked),
            _ = interrupt.recv() => break Ok(End::Asked),
        }
    };
    drop(raw);
    match end? {
        End::Closed if is_terminal => eprintln!("\nthe console of vm {vm} was closed: `quorate vm show {vm}` says why"),
        End::Escape => eprintln!(),
        End::Closed | End::Asked => {}
    }
    Ok(())
}

fn broken(vm: &str, error: &io::Error) -> Failure {
    ClientError::Broken { whom: format!("the console of vm {vm}"), why: error.to_string() }.into()
}

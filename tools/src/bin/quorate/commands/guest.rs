//! `quorate guest ...`.

use std::io::IsTerminal;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hostd_api::MAX_BODY_BYTES;
use hostd_api::guest::Exec;
use hostd_api::guest::ExecAnswer;
use hostd_api::guest::Freeze;

use super::Context;
use crate::args::ExecArgs;
use crate::args::Format;
use crate::args::GuestCommand;
use crate::exit::Failure;
use crate::output;

pub async fn run(context: &Context, command: GuestCommand) -> Result<(), Failure> {
    let (client, format) = (&context.client, context.format);
    match command {
        GuestCommand::Show { vm } => output::show(format, &client.guest_agent(&vm).await?),
        GuestCommand::Exec(args) => exec(context, args).await,
        GuestCommand::Freeze { vm, limit } => {
            let answer = client.guest_freeze(&vm, &Freeze { seconds: Some(seconds(limit)) }).await?;
            let count = output::agree(answer.filesystems, "file system");
            let sentence = format!("{count} of vm {vm} stand still for {} s at most", seconds(limit));
            output::done(format, &answer, &sentence)
        }
        GuestCommand::Thaw { vm } => {
            let answer = client.guest_order(&vm, "thaw").await?;
            output::done(format, &answer, &format!("the file systems of vm {vm} go on"))
        }
        GuestCommand::SetTime { vm } => {
            let answer = client.guest_order(&vm, "set-time").await?;
            output::done(format, &answer, &format!("the clock of vm {vm} is that of its host"))
        }
        GuestCommand::Reboot { vm } => {
            let answer = client.guest_order(&vm, "reboot").await?;
            output::done(format, &answer, &format!("vm {vm} restarts itself"))
        }
    }
}

async fn exec(context: &Context, args: ExecArgs) -> Result<(), Failure> {
    let input = args.input.as_deref().map(read_input).transpose()?.unwrap_or_default();
    let [path, arguments @ ..] = args.program.as_slice() else {
        return Err(Failure::Usage("no program is named".to_owned()));
    };
    let request = Exec {
        path: path.clone(),
        arguments: arguments.to_vec(),
        environment: Vec::new(),
        input: STANDARD.encode(input),
        wait_s: Some(seconds(args.timeout)),
    };
    let answer = context.client.guest_exec(&args.vm, &request).await?;
    match context.format {
        Format::Table => pass_on(&answer)?,
        format => output::done(format, &answer, "")?,
    }
    match (answer.ended, answer.code) {
        (true, Some(0)) => Ok(()),
        (true, Some(code)) => Err(Failure::CameDifferently(format!("{path} ended with code {code}"))),
        (true, None) => {
            let signal = answer.signal.map_or_else(|| "a signal".to_owned(), |signal| format!("signal {signal}"));
            Err(Failure::CameDifferently(format!("{path} was ended by {signal}")))
        }
        (false, _) => {
            let words = format!("{path} runs on in the guest; its output is lost. Name a longer time with --timeout");
            Err(Failure::WaitedTooLong(words))
        }
    }
}

/// The program's two outputs to ours. What a guest wrote does not reach a terminal as it is.
fn pass_on(answer: &ExecAnswer) -> Result<(), Failure> {
    let decoded = |text: &str| {
        STANDARD.decode(text).map_err(|_| Failure::Local("the guest's output is not what the API promises".to_owned()))
    };
    let (output, errors) = (decoded(&answer.output)?, decoded(&answer.errors)?);
    write_to(&mut std::io::stdout().lock(), std::io::stdout().is_terminal(), &output)?;
    write_to(&mut std::io::stderr().lock(), std::io::stderr().is_terminal(), &errors)?;
    if answer.cut {
        eprintln!("(cut: the first 64 KiB of each output are kept)");
    }
    Ok(())
}

fn write_to(to: &mut impl Write, is_terminal: bool, bytes: &[u8]) -> Result<(), Failure> {
    let written = match is_terminal {
        true => to.write_all(harmless(bytes).as_bytes()),
        false => to.write_all(bytes),
    };
    written.and_then(|()| to.flush()).map_err(Failure::Output)
}

/// Text for a terminal: lines and tabs, and no other control characters.
fn harmless(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn read_input(path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |why: String| Failure::Local(format!("cannot read {}: {why}", path.display()));
    // In base64 it grows by a third, and has to fit into one request.
    let limit = MAX_BODY_BYTES as u64 / 2;
    let mut bytes = Vec::new();
    let read = match path.to_str() {
        Some("-") => std::io::stdin().lock().take(limit + 1).read_to_end(&mut bytes),
        _ => std::fs::File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)),
    };
    read.map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > limit {
        return Err(failed(format!("it is longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// Whole seconds, at least one.
fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_wrote_does_not_move_the_cursor() {
        assert_eq!(harmless(b"a\x1b[2Jb\tc\nd\r\x07\xff"), "a[2Jb\tc\nd\u{fffd}");
        let mut piped = Vec::new();
        write_to(&mut piped, false, b"\x1b[2J").unwrap();
        assert_eq!(piped, b"\x1b[2J", "a pipe gets what was written");
    }

    #[test]
    fn a_part_of_a_second_is_a_second() {
        assert_eq!(seconds(Duration::from_millis(1)), 1);
        assert_eq!(seconds(Duration::from_secs(20)), 20);
    }
}

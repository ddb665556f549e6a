//! `init`, `join`, `leave`, `site set`, `state digest`.

use std::io::Read;

use hostd_api::JoinToken;
use hostd_api::SecretText;
use hostd_api::site::InitRequest;
use hostd_api::site::JoinRequest;
use hostd_api::site::Membership;
use hostd_api::site::SitePatch;
use statemachine::view::HostStatus;

use super::Context;
use super::host;
use crate::args::InitArgs;
use crate::args::JoinArgs;
use crate::args::SiteCommand;
use crate::args::Wait;
use crate::exit::Failure;
use crate::output;

/// A token has about 200 characters; whatever is much longer on standard input is not one.
const TOKEN_INPUT_MAX_BYTES: u64 = 4096;

pub async fn run(context: &Context, command: SiteCommand) -> Result<(), Failure> {
    let SiteCommand::Set { voters } = command;
    let answer = context.client.site_change(&SitePatch { voters: Some(voters) }).await?;
    output::done(context.format, &answer, &format!("up to {voters} hosts vote (seq {})", answer.seq))
}

pub async fn init(context: &Context, args: InitArgs) -> Result<(), Failure> {
    let membership = context.client.init(&InitRequest { name: args.name }).await?;
    belongs(context, &membership, args.wait).await
}

pub async fn join(context: &Context, args: JoinArgs) -> Result<(), Failure> {
    let token = match args.token.as_str() {
        "-" => from_stdin()?,
        token => token.to_owned(),
    };
    // A typing error is told here; what only the site knows is told by the site.
    JoinToken::from_text(&token).map_err(|error| Failure::Local(error.to_string()))?;
    let request = JoinRequest { token: SecretText::new(token.trim()) };
    let membership = context.client.join(&request).await?;
    belongs(context, &membership, args.wait).await
}

async fn belongs(context: &Context, membership: &Membership, wait: Wait) -> Result<(), Failure> {
    if wait.wait {
        let id = membership.host.to_string();
        host::wait_for(context, &id, None, HostStatus::Up, wait).await?;
    }
    output::show(context.format, membership)
}

pub async fn leave(context: &Context) -> Result<(), Failure> {
    let answer = context.client.leave().await?;
    let sentence = format!("this host left its site (seq {}); `quorate join TOKEN` enters one again", answer.seq);
    output::done(context.format, &answer, &sentence)
}

pub async fn digest(context: &Context) -> Result<(), Failure> {
    let digest = context.client.state_digest().await?;
    output::show(context.format, &digest)?;
    match output::disagreement(&digest) {
        None => Ok(()),
        Some(seq) => Err(Failure::CameDifferently(format!("two hosts believe different things at seq {seq}"))),
    }
}

fn from_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(TOKEN_INPUT_MAX_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| Failure::Local(format!("cannot read the token from standard input: {error}")))?;
    Ok(text)
}

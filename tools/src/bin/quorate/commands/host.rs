//! `quorate host ...`.

use hostd_api::host::HostPatch;
use hostd_api::write::WriteAnswer;
use statemachine::Seq;
use statemachine::view::HostStatus;

use super::Context;
use crate::args::HostCommand;
use crate::args::Wait;
use crate::exit::Failure;
use crate::output;
use crate::wait;
use crate::wait::Look;

pub async fn run(context: &Context, command: HostCommand) -> Result<(), Failure> {
    let client = &context.client;
    match command {
        HostCommand::List => output::show(context.format, &client.hosts().await?),
        HostCommand::Show { host } => output::show(context.format, &client.host(&host, None).await?),
        HostCommand::Set { host, failure_domain, spm_priority } => {
            let answer = client.host_change(&host, &HostPatch { spm_priority, failure_domain }).await?;
            output::done(context.format, &answer, &format!("host {host} is changed (seq {})", answer.seq))
        }
        HostCommand::Maintenance { host, wait } => {
            let answer = client.host_maintenance(&host).await?;
            settled(context, &host, answer, HostStatus::Maintenance, wait, "gets no more VMs").await
        }
        HostCommand::Activate { host, wait } => {
            let answer = client.host_activate(&host).await?;
            settled(context, &host, answer, HostStatus::Up, wait, "is active").await
        }
        HostCommand::Remove { host } => {
            let answer = client.host_remove(&host).await?;
            output::done(context.format, &answer, &format!("host {host} is removed (seq {})", answer.seq))
        }
    }
}

async fn settled(
    context: &Context,
    host: &str,
    answer: WriteAnswer,
    status: HostStatus,
    wait: Wait,
    asked: &str,
) -> Result<(), Failure> {
    if !wait.wait {
        return output::done(context.format, &answer, &format!("host {host} {asked} (seq {})", answer.seq));
    }
    wait_for(context, host, Some(answer.seq), status, wait).await?;
    output::done(context.format, &answer, &format!("host {host} is {status} (seq {})", answer.seq))
}

pub async fn wait_for(
    context: &Context,
    host: &str,
    min_seq: Option<Seq>,
    status: HostStatus,
    wait: Wait,
) -> Result<(), Failure> {
    let client = &context.client;
    let look = || async move {
        let seen = client.host(host, min_seq).await?.item;
        Ok(match seen.status == status {
            true => Look::Done(()),
            false if seen.usage.vms > 0 && status == HostStatus::Maintenance => {
                let left = output::agree(u64::from(seen.usage.vms), "VM");
                Look::NotYet(format!("it is {}, with {left} left on it", seen.status))
            }
            false => Look::NotYet(format!("it is {}", seen.status)),
        })
    };
    wait::until(wait, &format!("host {host}"), look).await
}

//! `quorate vm ...`.

use std::io::Read;
use std::path::Path;

use hostd_api::MAX_BODY_BYTES;
use hostd_api::read::Item;
use hostd_api::spec::FirstBootBody;
use hostd_api::spec::VmSpecBody;
use hostd_api::vm::DesiredView;
use hostd_api::vm::PlugBody;
use hostd_api::vm::VmCreate;
use hostd_api::vm::VmMigrate;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmStart;
use hostd_api::vm::VmStop;
use hostd_api::vm::VmView;
use hostd_api::write::WriteAnswer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::ClusterId;
use statemachine::Seq;
use statemachine::state::FirstBoot;
use statemachine::state::RunStrategy;
use statemachine::state::StopMode;
use statemachine::view::VmStatus;

use super::Context;
use super::console;
use super::devices;
use crate::args::ChangeArgs;
use crate::args::CreateArgs;
use crate::args::MachineArgs;
use crate::args::VmCommand;
use crate::args::Wait;
use crate::exit::Failure;
use crate::output;
use crate::wait;
use crate::wait::Look;

pub async fn run(context: &Context, command: VmCommand) -> Result<(), Failure> {
    let client = &context.client;
    match command {
        VmCommand::Create(create_args) => create(context, *create_args).await,
        VmCommand::Change(change_args) => change(context, *change_args).await,
        VmCommand::List => output::show(context.format, &client.vms().await?),
        VmCommand::Show { vm } => output::show(context.format, &client.vm(&vm, None).await?),
        VmCommand::Start { vm, host, wait } => start(context, &vm, host, wait).await,
        VmCommand::Stop { vm, power_off, wait } => stop(context, &vm, power_off, wait).await,
        VmCommand::Reset { vm } => {
            let answer = client.vm_reset(&vm).await?;
            output::done(context.format, &answer, &format!("vm {vm} is being reset (seq {})", answer.seq))
        }
        VmCommand::Migrate { vm, to, wait } => migrate(context, &vm, to, wait).await,
        VmCommand::CancelMigration { vm } => {
            let answer = client.vm_cancel_migration(&vm).await?;
            output::done(context.format, &answer, &format!("vm {vm} stays where it is (seq {})", answer.seq))
        }
        VmCommand::Suspend { vm, wait } => suspend(context, &vm, wait).await,
        VmCommand::Plug { vm, disk, nic, wait } => {
            devices::plug(context, &vm, PlugBody { disks: disk, nics: nic }, wait).await
        }
        VmCommand::Unplug { vm, devices, wait } => devices::unplug(context, &vm, devices, wait).await,
        VmCommand::Memory { vm, memory } => devices::memory(context, &vm, memory).await,
        VmCommand::Pause { vm } => {
            let answer = client.vm_pause(&vm).await?;
            output::done(context.format, &answer, &format!("vm {vm} is to stand still (seq {})", answer.seq))
        }
        VmCommand::Resume { vm } => {
            let answer = client.vm_resume(&vm).await?;
            output::done(context.format, &answer, &format!("vm {vm} is to go on (seq {})", answer.seq))
        }
        VmCommand::Console { vm, for_duration } => console::run(context, &vm, for_duration).await,
        VmCommand::Delete { vm } => {
            let answer = client.vm_delete(&vm).await?;
            output::done(context.format, &answer, &format!("vm {vm} is deleted (seq {})", answer.seq))
        }
    }
}

async fn create(context: &Context, args: CreateArgs) -> Result<(), Failure> {
    let (start_it, wait) = (args.start, args.wait);
    let body = definition(args)?;
    let answer = context.client.vm_create(&body).await?;
    if start_it {
        // The id rather than the name: it is the VM of this answer that is started.
        let id = answer.id.clone().unwrap_or_else(|| body.name.clone());
        return start(context, &id, None, wait).await;
    }
    let id = answer.id.as_deref().unwrap_or("-");
    output::done(context.format, &answer, &format!("vm {} is defined (seq {}, id {id})", body.name, answer.seq))
}

fn definition(args: CreateArgs) -> Result<VmCreate, Failure> {
    let mut body = match &args.file {
        Some(path) => from_file(path)?,
        None => VmCreate {
            name: String::new(),
            cluster: None,
            run_strategy: RunStrategy::Manual,
            spec: VmSpecBody::default(),
        },
    };
    if let Some(name) = args.name {
        body.name = name;
    }
    if let Some(strategy) = args.run_strategy {
        body.run_strategy = strategy.into();
    }
    if let Some(cluster) = args.cluster {
        body.cluster = Some(ClusterId(cluster));
    }
    let user_data = user_data(&args.machine)?;
    args.machine.apply(&body.name, user_data, &mut body.spec);
    match body.spec.kernel {
        Some(_) => Ok(body),
        None => Err(Failure::Usage("a VM boots a kernel; name it with --kernel PATH".to_owned())),
    }
}

fn from_file(path: &Path) -> Result<VmCreate, Failure> {
    let failed = |why: String| Failure::Local(format!("cannot read a definition from {}: {why}", path.display()));
    let mut text = String::new();
    let limit = MAX_BODY_BYTES as u64 + 1;
    let read = match path.to_str() {
        Some("-") => std::io::stdin().lock().take(limit).read_to_string(&mut text),
        _ => std::fs::File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text)),
    };
    read.map_err(|error| failed(error.to_string()))?;
    if text.len() > MAX_BODY_BYTES {
        return Err(failed(format!("it is larger than {MAX_BODY_BYTES} bytes")));
    }
    // JSON is YAML.
    serde_norway::from_str(&text).map_err(|error| failed(error.to_string()))
}

async fn change(context: &Context, args: ChangeArgs) -> Result<(), Failure> {
    let machine = &args.machine;
    let mut parts = VmSpecBody::default();
    if machine.cpu.is_given() || machine.first_boot.is_given() || machine.migration.is_given() {
        present_parts(&context.client.vm(&args.vm, None).await?.item, machine, &mut parts)?;
    }
    let patch = patch(&args, parts)?;
    if patch == VmPatch::default() {
        return Err(Failure::Usage(format!(
            "nothing to change was named; `quorate vm change --help` says what can be, `quorate vm show {}` what is",
            args.vm
        )));
    }
    let answer = context.client.vm_change(&args.vm, &patch).await?;
    output::done(context.format, &answer, &format!("vm {} is changed (seq {})", args.vm, answer.seq))
}

/// `spec`: parts that have several values, as they are now.
fn patch(args: &ChangeArgs, mut spec: VmSpecBody) -> Result<VmPatch, Failure> {
    let machine = &args.machine;
    machine.clone().apply(&args.vm, user_data(machine)?, &mut spec);
    if args.no_first_boot {
        spec.first_boot = Some(FirstBootBody::default());
    }
    if args.no_initrd {
        spec.initrd = Some(String::new());
    }
    if args.no_disks {
        spec.disks = Some(Vec::new());
    }
    if args.no_nics {
        spec.nics = Some(Vec::new());
    }
    let takes_away = args.no_initrd || args.no_disks || args.no_nics || args.no_first_boot;
    Ok(VmPatch {
        name: args.rename.clone(),
        run_strategy: args.run_strategy.map(Into::into),
        spec: (takes_away || *machine != MachineArgs::default()).then_some(spec),
        ..VmPatch::default()
    })
}

/// Parts that have several values, and of which some change: the others stay as they are.
fn present_parts(vm: &VmView, machine: &MachineArgs, spec: &mut VmSpecBody) -> Result<(), Failure> {
    if machine.cpu.is_given() {
        spec.cpu = Some(as_body(&vm.spec.cpu)?);
    }
    if machine.first_boot.is_given() {
        spec.first_boot = vm.spec.first_boot.as_ref().map(as_body).transpose()?;
    }
    if machine.migration.is_given() {
        spec.migration = Some(as_body(&vm.spec.migration)?);
    }
    Ok(())
}

/// What is shown can be sent again: the fields are the same.
fn as_body<T: DeserializeOwned>(shown: &impl Serialize) -> Result<T, Failure> {
    let body = serde_json::to_value(shown).and_then(serde_json::from_value);
    body.map_err(|error| Failure::Local(format!("the definition is not understood by this `quorate`: {error}")))
}

fn user_data(machine: &MachineArgs) -> Result<Option<String>, Failure> {
    let Some(path) = &machine.first_boot.user_data else { return Ok(None) };
    let failed = |why: String| Failure::Local(format!("cannot read user data from {}: {why}", path.display()));
    let most = FirstBoot::MAX_USER_DATA_BYTES as u64;
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(most + 1).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() as u64 > most => Err(failed(format!("it is larger than {most} bytes"))),
        Ok(_) => Ok(Some(text)),
        Err(error) => Err(failed(error.to_string())),
    }
}

async fn start(context: &Context, vm: &str, host: Option<String>, wait: Wait) -> Result<(), Failure> {
    let answer = context.client.vm_start(vm, &VmStart { host }).await?;
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} is being started (seq {})", answer.seq));
    }
    let running = wait_for(context, vm, &answer, wait, runs).await?;
    let host = running.host_name.as_deref().unwrap_or("-");
    output::done(context.format, &answer, &format!("vm {} is Up on host {host} (seq {})", running.name, answer.seq))
}

async fn stop(context: &Context, vm: &str, power_off: bool, wait: Wait) -> Result<(), Failure> {
    let mode = if power_off { StopMode::PowerOff } else { StopMode::Shutdown };
    let answer = context.client.vm_stop(vm, &VmStop { mode }).await?;
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} is being stopped (seq {})", answer.seq));
    }
    let stopped = wait_for(context, vm, &answer, wait, is_down).await?;
    output::done(context.format, &answer, &format!("vm {} is Down (seq {})", stopped.name, answer.seq))
}

async fn migrate(context: &Context, vm: &str, host: Option<String>, wait: Wait) -> Result<(), Failure> {
    let answer = context.client.vm_migrate(vm, &VmMigrate { host }).await?;
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} is on its way (seq {})", answer.seq));
    }
    let moved = wait_for(context, vm, &answer, wait, has_moved).await?;
    let host = moved.host_name.as_deref().unwrap_or("-");
    output::done(
        context.format,
        &answer,
        &format!("vm {} is {} on host {host} (seq {})", moved.name, moved.status, answer.seq),
    )
}

async fn suspend(context: &Context, vm: &str, wait: Wait) -> Result<(), Failure> {
    let answer = context.client.vm_suspend(vm).await?;
    if !wait.wait {
        return output::done(context.format, &answer, &format!("vm {vm} falls asleep (seq {})", answer.seq));
    }
    let asleep = wait_for(context, vm, &answer, wait, is_suspended).await?;
    let file =
        asleep.suspension.map(|it| format!(", {} MiB on host {}", it.bytes.unwrap_or_default() >> 20, it.host_name));
    let words = format!("vm {} is Suspended{} (seq {})", asleep.name, file.unwrap_or_default(), answer.seq);
    output::done(context.format, &answer, &words)
}

pub(super) async fn wait_for(
    context: &Context,
    vm: &str,
    answer: &WriteAnswer,
    wait: Wait,
    judge: impl Fn(&VmView, Seq) -> Look<()>,
) -> Result<VmView, Failure> {
    let (client, seq) = (&context.client, answer.seq);
    let judge = &judge;
    let look = || async move {
        let Item { item, .. } = client.vm(vm, Some(seq)).await?;
        Ok(match judge(&item, seq) {
            Look::Done(()) => Look::Done(item),
            Look::NotYet(doing) => Look::NotYet(doing),
            Look::Never(why) => Look::Never(why),
        })
    };
    wait::until(wait, &format!("vm {vm}"), look).await
}

/// Does it run, after it was asked to at `since`?
fn runs(vm: &VmView, since: Seq) -> Look<()> {
    let ended = vm.last_exit.as_ref().filter(|exit| exit.at > since);
    match (vm.status, ended) {
        (VmStatus::Up, _) => Look::Done(()),
        (VmStatus::Suspended, Some(exit)) => {
            let why = output::exit_line(exit);
            Look::Never(format!("vm {} did not wake up: {why}; what it was is kept", vm.name))
        }
        (VmStatus::Down, Some(exit)) => Look::Never(format!("vm {} ended: {}", vm.name, output::exit_line(exit))),
        (VmStatus::Down, None) if vm.desired != DesiredView::Running => {
            Look::Never(format!("vm {} was stopped by another command", vm.name))
        }
        (status, Some(exit)) => {
            Look::NotYet(format!("it is {status} again, after it ended: {}", output::exit_line(exit)))
        }
        (status, None) => Look::NotYet(format!("it is {status}")),
    }
}

/// Did the migration that began at `since`, or earlier, bring it to another host?
fn has_moved(vm: &VmView, since: Seq) -> Look<()> {
    let began = vm.migration.as_ref().map_or(since, |migration| Seq::from(migration.id));
    let name = &vm.name;
    // It has a new permit all the same, when it was started again.
    let ended = vm.last_exit.as_ref().filter(|exit| exit.at > began);
    if let (None, Some(exit)) = (&vm.migration, ended) {
        return Look::Never(format!("vm {name} ended on its way: {}; it is {}", output::exit_line(exit), vm.status));
    }
    match (&vm.migration, vm.epoch) {
        (None, Some(epoch)) if Seq::from(epoch) > began => Look::Done(()),
        (None, Some(_)) => Look::Never(format!(
            "vm {name} stays where it is; `quorate events --entity vm/{name} --from oldest` says why"
        )),
        (None, None) => Look::Never(format!("vm {name} runs no more")),
        (Some(migration), _) if migration.committed => Look::NotYet(format!("it has left for {}", migration.to)),
        (Some(migration), _) => {
            let far = migration.progress.map_or_else(
                || "it sets out".to_owned(),
                |it| {
                    format!(
                        "round {}, {} MiB sent, {} MiB left",
                        it.round,
                        it.sent_bytes >> 20,
                        it.remaining_bytes >> 20
                    )
                },
            );
            Look::NotYet(far)
        }
    }
}

fn is_suspended(vm: &VmView, since: Seq) -> Look<()> {
    match (vm.status, &vm.suspension) {
        (VmStatus::Suspended, _) => Look::Done(()),
        (status, Some(_)) => Look::NotYet(format!("it is {status}")),
        (status, None) => Look::Never(format!(
            "vm {name} is {status} and was not suspended; `quorate events --entity vm/{name} --from {since}` says why",
            name = vm.name
        )),
    }
}

fn is_down(vm: &VmView, _since: Seq) -> Look<()> {
    match vm.status {
        VmStatus::Down => Look::Done(()),
        status if vm.desired == DesiredView::Running => {
            Look::Never(format!("vm {} was started by another command and is {status}", vm.name))
        }
        status => Look::NotYet(format!("it is {status}")),
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;

use std::io::Write;

use clap::Parser;
use hostd_api::vm::ExitView;
use hostd_api::vm::MigrationView;
use statemachine::Epoch;
use statemachine::HostId;
use statemachine::VmId;
use statemachine::ids::MigrationId;
use statemachine::state::ExitReason;
use statemachine::state::ReleaseClass;

use super::*;
use crate::args::Cli;
use crate::args::Command;

fn vm(status: VmStatus, desired: DesiredView) -> VmView {
    VmView {
        id: VmId::default(),
        name: "web1".into(),
        status,
        cluster: ClusterId(1),
        cluster_name: "Default".into(),
        run_strategy: RunStrategy::Manual,
        desired,
        host: None,
        host_name: None,
        epoch: None,
        release: ReleaseClass::Operator,
        observed: None,
        last_exit: None,
        migration: None,
        suspension: None,
        disk_fault: None,
        guest: None,
        spec: std::sync::Arc::new(VmSpecBody::default().into_spec()),
        spec_pending: false,
        devices: Vec::new(),
        memory_target_mib: None,
    }
}

fn exit_at(seq: u64) -> Option<ExitView> {
    let reason = ExitReason::StartFailed;
    Some(ExitView { reason, detail: "no such kernel".into(), host: HostId(1), epoch: Epoch(8), at: Seq(seq) })
}

#[test]
fn waiting_for_a_start_ends_when_the_guest_ended_and_says_how() {
    let failed = VmView { last_exit: exit_at(12), ..vm(VmStatus::Down, DesiredView::PowerOff) };
    let Look::Never(why) = runs(&failed, Seq(10)) else { panic!("it waits on") };
    assert!(why.contains("start_failed") && why.contains("no such kernel"), "{why}");
}

#[test]
fn a_guest_that_does_not_wake_up_is_said_to_sleep_on() {
    let failed = VmView { last_exit: exit_at(12), ..vm(VmStatus::Suspended, DesiredView::Shutdown) };
    let Look::Never(why) = runs(&failed, Seq(10)) else { panic!("it waits on") };
    assert!(why.contains("did not wake up") && why.contains("no such kernel"), "{why}");
    let asleep = VmView { last_exit: exit_at(5), ..failed };
    assert!(matches!(runs(&asleep, Seq(10)), Look::NotYet(_)), "its permit is on its way");
    assert!(matches!(is_suspended(&asleep, Seq(10)), Look::Done(())));
    let gave_up = vm(VmStatus::Up, DesiredView::Running);
    let Look::Never(why) = is_suspended(&gave_up, Seq(10)) else { panic!("it waits on") };
    assert!(why.contains("quorate events"), "{why}");
}

#[test]
fn an_exit_before_the_start_is_history() {
    let starting = VmView { last_exit: exit_at(5), ..vm(VmStatus::PoweringUp, DesiredView::Running) };
    assert!(matches!(runs(&starting, Seq(10)), Look::NotYet(_)));
    assert!(matches!(runs(&VmView { status: VmStatus::Up, ..starting }, Seq(10)), Look::Done(())));
}

#[test]
fn a_move_is_over_when_the_guest_is_elsewhere_or_stays() {
    let at =
        |epoch, migration| VmView { epoch: Some(Epoch(epoch)), migration, ..vm(VmStatus::Up, DesiredView::Running) };
    let migration = |committed| {
        let (from, to) = ("n1".to_owned(), "n2".to_owned());
        Some(MigrationView { id: MigrationId(20), from, to, committed, progress: None })
    };
    assert!(matches!(has_moved(&at(10, migration(false)), Seq(20)), Look::NotYet(_)));
    assert!(matches!(has_moved(&at(24, migration(true)), Seq(20)), Look::NotYet(_)));
    assert!(matches!(has_moved(&at(24, None), Seq(20)), Look::Done(())));
    assert!(matches!(has_moved(&at(10, None), Seq(20)), Look::Never(_)), "it was aborted");
    let restarted = VmView { last_exit: exit_at(22), ..at(24, None) };
    let Look::Never(why) = has_moved(&restarted, Seq(20)) else { panic!("it ended, and was started again") };
    assert!(why.contains("ended on its way") && why.contains("no such kernel"), "{why}");
    let earlier = VmView { last_exit: exit_at(12), ..at(24, None) };
    assert!(matches!(has_moved(&earlier, Seq(20)), Look::Done(())));
    assert!(matches!(has_moved(&vm(VmStatus::Down, DesiredView::Running), Seq(20)), Look::Never(_)));
}

#[test]
fn a_vm_that_is_started_again_while_it_stops_is_not_waited_for() {
    assert!(matches!(is_down(&vm(VmStatus::PoweringDown, DesiredView::Shutdown), Seq(1)), Look::NotYet(_)));
    assert!(matches!(is_down(&vm(VmStatus::Up, DesiredView::Running), Seq(1)), Look::Never(_)));
    assert!(matches!(is_down(&vm(VmStatus::Down, DesiredView::Shutdown), Seq(1)), Look::Done(())));
}

fn create_args(line: &[&str]) -> CreateArgs {
    let words = ["quorate", "vm", "create"].iter().chain(line);
    match Cli::try_parse_from(words).unwrap().command {
        Command::Vm(VmCommand::Create(args)) => *args,
        _ => panic!("not vm create"),
    }
}

#[test]
fn a_definition_comes_from_a_file_in_json_or_yaml_with_options_over_it() {
    for text in [
        r#"{"name":"db1","run_strategy":"Always","spec":{"kernel":"/k","vcpus":4}}"#,
        "name: db1\nrun_strategy: Always\nspec:\n  kernel: /k\n  vcpus: 4\n",
    ] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap();
        let body = definition(create_args(&["db2", "--file", path, "--vcpus", "2"])).unwrap();
        assert_eq!((body.name.as_str(), body.run_strategy), ("db2", RunStrategy::Always));
        assert_eq!((body.spec.kernel.as_deref(), body.spec.vcpus), (Some("/k"), Some(2)));
    }
}

#[test]
fn a_misspelt_definition_and_a_vm_without_a_kernel_are_refused_here() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"name: db1\nspec: {kernel: /k, cpus: 2}\n").unwrap();
    let refused = definition(create_args(&["--file", file.path().to_str().unwrap()])).unwrap_err();
    assert!(refused.to_string().contains("cpus"), "{refused}");
    assert_eq!(definition(create_args(&["db1"])).unwrap_err().code(), 2);
}

#[test]
fn a_change_holds_what_was_named_and_nothing_else() {
    let words = ["quorate", "vm", "change", "web1", "--memory", "2GiB", "--no-disks"];
    let Command::Vm(VmCommand::Change(args)) = Cli::try_parse_from(words).unwrap().command else { panic!() };
    let json = serde_json::to_value(patch(&args, VmSpecBody::default()).unwrap()).unwrap();
    assert_eq!(json, serde_json::json!({"spec": {"memory_mib": 2048, "disks": []}}));
}

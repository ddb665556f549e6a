use std::time::Duration;

use clap::CommandFactory;
use hostd_api::spec::VmSpecBody;
use statemachine::state::DiskFormat;
use statemachine::state::OnError;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_command_line_contradicts_itself_nowhere() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_teaches_by_an_example() {
    fn visit(path: &str, command: &clap::Command) {
        let path = format!("{path} {}", command.get_name());
        let mut has_children = false;
        for child in command.get_subcommands().filter(|child| child.get_name() != "help") {
            has_children = true;
            visit(&path, child);
        }
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(has_children || help.contains("quorate "), "`{path}` has no example");
    }
    visit("", &Cli::command());
}

#[test]
fn durations_are_typed_as_people_say_them() {
    for (text, seconds) in [("30s", 30), ("90m", 5400), ("3h", 10_800), ("30d", 2_592_000), ("1d 12h", 129_600)] {
        assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
    }
    for text in ["", "3", "three hours", "0s", "-3h", "1mo", "99999999999999999999h"] {
        assert!(parse_duration(text).is_err(), "{text:?}");
    }
}

#[test]
fn sizes_of_memory_are_powers_of_1024_and_need_a_unit() {
    for (text, mib) in [("512MiB", 512), ("2GiB", 2048), ("2g", 2048), ("1 TiB", 1 << 20)] {
        assert_eq!(parse_memory_mib(text), Ok(mib), "{text}");
    }
    for text in ["", "512", "2GB", "-1G", "1.5G", "99999999999999999999T", "18446744073709551615T", "Gib"] {
        assert!(parse_memory_mib(text).is_err(), "{text:?}");
    }
}

#[test]
fn a_disk_needs_an_id_and_a_path_and_knows_no_other_words() {
    let disk = parse_disk("id=data,path=/dev/disk/by-id/x=1,ro").unwrap();
    assert_eq!((disk.id.as_str(), disk.path.as_str()), ("data", "/dev/disk/by-id/x=1"));
    assert!(disk.read_only && !disk.shareable);
    for text in ["", "path=/x", "id=a", "id=a,path=/x,rw", "id=a,path=/x,cache=none"] {
        assert!(parse_disk(text).is_err(), "{text:?}");
    }
}

#[test]
fn options_go_over_the_definition_of_a_file() {
    let mut spec = VmSpecBody { vcpus: Some(4), kernel: Some("/a".into()), ..Default::default() };
    let cli = parse("quorate vm create web1 --kernel /b --memory 1GiB --ha --disk id=r,path=/r --nic id=lan,bridge=br0,mac=52:54:00:12:34:56").unwrap();
    let Command::Vm(VmCommand::Create(create)) = cli.command else { panic!("not vm create") };
    create.machine.apply("web1", None, &mut spec);
    assert_eq!((spec.vcpus, spec.memory_mib, spec.highly_available), (Some(4), Some(1024), Some(true)));
    assert_eq!(spec.kernel.as_deref(), Some("/b"));
    assert_eq!(spec.disks.map(|disks| disks.len()), Some(1));
    assert_eq!(spec.nics.map(|nics| nics.len()), Some(1));
}

#[test]
fn a_disk_is_what_its_words_say() {
    let disk = parse_disk("id=root,path=/a:b,format=qcow2,backing=/base:1.qcow2:qcow2,backing=/raw:raw,on-error=enospc,iops=500,mib-per-second=20").unwrap();
    assert_eq!((disk.format, disk.on_error), (DiskFormat::Qcow2, OnError::Enospc));
    let backing: Vec<_> = disk.backing.iter().map(|image| (image.path.as_str(), image.format)).collect();
    assert_eq!(backing, [("/base:1.qcow2", DiskFormat::Qcow2), ("/raw", DiskFormat::Raw)]);
    let limit = disk.rate_limit.unwrap();
    assert_eq!((limit.iops, limit.bytes_per_second), (Some(500), Some(20 << 20)));
    let plain = parse_disk("id=root,path=/a").unwrap();
    assert_eq!((plain.format, plain.on_error, plain.rate_limit), (DiskFormat::Raw, OnError::Stop, None));
    for option in ["format=vmdk", "on-error=panic", "backing=/base", "backing=/base:vmdk", "iops=fast", "iops=-1"] {
        assert!(parse_disk(&format!("id=root,path=/a,{option}")).is_err(), "{option}");
    }
}

#[test]
fn a_network_card_is_an_id_and_a_bridge() {
    let nic = parse_nic("id=lan,bridge=br0").unwrap();
    assert_eq!((nic.id.as_str(), nic.bridge.as_str(), nic.mac), ("lan", "br0", None));
    let mac = parse_nic("bridge=br0,mac=52:54:00:12:34:56,id=lan").unwrap().mac;
    assert_eq!(mac.map(|mac| mac.to_string()).as_deref(), Some("52:54:00:12:34:56"));
    for text in ["", "id=lan", "bridge=br0", "id=lan,bridge=br0,mac=52", "id=lan,bridge=br0,vlan=3"] {
        assert!(parse_nic(text).is_err(), "{text:?}");
    }
}

#[test]
fn contradictions_on_the_command_line_are_usage_errors() {
    for line in [
        "quorate",
        "quorate vm",
        "quorate vm create",
        "quorate vm start",
        "quorate vm change web1 --initrd /i --no-initrd",
        "quorate vm change web1 --nic id=lan,bridge=br0 --no-nics",
        "quorate events --after x --from oldest",
        "quorate token create --purpose root",
        "quorate token revoke seventeen",
        "quorate -o xml status",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn global_options_are_taken_before_and_behind_the_command() {
    assert_eq!(parse("quorate -o json vm list").unwrap().output, Format::Json);
    assert_eq!(parse("quorate vm list -o yaml").unwrap().output, Format::Yaml);
}

#[test]
fn a_server_without_its_authority_or_a_token_is_a_usage_error() {
    let connection = |line: &str| parse(line).unwrap().connection.options();
    assert!(matches!(connection("quorate status --socket /tmp/s"), Ok(Options::Socket(_))));
    let bare = connection("quorate status --server https://192.0.2.1:7443").unwrap_err();
    assert_eq!(bare.code(), 2);
    let full = "quorate status --server https://a:7443,https://b:7443 --ca ca.pem --token-file t";
    assert!(matches!(connection(full), Ok(Options::Servers { urls, .. }) if urls.len() == 2));
}

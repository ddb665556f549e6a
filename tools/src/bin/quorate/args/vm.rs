//! `quorate vm ...`.

use std::path::PathBuf;

use clap::Args;
use clap::Subcommand;
use hostd_api::spec::DiskBody;
use hostd_api::spec::NicBody;
use hostd_api::spec::VmSpecBody;

use super::CpuArgs;
use super::FirstBootArgs;
use super::MigrationArgs;
use super::Pages;
use super::Panic;
use super::Release;
use super::Strategy;
use super::Wait;
use super::Watchdog;
use super::parse_disk;
use super::parse_duration;
use super::parse_memory_mib;
use super::parse_nic;

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Define a VM
    #[command(after_help = "Examples:
  quorate vm create web1 --kernel /srv/vm/vmlinuz --initrd /srv/vm/initrd.img --vcpus 2 --memory 1GiB \\
      --disk id=root,path=/srv/vm/web1.raw --cmdline 'console=ttyS0 root=/dev/vda1' --start --wait
  quorate vm create db1 --file db1.json        the body of POST /v1/vms, JSON or YAML")]
    Create(Box<CreateArgs>),
    /// Change a VM; a changed machine takes effect at its next start, but disks and network cards come and leave at once
    #[command(after_help = "Example:\n  quorate vm change web1 --memory 2GiB --run-strategy always")]
    Change(Box<ChangeArgs>),
    /// List VMs
    #[command(after_help = "Example:\n  quorate vm list")]
    List,
    /// Everything about a VM
    #[command(after_help = "Example:\n  quorate vm show web1 -o yaml")]
    Show { vm: String },
    /// Start a VM, or wake it up; the scheduler chooses the host
    #[command(after_help = "Example:\n  quorate vm start web1 --wait")]
    Start {
        vm: String,
        /// It must run on this host
        #[arg(long)]
        host: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Shut a VM down by its power button, or pull the plug
    #[command(after_help = "Examples:\n  quorate vm stop web1 --wait\n  quorate vm stop web1 --power-off")]
    Stop {
        vm: String,
        /// As pulling the plug: the guest is not asked; of a suspended one, its memory is thrown away
        #[arg(long)]
        power_off: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Reset a VM as its reset button does; it stays on its host
    #[command(after_help = "Example:\n  quorate vm reset web1")]
    Reset { vm: String },
    /// Move a running VM to another host without a restart; it runs while its memory is copied
    #[command(after_help = "Examples:\n  quorate vm migrate web1 --wait\n  quorate vm migrate web1 --to n2")]
    Migrate {
        vm: String,
        /// It must go to this host
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Let a VM stay that is on its way to another host
    #[command(after_help = "Example:\n  quorate vm cancel-migration web1")]
    CancelMigration { vm: String },
    /// Write a running VM down into a file of its host, and end it; `start` has it go on where it was
    #[command(after_help = "Example:\n  quorate vm suspend web1 --wait && quorate vm start web1 --wait")]
    Suspend {
        vm: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Stop a VM's processors; it keeps its memory and its place
    #[command(after_help = "Example:\n  quorate vm pause web1 && quorate vm resume web1")]
    Pause { vm: String },
    /// Give a VM disks and network cards more; a running one gets them at once
    #[command(after_help = "Example:\n  quorate vm plug web1 --disk id=data,path=/srv/vm/data.raw --wait")]
    Plug {
        vm: String,
        /// As for `vm create`
        #[arg(long, value_name = "DISK", value_parser = parse_disk, required_unless_present = "nic")]
        disk: Vec<DiskBody>,
        /// As for `vm create`
        #[arg(long, value_name = "NIC", value_parser = parse_nic)]
        nic: Vec<NicBody>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take disks and network cards away from a VM; a running one is asked to give them up. Disks are left alone
    #[command(after_help = "Example:\n  quorate vm unplug web1 data --wait")]
    Unplug {
        vm: String,
        /// Ids of disks and network cards
        #[arg(required = true, value_name = "DEVICE")]
        devices: Vec<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Have a running VM make do with less memory, or give it back what it was started with
    #[command(after_help = "Example:\n  quorate vm memory web1 512MiB")]
    Memory {
        vm: String,
        #[arg(value_name = "SIZE", value_parser = parse_memory_mib)]
        memory: u64,
    },
    /// Let a paused VM go on; one that an error of a disk holds tries again at once
    #[command(after_help = "Example:\n  quorate vm resume web1")]
    Resume { vm: String },
    /// Talk to a VM on its serial console; Ctrl-] leaves
    #[command(after_help = "Examples:
  quorate vm console web1
  quorate vm console web1 --for 10s </dev/null | grep login:")]
    Console {
        vm: String,
        /// Leave after this time
        #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
        for_duration: Option<std::time::Duration>,
    },
    /// Forget a VM that is down; its disks are left alone
    #[command(after_help = "Example:\n  quorate vm stop web1 --wait && quorate vm delete web1")]
    Delete { vm: String },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name, unique in the site: a-z, 0-9, - and .
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// Take the definition from a file (JSON or YAML), or - for standard input; options go over it
    #[arg(long, short, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// When it runs [default: manual]
    #[arg(long, value_enum)]
    pub run_strategy: Option<Strategy>,
    /// Id of the cluster; the `Default` one when left out
    #[arg(long, value_name = "ID")]
    pub cluster: Option<u64>,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Start it at once
    #[arg(long)]
    pub start: bool,
    /// With --start: wait until it runs
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct ChangeArgs {
    pub vm: String,
    /// A new name
    #[arg(long, value_name = "NAME")]
    pub rename: Option<String>,
    /// When it runs
    #[arg(long, value_enum)]
    pub run_strategy: Option<Strategy>,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Boot without an initial RAM disk
    #[arg(long, conflicts_with = "initrd")]
    pub no_initrd: bool,
    /// Take all disks away
    #[arg(long, conflicts_with = "disk")]
    pub no_disks: bool,
    /// Take all network cards away
    #[arg(long, conflicts_with = "nic")]
    pub no_nics: bool,
    /// Tell the guest nothing at its first boot
    #[arg(long, conflicts_with_all = ["host_name", "user", "address", "gateway", "dns", "user_data"])]
    pub no_first_boot: bool,
}

/// What a guest is made of; what is left out stays, or has its default.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct MachineArgs {
    /// Linux kernel: bzImage, or ELF with a PVH note; a path on the hosts
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<String>,
    /// Initial RAM disk; a path on the hosts
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<String>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Number of virtual CPUs
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory: 512MiB, 2GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mib)]
    pub memory: Option<u64>,
    /// A disk: id=NAME,path=PATH[,OPTION...]; once for each, and all of them
    ///
    /// Options: ro; shareable; format=raw|qcow2 [raw]; backing=PATH:FORMAT, once for each image under a qcow2 one, nearest
    /// first; on-error=stop|report|ignore|enospc [stop]; iops=N and mib-per-second=N, what it may do at most; slot=N, where the guest
    /// finds it.
    #[arg(long, value_name = "DISK", value_parser = parse_disk)]
    pub disk: Vec<DiskBody>,
    /// A network card: id=NAME,bridge=BRIDGE[,mac=ADDRESS][,slot=N]; once for each, and all of them
    #[arg(long, value_name = "NIC", value_parser = parse_nic)]
    pub nic: Vec<NicBody>,
    /// Restart it elsewhere when its host is lost
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub ha: Option<bool>,
    /// What may end its right to run without its host's word
    #[arg(long, value_enum)]
    pub release: Option<Release>,
    /// What guest memory is made of
    #[arg(long, value_enum)]
    pub pages: Option<Pages>,
    /// When the guest's watchdog runs out [default: reset]
    #[arg(long, value_enum)]
    pub on_watchdog: Option<Watchdog>,
    /// When the guest's kernel panics [default: report]
    #[arg(long, value_enum)]
    pub on_panic: Option<Panic>,
    #[command(flatten)]
    pub cpu: CpuArgs,
    #[command(flatten)]
    pub first_boot: FirstBootArgs,
    #[command(flatten)]
    pub migration: MigrationArgs,
}

impl MachineArgs {
    /// Puts what was given over `spec`, of a VM of this name. `user_data` is what its file holds.
    pub fn apply(self, vm: &str, user_data: Option<String>, spec: &mut VmSpecBody) {
        fn over<T>(field: &mut Option<T>, given: Option<T>) {
            if given.is_some() {
                *field = given;
            }
        }
        over(&mut spec.kernel, self.kernel);
        over(&mut spec.initrd, self.initrd);
        over(&mut spec.cmdline, self.cmdline);
        over(&mut spec.vcpus, self.vcpus);
        over(&mut spec.memory_mib, self.memory);
        over(&mut spec.disks, (!self.disk.is_empty()).then_some(self.disk));
        over(&mut spec.nics, (!self.nic.is_empty()).then_some(self.nic));
        over(&mut spec.highly_available, self.ha);
        over(&mut spec.release, self.release.map(Into::into));
        over(&mut spec.pages, self.pages.map(Into::into));
        over(&mut spec.on_watchdog, self.on_watchdog.map(Into::into));
        over(&mut spec.on_panic, self.on_panic.map(Into::into));
        self.cpu.apply(&mut spec.cpu);
        self.first_boot.apply(vm, user_data, &mut spec.first_boot);
        self.migration.apply(&mut spec.migration);
    }
}

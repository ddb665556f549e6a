//! Puts a machine together, in the order in which its parts need each other.
//!
//! Slots are addresses that the guest sees, so they follow fixed rules of the machine type: the console has slot 0, the nth disk slot
//! 1 + n, the nth network card the nth slot from the top. Disks and network cards grow towards each other, and neither moves when
//! one of the other kind comes or goes; `VmmConfig::check` keeps them from meeting.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use vmm_control::slots::{FIRST_SLOT, LAST_SLOT};
use vmm_control::{MachineType, VmmConfig};

use super::device_manager::DeviceManager;
use super::fixed::{self, FixedHandles};
use super::kvm::{self, KvmError, KvmVm};
use super::layout::{
    ECAM_BASE, ECAM_BUSES, GSI_COM1, GSI_SCI, Layout, PORT_BOOT_TIMER, PORT_COM1, PORT_DEBUG, PORT_PM_BASE,
    PORT_PVPANIC, PORT_RESET,
};
use super::msi::KvmMsi;
use super::open_device::{Connections, PlugError};
use super::{Endings, Machine};
use crate::acpi::{self, AcpiError};
use crate::agent_channel::AgentChannel;
use crate::boot::{self, BootError, BootFiles};
use crate::bus::{BusError, MmioBus, PioBus, PioDevice};
use crate::console_hub::{self, ConsoleError, ConsoleHub};
use crate::cpu::errand::Errands;
use crate::cpu::gate::RunGate;
use crate::cpu::model::{self, ModelError};
use crate::cpu::regs::{self, RegsError};
use crate::cpu::vcpu::{Shared, Vcpu};
use crate::cpu::{cpuid, msr};
use crate::devices::balloon::BalloonError;
use crate::devices::console::{Console, ConsoleDeviceError};
use crate::devices::legacy::boot_timer::{BootTime, BootTimerPort};
use crate::devices::legacy::debug_port::DebugPort;
use crate::devices::legacy::pm::{self, PowerManagement};
use crate::devices::legacy::pvpanic::PvPanic;
use crate::devices::legacy::reset::{KEYBOARD_COMMAND_PORT, KEYBOARD_DATA_PORT, KeyboardController, ResetPort};
use crate::devices::legacy::rtc::{self, RealTimeClock};
use crate::devices::legacy::serial::{self, SerialPort};
use crate::devices::legacy::vmgenid::{VmGeneration, VmGenerationError};
use crate::devices::rng::RngError;
use crate::devices::watchdog::WatchdogError;
use crate::incident::Incidents;
use crate::interrupt::InterruptError;
use crate::io_stop::IoStop;
use crate::lease::Lease;
use crate::lease::quiesce::DiskGate;
use crate::memory::huge_pages::Reserved;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::metrics::ExitCounters;
use crate::pci::topology::MAX_SLOTS;
use crate::pci::{PciBus, PciError, PciMap, Topology};
use crate::saved::header::{Shape, chosen_cpu};
use crate::saved::parts::{GivenProcessor, LegacyParts, Parts};
use crate::saved::processor::Leaves;
use crate::saved::session::Saves;
use crate::saved::vcpu::VcpuAbilities;
use crate::smbios::{self, Board, SmbiosError};
use crate::virtio::pci::TransportError;

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    #[error(transparent)]
    Registers(#[from] RegsError),
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error("two devices want the same addresses")]
    Bus(#[from] BusError),
    #[error("cannot connect an interrupt line")]
    Line(#[source] io::Error),
    #[error("cannot start a vCPU thread")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Virtio(#[from] TransportError),
    #[error(transparent)]
    Device(#[from] PlugError),
    #[error(transparent)]
    ConsoleDevice(#[from] ConsoleDeviceError),
    #[error(transparent)]
    Generation(#[from] VmGenerationError),
    #[error(transparent)]
    Rng(#[from] RngError),
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("this host's KVM runs at most {limit} vCPUs a guest, not {asked}")]
    TooManyVcpus { asked: u16, limit: usize },
}

/// What outlives a machine and is shared by all machines of this process.
pub struct Context {
    pub config: VmmConfig,
    pub kvm: Kvm,
    pub files: BootFiles,
    /// The guest's memory, where it is in huge pages.
    pub reserved: Option<Reserved>,
    /// Disks and network cards, which come and go.
    pub devices: Arc<DeviceManager>,
    pub console: Arc<ConsoleHub>,
    pub agent: Arc<AgentChannel>,
    pub gate: Arc<RunGate>,
    pub disk_gate: Arc<DiskGate>,
    pub io_stop: Arc<IoStop>,
    pub incidents: Arc<Incidents>,
    /// The guest was restarted by its watchdog, and has not taken note of it.
    pub watchdog_has_fired: Arc<AtomicBool>,
    pub lease: Arc<Lease>,
    pub endings: Arc<Endings>,
    pub boot_time: Arc<BootTime>,
    pub exits: Arc<ExitCounters>,
    pub saves: Arc<Saves>,
    /// The CPUID of each vCPU of a guest that began elsewhere. It keeps it over a reset too.
    pub given_cpuid: OnceLock<Vec<CpuId>>,
}

/// How a machine begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// With a kernel in its memory.
    Boot,
    /// With empty memory, and disks that are not open: a guest from elsewhere moves in.
    Incoming,
}

/// Builds a machine. Nothing of it runs yet.
pub fn build(context: &Context, beginning: Beginning) -> Result<Machine, MachineError> {
    let config = &context.config;
    let layout = Layout::new(config.memory_bytes, config.max_memory_bytes());
    let memory = memory::allocate(&layout, context.reserved.as_ref())?;
    let vm = KvmVm::new(&context.kvm, &memory)?;
    let msi = KvmMsi::new(Arc::clone(&vm))?;
    let pio = PioBus::new();
    let mmio = MmioBus::new();

    let legacy = add_legacy_devices(context, &vm, &memory, &pio, beginning)?;
    let Hierarchy { bus, connections, fixed } = add_pci(context, &layout, &vm, &memory, msi, (&pio, &mmio), beginning)?;
    let entry = match beginning {
        Beginning::Boot => Some(load_guest(context, &memory, &layout)?),
        Beginning::Incoming => None,
    };

    let shared = Arc::new(Shared {
        pio,
        mmio,
        gate: Arc::clone(&context.gate),
        lease: Arc::clone(&context.lease),
        events: Arc::clone(&context.endings) as _,
        exits: Arc::clone(&context.exits),
        errands: Errands::default(),
    });
    let supported = cpuid::supported(&context.kvm)?;
    let told = model::leaves(config.cpu().model, &supported, layout.address_bits())?;
    let vcpus = create_vcpus(context, &told, &vm, &memory, entry, &shared)?;
    let nmi = Arc::clone(&vm);
    let parts = Parts {
        memory,
        pci: Arc::clone(&bus),
        legacy,
        shared,
        shape: shape(config),
        devices: Arc::clone(&context.devices),
        disk_gate: Arc::clone(&context.disk_gate),
        supported,
        abilities: VcpuAbilities::of(&context.kvm, vm.fd(), config.cpu().model)?,
        processor: Mutex::new(given_processor(&vcpus)?),
        vm,
    };
    context.devices.attach(bus, connections);
    Ok(Machine { parts: Arc::new(parts), vcpus, threads: Vec::new(), saves: Arc::clone(&context.saves), fixed, nmi })
}

/// What the guest sees of its configuration, but for what comes and goes.
fn shape(config: &VmmConfig) -> Shape {
    Shape {
        vm: config.vm,
        machine: config.machine,
        vcpus: config.vcpus,
        cpu: chosen_cpu(config.cpu(), config.vcpus),
        memory_bytes: config.memory_bytes,
        max_memory_bytes: config.max_memory_bytes(),
        virtio_keyboard: console_hub::keyboard_is_virtio(&config.cmdline),
        watchdog: config.watchdog.is_some(),
        slots: BTreeMap::new(),
    }
}

fn given_processor(vcpus: &[Vcpu]) -> Result<GivenProcessor, KvmError> {
    let first = vcpus.first().ok_or(KvmError::Missing("a vCPU"))?;
    let tsc_khz = first.fd().get_tsc_khz().map_err(kvm::refused("read the frequency of the TSC"))?;
    Ok(GivenProcessor { cpuid: Leaves::from(first.cpuid()), tsc_khz })
}

/// The bus, what later devices are connected to, and the functions that every guest has.
struct Hierarchy {
    bus: Arc<PciBus>,
    connections: Connections,
    fixed: FixedHandles,
}

const CONSOLE_SLOT: u8 = 0;
const _: () = assert!(FIRST_SLOT == CONSOLE_SLOT + 1 && LAST_SLOT == MAX_SLOTS - 1);

/// Slots of the disks that name none, in the order of the configuration: hostd writes them in the order of the VM's definition.
pub(super) fn disk_slots() -> impl Iterator<Item = u8> {
    FIRST_SLOT..=LAST_SLOT
}

/// Slots of the network cards, likewise.
pub(super) fn nic_slots() -> impl Iterator<Item = u8> {
    (FIRST_SLOT..=LAST_SLOT).rev()
}

/// The bus behind the last root port: slot n leads to bus n + 1.
const LAST_BUS: u8 = MAX_SLOTS;

/// The PCI hierarchy: the fixed functions, and a root port for each slot, with its device or without.
///
/// An empty port costs 17 µs of the machine's start (24 of them 0.4 ms), 1.1 KiB, an interrupt vector with its descriptor, and the guest
/// the time to find it; in exchange any slot can take a device at any time, and no bus number depends on how many devices there are.
fn add_pci(
    context: &Context,
    layout: &Layout,
    vm: &Arc<KvmVm>,
    memory: &GuestMemory,
    msi: Arc<KvmMsi>,
    (pio, mmio): (&PioBus, &MmioBus),
    beginning: Beginning,
) -> Result<Hierarchy, MachineError> {
    let map = PciMap {
        ecam_base: ECAM_BASE,
        ecam_buses: ECAM_BUSES,
        mmio32: layout.mmio32().base..layout.mmio32().end(),
        mmio64: layout.mmio64().base..layout.mmio64().end(),
    };
    let connections = Connections { memory: memory.clone(), msi: msi.clone(), io_events: vm.clone() };
    let mut topology = Topology::new(map, msi)?;
    topology.tell(context.devices.slot_events());
    let keyboard = Arc::new(context.console.device()?);
    if console_hub::keyboard_is_virtio(&context.config.cmdline) {
        context.console.focus(&keyboard);
    }
    let console = Console::open(keyboard, Arc::clone(&context.agent), Arc::clone(&context.gate))?;
    topology.add_root_port_device(CONSOLE_SLOT, connections.connect(console)?)?;
    for (slot, device) in context.devices.open_all(beginning)? {
        topology.add_root_port_device(slot, connections.connect(device)?)?;
    }
    topology.add_empty_root_ports()?;
    let fixed = fixed::add(&mut topology, context, layout, &connections)?;
    let bus = topology.build();
    bus.program()?;
    bus.insert_into(pio, mmio)?;
    Ok(Hierarchy { bus, connections, fixed })
}

fn add_legacy_devices(
    context: &Context,
    vm: &Arc<KvmVm>,
    memory: &GuestMemory,
    pio: &PioBus,
    beginning: Beginning,
) -> Result<LegacyParts, MachineError> {
    let power = Arc::clone(&context.endings);
    let insert = |port: u16, count: u64, device: Arc<Mutex<dyn PioDevice>>| pio.insert(u64::from(port), count, device);
    let console = Arc::new(context.console.device()?);
    let line = vm.edge_line(GSI_COM1).map_err(MachineError::Line)?;
    let serial = Arc::new(Mutex::new(SerialPort::new(line, console)));
    insert(PORT_COM1, serial::PORTS, serial.clone())?;

    let pm = Arc::new(Mutex::new(PowerManagement::new(vm.level_line(GSI_SCI), power.clone())));
    insert(PORT_PM_BASE, pm::PORTS, pm.clone())?;

    let clock = Arc::new(Mutex::new(RealTimeClock::default()));
    insert(rtc::PORT, rtc::PORTS, clock.clone())?;
    let reset = Arc::new(Mutex::new(ResetPort::new(power.clone())));
    insert(PORT_RESET, 1, reset.clone())?;
    let keyboard = KeyboardController::command(power);
    insert(KEYBOARD_COMMAND_PORT, 1, Arc::new(Mutex::new(keyboard)))?;
    let keyboard = KeyboardController::data();
    insert(KEYBOARD_DATA_PORT, 1, Arc::new(Mutex::new(keyboard)))?;
    let timer = BootTimerPort(Arc::clone(&context.boot_time));
    insert(PORT_BOOT_TIMER, 1, Arc::new(Mutex::new(timer)))?;
    let debug = Arc::new(Mutex::new(DebugPort::default()));
    insert(PORT_DEBUG, 1, debug)?;
    let pvpanic = Arc::new(Mutex::new(PvPanic::new(Arc::clone(&context.incidents) as _)));
    insert(PORT_PVPANIC, 1, pvpanic.clone())?;
    let generation = VmGeneration::new(memory.clone(), Arc::clone(&pm), context.config.generation());
    if beginning == Beginning::Boot {
        generation.place()?;
    }
    Ok(LegacyParts { pm, clock, serial, reset, pvpanic, generation: Arc::new(generation) })
}

fn machine_type_name(machine: MachineType) -> &'static str {
    match machine {
        MachineType::QDirect1 => "q-direct-1",
    }
}

fn load_guest(context: &Context, memory: &GuestMemory, layout: &Layout) -> Result<boot::Entry, MachineError> {
    let config = &context.config;
    let rsdp =
        acpi::write(memory, layout, acpi::Machine { vcpus: config.vcpus, cpu: config.cpu(), last_bus: LAST_BUS })?;
    let board = Board {
        product: machine_type_name(config.machine),
        // Of the machine type, not of this program: a guest sees the same on every host and after every upgrade.
        version: "1",
        serial: &config.identity.serial,
        uuid: config.identity.uuid,
    };
    smbios::write(memory, &board)?;
    Ok(boot::load(memory, layout, &context.files, rsdp)?)
}

/// Without an entry they have no state of their own to start with.
fn create_vcpus(
    context: &Context,
    told: &Leaves,
    vm: &Arc<KvmVm>,
    memory: &GuestMemory,
    entry: Option<boot::Entry>,
    shared: &Arc<Shared>,
) -> Result<Vec<Vcpu>, MachineError> {
    let (count, cpu) = (context.config.vcpus, context.config.cpu());
    let limit = context.kvm.get_max_vcpus();
    if usize::from(count) > limit {
        return Err(MachineError::TooManyVcpus { asked: count, limit });
    }
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let fd = vm.create_vcpu(cpu.apic_id(index))?;
        let given = context.given_cpuid.get().and_then(|all| all.get(usize::from(index))).cloned();
        let cpuid = match given {
            Some(given) => given,
            None => {
                cpuid::for_vcpu(told, cpu, index).to_kvm().ok_or(KvmError::Missing("room for these CPUID leaves"))?
            }
        };
        fd.set_cpuid2(&cpuid).map_err(kvm::refused("set CPUID"))?;
        msr::set_boot_msrs(&fd)?;
        regs::set_local_pins(&fd)?;
        if let (0, Some(entry)) = (index, entry) {
            regs::set_entry(&fd, memory, entry)?;
        }
        vcpus.push(Vcpu::new(index, fd, cpuid, Arc::clone(shared)));
    }
    Ok(vcpus)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vmm_control::config::{MAX_DISKS, MAX_DISKS_AND_NICS, MAX_NICS};

    use super::*;

    #[test]
    fn disks_and_network_cards_grow_towards_each_other_and_never_meet() {
        // Addresses that guests know: a change is another machine type.
        assert_eq!(disk_slots().take(3).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(nic_slots().take(3).collect::<Vec<_>>(), [23, 22, 21]);
        for nics in 0..=MAX_NICS {
            let disks = MAX_DISKS.min(MAX_DISKS_AND_NICS - nics);
            let taken: BTreeSet<u8> =
                [CONSOLE_SLOT].into_iter().chain(disk_slots().take(disks)).chain(nic_slots().take(nics)).collect();
            assert_eq!(taken.len(), 1 + disks + nics);
            assert!(taken.iter().all(|slot| *slot < MAX_SLOTS));
        }
    }
}

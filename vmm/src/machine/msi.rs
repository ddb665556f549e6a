//! Message-signalled interrupts on KVM: each vector is an irqfd with a route of its own in KVM's one routing table.
//!
//! Delivery never touches the table: a write to the irqfd is enough, from any thread. Only a guest that changes its MSI-X table does,
//! and then the whole table is handed to KVM again, which is how `KVM_SET_GSI_ROUTING` works.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::kvm::{KvmVm, to_io};
use super::layout::IOAPIC_PINS;
use crate::interrupt::{InterruptError, MsiSink, MsiVectors};

/// More than the devices of one guest ask for, and below KVM's 4096 routes.
const MAX_VECTORS: u32 = 2048;

/// The interrupt routing of one guest.
pub struct KvmMsi {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<KvmVm>,
    table: Mutex<Table>,
}

/// Numbers in use, and where each leads once the guest has said so.
#[derive(Default)]
struct Table {
    routes: BTreeMap<u32, Option<Message>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

impl KvmMsi {
    /// Sets the routes of the legacy lines, which stay.
    pub fn new(vm: Arc<KvmVm>) -> Result<Arc<Self>, InterruptError> {
        let shared = Arc::new(Shared { vm, table: Mutex::default() });
        shared.apply(&shared.table())?;
        Ok(Arc::new(Self { shared }))
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, table: &Table) -> Result<(), InterruptError> {
        let mut entries = legacy_routes();
        entries.extend(table.routes.iter().filter_map(|(gsi, message)| message.map(|m| msi_route(*gsi, m))));
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| InterruptError::Routing(io::Error::from_raw_os_error(libc::E2BIG)))?;
        self.vm.fd().set_gsi_routing(&routing).map_err(|e| InterruptError::Routing(to_io(e)))
    }
}

fn irqchip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// The wiring of a PC: two PICs in cascade, and an I/O APIC whose pin 2 has the timer (as the MADT says).
fn legacy_routes() -> Vec<kvm_irq_routing_entry> {
    let mut routes = Vec::new();
    for gsi in (0..16).filter(|gsi| *gsi != 2) {
        let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        routes.push(irqchip_route(gsi, chip, gsi % 8));
    }
    for gsi in (0..IOAPIC_PINS).filter(|gsi| *gsi != 2) {
        let pin = if gsi == 0 { 2 } else { gsi };
        routes.push(irqchip_route(gsi, KVM_IRQCHIP_IOAPIC, pin));
    }
    routes
}

impl MsiSink for KvmMsi {
    fn allocate(&self, vectors: u16) -> Result<Arc<dyn MsiVectors>, InterruptError> {
        let mut table = self.shared.table();
        let free: Vec<u32> = (IOAPIC_PINS..IOAPIC_PINS + MAX_VECTORS)
            .filter(|gsi| !table.routes.contains_key(gsi))
            .take(usize::from(vectors))
            .collect();
        if free.len() < usize::from(vectors) {
            return Err(InterruptError::NoVectors {
                wanted: vectors,
                used: table.routes.len(),
                limit: MAX_VECTORS as usize,
            });
        }
        let mut made = Vec::with_capacity(free.len());
        for gsi in free {
            made.push(Vector {
                gsi,
                fd: EventFd::new(EFD_NONBLOCK).map_err(InterruptError::EventFd)?,
                connected: Mutex::new(false),
            });
        }
        for vector in &made {
            table.routes.insert(vector.gsi, None);
        }
        Ok(Arc::new(KvmVectors { shared: Arc::clone(&self.shared), vectors: made }))
    }
}

struct Vector {
    gsi: u32,
    fd: EventFd,
    /// Whether the irqfd is registered, which is the same as unmasked.
    connected: Mutex<bool>,
}

/// The vectors of one function.
struct KvmVectors {
    shared: Arc<Shared>,
    vectors: Vec<Vector>,
}

impl KvmVectors {
    fn vector(&self, index: u16) -> Result<&Vector, InterruptError> {
        self.vectors
            .get(usize::from(index))
            .ok_or(InterruptError::NoSuchVector { index, count: self.vectors.len() as u16 })
    }
}

impl MsiVectors for KvmVectors {
    fn configure(&self, index: u16, address: u64, data: u32, masked: bool) -> Result<(), InterruptError> {
        let vector = self.vector(index)?;
        let mut connected = vector.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let vm = self.shared.vm.fd();
        if masked {
            if *connected {
                vm.unregister_irqfd(&vector.fd, vector.gsi).map_err(|e| InterruptError::Routing(to_io(e)))?;
                *connected = false;
            }
            return Ok(());
        }
        let message = Some(Message { address, data });
        {
            let mut table = self.shared.table();
            let before = table.routes.insert(vector.gsi, message);
            if before != Some(message)
                && let Err(error) = self.shared.apply(&table)
            {
                // The guest may have written an address that is none: the others keep their routes.
                table.routes.insert(vector.gsi, before.flatten());
                return Err(error);
            }
        }
        if !*connected {
            vm.register_irqfd(&vector.fd, vector.gsi).map_err(|e| InterruptError::Routing(to_io(e)))?;
            *connected = true;
        }
        Ok(())
    }

    fn trigger(&self, index: u16) -> Result<(), InterruptError> {
        let vector = self.vector(index)?;
        let connected = *vector.connected.lock().unwrap_or_else(PoisonError::into_inner);
        if !connected {
            return Ok(());
        }
        vector.fd.write(1).map_err(InterruptError::Deliver)
    }

    fn irqfd(&self, index: u16) -> Option<&EventFd> {
        self.vector(index).ok().map(|v| &v.fd)
    }
}

impl Drop for KvmVectors {
    fn drop(&mut self) {
        let vm = self.shared.vm.fd();
        for vector in &self.vectors {
            let connected = *vector.connected.lock().unwrap_or_else(PoisonError::into_inner);
            if connected && let Err(error) = vm.unregister_irqfd(&vector.fd, vector.gsi) {
                tracing::warn!(gsi = vector.gsi, %error, "cannot disconnect an interrupt");
            }
        }
        let mut table = self.shared.table();
        for vector in &self.vectors {
            table.routes.remove(&vector.gsi);
        }
        if let Err(error) = self.shared.apply(&table) {
            tracing::warn!(%error, "cannot give interrupt routes back");
        }
    }
}

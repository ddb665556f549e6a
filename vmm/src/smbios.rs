//! SMBIOS 3 tables: what the guest is told about the machine it is. cloud-init and inventory agents read the UUID and the serial.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::machine::layout::{HIGH_MEMORY_START, SMBIOS_START};
use crate::memory::GuestMemory;

const ENTRY_BYTES: u64 = 24;
/// Tables start behind the entry point, on the next 16.
const TABLE_OFFSET: u64 = 32;
const MANUFACTURER: &str = "Quorate";

#[derive(Debug, thiserror::Error)]
pub enum SmbiosError {
    #[error("the SMBIOS tables do not fit below 1 MiB")]
    TooLarge,
    #[error("cannot write the SMBIOS tables into guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// What the tables say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Board<'a> {
    /// The machine type.
    pub product: &'a str,
    pub version: &'a str,
    pub serial: &'a str,
    pub uuid: Uuid,
}

/// One structure: a fixed part that names its strings by number, then the strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut bytes = vec![kind, 0];
        bytes.extend(handle.to_le_bytes());
        Self { bytes, strings: Vec::new(), count: 0 }
    }

    fn string(mut self, text: &str) -> Self {
        if text.is_empty() {
            self.bytes.push(0);
        } else {
            self.count += 1;
            self.bytes.push(self.count);
            self.strings.extend(text.bytes());
            self.strings.push(0);
        }
        self
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend(data);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes[1] = self.bytes.len() as u8;
        self.bytes.append(&mut self.strings);
        // The set of strings ends with an empty one; with none at all there are two zeros.
        if self.count == 0 {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.bytes
    }
}

fn structures(board: &Board) -> Vec<u8> {
    let bios = Structure::new(0, 0)
        .string(MANUFACTURER)
        .string(board.version)
        .data(&[0, 0xe0])
        .string("")
        .data(&[0])
        // Characteristics: this field is not supported; extension: a virtual machine.
        .data(&(1u64 << 3).to_le_bytes())
        .data(&[0, 1 << 4])
        .data(&[0xff; 4])
        .finish();
    let system = Structure::new(1, 0x100)
        .string(MANUFACTURER)
        .string(board.product)
        .string(board.version)
        .string(board.serial)
        // The first three fields are little endian since SMBIOS 2.6.
        .data(&board.uuid.to_bytes_le())
        // Woken by the power switch.
        .data(&[6])
        .string("")
        .string("")
        .finish();
    let chassis = Structure::new(3, 0x300)
        .string(MANUFACTURER)
        // "Other".
        .data(&[1])
        .string(board.version)
        .string(board.serial)
        .string("")
        // Boot, power and thermal state safe, no security.
        .data(&[3, 3, 3, 2])
        .data(&[0; 4])
        .data(&[0, 0, 0, 0])
        .finish();
    let end = Structure::new(127, 0x7f00).finish();
    [bios, system, chassis, end].concat()
}

fn entry_point(table_bytes: u32) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    entry.extend([0, ENTRY_BYTES as u8, 3, 0, 0, 1, 0]);
    entry.extend(table_bytes.to_le_bytes());
    entry.extend((SMBIOS_START + TABLE_OFFSET).to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    entry[5] = sum.wrapping_neg();
    entry
}

/// Writes the entry point where a kernel that was not started by UEFI looks for it, and the tables behind.
pub fn write(memory: &GuestMemory, board: &Board) -> Result<(), SmbiosError> {
    let tables = structures(board);
    let start = SMBIOS_START + TABLE_OFFSET;
    if start + tables.len() as u64 > HIGH_MEMORY_START {
        return Err(SmbiosError::TooLarge);
    }
    let entry = entry_point(tables.len() as u32);
    memory
        .write_slice(&entry, GuestAddress(SMBIOS_START))
        .and_then(|()| memory.write_slice(&tables, GuestAddress(start)))
        .map_err(SmbiosError::Memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::Layout;

    #[test]
    fn the_guest_finds_its_uuid_and_serial() {
        let layout = Layout::new(16 << 20, 16 << 20);
        let memory = crate::memory::allocate(&layout, None).unwrap();
        let uuid = Uuid::from_u128(0x00112233_4455_6677_8899_aabbccddeeff);
        let board = Board { product: "q-direct-1", version: "1", serial: "S-42", uuid };
        write(&memory, &board).unwrap();

        let mut entry = [0; ENTRY_BYTES as usize];
        memory.read_slice(&mut entry, GuestAddress(SMBIOS_START)).unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let len = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
        let mut tables = vec![0; len];
        let at = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        memory.read_slice(&mut tables, GuestAddress(at)).unwrap();

        // Walk as a reader does: fixed part, strings, double zero.
        let mut kinds = Vec::new();
        let mut rest = &tables[..];
        while rest.len() > 4 {
            let (kind, fixed) = (rest[0], usize::from(rest[1]));
            kinds.push(kind);
            let strings = &rest[fixed..];
            let end = strings.windows(2).position(|w| w == [0, 0]).unwrap();
            if kind == 1 {
                assert_eq!(fixed, 27);
                assert_eq!(&rest[8..24], &uuid.to_bytes_le());
                let text = String::from_utf8_lossy(&strings[..end]).into_owned();
                let serial = text.split('\0').nth(usize::from(rest[7]) - 1);
                assert_eq!(serial, Some("S-42"));
            }
            rest = &strings[end + 2..];
        }
        assert_eq!(kinds, [0, 1, 3, 127]);
    }
}

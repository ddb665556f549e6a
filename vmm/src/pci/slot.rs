//! The hot-plug controls of one slot, as a pure state machine (PCI Express Base 6.0, 6.7.3 and 7.5.3.9 to 7.5.3.11).
//!
//! What the guest sees is what it knows from QEMU's root port, which Linux (`pciehp`), Windows and OVMF are tested with:
//! attention button, power controller, both indicators, presence, link state, and a completion for each command. The slot is
//! not for surprise removal.
//!
//! ```text
//! plug    present, button pressed  ->  guest powers the slot on     ->  link is up
//! unplug  button pressed           ->  guest blinks, waits 5 s, powers the slot off  ->  the device is out
//!                                  ->  guest stops to blink: it keeps the device
//! ```
//!
//! A press that comes with a new device makes old drivers act, which ignore presence in slots without surprise removal; new ones
//! take it as one event with the presence. A guest that powers a slot off by itself keeps its device: nobody has pulled the
//! card, and it may power the slot on again.

use serde::{Deserialize, Serialize};

pub mod bits {
    //! Slot capabilities, control and status.
    pub const ATTENTION_BUTTON: u32 = 1 << 0;
    pub const POWER_CONTROLLER: u32 = 1 << 1;
    pub const ATTENTION_INDICATOR: u32 = 1 << 3;
    pub const POWER_INDICATOR: u32 = 1 << 4;
    pub const HOT_PLUG: u32 = 1 << 6;
    pub const NUMBER_SHIFT: u32 = 19;

    /// Event enables, both indicators, power; the interlock is not there.
    pub const CONTROL_WRITABLE: u16 = 0x17ff;
    pub const ENABLE_HOT_PLUG: u16 = 1 << 5;
    pub const ATTENTION_OFF: u16 = 0b11 << 6;
    pub const INDICATOR: u16 = 0b11 << 8;
    pub const INDICATOR_ON: u16 = 0b01 << 8;
    pub const INDICATOR_BLINK: u16 = 0b10 << 8;
    pub const INDICATOR_OFF: u16 = 0b11 << 8;
    pub const POWERED_OFF: u16 = 1 << 10;
    pub const ENABLE_LINK: u16 = 1 << 12;

    /// The events: each is enabled by the bit of control at the same place, but for the last one.
    pub const STATUS_CLEARABLE: u16 = 0x011f;
    pub const BUTTON_PRESSED: u16 = 1 << 0;
    pub const PRESENCE_CHANGED: u16 = 1 << 3;
    pub const COMMAND_COMPLETED: u16 = 1 << 4;
    pub const PRESENT: u16 = 1 << 6;
    pub const LINK_CHANGED: u16 = 1 << 8;
    /// Events whose enable is at their own place: button, presence, completion. Power faults and latches do not happen.
    pub const SAME_PLACE: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED;
}
use bits::*;

/// Slot control and slot status, as the guest reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    pub control: u16,
    pub status: u16,
}

impl Registers {
    pub fn is_powered(self) -> bool {
        self.control & POWERED_OFF == 0
    }

    fn indicator(self) -> u16 {
        self.control & INDICATOR
    }

    /// Whether a hot-plug interrupt is due. A message is sent each time that this becomes true (6.7.3.4).
    pub fn wants_interrupt(self) -> bool {
        let enabled = self.control & self.status & SAME_PLACE != 0
            || (self.control & ENABLE_LINK != 0 && self.status & LINK_CHANGED != 0);
        enabled && self.control & ENABLE_HOT_PLUG != 0
    }
}

/// Where a request to let the device go stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Removal {
    #[default]
    NotAsked,
    /// The button was pressed.
    Asked,
    /// The guest took note: since then its power indicator blinks.
    Heard,
}

/// What follows from a guest's write or from a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    /// The device lost its power and stays in the slot.
    PoweredOff,
    /// The device is out of the slot.
    Ejected,
    /// The guest was asked for the device and keeps it.
    Kept,
}

/// What is in the slot, and what was asked of the guest. The rest is in [`Registers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    occupied: bool,
    removal: Removal,
}

impl Slot {
    /// After power-on, together with its registers: a device that is there has power.
    pub fn power_on(occupied: bool) -> (Self, Registers) {
        let registers = if occupied {
            Registers { control: ATTENTION_OFF | INDICATOR_ON, status: PRESENT }
        } else {
            Registers { control: ATTENTION_OFF | INDICATOR_OFF | POWERED_OFF, status: 0 }
        };
        (Self { occupied, removal: Removal::NotAsked }, registers)
    }

    /// As it was saved. What the state says of presence is not believed: `occupied` is what is here.
    pub fn restored(occupied: bool, removal: Removal, registers: &mut Registers) -> Self {
        registers.control &= CONTROL_WRITABLE;
        registers.status &= STATUS_CLEARABLE;
        if occupied {
            registers.status |= PRESENT;
        }
        Self { occupied, removal: if occupied { removal } else { Removal::NotAsked } }
    }

    pub fn is_occupied(&self) -> bool {
        self.occupied
    }

    pub fn removal(&self) -> Removal {
        self.removal
    }

    pub fn link_is_active(&self, registers: Registers) -> bool {
        self.occupied && registers.is_powered()
    }

    /// A device comes. The slot is empty.
    pub fn insert(&mut self, registers: &mut Registers) {
        self.occupied = true;
        self.removal = Removal::NotAsked;
        registers.status |= PRESENT | PRESENCE_CHANGED | BUTTON_PRESSED;
        if registers.is_powered() {
            registers.status |= LINK_CHANGED;
        }
    }

    /// Asks the guest for the device. A slot without power gives it at once. Asked again, the button is pressed again unless the
    /// guest is at it already: a second press within its five seconds would take the first one back.
    pub fn ask_removal(&mut self, registers: &mut Registers) -> Effect {
        if !self.occupied {
            return Effect::Nothing;
        }
        if !registers.is_powered() {
            self.take_out(registers);
            return Effect::Ejected;
        }
        let at_it = self.removal == Removal::Heard && registers.indicator() == INDICATOR_BLINK;
        if !at_it {
            self.removal = Removal::Asked;
            registers.status |= BUTTON_PRESSED;
        }
        Effect::Nothing
    }

    /// The device is gone, whether the guest agreed or not.
    pub fn take_out(&mut self, registers: &mut Registers) {
        if self.link_is_active(*registers) {
            registers.status |= LINK_CHANGED;
        }
        registers.status = registers.status & !PRESENT | PRESENCE_CHANGED;
        self.occupied = false;
        self.removal = Removal::NotAsked;
    }

    /// The guest wrote one of the registers. `before` is how they were, `command` whether control was among them: a write to it is
    /// a command even when it changes nothing (6.7.3.2), and ours complete at once.
    pub fn written(&mut self, before: Registers, registers: &mut Registers, command: bool) -> Effect {
        if command {
            registers.status |= COMMAND_COMPLETED;
        }
        if !self.occupied {
            return Effect::Nothing;
        }
        if before.is_powered() && !registers.is_powered() {
            registers.status |= LINK_CHANGED;
            if self.removal == Removal::NotAsked {
                return Effect::PoweredOff;
            }
            self.take_out(registers);
            return Effect::Ejected;
        }
        if !before.is_powered() && registers.is_powered() {
            registers.status |= LINK_CHANGED;
        }
        let (old, new) = (before.indicator(), registers.indicator());
        let acknowledged = registers.status & BUTTON_PRESSED == 0;
        match self.removal {
            Removal::Asked if acknowledged && old != INDICATOR_BLINK && new == INDICATOR_BLINK => {
                self.removal = Removal::Heard;
            }
            Removal::Heard if old == INDICATOR_BLINK && new == INDICATOR_ON => {
                self.removal = Removal::NotAsked;
                return Effect::Kept;
            }
            _ => {}
        }
        Effect::Nothing
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest's driver in the terms of the registers.
    struct Driver {
        slot: Slot,
        registers: Registers,
    }

    impl Driver {
        fn new(occupied: bool) -> Self {
            let (slot, registers) = Slot::power_on(occupied);
            Self { slot, registers }
        }

        fn write(&mut self, control: u16, clear: u16) -> Effect {
            let before = self.registers;
            self.registers.control = control & CONTROL_WRITABLE;
            self.registers.status &= !(clear & STATUS_CLEARABLE);
            self.slot.written(before, &mut self.registers, true)
        }

        fn acknowledge(&mut self) {
            let before = self.registers;
            self.registers.status &= !STATUS_CLEARABLE;
            assert_eq!(self.slot.written(before, &mut self.registers, false), Effect::Nothing);
        }

        fn indicate(&mut self, indicator: u16) -> Effect {
            self.write(self.registers.control & !INDICATOR | indicator, 0)
        }
    }

    #[test]
    fn a_device_that_the_guest_blinks_for_and_keeps_is_kept() {
        let mut driver = Driver::new(true);
        assert_eq!(driver.slot.ask_removal(&mut driver.registers), Effect::Nothing);
        driver.acknowledge();
        assert_eq!(driver.indicate(INDICATOR_BLINK), Effect::Nothing);
        assert_eq!(driver.slot.removal(), Removal::Heard);
        assert_eq!(driver.indicate(INDICATOR_ON), Effect::Kept);
        // Asked again it goes.
        driver.slot.ask_removal(&mut driver.registers);
        driver.acknowledge();
        driver.indicate(INDICATOR_BLINK);
        assert_eq!(driver.write(driver.registers.control | POWERED_OFF, 0), Effect::Ejected);
        assert!(!driver.slot.is_occupied());
    }

    #[test]
    fn the_end_of_a_plug_is_no_answer_to_a_press_that_came_meanwhile() {
        let mut driver = Driver::new(false);
        driver.slot.insert(&mut driver.registers);
        driver.acknowledge();
        driver.write(ATTENTION_OFF | INDICATOR_BLINK, 0);
        driver.slot.ask_removal(&mut driver.registers);
        driver.acknowledge();
        // The indicator of the plug goes on: the guest has not yet looked at the press.
        assert_eq!(driver.indicate(INDICATOR_ON), Effect::Nothing);
        assert_eq!(driver.slot.removal(), Removal::Asked);
        driver.indicate(INDICATOR_BLINK);
        assert_eq!(driver.write(driver.registers.control | POWERED_OFF, 0), Effect::Ejected);
    }

    #[test]
    fn a_guest_that_blinks_for_a_plug_has_not_heard_a_press_that_it_has_not_read() {
        let mut driver = Driver::new(false);
        driver.slot.insert(&mut driver.registers);
        driver.acknowledge();
        driver.write(ATTENTION_OFF | INDICATOR_OFF, 0);
        driver.slot.ask_removal(&mut driver.registers);
        driver.write(ATTENTION_OFF | INDICATOR_BLINK, 0);
        assert_eq!(driver.indicate(INDICATOR_ON), Effect::Nothing);
        assert_eq!(driver.slot.removal(), Removal::Asked);
    }

    #[test]
    fn a_press_is_not_repeated_while_the_guest_blinks() {
        let mut driver = Driver::new(true);
        driver.slot.ask_removal(&mut driver.registers);
        driver.acknowledge();
        driver.indicate(INDICATOR_BLINK);
        driver.slot.ask_removal(&mut driver.registers);
        assert_eq!(driver.registers.status & BUTTON_PRESSED, 0);
    }

    #[test]
    fn a_press_that_nobody_heard_is_repeated() {
        let mut driver = Driver::new(true);
        driver.slot.ask_removal(&mut driver.registers);
        driver.acknowledge();
        driver.slot.ask_removal(&mut driver.registers);
        assert_ne!(driver.registers.status & BUTTON_PRESSED, 0);
    }

    #[test]
    fn power_off_without_a_request_leaves_the_device_in_the_slot() {
        let mut driver = Driver::new(true);
        assert_eq!(driver.write(ATTENTION_OFF | INDICATOR_OFF | POWERED_OFF, 0), Effect::PoweredOff);
        assert!(driver.slot.is_occupied() && !driver.slot.link_is_active(driver.registers));
        // Now it can be pulled without asking.
        assert_eq!(driver.slot.ask_removal(&mut driver.registers), Effect::Ejected);
    }

    #[test]
    fn every_command_completes() {
        let mut driver = Driver::new(false);
        driver.write(driver.registers.control, 0);
        assert_ne!(driver.registers.status & COMMAND_COMPLETED, 0);
        let before = driver.registers;
        driver.registers.status &= !COMMAND_COMPLETED;
        driver.slot.written(before, &mut driver.registers, false);
        assert_eq!(driver.registers.status & COMMAND_COMPLETED, 0, "status is no command");
    }

    #[test]
    fn interrupts_need_their_enable_and_the_common_one() {
        let pending = Registers { control: 0, status: PRESENCE_CHANGED | LINK_CHANGED };
        let wants = |control| Registers { control, ..pending }.wants_interrupt();
        assert!(!wants(0) && !wants(ENABLE_HOT_PLUG) && !wants(PRESENCE_CHANGED) && !wants(ENABLE_LINK));
        assert!(wants(ENABLE_HOT_PLUG | PRESENCE_CHANGED) && wants(ENABLE_HOT_PLUG | ENABLE_LINK));
        assert!(!wants(ENABLE_HOT_PLUG | BUTTON_PRESSED));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u16, u16),
        Insert,
        Ask,
        TakeOut,
        Restore(Removal),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let removal = prop_oneof![Just(Removal::NotAsked), Just(Removal::Asked), Just(Removal::Heard)];
        let step = prop_oneof![
            4 => any::<(u16, u16)>().prop_map(|(control, clear)| Step::Write(control, clear)),
            1 => Just(Step::Insert),
            2 => Just(Step::Ask),
            1 => Just(Step::TakeOut),
            1 => removal.prop_map(Step::Restore),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// Whatever a guest writes and whoever plugs: presence tells the truth, a device leaves only when it was asked for or
        /// pulled, and it leaves once.
        #[test]
        fn hostile_drivers_eject_only_what_was_asked_for(occupied in any::<bool>(), steps in steps()) {
            let mut driver = Driver::new(occupied);
            let mut inside = occupied;
            for step in steps {
                let was_asked = driver.slot.removal() != Removal::NotAsked;
                let effect = match step {
                    Step::Write(control, clear) => {
                        let effect = driver.write(control, clear);
                        prop_assert!(effect != Effect::Ejected || was_asked);
                        prop_assert!(effect != Effect::Kept || was_asked);
                        effect
                    }
                    Step::Insert if !inside => {
                        driver.slot.insert(&mut driver.registers);
                        inside = true;
                        Effect::Nothing
                    }
                    Step::Insert => Effect::Nothing,
                    Step::Ask => driver.slot.ask_removal(&mut driver.registers),
                    Step::TakeOut => {
                        driver.slot.take_out(&mut driver.registers);
                        inside = false;
                        Effect::Nothing
                    }
                    Step::Restore(removal) => {
                        driver.registers.status ^= PRESENT;
                        driver.slot = Slot::restored(inside, removal, &mut driver.registers);
                        Effect::Nothing
                    }
                };
                if effect == Effect::Ejected {
                    prop_assert!(std::mem::take(&mut inside));
                }
                prop_assert_eq!(driver.slot.is_occupied(), inside);
                prop_assert_eq!(driver.registers.status & PRESENT != 0, inside);
                prop_assert!(inside || driver.slot.removal() == Removal::NotAsked);
                prop_assert_eq!(driver.registers.control & !CONTROL_WRITABLE, 0);
            }
        }
    }
}

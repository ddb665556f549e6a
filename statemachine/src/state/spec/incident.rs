//! What follows when a guest says, or shows, that it cannot go on.

use serde::Deserialize;
use serde::Serialize;

/// The guest's watchdog ran out: nothing in it fed the dog for the time that it chose itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnWatchdog {
    #[default]
    Reset,
    PowerOff,
    /// It stands, for somebody to look at it.
    Pause,
    /// A non-maskable interrupt, on which a kernel can panic and dump.
    InjectNmi,
    None,
}

/// The guest's kernel panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPanic {
    /// It is told, and the guest is left to itself.
    #[default]
    Report,
    Reset,
    PowerOff,
    /// It stands, for somebody to look at it.
    Pause,
}

//! A guest that sleeps: what it was is in a file of its host, and it holds no permit (oVirt's *suspend*).

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::ids::Epoch;
use crate::ids::HostId;
use crate::ids::MigrationId;
use crate::state::VmSpec;

/// To sleep is to move into a file, so this is numbered as a migration is, and the guest's process is told the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspension {
    pub id: MigrationId,
    /// Where it falls asleep, and where alone it wakes up.
    pub host: HostId,
    pub phase: SuspensionPhase,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuspensionPhase {
    /// The host writes it down. The guest has the permit of this epoch.
    Saving { epoch: Epoch },
    /// No permit. Its volumes have to stay as they are: its memory knows what is on them.
    Asleep(Saved),
    /// It has the permit of this epoch to go on from its file, and has not said that it runs. From the moment in which it may run, the file
    /// is a past that must never come back.
    Waking { epoch: Epoch, saved: Saved },
}

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub bytes: u64,
    /// What the guest is made of, whatever its definition says by now.
    pub spec: Arc<VmSpec>,
}

impl Suspension {
    pub fn is_saving(&self) -> bool {
        matches!(self.phase, SuspensionPhase::Saving { .. })
    }

    /// Of one that sleeps: its file.
    pub fn asleep(&self) -> Option<&Saved> {
        match &self.phase {
            SuspensionPhase::Asleep(saved) => Some(saved),
            SuspensionPhase::Saving { .. } | SuspensionPhase::Waking { .. } => None,
        }
    }

    /// The permit that the guest has meanwhile.
    pub fn epoch(&self) -> Option<Epoch> {
        match self.phase {
            SuspensionPhase::Saving { epoch } | SuspensionPhase::Waking { epoch, .. } => Some(epoch),
            SuspensionPhase::Asleep(_) => None,
        }
    }
}

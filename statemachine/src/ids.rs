//! Identifiers. Each is its own type: a host id is never an epoch by accident.
//!
//! Ids that the log hands out are the [`Seq`] of the batch that created the thing: strictly
//! increasing, gapless, never reused (DESIGN §3). None of them leaves the decider before that
//! batch is applied.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

macro_rules! seq_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

seq_id! {
    /// Position of a batch in the log as users see it: previous plus one, from 1.
    Seq
}
seq_id! {
    /// Fencing token of a run permit: the seq of the batch that granted it.
    Epoch
}
seq_id! {
    /// A host: the seq of its join. Never reused, so a removed host can never come back as another (hazard C13).
    HostId
}
seq_id! {
    /// A data center: the seq of its creation.
    DataCenterId
}
seq_id! {
    /// A cluster of hosts inside a data center (oVirt's sense): the seq of its creation.
    ClusterId
}
seq_id! {
    /// A join or API token: the seq of its creation. The secret itself never enters the log.
    TokenId
}
seq_id! {
    /// One attempt to move a guest, to another host or to sleep: the seq of the batch that began it.
    MigrationId
}
uuid_id! {
    /// One Quorate installation: one Raft cluster, one log, one certificate authority.
    SiteId
}
uuid_id! {
    /// A virtual machine; also its SMBIOS UUID.
    VmId
}
uuid_id! {
    /// One incarnation of a host: `/proc/sys/kernel/random/boot_id`.
    BootId
}

impl Seq {
    /// The head of an empty log.
    pub const ZERO: Seq = Seq(0);

    /// The seq of the batch that follows this one.
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

impl From<Seq> for Epoch {
    fn from(seq: Seq) -> Epoch {
        Epoch(seq.0)
    }
}

impl From<Seq> for MigrationId {
    fn from(seq: Seq) -> MigrationId {
        MigrationId(seq.0)
    }
}

impl From<MigrationId> for Seq {
    fn from(migration: MigrationId) -> Seq {
        Seq(migration.0)
    }
}

impl From<Epoch> for Seq {
    fn from(epoch: Epoch) -> Seq {
        Seq(epoch.0)
    }
}

impl VmId {
    /// The id of the VM that is defined by batch `seq` of `site`: RFC 9562 version 8 over a hash,
    /// so that `decide` stays a function and no host invents an id.
    pub fn derive(site: SiteId, seq: Seq) -> VmId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"quorate vm id\0");
        hasher.update(site.0.as_bytes());
        hasher.update(&seq.0.to_be_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        VmId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

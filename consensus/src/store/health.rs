//! Numbers about the stores, for `/metrics` and for the check that a leader's disk is not gray (DESIGN §4, hazard H21).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

/// Shared by the writer, the state machine and whoever watches them. All times on the platform's boottime clock.
#[derive(Debug, Default)]
pub struct Health {
    /// When the append that the writer works on was handed in; 0 when idle.
    append_since_ns: AtomicU64,
    /// When the apply that runs began; 0 when idle.
    apply_since_ns: AtomicU64,
    wal_syncs: AtomicU64,
    wal_bytes: AtomicU64,
    wal_entries: AtomicU64,
    wal_sync_ns: AtomicU64,
    wal_disk_bytes: AtomicU64,
    batches_superseded: AtomicU64,
    snapshots_installed: AtomicU64,
    batches_pulled: AtomicU64,
}

/// A copy of the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HealthCounters {
    /// Write groups synced, entries and bytes in them, and the nanoseconds that they took.
    pub wal_syncs: u64,
    pub wal_entries: u64,
    pub wal_bytes: u64,
    pub wal_sync_ns: u64,
    /// Size of the write-ahead log on disk, preallocated space included.
    pub wal_disk_bytes: u64,
    /// Batches that did not follow the head when they came out of the log (DESIGN §3).
    pub batches_superseded: u64,
    pub snapshots_installed: u64,
    /// Batches that came from a member and not out of the own log.
    pub batches_pulled: u64,
}

impl Health {
    /// Age in nanoseconds of the append that is not durable yet.
    pub fn append_age_ns(&self, now_ns: u64) -> Option<u64> {
        age(&self.append_since_ns, now_ns)
    }

    /// Age in nanoseconds of the apply that has not returned.
    pub fn apply_age_ns(&self, now_ns: u64) -> Option<u64> {
        age(&self.apply_since_ns, now_ns)
    }

    pub fn counters(&self) -> HealthCounters {
        HealthCounters {
            wal_syncs: self.wal_syncs.load(Ordering::Relaxed),
            wal_entries: self.wal_entries.load(Ordering::Relaxed),
            wal_bytes: self.wal_bytes.load(Ordering::Relaxed),
            wal_sync_ns: self.wal_sync_ns.load(Ordering::Relaxed),
            wal_disk_bytes: self.wal_disk_bytes.load(Ordering::Relaxed),
            batches_superseded: self.batches_superseded.load(Ordering::Relaxed),
            snapshots_installed: self.snapshots_installed.load(Ordering::Relaxed),
            batches_pulled: self.batches_pulled.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn append_began(&self, submitted_ns: u64) {
        self.append_since_ns.store(submitted_ns.max(1), Ordering::Relaxed);
    }

    pub(crate) fn append_ended(&self) {
        self.append_since_ns.store(0, Ordering::Relaxed);
    }

    pub(crate) fn apply_began(&self, now_ns: u64) {
        self.apply_since_ns.store(now_ns.max(1), Ordering::Relaxed);
    }

    pub(crate) fn apply_ended(&self) {
        self.apply_since_ns.store(0, Ordering::Relaxed);
    }

    pub(crate) fn synced(&self, entries: usize, bytes: usize, took_ns: u64) {
        self.wal_syncs.fetch_add(1, Ordering::Relaxed);
        self.wal_entries.fetch_add(entries as u64, Ordering::Relaxed);
        self.wal_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.wal_sync_ns.fetch_add(took_ns, Ordering::Relaxed);
    }

    pub(crate) fn batch_superseded(&self) {
        self.batches_superseded.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot_installed(&self) {
        self.snapshots_installed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn pulled(&self, batches: usize) {
        self.batches_pulled.fetch_add(batches as u64, Ordering::Relaxed);
    }

    pub(crate) fn wal_size(&self, disk_bytes: u64) {
        self.wal_disk_bytes.store(disk_bytes, Ordering::Relaxed);
    }
}

fn age(since_ns: &AtomicU64, now_ns: u64) -> Option<u64> {
    match since_ns.load(Ordering::Relaxed) {
        0 => None,
        since => Some(now_ns.saturating_sub(since)),
    }
}

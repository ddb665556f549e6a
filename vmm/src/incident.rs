//! What follows when a guest says that it has panicked, or when its watchdog has run out: a notice always, and what the
//! configuration decides.
//!
//! "Pause" is one more reason at the run gate: it ends with `resume`, as an I/O error's does.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_control::{OnPanic, PanicKind, PauseReason, WatchdogAction};

use crate::cpu::gate::{RunGate, Stop};
use crate::machine::{Ending, Endings};
use crate::metrics::Counter;
use crate::virtio::locked;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incident {
    Panic(PanicKind),
    WatchdogExpired,
    /// The guest stands because of it.
    Paused(PauseReason),
}

/// Told from vCPU and device threads; must not wait.
pub type IncidentListener = Box<dyn Fn(Incident) + Send + Sync>;

/// Reaches all vCPUs of a machine with a non-maskable interrupt. Must not wait.
pub trait NmiSink: Send + Sync {
    fn inject(&self) -> io::Result<()>;
}

/// How a device of the guest reports; see [`Incidents`].
pub trait PanicSink: Send + Sync {
    fn panicked(&self, kind: PanicKind);
}

/// Where a watchdog says that its guest hangs.
pub trait WatchdogSink: Send + Sync {
    fn expired(&self);
}

pub struct Incidents {
    on_panic: OnPanic,
    on_watchdog: WatchdogAction,
    gate: Arc<RunGate>,
    endings: Arc<Endings>,
    listener: IncidentListener,
    state: Mutex<State>,
    panics: Counter,
    watchdog_expired: Counter,
}

/// Of the machine of now.
#[derive(Default)]
struct State {
    panic: Option<PanicKind>,
    paused: Option<PauseReason>,
    nmi: Option<Arc<dyn NmiSink>>,
}

impl Incidents {
    pub fn new(
        on_panic: OnPanic,
        on_watchdog: WatchdogAction,
        gate: Arc<RunGate>,
        endings: Arc<Endings>,
        listener: IncidentListener,
    ) -> Arc<Self> {
        Arc::new(Self {
            on_panic,
            on_watchdog,
            gate,
            endings,
            listener,
            state: Mutex::default(),
            panics: Counter::default(),
            watchdog_expired: Counter::default(),
        })
    }

    /// A new machine runs: what happened to the last one holds it no more. `panic` is what the guest has reported already, where it comes
    /// from elsewhere.
    pub fn machine_is(&self, nmi: Arc<dyn NmiSink>, panic: Option<PanicKind>) {
        let mut state = locked(&self.state);
        *state = State { nmi: Some(nmi), panic, paused: None };
        self.gate.open(Stop::Incident);
    }

    /// What the guest of now has reported.
    pub fn panic(&self) -> Option<PanicKind> {
        locked(&self.state).panic
    }

    /// Why the guest stands, if for one of these reasons.
    pub fn paused(&self) -> Option<PauseReason> {
        locked(&self.state).paused
    }

    /// Panics in this process. A crash kernel that takes over counts as one.
    pub fn panics(&self) -> u64 {
        self.panics.get()
    }

    pub fn watchdog_expired(&self) -> u64 {
        self.watchdog_expired.get()
    }

    /// Lets a guest go on that was paused here. What it reported stays known.
    pub fn resume(&self) {
        let mut state = locked(&self.state);
        state.paused = None;
        self.gate.open(Stop::Incident);
    }

    fn pause(&self, reason: PauseReason) {
        {
            let mut state = locked(&self.state);
            state.paused.get_or_insert(reason);
            // Under the lock, so that a resume either sees this or comes before it.
            self.gate.shut(Stop::Incident);
        }
        (self.listener)(Incident::Paused(reason));
    }

    fn inject_nmi(&self) {
        let nmi = locked(&self.state).nmi.clone();
        let injected = nmi.map_or_else(|| Err(io::ErrorKind::NotConnected.into()), |nmi| nmi.inject());
        if let Err(error) = injected {
            tracing::error!(%error, "the watchdog's interrupt does not reach the guest");
        }
    }
}

impl PanicSink for Incidents {
    fn panicked(&self, kind: PanicKind) {
        tracing::warn!(?kind, "the guest reports a panic");
        self.panics.add(1);
        locked(&self.state).panic = Some(kind);
        (self.listener)(Incident::Panic(kind));
        if kind == PanicKind::CrashKernel {
            // It is about to write its dump, and restarts by itself.
            return;
        }
        match self.on_panic {
            OnPanic::Report => {}
            OnPanic::Reset => self.endings.post(Ending::Reset),
            OnPanic::PowerOff => self.endings.post(Ending::GuestPanicked),
            OnPanic::Pause => self.pause(PauseReason::GuestPanicked),
        }
    }
}

impl WatchdogSink for Incidents {
    fn expired(&self) {
        tracing::warn!(action = ?self.on_watchdog, "the guest's watchdog has run out");
        self.watchdog_expired.add(1);
        (self.listener)(Incident::WatchdogExpired);
        match self.on_watchdog {
            WatchdogAction::Reset => self.endings.post(Ending::Reset),
            WatchdogAction::PowerOff => self.endings.post(Ending::WatchdogExpired),
            WatchdogAction::Pause => self.pause(PauseReason::Watchdog),
            WatchdogAction::InjectNmi => self.inject_nmi(),
            WatchdogAction::None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::machine::EndingsReceiver;

    struct Policy {
        incidents: Arc<Incidents>,
        gate: Arc<RunGate>,
        endings: EndingsReceiver,
        told: Arc<Mutex<Vec<Incident>>>,
    }

    #[derive(Default)]
    struct Nmis(AtomicUsize);

    impl NmiSink for Nmis {
        fn inject(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn policy(on_panic: OnPanic, on_watchdog: WatchdogAction) -> Policy {
        let gate = RunGate::new();
        let (sender, endings) = Endings::new(Arc::clone(&gate));
        let told: Arc<Mutex<Vec<Incident>>> = Arc::default();
        let listener = {
            let told = Arc::clone(&told);
            Box::new(move |incident| locked(&told).push(incident))
        };
        let incidents = Incidents::new(on_panic, on_watchdog, Arc::clone(&gate), sender, listener);
        Policy { incidents, gate, endings, told }
    }

    impl Policy {
        /// How the machine ends, if it does.
        fn ending(&self) -> Option<Ending> {
            self.gate.holds(Stop::End).then(|| self.endings.wait(Duration::from_secs(10)).unwrap().unwrap())
        }
    }

    #[test]
    fn a_panic_is_told_and_leads_to_what_was_configured() {
        use OnPanic::*;
        for (on_panic, ending) in
            [(Report, None), (Reset, Some(Ending::Reset)), (PowerOff, Some(Ending::GuestPanicked)), (Pause, None)]
        {
            let policy = policy(on_panic, WatchdogAction::None);
            policy.incidents.panicked(PanicKind::Panicked);
            assert_eq!(locked(&policy.told)[0], Incident::Panic(PanicKind::Panicked));
            assert_eq!(policy.ending(), ending, "{on_panic:?}");
            assert_eq!(policy.gate.holds(Stop::Incident), on_panic == Pause);
            assert_eq!(policy.incidents.panic(), Some(PanicKind::Panicked));
        }
    }

    #[test]
    fn a_crash_kernel_is_never_kept_from_its_dump() {
        for on_panic in [OnPanic::Report, OnPanic::Reset, OnPanic::PowerOff, OnPanic::Pause] {
            let policy = policy(on_panic, WatchdogAction::Reset);
            policy.incidents.panicked(PanicKind::CrashKernel);
            assert!(policy.gate.is_open());
            assert_eq!(locked(&policy.told).len(), 1);
            assert_eq!(policy.incidents.panics(), 1);
        }
    }

    #[test]
    fn a_watchdog_leads_to_what_was_configured() {
        for (action, ending) in [
            (WatchdogAction::None, None),
            (WatchdogAction::Reset, Some(Ending::Reset)),
            (WatchdogAction::PowerOff, Some(Ending::WatchdogExpired)),
            (WatchdogAction::InjectNmi, None),
        ] {
            let policy = policy(OnPanic::Report, action);
            let nmis = Arc::new(Nmis::default());
            policy.incidents.machine_is(nmis.clone(), None);
            policy.incidents.expired();
            assert_eq!(*locked(&policy.told), [Incident::WatchdogExpired]);
            assert_eq!(policy.ending(), ending, "{action:?}");
            assert_eq!(nmis.0.load(Ordering::SeqCst), usize::from(action == WatchdogAction::InjectNmi));
        }
    }

    #[test]
    fn a_pause_ends_by_resume_and_with_the_machine() {
        let policy = policy(OnPanic::Pause, WatchdogAction::Pause);
        policy.incidents.panicked(PanicKind::Panicked);
        policy.incidents.expired();
        assert_eq!(
            policy.incidents.paused(),
            Some(PauseReason::GuestPanicked),
            "the first reason is the one to look at"
        );
        policy.gate.shut(Stop::Lease);
        policy.incidents.resume();
        assert!(!policy.gate.holds(Stop::Incident) && !policy.gate.is_open());
        assert_eq!((policy.incidents.paused(), policy.incidents.panic()), (None, Some(PanicKind::Panicked)));

        policy.incidents.expired();
        assert_eq!(policy.incidents.paused(), Some(PauseReason::Watchdog));
        policy.incidents.machine_is(Arc::new(Nmis::default()), None);
        assert_eq!((policy.incidents.paused(), policy.incidents.panic()), (None, None));
        let from_elsewhere = Some(PanicKind::CrashKernel);
        policy.incidents.machine_is(Arc::new(Nmis::default()), from_elsewhere);
        assert_eq!((policy.incidents.panic(), policy.incidents.panics()), (from_elsewhere, 1));
        policy.gate.open(Stop::Lease);
        assert!(policy.gate.is_open());
        assert_eq!((policy.incidents.panics(), policy.incidents.watchdog_expired()), (1, 2));
    }
}

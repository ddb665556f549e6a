//! What became of a VM that this process did not start, or lost sight of: the lock says whether it lives, then the exit report
//! and the mark say how it ended. Blocking.

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state::ExitReason;
use statemachine::state::ReleaseClass;
use vmm_control::ExitReport;

use super::guest_files::permit_class;
use super::launcher::Launcher;
use super::plan::Ended;
use super::run_dir::RunDir;

/// Most bytes of a detail that the log takes.
const DETAIL_MAX: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing of this VM was ever here, or all of it was cleared.
    Nothing,
    /// Its process lives. Whoever listens on the control socket will say who it is.
    Alive {
        epoch: Epoch,
        release: ReleaseClass,
        /// It takes in the guest of this migration, or took it in and has not said so yet.
        incoming: Option<MigrationId>,
    },
    Gone {
        epoch: Epoch,
        release: ReleaseClass,
        ended: Ended,
    },
    /// A configuration was written, and no guest ever ran by it.
    NeverRan {
        epoch: Epoch,
        words: String,
    },
    /// It cannot be told now.
    Unclear(String),
}

/// Looks at a VM's run directory, lock, control group, report and mark.
pub fn inspect(launcher: &Launcher, vm: VmId) -> Found {
    let run_dir = RunDir::of(&launcher.vms_dir, vm);
    let locked = match run_dir.is_locked() {
        Ok(locked) => locked,
        Err(error) => return Found::Unclear(error.to_string()),
    };
    let config = run_dir.config();
    if locked {
        return match config {
            Some(config) => Found::Alive {
                epoch: Epoch(config.epoch),
                release: permit_class(config.release),
                incoming: run_dir.incoming(),
            },
            None => Found::Unclear("a process holds the VM's lock and its configuration cannot be read".to_owned()),
        };
    }
    match launcher.groups.of(vm).is_empty() {
        Ok(true) => {}
        Ok(false) => return Found::Unclear("the VM's control group still holds a process".to_owned()),
        Err(error) => return Found::Unclear(format!("the VM's control group cannot be read: {error}")),
    }
    let Some(config) = config else { return Found::Nothing };
    let (epoch, release) = (Epoch(config.epoch), permit_class(config.release));
    let report = match ExitReport::read(&run_dir.of_process()) {
        Ok(report) => report.filter(|report| report.epoch == epoch.0),
        Err(error) => return Found::Gone { epoch, release, ended: lost(&error.to_string()) },
    };
    match report {
        Some(report) => Found::Gone { epoch, release, ended: ended(&report) },
        None if launcher.marks.contains(vm, epoch) => {
            let words = run_dir.last_words();
            Found::Gone { epoch, release, ended: lost(&words) }
        }
        None => Found::NeverRan { epoch, words: run_dir.last_words() },
    }
}

/// The end of a guest whose process left no report.
pub fn lost(words: &str) -> Ended {
    let detail = match words.is_empty() {
        true => "its process is gone and left no report".to_owned(),
        false => format!("its process is gone and left no report; its last words: {words}"),
    };
    Ended { reason: ExitReason::Lost, detail: bounded(&detail) }
}

pub fn start_failed(words: &str) -> Ended {
    Ended { reason: ExitReason::StartFailed, detail: bounded(words) }
}

fn ended(report: &ExitReport) -> Ended {
    let reason = match report.reason {
        vmm_control::ExitReason::GuestPoweredOff => ExitReason::GuestPoweredOff,
        vmm_control::ExitReason::PoweredOff => ExitReason::PoweredOff,
        // The vmm found its epoch used: how that use ended is not known.
        vmm_control::ExitReason::AlreadyStarted => ExitReason::Lost,
        vmm_control::ExitReason::GuestFault
        | vmm_control::ExitReason::GuestPanicked
        | vmm_control::ExitReason::WatchdogExpired
        | vmm_control::ExitReason::Internal => ExitReason::GuestFault,
        vmm_control::ExitReason::StartFailed | vmm_control::ExitReason::RestoreFailed => ExitReason::StartFailed,
    };
    Ended { reason, detail: bounded(&report.detail) }
}

/// A detail as the log takes it.
pub(super) fn bounded(text: &str) -> String {
    one_line(text, DETAIL_MAX)
}

/// So many bytes at most, without what moves a terminal's cursor.
pub(super) fn one_line(text: &str, max: usize) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut end = line.len().min(max);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_is_one_line_that_the_log_takes() {
        let dump = format!("{}\nrip=0x10\u{7}", "é".repeat(400));
        let detail = bounded(&dump);
        assert!(detail.len() <= DETAIL_MAX && !detail.chars().any(char::is_control));
        assert_eq!(bounded("short\nwords"), "short words");
    }
}

//! From the tables to filters in the kernel.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::role::Role;
use super::tables::{self, Table};

/// A table that makes no filter, or a kernel that takes none.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FilterError {
    #[error("the system call filter of the thread {thread} cannot be made: {words}")]
    Compile { thread: &'static str, words: String },
    #[error(
        "the kernel does not take a system call filter: {words}; it needs CONFIG_SECCOMP_FILTER; without \
         `--sandbox` the guest runs with no filter"
    )]
    Install { words: String },
}

/// Set once the main thread has its filter: from then on no thread starts without.
static ACTIVE: AtomicBool = AtomicBool::new(false);
static PROGRAMS: [OnceLock<Result<BpfProgram, FilterError>>; Role::ALL.len()] =
    [const { OnceLock::new() }; Role::ALL.len()];

/// The filter that a new thread has to install, if this process has filters.
pub(super) fn program(role: Role) -> Result<Option<&'static BpfProgram>, FilterError> {
    if !ACTIVE.load(Ordering::SeqCst) {
        return Ok(None);
    }
    compiled(role).map(Some)
}

fn compiled(role: Role) -> Result<&'static BpfProgram, FilterError> {
    PROGRAMS[role as usize].get_or_init(|| compile(role)).as_ref().map_err(Clone::clone)
}

/// Everything that is not on the role's lists is trapped.
fn compile(role: Role) -> Result<BpfProgram, FilterError> {
    let failed = |error: seccompiler::BackendError| FilterError::Compile {
        thread: role.thread_name(),
        words: error.to_string(),
    };
    let mut calls = std::collections::BTreeMap::<_, Option<Vec<SeccompRule>>>::new();
    for rule in tables::allowed(role).into_iter().flat_map(Table::rules) {
        let mut conditions = Vec::new();
        for condition in rule.conditions() {
            let (mask, value) = condition.bits();
            let operator = match mask {
                u32::MAX => SeccompCmpOp::Eq,
                mask => SeccompCmpOp::MaskedEq(u64::from(mask)),
            };
            let width = SeccompCmpArgLen::Dword;
            conditions
                .push(SeccompCondition::new(condition.argument, width, operator, u64::from(value)).map_err(failed)?);
        }
        let rules = calls.entry(rule.call()).or_insert_with(|| Some(Vec::new()));
        match rules {
            // One rule without a condition allows them all.
            _ if conditions.is_empty() => *rules = None,
            Some(rules) => rules.push(SeccompRule::new(conditions).map_err(failed)?),
            None => {}
        }
    }
    let calls = calls.into_iter().map(|(call, rules)| (call, rules.unwrap_or_default())).collect();
    let filter = SeccompFilter::new(calls, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    filter.and_then(BpfProgram::try_from).map_err(failed)
}

/// glibc starts threads with `clone3`, whose flags are in memory, where no filter sees them; told that there is none, it takes
/// `clone`.
fn without_clone3() -> Result<BpfProgram, FilterError> {
    let calls = [(libc::SYS_clone3, Vec::new())].into();
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, absent, TargetArch::x86_64);
    filter
        .and_then(BpfProgram::try_from)
        .map_err(|error| FilterError::Compile { thread: Role::Main.thread_name(), words: error.to_string() })
}

fn install(program: &BpfProgram) -> Result<(), FilterError> {
    seccompiler::apply_filter(program).map_err(|error| FilterError::Install { words: error.to_string() })
}

/// Filters the calling thread, which is the main one and alone, and from now on every thread that it starts.
pub(super) fn activate() -> Result<(), FilterError> {
    let program = compiled(Role::Main)?;
    install(&without_clone3()?)?;
    install(program)?;
    ACTIVE.store(true, Ordering::SeqCst);
    Ok(())
}

/// For a new thread. The kernel has taken filters before, so a refusal is one for want of memory: no thread runs without.
pub(super) fn install_or_die(program: &BpfProgram) {
    if let Err(error) = install(program) {
        eprintln!("vmm: {error}");
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_roles_tables_make_a_filter() {
        // The kernel takes 4096 instructions a filter, and 32768 for a thread and those that it descends from.
        for role in Role::ALL {
            assert!(compile(role).unwrap().len() < 4096, "{role:?}");
        }
        without_clone3().unwrap();
    }
}

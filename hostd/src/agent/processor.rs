//! What this host's processor can be to guests, as its vmm says.

use std::io;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use statemachine::state::CpuModel;
use statemachine::state::HostProcessor;
use thiserror::Error;

use super::adopt;

#[derive(Debug, Error)]
pub enum ProcessorError {
    #[error("cannot run {program} processor: {source}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} processor ended with {status}: {words}")]
    Failed { program: String, status: String, words: String },
    #[error("what {program} processor says is not understood: {source}")]
    Nonsense {
        program: String,
        #[source]
        source: serde_json::Error,
    },
}

/// Asks the vmm, which asks KVM. Blocking.
pub fn look(vmm: &Path) -> Result<HostProcessor, ProcessorError> {
    let program = || vmm.display().to_string();
    let done = Command::new(vmm).arg("processor").stdin(Stdio::null()).output();
    let done = done.map_err(|source| ProcessorError::Run { program: program(), source })?;
    if !done.status.success() {
        let words = adopt::bounded(&String::from_utf8_lossy(&done.stderr));
        return Err(ProcessorError::Failed { program: program(), status: done.status.to_string(), words });
    }
    let said = serde_json::from_slice(&done.stdout);
    Ok(reported(said.map_err(|source| ProcessorError::Nonsense { program: program(), source })?))
}

/// As the log takes it.
fn reported(said: vmm_control::HostProcessor) -> HostProcessor {
    let named = |model: &vmm_control::CpuModel| match model {
        vmm_control::CpuModel::Host => None,
        vmm_control::CpuModel::X86_64V2 => Some(CpuModel::V2),
        vmm_control::CpuModel::X86_64V3 => Some(CpuModel::V3),
    };
    let words = |text: &str| adopt::one_line(text, HostProcessor::MAX_WORDS);
    HostProcessor {
        vendor: words(&said.vendor),
        model_name: words(&said.model_name),
        models: said.models.iter().filter_map(named).collect(),
        fingerprint: words(&said.fingerprint),
        tsc_khz: said.tsc_khz,
        scales_tsc: said.scales_tsc,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn vmm(script: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    #[test]
    fn what_the_vmm_says_is_what_the_log_is_told() {
        let said = r#"{"vendor":"AuthenticAMD","model_name":"A","models":["host","x86-64-v2"],"fingerprint":"ab",
            "tsc_khz":2000000,"scales_tsc":true,"missing":{"x86-64-v3":["avx2"]},"huge_pages":{"mib2":4}}"#;
        let (_dir, path) = vmm(&format!("[ \"$1\" = processor ] && cat <<'END'\n{said}\nEND"));
        let processor = look(&path).unwrap();
        assert_eq!((processor.models.as_slice(), processor.tsc_khz), ([CpuModel::V2].as_slice(), 2_000_000));
    }

    #[test]
    fn a_vmm_that_cannot_say_is_an_error_in_words() {
        let (_dir, path) = vmm("echo no KVM >&2; exit 3");
        assert!(look(&path).unwrap_err().to_string().contains("no KVM"));
        let (_dir, path) = vmm("echo nonsense");
        assert!(matches!(look(&path), Err(ProcessorError::Nonsense { .. })));
        assert!(matches!(look(Path::new("/nowhere/vmm")), Err(ProcessorError::Run { .. })));
    }
}

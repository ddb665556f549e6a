//! `vmm processor`: what this host offers to guests, for its report to the cluster.

use std::collections::BTreeMap;

use vmm_control::{CpuModel, HostProcessor, HugePages};

use super::leaves::Leaves;
use super::model::{self, MIN_ADDRESS_BITS};
use crate::machine::kvm::{self, KvmError, refused};
use crate::memory::huge_pages;
use crate::saved::processor::{Model, fingerprint};
use crate::saved::vcpu::scales_tsc;

/// Asks KVM and the kernel. No guest runs.
pub fn run() -> Result<HostProcessor, KvmError> {
    let kvm = kvm::open()?;
    let supported = super::cpuid::supported(&kvm)?;
    let vm = kvm.create_vm().map_err(refused("create a VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(refused("read the frequency of the TSC"))?;
    let huge_pages = HugePages::ALL.into_iter().filter_map(|pages| Some((pages, huge_pages::free(pages)?))).collect();
    Ok(HostProcessor { tsc_khz, scales_tsc: scales_tsc(&kvm), huge_pages, ..features(&supported) })
}

/// The part that follows from CPUID alone.
fn features(supported: &Leaves) -> HostProcessor {
    let processor = Model::of(supported);
    let mut missing = BTreeMap::new();
    let mut models = vec![CpuModel::Host];
    for named in CpuModel::NAMED {
        // A guest whose memory needs more address bits than these is told so when it starts.
        match model::leaves(named, supported, MIN_ADDRESS_BITS) {
            Ok(_) => models.push(named),
            Err(error) => drop(missing.insert(named, error.missing)),
        }
    }
    HostProcessor {
        model_name: processor.to_string(),
        vendor: processor.vendor,
        models,
        fingerprint: fingerprint(supported),
        tsc_khz: 0,
        scales_tsc: false,
        missing,
        huge_pages: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model_tests::host;
    use super::*;

    #[test]
    fn a_host_tells_what_it_can_run_and_what_the_rest_would_need() {
        let mut leaves = host("GenuineIntel");
        let all = features(&leaves);
        assert_eq!(all.models, [CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3]);
        assert!(all.missing.is_empty() && all.vendor == "GenuineIntel" && all.fingerprint.len() == 64);
        // Without AVX2 and BMI2.
        leaves.entry(0x7, 0).ebx &= !(1 << 5 | 1 << 8);
        let less = features(&leaves);
        assert_eq!(less.models, [CpuModel::Host, CpuModel::X86_64V2]);
        assert_eq!(less.missing[&CpuModel::X86_64V3], ["avx2", "bmi2"]);
        assert_ne!(less.fingerprint, all.fingerprint);
    }
}

//! From a VM's definition to the configuration of its vmm: paths resolved and kept inside what this host's administrator
//! allows, the epoch on the kernel's command line.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::path::PathBuf;

use statemachine::ids::Epoch;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use statemachine::state;
use statemachine::state::Disk;
use statemachine::state::MachineType;
use statemachine::state::Nic;
use statemachine::state::ReleaseClass;
use statemachine::state::VmSpec;
use thiserror::Error;
use vmm_control::BackingImage;
use vmm_control::DiskConfig;
use vmm_control::DiskFormat;
use vmm_control::Identity;
use vmm_control::LeaseConfig;
use vmm_control::NicConfig;
use vmm_control::OnError;
use vmm_control::RateLimit;
use vmm_control::VmmConfig;
use vmm_control::config::DEFAULT_MTU;

use crate::lease::clock::Boottime;

#[derive(Debug, Error)]
pub enum GuestFilesError {
    #[error("{what} {path} cannot be opened on this host: {source}")]
    Missing {
        what: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{what} {path} leads to {target}, which is not under an allowed path of this host ({allowed}); move it, or add its directory to allowed_paths in hostd.toml"
    )]
    NotAllowed { what: String, path: PathBuf, target: PathBuf, allowed: String },
    #[error("{what} {path} is neither a regular file nor a block device")]
    WrongKind { what: String, path: PathBuf },
    #[error("the definition does not make a guest: {0}")]
    Definition(#[from] vmm_control::ConfigError),
}

/// What a launch knows of the guest.
#[derive(Debug, Clone)]
pub struct GuestIdentity {
    pub vm: VmId,
    pub name: String,
    pub epoch: Epoch,
    pub release: ReleaseClass,
    /// First deadline of a `lease` guest that starts here.
    pub deadline: Boottime,
    /// It comes by this migration, whose number is in the place of its epoch; its permit and deadline come when it may run.
    pub incoming: Option<MigrationId>,
}

/// Where the vmm of a guest writes.
#[derive(Debug, Clone)]
pub struct GuestPlaces {
    pub run_dir: PathBuf,
    pub mark: PathBuf,
}

/// Makes and checks the configuration. Touches the files that the definition names, so it may block on their storage.
pub fn vmm_config(
    identity: &GuestIdentity,
    spec: &VmSpec,
    allowed: &[PathBuf],
    places: GuestPlaces,
) -> Result<VmmConfig, GuestFilesError> {
    let resolve = |what: &str, path: &str, device: bool| resolve(what, Path::new(path), allowed, device);
    let mut disks = Vec::with_capacity(spec.disks.len());
    for disk in &spec.disks {
        disks.push(disk_config(disk, allowed)?);
    }
    let nic = |nic: &Nic| NicConfig { id: nic.id.clone(), mac: nic.mac_of(identity.vm), mtu: DEFAULT_MTU, slot: None };
    let release = release_class(identity.release);
    let config = VmmConfig {
        vm: identity.vm.0,
        name: identity.name.clone(),
        epoch: identity.epoch.0,
        machine: match spec.machine {
            MachineType::QDirect1 => vmm_control::MachineType::QDirect1,
        },
        vcpus: u16::try_from(spec.vcpus).unwrap_or(u16::MAX),
        memory_bytes: spec.memory_mib.saturating_mul(1 << 20),
        max_memory_bytes: None,
        kernel: resolve("kernel", &spec.kernel, false)?,
        initrd: spec.initrd.as_ref().map(|initrd| resolve("initrd", initrd, false)).transpose()?,
        cmdline: format!("{} quorate.epoch={}", spec.cmdline, identity.epoch).trim_start().to_owned(),
        disks,
        nics: spec.nics.iter().map(nic).collect(),
        identity: Identity { uuid: identity.vm.0, serial: identity.vm.to_string() },
        release,
        started_marker: places.mark,
        run_dir: places.run_dir,
        lease: (release == vmm_control::ReleaseClass::Lease && identity.incoming.is_none())
            .then(|| LeaseConfig { deadline_boottime_ns: identity.deadline.as_ns() }),
        log_level: vmm_control::LogLevel::Info,
        on_panic: Default::default(),
        generation: None,
        watchdog: None,
        cpu: None,
        huge_pages: None,
    };
    check(&config, identity.incoming)?;
    Ok(config)
}

/// Every bound that the vmm checks again.
pub fn check(config: &VmmConfig, incoming: Option<MigrationId>) -> Result<(), GuestFilesError> {
    match incoming {
        Some(_) => config.check_incoming()?,
        None => config.check()?,
    }
    Ok(())
}

fn disk_config(disk: &Disk, allowed: &[PathBuf]) -> Result<DiskConfig, GuestFilesError> {
    let what = format!("disk {}", disk.id);
    // An image names the one below it by a path relative to its own, so an image of a chain keeps the path that the definition has.
    let chained = !disk.backing.is_empty();
    let place = |what: &str, path: &str| {
        let target = resolve(what, Path::new(path), allowed, true)?;
        Ok::<PathBuf, GuestFilesError>(if chained { PathBuf::from(path) } else { target })
    };
    let mut backing = Vec::with_capacity(disk.backing.len());
    for image in &disk.backing {
        let path = place(&format!("backing image of {what}"), &image.path)?;
        backing.push(BackingImage { path, format: disk_format(image.format) });
    }
    Ok(DiskConfig {
        id: disk.id.clone(),
        path: place(&what, &disk.path)?,
        read_only: disk.read_only,
        serial: disk.id.clone(),
        slot: None,
        // Nothing here can know that no other host reaches the same storage.
        shared: true,
        format: disk_format(disk.format),
        backing,
        on_error: match disk.on_error {
            state::OnError::Stop => OnError::Stop,
            state::OnError::Report => OnError::Report,
            state::OnError::Ignore => OnError::Ignore,
            state::OnError::Enospc => OnError::Enospc,
        },
        rate_limit: disk.rate_limit.map(|limit| RateLimit {
            iops: limit.iops,
            burst_iops: limit.burst_iops,
            bytes_per_second: limit.bytes_per_second,
            burst_bytes: limit.burst_bytes,
        }),
    })
}

fn disk_format(format: state::DiskFormat) -> DiskFormat {
    match format {
        state::DiskFormat::Raw => DiskFormat::Raw,
        state::DiskFormat::Qcow2 => DiskFormat::Qcow2,
    }
}

/// The path with every link followed, if that ends under an allowed path. The vmm gets this one, so a link that changes
/// later changes nothing.
fn resolve(what: &str, path: &Path, allowed: &[PathBuf], device: bool) -> Result<PathBuf, GuestFilesError> {
    let missing = |source| GuestFilesError::Missing { what: what.to_owned(), path: path.to_owned(), source };
    let target = path.canonicalize().map_err(missing)?;
    let inside = allowed.iter().filter_map(|root| root.canonicalize().ok()).any(|root| target.starts_with(root));
    if !inside {
        let allowed: Vec<String> = allowed.iter().map(|root| root.display().to_string()).collect();
        let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
        return Err(GuestFilesError::NotAllowed { what: what.to_owned(), path: path.to_owned(), target, allowed });
    }
    let kind = target.metadata().map_err(missing)?.file_type();
    let fits = kind.is_file() || device && kind.is_block_device();
    if !fits {
        return Err(GuestFilesError::WrongKind { what: what.to_owned(), path: path.to_owned() });
    }
    Ok(target)
}

fn release_class(class: ReleaseClass) -> vmm_control::ReleaseClass {
    match class {
        ReleaseClass::Lease => vmm_control::ReleaseClass::Lease,
        ReleaseClass::Power => vmm_control::ReleaseClass::Power,
        ReleaseClass::Storage => vmm_control::ReleaseClass::Storage,
        ReleaseClass::Operator => vmm_control::ReleaseClass::Operator,
    }
}

/// The same, from a configuration that a running vmm was started with.
pub fn permit_class(class: vmm_control::ReleaseClass) -> ReleaseClass {
    match class {
        vmm_control::ReleaseClass::Lease => ReleaseClass::Lease,
        vmm_control::ReleaseClass::Power => ReleaseClass::Power,
        vmm_control::ReleaseClass::Storage => ReleaseClass::Storage,
        vmm_control::ReleaseClass::Operator => ReleaseClass::Operator,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use uuid::Uuid;

    struct Images {
        _dir: tempfile::TempDir,
        allowed: PathBuf,
        outside: PathBuf,
    }

    fn images() -> Images {
        let dir = tempfile::tempdir().unwrap();
        let (allowed, outside) = (dir.path().join("images"), dir.path().join("outside"));
        for place in [&allowed, &outside] {
            std::fs::create_dir(place).unwrap();
            std::fs::write(place.join("vmlinuz"), "kernel").unwrap();
        }
        Images { allowed, outside, _dir: dir }
    }

    fn config(images: &Images, kernel: &Path, release: ReleaseClass) -> Result<VmmConfig, GuestFilesError> {
        let disk = Disk::raw("root", &images.allowed.join("vmlinuz").display().to_string());
        config_with(images, kernel, release, disk)
    }

    fn config_with(
        images: &Images,
        kernel: &Path,
        release: ReleaseClass,
        disk: Disk,
    ) -> Result<VmmConfig, GuestFilesError> {
        let mut spec = crate::test_site::spec(release);
        spec.kernel = kernel.display().to_string();
        spec.disks.push(disk);
        let vm = VmId(Uuid::from_u128(7));
        let deadline = Boottime::from_ms(5);
        let identity =
            GuestIdentity { vm, name: "web".to_owned(), epoch: Epoch(41), release, deadline, incoming: None };
        let places = GuestPlaces { run_dir: "/run/quorate/vm/7".into(), mark: "/var/lib/quorate/marks/7/41".into() };
        vmm_config(&identity, &spec, std::slice::from_ref(&images.allowed), places)
    }

    #[test]
    fn the_guest_sees_its_epoch_and_only_a_lease_guest_has_a_deadline() {
        let images = images();
        let kernel = images.allowed.join("vmlinuz");
        let lease = config(&images, &kernel, ReleaseClass::Lease).unwrap();
        assert_eq!(lease.cmdline, "console=ttyS0 quorate.epoch=41");
        assert_eq!(lease.lease, Some(LeaseConfig { deadline_boottime_ns: 5_000_000 }));
        assert_eq!(config(&images, &kernel, ReleaseClass::Operator).unwrap().lease, None);
    }

    #[test]
    fn an_image_of_a_chain_is_called_as_the_definition_calls_it_and_lies_where_it_may() {
        let images = images();
        let kernel = images.allowed.join("vmlinuz");
        let (top, base) = (images.allowed.join("top.qcow2"), images.allowed.join("base.raw"));
        let elsewhere = images.allowed.join("elsewhere");
        std::fs::write(&elsewhere, "data").unwrap();
        symlink(&elsewhere, &top).unwrap();
        symlink(&elsewhere, &base).unwrap();
        let chain = |below: &Path| Disk {
            format: state::DiskFormat::Qcow2,
            backing: vec![state::BackingImage { path: below.display().to_string(), format: state::DiskFormat::Raw }],
            on_error: state::OnError::Enospc,
            rate_limit: Some(state::RateLimit { iops: Some(500), ..state::RateLimit::default() }),
            ..Disk::raw("root", &top.display().to_string())
        };
        let disk = |disk| config_with(&images, &kernel, ReleaseClass::Operator, disk).map(|config| config.disks);
        let [made] = &disk(chain(&base)).unwrap()[..] else { panic!("one disk") };
        assert_eq!((made.path.as_path(), made.format), (top.as_path(), DiskFormat::Qcow2));
        assert_eq!(made.backing, [BackingImage { path: base.clone(), format: DiskFormat::Raw }]);
        assert_eq!(made.on_error, OnError::Enospc);
        assert_eq!(made.rate_limit, Some(RateLimit { iops: Some(500), ..RateLimit::default() }));

        let outside = disk(chain(&images.outside.join("vmlinuz"))).unwrap_err();
        assert!(matches!(outside, GuestFilesError::NotAllowed { .. }), "{outside}");
        let [alone] = &disk(Disk { backing: Vec::new(), ..chain(&base) }).unwrap()[..] else { panic!("one disk") };
        assert_eq!(alone.path, elsewhere.canonicalize().unwrap(), "nothing is below it, so its links are followed");
    }

    #[test]
    fn a_path_that_leads_out_of_the_allowed_ones_is_refused_in_words() {
        let images = images();
        let link = images.allowed.join("link");
        symlink(images.outside.join("vmlinuz"), &link).unwrap();
        let beside = images.allowed.with_file_name("images-of-others");
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(beside.join("vmlinuz"), "kernel").unwrap();
        for kernel in [images.outside.join("vmlinuz"), link, beside.join("vmlinuz")] {
            let error = config(&images, &kernel, ReleaseClass::Operator).unwrap_err();
            assert!(matches!(error, GuestFilesError::NotAllowed { .. }), "{error}");
            assert!(error.to_string().contains("allowed_paths"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_no_file_is_refused() {
        let images = images();
        let missing = config(&images, &images.allowed.join("none"), ReleaseClass::Operator).unwrap_err();
        assert!(matches!(missing, GuestFilesError::Missing { .. }), "{missing}");
        let directory = config(&images, &images.allowed, ReleaseClass::Operator).unwrap_err();
        assert!(matches!(directory, GuestFilesError::WrongKind { .. }), "{directory}");
    }

    #[test]
    fn a_link_inside_the_allowed_paths_is_followed_once_and_for_all() {
        let images = images();
        let link = images.allowed.join("current");
        symlink(images.allowed.join("vmlinuz"), &link).unwrap();
        let resolved = config(&images, &link, ReleaseClass::Operator).unwrap().kernel;
        assert_eq!(resolved, images.allowed.join("vmlinuz").canonicalize().unwrap());
    }
}

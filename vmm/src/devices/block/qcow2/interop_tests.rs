//! Images that `qemu-img` made, and its judgement of what we left. Where the tool is not installed the tests say so and pass.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use tempfile::TempDir;
use vmm_control::DiskFormat;

use super::chain::{self, Layer};
use super::{Image, ImageError};

const MIB: u64 = 1 << 20;

/// A directory for images.
struct Images {
    dir: TempDir,
}

impl Images {
    fn new() -> Self {
        Command::new("qemu-img").arg("--version").output().expect("qemu-img, of Debian's qemu-utils: `make setup`");
        // Not in memory: O_DIRECT and holes are part of the matter.
        Self { dir: tempfile::tempdir_in("/var/tmp").unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qemu_img(&self, args: &[&str]) -> String {
        let output = Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {args:?}: {text}");
        text
    }

    fn raw(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The image has no errors and no leaks, and holds `expected`.
    fn is_sound(&self, name: &str, expected: &[u8]) {
        let report = self.qemu_img(&["check", "-f", "qcow2", name]);
        assert!(report.contains("No errors were found"), "{report}");
        self.raw("expected.raw", expected);
        self.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected.raw", name]);
    }

    fn open(&self, chain: &[(&str, DiskFormat)]) -> Result<Image, ImageError> {
        self.open_with(chain, None)
    }

    /// `align` asks for O_DIRECT, with requests of so many bytes at the least.
    fn open_with(&self, chain: &[(&str, DiskFormat)], align: Option<usize>) -> Result<Image, ImageError> {
        let flags = if align.is_some() { libc::O_DIRECT } else { 0 };
        let layers = chain.iter().enumerate().map(|(at, (name, format))| {
            let path = self.path(name);
            let file = File::options().read(true).write(at == 0).custom_flags(flags).open(&path).unwrap();
            Layer::new(path, *format, file, align)
        });
        chain::open(layers.collect(), false)
    }
}

/// Bytes that differ from place to place.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// Writes of many sizes and places, to the image and to what it should be.
fn scribble(image: &Image, model: &mut [u8], seed: u64) {
    for (i, (offset, len)) in [
        (0, 512),
        (512, 4096),
        (65536 - 512, 1024),
        (200_000 / 512 * 512, 131_072),
        (3 << 20, 512),
        (5 * MIB, MIB + 512),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes = noise(len, seed + i as u64);
        image.write(offset, &bytes).unwrap();
        model[offset as usize..][..len as usize].copy_from_slice(&bytes);
    }
    let last = model.len() - 512;
    image.write(last as u64, &[0x77; 512]).unwrap();
    model[last..].fill(0x77);
    for (offset, len, unmap) in [(131_072u64, 65_536u64, false), (5 * MIB + 512, 262_144, true), (7 * MIB, 4096, false)]
    {
        if unmap {
            image.unmap_to_zeros(offset, len).unwrap();
        } else {
            image.write_zeros(offset, len).unwrap();
        }
        model[offset as usize..][..len as usize].fill(0);
    }
    image.flush().unwrap();
}

fn reads(image: &Image, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    image.read(0, &mut bytes).unwrap();
    assert!(bytes == expected, "the image reads as something else");
}

#[test]
fn images_of_every_geometry_stay_sound() {
    let images = Images::new();
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k",
        "cluster_size=64k,refcount_bits=64",
        "cluster_size=2M",
        "cluster_size=64k,preallocation=metadata",
        "cluster_size=64k,preallocation=full",
    ] {
        images.qemu_img(&["create", "-f", "qcow2", "-o", options, "disk.qcow2", "8M"]);
        let mut model = vec![0; 8 << 20];
        // Storage with large blocks, too: clusters smaller than a block share it with tables.
        for (round, align) in (0..).zip([None, Some(4096), None]) {
            let image = images.open_with(&[("disk.qcow2", DiskFormat::Qcow2)], align).unwrap();
            assert_eq!(image.bytes(), 8 * MIB);
            reads(&image, &model);
            scribble(&image, &mut model, round * 100);
            reads(&image, &model);
            drop(image);
            images.is_sound("disk.qcow2", &model);
        }
        fs::remove_file(images.path("disk.qcow2")).unwrap();
    }
}

#[test]
fn an_image_of_version_2_is_written_and_says_that_it_cannot_zero() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "-o", "compat=0.10", "disk.qcow2", "8M"]);
    let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    let bytes = noise(65_536, 1);
    image.write(MIB, &bytes).unwrap();
    let error = image.write_zeros(MIB, 65_536).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
    image.flush().unwrap();
    drop(image);
    let mut model = vec![0; 8 << 20];
    model[1 << 20..][..65_536].copy_from_slice(&bytes);
    images.is_sound("disk.qcow2", &model);
}

#[test]
fn a_chain_is_read_through_and_only_its_top_is_written() {
    let images = Images::new();
    let mut model = noise(6 * MIB, 7);
    images.raw("base.raw", &model);
    images.qemu_img(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "8M"]);
    model.resize(8 << 20, 0);
    let middle_chain = [("middle.qcow2", DiskFormat::Qcow2), ("base.raw", DiskFormat::Raw)];
    let middle = images.open(&middle_chain).unwrap();
    reads(&middle, &model);
    scribble(&middle, &mut model, 1);
    drop(middle);
    images.is_sound("middle.qcow2", &model);

    images.qemu_img(&["create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2"]);
    let below = [fs::read(images.path("base.raw")).unwrap(), fs::read(images.path("middle.qcow2")).unwrap()];
    let chain = [("top.qcow2", DiskFormat::Qcow2), middle_chain[0], middle_chain[1]];
    let top = images.open(&chain).unwrap();
    reads(&top, &model);
    scribble(&top, &mut model, 500);
    reads(&top, &model);
    drop(top);
    images.is_sound("top.qcow2", &model);
    assert!(fs::read(images.path("base.raw")).unwrap() == below[0], "the base was written");
    assert!(fs::read(images.path("middle.qcow2")).unwrap() == below[1], "the middle was written");
}

#[test]
fn the_chain_of_the_configuration_is_that_of_the_headers() {
    let images = Images::new();
    images.raw("base.raw", &noise(MIB, 7));
    images.raw("other.raw", &noise(MIB, 8));
    images.qemu_img(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "1M"]);
    images.qemu_img(&["create", "-f", "qcow2", "alone.qcow2", "1M"]);
    let refusal = |chain: &[(&str, DiskFormat)]| images.open(chain).err();
    let top = ("top.qcow2", DiskFormat::Qcow2);
    assert!(matches!(refusal(&[top]), Some(ImageError::BackingName { .. })));
    assert!(matches!(refusal(&[top, ("other.raw", DiskFormat::Raw)]), Some(ImageError::BackingName { .. })));
    assert!(matches!(
        refusal(&[("alone.qcow2", DiskFormat::Qcow2), ("base.raw", DiskFormat::Raw)]),
        Some(ImageError::NoBacking { .. })
    ));
    // A guest wrote the header of an image into its raw base: that is data, and not an image.
    fs::copy(images.path("alone.qcow2"), images.path("base.raw")).unwrap();
    assert!(matches!(refusal(&[top, ("base.raw", DiskFormat::Qcow2)]), Some(ImageError::BackingFormat { .. })));
    let image = images.open(&[top, ("base.raw", DiskFormat::Raw)]).unwrap();
    let mut start = [0; 512];
    image.read(0, &mut start).unwrap();
    assert_eq!(&start[..4], b"QFI\xfb");
}

#[test]
fn one_file_by_two_names_is_found() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "top.qcow2", "1M"]);
    fs::hard_link(images.path("top.qcow2"), images.path("again.qcow2")).unwrap();
    images.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "again.qcow2", "-F", "qcow2", "top.qcow2"]);
    let chain = [("top.qcow2", DiskFormat::Qcow2), ("again.qcow2", DiskFormat::Qcow2)];
    assert!(matches!(images.open(&chain).err(), Some(ImageError::Twice { .. })));
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    let images = Images::new();
    let mut model: Vec<u8> = (0..8 * MIB).map(|i| (i / 3000) as u8).collect();
    images.raw("source.raw", &model);
    images.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "source.raw", "disk.qcow2"]);
    let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    reads(&image, &model);
    scribble(&image, &mut model, 9);
    reads(&image, &model);
    drop(image);
    images.is_sound("disk.qcow2", &model);
}

#[test]
fn other_compression_is_refused_in_words() {
    let images = Images::new();
    images.raw("source.raw", &noise(MIB, 1));
    let made = Command::new("qemu-img")
        .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", "source.raw", "disk.qcow2"])
        .current_dir(images.dir.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "Debian's qemu-img has zstd");
    let error = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).err().unwrap();
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
}

#[test]
fn a_snapshot_inside_of_the_image_keeps_its_data() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "disk.qcow2", "8M"]);
    let mut model = vec![0; 8 << 20];
    let open = || images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    scribble(&open(), &mut model, 1);
    images.qemu_img(&["snapshot", "-c", "before", "disk.qcow2"]);
    let before = model.clone();
    scribble(&open(), &mut model, 1000);
    images.is_sound("disk.qcow2", &model);
    images.qemu_img(&["convert", "-f", "qcow2", "-l", "before", "-O", "raw", "disk.qcow2", "before.raw"]);
    assert!(fs::read(images.path("before.raw")).unwrap() == before, "the snapshot has changed");
}

#[test]
fn a_full_file_system_leaves_a_sound_image_and_the_write_succeeds_later() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "disk.qcow2", "8M"]);
    let mut model = vec![0; 8 << 20];
    let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    scribble(&image, &mut model, 1);
    image.file().full.store(true, Ordering::SeqCst);
    let bytes = noise(512 << 10, 3);
    let error = image.write(7 * MIB, &bytes).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    image.file().full.store(false, Ordering::SeqCst);
    image.write(7 * MIB, &bytes).unwrap();
    model[7 << 20..][..512 << 10].copy_from_slice(&bytes);
    image.flush().unwrap();
    drop(image);
    images.is_sound("disk.qcow2", &model);
}

#[test]
fn a_process_that_is_killed_leaves_an_image_without_errors() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "disk.qcow2", "8M"]);
    let mut model = vec![0; 8 << 20];
    let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    scribble(&image, &mut model, 1);
    // Not flushed: what is in memory is lost with the process, which a fence does as well.
    for at in 0..8 {
        image.write(at * MIB, &noise(100 << 10, at)).unwrap();
    }
    image.file().fence();
    drop(image);
    // Leaks are allowed, errors are not: exit code 3 is leaks alone.
    let check =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(images.path("disk.qcow2")).output().unwrap();
    let report = String::from_utf8_lossy(&check.stdout);
    assert!(matches!(check.status.code(), Some(0 | 3)), "{report}");
    images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
}

/// Blocks of the file system that a file takes.
fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks()
}

#[test]
fn discarded_clusters_go_back_to_the_file_system() {
    let images = Images::new();
    images.qemu_img(&["create", "-f", "qcow2", "disk.qcow2", "8M"]);
    let path = images.path("disk.qcow2");
    let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
    image.write(0, &noise(4 * MIB, 1)).unwrap();
    image.flush().unwrap();
    let full = blocks(&path);
    image.discard(512, 3 * MIB).unwrap();
    image.flush().unwrap();
    assert!(blocks(&path) + 2 * MIB / 512 < full, "{full} blocks before, {} after", blocks(&path));
    let mut kept = vec![0; MIB as usize];
    image.read(3 * MIB + 65_536, &mut kept[..65_536]).unwrap();
    assert!(kept[..65_536] == noise(4 * MIB, 1)[(3 * MIB + 65_536) as usize..][..65_536], "too much was discarded");
    drop(image);
    let report = images.qemu_img(&["check", "-f", "qcow2", "disk.qcow2"]);
    assert!(report.contains("No errors were found"), "{report}");
}

#[test]
fn threads_that_share_clusters_do_not_meet() {
    const STRIPE: u64 = 4096;
    const THREADS: u64 = 4;
    let images = Images::new();
    for options in ["cluster_size=64k", "cluster_size=512"] {
        images.qemu_img(&["create", "-f", "qcow2", "-o", options, "disk.qcow2", "8M"]);
        let image = images.open(&[("disk.qcow2", DiskFormat::Qcow2)]).unwrap();
        // Each thread has every fourth stripe of the first half to itself, and all free clusters of the second.
        let work = |thread: u64| {
            let mut mine = Vec::new();
            for round in 0..200 {
                let stripe = (noise(8, round * THREADS + thread)[0] as u64 * THREADS + thread) % (4 * MIB / STRIPE);
                let bytes = noise(STRIPE, round + 1);
                image.write(stripe * STRIPE, &bytes).unwrap();
                let mut found = vec![0; STRIPE as usize];
                image.read(stripe * STRIPE, &mut found).unwrap();
                assert!(found == bytes, "another thread's data");
                mine.push((stripe, bytes));
                match round % 16 {
                    3 => image.flush().unwrap(),
                    7 => image.discard(4 * MIB + thread * MIB, MIB).unwrap(),
                    11 => image.write(4 * MIB + thread * MIB, &noise(256 << 10, round)).unwrap(),
                    _ => {}
                }
            }
            image.unmap_to_zeros(4 * MIB + thread * MIB, MIB).unwrap();
            mine
        };
        let mut model = vec![0; 8 << 20];
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn({
                        let work = &work;
                        move || work(thread)
                    })
                })
                .collect();
            for thread in threads {
                for (stripe, bytes) in thread.join().unwrap() {
                    model[(stripe * STRIPE) as usize..][..STRIPE as usize].copy_from_slice(&bytes);
                }
            }
        });
        image.flush().unwrap();
        reads(&image, &model);
        drop(image);
        images.is_sound("disk.qcow2", &model);
    }
}

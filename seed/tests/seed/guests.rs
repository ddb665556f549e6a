//! The disk as programs see it that have nothing of ours in them: util-linux, by which cloud-init finds it, and mtools.

use std::path::Path;
use std::process::Command;

use crate::world::*;

fn run(program: &str, arguments: &[&str]) -> String {
    // Of a user's shell the directories of the administrator may be missing.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let done = Command::new(program).args(arguments).env("PATH", path).output();
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}; `make setup` installs it"));
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

fn written(directory: &Path) -> String {
    let path = directory.join("seed.raw");
    std::fs::write(&path, image(&full())).expect("a file");
    path.to_str().expect("a path of text").to_owned()
}

#[test]
fn blkid_finds_the_disk_by_the_label_that_cloud_init_looks_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = written(directory.path());
    let said = run("blkid", &["-p", "-o", "export", &disk]);
    for line in ["LABEL=CIDATA", "LABEL_FATBOOT=CIDATA", "TYPE=vfat", "USAGE=filesystem"] {
        assert!(said.lines().any(|said| said == line), "{line} is not in {said}");
    }
}

#[test]
fn mtools_reads_the_files_that_our_own_reader_reads() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = written(directory.path());
    let ours = files(&image(&full()));
    let listed = run("mdir", &["-b", "-i", &disk, "::"]);
    let listed: Vec<&str> = listed.lines().filter_map(|line| line.strip_prefix("::/")).collect();
    assert_eq!(listed.len(), ours.len(), "{listed:?}");
    for (name, text) in ours {
        assert!(listed.contains(&name.as_str()), "{listed:?}");
        assert_eq!(run("mtype", &["-i", &disk, &format!("::{name}")]), text, "{name}");
    }
}

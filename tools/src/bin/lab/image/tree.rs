//! Pieces that both images share: busybox with its names, modules in load order, programs with
//! the shared libraries that they need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::modules::Module;
use super::packages::program;

/// Static busybox as /bin/busybox, and a link for each of its applets.
pub fn add_busybox(archive: &mut Archive) -> Result<()> {
    let busybox = program("busybox")?;
    if !shared_libraries(&busybox)?.is_empty() {
        bail!("{} is not static: install busybox-static", busybox.display());
    }
    archive.file("bin/busybox", 0o755, &read(&busybox)?);
    let list = Command::new(&busybox).arg("--list").output().context("run busybox --list")?;
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

/// Modules below /lib/modules, with the file `load-order`: a line a module, `FILE [PARAMETERS]`.
pub fn add_modules(archive: &mut Archive, modules: &[Module], parameters: &[(&str, &str)]) {
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.bytes);
        let of_module = parameters.iter().find(|(name, _)| *name == module.name).map_or("", |(_, text)| *text);
        order.push_str(format!("{}.ko {of_module}", module.name).trim_end());
        order.push('\n');
    }
    archive.file("lib/modules/load-order", 0o644, order.as_bytes());
}

/// A program at `path` in the image; answers the libraries that it needs on this machine.
pub fn add_program(archive: &mut Archive, path: &str, source: &Path) -> Result<BTreeSet<PathBuf>> {
    archive.file(path, 0o755, &read(source)?);
    shared_libraries(source)
}

/// Libraries at the same paths as here, so that the loader finds them.
pub fn add_libraries(archive: &mut Archive, libraries: &BTreeSet<PathBuf>) -> Result<()> {
    for library in libraries {
        archive.file(&library.to_string_lossy(), 0o755, &read(library)?);
    }
    Ok(())
}

/// Asks ldd; an empty set means a static program.
fn shared_libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
        bail!(
            "{} needs a library that this machine lacks: {}; install the packages in lab/packages.txt",
            program.display(),
            missing.trim()
        );
    }
    Ok(library_paths(&text))
}

fn library_paths(ldd: &str) -> BTreeSet<PathBuf> {
    ldd.lines()
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect()
}

pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_the_loader() {
        let text = "\tlinux-vdso.so.1 (0x7f)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let paths: Vec<_> = library_paths(text).into_iter().collect();
        assert_eq!(paths, [PathBuf::from("/lib/x86_64-linux-gnu/libm.so.6"), "/lib64/ld-linux-x86-64.so.2".into()]);
    }
}

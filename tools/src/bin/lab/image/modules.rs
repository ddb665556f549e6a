//! Which kernel modules an image needs, and in which order they load. The distribution's package
//! holds no modules.dep (depmod runs at installation), so the order comes from the modules
//! themselves: `depends` and `softdep` of their `.modinfo` section.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What a module says of itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ModuleInfo {
    pub depends: Vec<String>,
    /// Names or aliases that should load first (`softdep=pre:`).
    pub wants: Vec<String>,
    pub aliases: Vec<String>,
}

/// A module that goes into an image: its file name there and its bytes, uncompressed.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// The modules below one kernel's `/lib/modules/VERSION`.
pub struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// Module names treat `-` and `_` alike; the kernel itself uses `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let name = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(normal(name))
}

impl ModuleTree {
    pub fn open(root: &Path) -> Result<Self> {
        let builtin = std::fs::read_to_string(root.join("modules.builtin"))
            .with_context(|| format!("{} is no kernel module tree", root.display()))?;
        let builtin = builtin.lines().filter_map(module_name).collect();
        let mut files = BTreeMap::new();
        let mut directories = vec![root.join("kernel")];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(name) = path.to_str().and_then(module_name) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Self { files, builtin })
    }

    /// The modules named and all they need, dependencies first. Names that the kernel has built in
    /// need no file; names that it lacks altogether are an error, since the image would not work.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        for name in wanted.iter().map(|name| normal(name)) {
            if !self.files.contains_key(&name) && !self.builtin.contains(&name) {
                bail!("this kernel has no module {name}");
            }
        }
        let mut bytes = BTreeMap::new();
        let mut infos = BTreeMap::new();
        let mut queue: Vec<String> = wanted.iter().map(|name| normal(name)).collect();
        while let Some(name) = queue.pop() {
            let Some(path) = self.files.get(&name) else { continue };
            if infos.contains_key(&name) {
                continue;
            }
            let content = read_module(path)?;
            let info = parse_modinfo(&content).with_context(|| format!("{} is no kernel module", path.display()))?;
            queue.extend(info.depends.iter().cloned());
            queue.extend(info.wants.iter().flat_map(|want| self.providers(want)));
            bytes.insert(name.clone(), without_signature(content));
            infos.insert(name, info);
        }
        let order = load_order(&infos, wanted);
        Ok(order.into_iter().filter_map(|name| bytes.remove(&name).map(|bytes| Module { name, bytes })).collect())
    }

    /// Modules that may answer to a soft dependency: the name itself, or for `crypto-X` all whose
    /// name begins with X. Which of them really carry the alias is decided in `load_order`.
    fn providers(&self, want: &str) -> Vec<String> {
        let want = normal(want);
        let stem = want.strip_prefix("crypto_").unwrap_or(&want);
        self.files.keys().filter(|name| **name == want || name.starts_with(stem)).cloned().collect()
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").arg("-dc").arg(path).output().context("run xz")?;
        if !output.status.success() {
            bail!("xz cannot unpack {}", path.display());
        }
        return Ok(output.stdout);
    }
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// A module's signature stands at its end: the signature, twelve bytes about it (the last four are
/// its length), a mark. Checking RSA costs an emulated processor a tenth of a second a module, and
/// the kernel loads unsigned modules as well.
fn without_signature(mut module: Vec<u8>) -> Vec<u8> {
    const MARK: &[u8] = b"~Module signature appended~\n";
    const ABOUT: usize = 12;
    let content = module.strip_suffix(MARK).and_then(|signed| {
        let (_, length) = signed.split_last_chunk::<4>()?;
        let signature = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        signed.len().checked_sub(ABOUT)?.checked_sub(signature)
    });
    if let Some(length) = content {
        module.truncate(length);
    }
    module
}

/// Depth-first order over what is known: every module after all that it needs.
pub fn load_order(infos: &BTreeMap<String, ModuleInfo>, wanted: &[&str]) -> Vec<String> {
    let mut by_alias: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for (name, info) in infos {
        by_alias.entry(name.clone()).or_default().push(name);
        for alias in &info.aliases {
            by_alias.entry(normal(alias)).or_default().push(name);
        }
    }
    fn visit<'a>(
        name: &'a str,
        infos: &'a BTreeMap<String, ModuleInfo>,
        by_alias: &BTreeMap<String, Vec<&'a String>>,
        seen: &mut BTreeSet<&'a str>,
        order: &mut Vec<String>,
    ) {
        let Some((name, info)) = infos.get_key_value(name) else { return };
        if !seen.insert(name) {
            return;
        }
        let soft = info.wants.iter().filter_map(|want| by_alias.get(&normal(want))).flatten().copied();
        for before in info.depends.iter().chain(soft) {
            visit(before, infos, by_alias, seen, order);
        }
        order.push(name.clone());
    }
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    for name in wanted.iter().map(|name| normal(name)) {
        if let Some((name, _)) = infos.get_key_value(&name) {
            visit(name, infos, &by_alias, &mut seen, &mut order);
        }
    }
    order
}

/// Reads `.modinfo` of a 64-bit little-endian ELF object. `None` when the bytes are not one.
pub fn parse_modinfo(object: &[u8]) -> Option<ModuleInfo> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(object.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(object.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| {
        let bytes = object.get(at..at.checked_add(8)?)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if object.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (headers, size, count) = (u64_at(0x28)?, usize::from(u16_at(0x3a)?), usize::from(u16_at(0x3c)?));
    let header = |n: usize| headers.checked_add(n.checked_mul(size)?);
    let section = |n: usize| {
        let at = header(n)?;
        let (offset, length) = (u64_at(at.checked_add(0x18)?)?, u64_at(at.checked_add(0x20)?)?);
        object.get(offset..offset.checked_add(length)?)
    };
    let names = section(usize::from(u16_at(0x3e)?))?;
    let modinfo = (0..count).find_map(|n| {
        let name = names.get(usize::try_from(u32_at(header(n)?)?).ok()?..)?;
        if name.starts_with(b".modinfo\0") { section(n) } else { None }
    })?;
    let mut info = ModuleInfo::default();
    for field in modinfo.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok()) {
        match field.split_once('=') {
            Some(("depends", list)) => {
                info.depends.extend(list.split(',').filter(|name| !name.is_empty()).map(normal));
            }
            Some(("softdep", rule)) => {
                let before = rule.strip_prefix("pre:").unwrap_or_default();
                let before = before.split("post:").next().unwrap_or_default();
                info.wants.extend(before.split_whitespace().map(str::to_owned));
            }
            Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
            _ => {}
        }
    }
    Some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &[&str], wants: &[&str], aliases: &[&str]) -> ModuleInfo {
        let own = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect();
        ModuleInfo { depends: own(depends), wants: own(wants), aliases: own(aliases) }
    }

    #[test]
    fn modules_load_after_all_that_they_need() {
        let infos = BTreeMap::from([
            ("virtio_net".to_owned(), module(&["virtio", "net_failover"], &[], &[])),
            ("net_failover".to_owned(), module(&["failover"], &[], &[])),
            ("failover".to_owned(), module(&[], &[], &[])),
            ("virtio".to_owned(), module(&[], &[], &[])),
            ("ext4".to_owned(), module(&["jbd2"], &["crypto-crc32c"], &[])),
            ("jbd2".to_owned(), module(&[], &[], &[])),
            ("crc32c_generic".to_owned(), module(&[], &[], &["crypto-crc32c"])),
            ("crc32c_other".to_owned(), module(&[], &[], &["crypto-else"])),
        ]);
        let order = load_order(&infos, &["ext4", "virtio-net"]);
        assert_eq!(order, ["jbd2", "crc32c_generic", "ext4", "virtio", "failover", "net_failover", "virtio_net"]);
    }

    #[test]
    fn a_circle_of_modules_ends() {
        let infos =
            BTreeMap::from([("a".to_owned(), module(&["b"], &[], &[])), ("b".to_owned(), module(&["a"], &[], &[]))]);
        assert_eq!(load_order(&infos, &["a"]), ["b", "a"]);
    }

    /// A minimal object: ELF header, section names, .modinfo, two section headers.
    fn object(modinfo: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64, 0);
        let names = b"\0.modinfo\0";
        let (names_at, info_at) = (64, 64 + names.len());
        bytes.extend_from_slice(names);
        bytes.extend_from_slice(modinfo);
        let headers_at = bytes.len();
        for (name, offset, length) in [(0u32, names_at, names.len()), (1, info_at, modinfo.len())] {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes[0x28..0x30].copy_from_slice(&(headers_at as u64).to_le_bytes());
        bytes[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        bytes[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        bytes
    }

    #[test]
    fn modinfo_names_dependencies() {
        let object = object(b"license=GPL\0alias=fs-ext4\0softdep=pre: crypto-crc32c post: x\0depends=jbd2,crc-16\0");
        let info = parse_modinfo(&object).expect("an object");
        assert_eq!(info, module(&["jbd2", "crc_16"], &["crypto-crc32c"], &["fs-ext4"]));
    }

    #[test]
    fn signatures_are_taken_off_and_other_ends_stay() {
        let mark = b"~Module signature appended~\n";
        let signed = [&b"module"[..], b"sig", &[0; 8], &3u32.to_be_bytes(), mark].concat();
        assert_eq!(without_signature(signed), b"module");
        assert_eq!(without_signature(b"module".to_vec()), b"module");
        let lying = [&b"module"[..], &[0; 8], &u32::MAX.to_be_bytes(), mark].concat();
        assert_eq!(without_signature(lying.clone()), lying);
    }

    #[test]
    fn a_damaged_object_is_refused_and_never_read_past_its_end() {
        let whole = object(b"depends=a\0");
        for length in 0..whole.len() {
            let _ = parse_modinfo(&whole[..length]);
        }
        for at in 0..64 {
            let mut damaged = whole.clone();
            damaged[at] = 0xff;
            let _ = parse_modinfo(&damaged);
        }
        assert_eq!(parse_modinfo(b"not an object"), None);
    }
}

//! The search for leaked secrets, inside a host: every form in which a key or a token is likely to be written, against every
//! file below given directories.
//!
//! What is searched for is read from where it belongs (key files) and from a file of token texts. A search that finds
//! nothing proves something only if the same search finds what was put in its way: [`SecretsOptions::must_find`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hostd_api::{ApiToken, JoinToken};
use memchr::memmem;

#[derive(Debug, clap::Args)]
pub struct SecretsOptions {
    /// Files with private keys: PEM, or raw bytes.
    #[arg(long = "key")]
    keys: Vec<PathBuf>,
    /// A file with one token text a line.
    #[arg(long)]
    tokens: Option<PathBuf>,
    /// Files and directories that are left out, because secrets belong there.
    #[arg(long = "except")]
    except: Vec<PathBuf>,
    /// Succeed only if every secret is found somewhere: the proof that the search can see.
    #[arg(long)]
    must_find: bool,
    /// Where to look.
    #[arg(required = true)]
    directories: Vec<PathBuf>,
}

/// A secret in one of its forms.
struct Needle {
    of: String,
    form: &'static str,
    bytes: Vec<u8>,
}

/// Shorter pieces than this would be found by chance.
const NEEDLE_MIN: usize = 16;

pub fn search(options: &SecretsOptions) -> Result<ExitCode> {
    let mut needles = Vec::new();
    for path in &options.keys {
        let bytes = std::fs::read(path).with_context(|| format!("read the key {}", path.display()))?;
        needles.extend(key_needles(&path.display().to_string(), &bytes));
    }
    if let Some(path) = &options.tokens {
        let texts = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        for (number, text) in texts.lines().filter(|line| !line.trim().is_empty()).enumerate() {
            needles.extend(token_needles(&format!("token {}", number + 1), text.trim())?);
        }
    }
    let mut seen = Seen::default();
    for directory in &options.directories {
        look_into(directory, &options.except, &needles, &mut seen)?;
    }
    println!(
        "{} forms of {} secrets, {} files, {} bytes: {} found",
        needles.len(),
        needles.iter().map(|needle| &needle.of).collect::<BTreeSet<_>>().len(),
        seen.files,
        seen.bytes,
        seen.found.len()
    );
    for (path, needle) in &seen.found {
        println!("{} holds {} ({})", path.display(), needles[*needle].of, needles[*needle].form);
    }
    let good = match options.must_find {
        false => seen.found.is_empty(),
        true => {
            let found: BTreeSet<&str> = seen.found.iter().map(|(_, needle)| needles[*needle].of.as_str()).collect();
            needles.iter().all(|needle| found.contains(needle.of.as_str()))
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Default)]
struct Seen {
    files: usize,
    bytes: u64,
    /// Path, and index of the needle.
    found: Vec<(PathBuf, usize)>,
}

fn look_into(path: &Path, except: &[PathBuf], needles: &[Needle], seen: &mut Seen) -> Result<()> {
    if except.iter().any(|excepted| path == excepted) {
        return Ok(());
    }
    let metadata = std::fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).with_context(|| format!("read {}", path.display()))? {
            look_into(&entry?.path(), except, needles, seen)?;
        }
    } else if metadata.is_file() {
        // The largest is a log segment of some megabytes.
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        seen.files += 1;
        seen.bytes += bytes.len() as u64;
        let hits = needles.iter().enumerate().filter(|(_, needle)| memmem::find(&bytes, &needle.bytes).is_some());
        seen.found.extend(hits.map(|(index, _)| (path.to_owned(), index)));
    }
    Ok(())
}

fn key_needles(of: &str, file: &[u8]) -> Vec<Needle> {
    let needle = |form, bytes: Vec<u8>| Needle { of: of.to_owned(), form, bytes };
    let text = std::str::from_utf8(file).unwrap_or_default();
    let body: Vec<&str> = text.lines().filter(|line| !line.starts_with("-----")).map(str::trim).collect();
    let der = STANDARD.decode(body.concat()).unwrap_or_default();
    let mut needles = Vec::new();
    if text.starts_with("-----BEGIN") && !der.is_empty() {
        // The first line of a PKCS #8 key names its algorithm; each line after it holds key bytes.
        needles.extend(body.iter().skip(1).map(|line| needle("a line of its PEM", line.as_bytes().to_vec())));
        needles.push(needle("hex", hex(&der)));
        needles.push(needle("DER", der));
    } else {
        needles.push(needle("hex", hex(file)));
        needles.push(needle("base64", STANDARD.encode(file).into_bytes()));
        needles.push(needle("raw", file.to_vec()));
    }
    needles.retain(|needle| needle.bytes.len() >= NEEDLE_MIN);
    needles
}

fn token_needles(of: &str, text: &str) -> Result<Vec<Needle>> {
    let secret = match JoinToken::from_text(text) {
        Ok(token) => token.secret,
        Err(_) => ApiToken::from_text(text).context("neither a join token nor an API token")?.secret,
    };
    let needle = |form, bytes: Vec<u8>| Needle { of: of.to_owned(), form, bytes };
    let raw = secret.expose().to_vec();
    Ok(vec![
        needle("text", text.as_bytes().to_vec()),
        needle("hex of its secret", hex(&raw)),
        needle("base64 of its secret", STANDARD.encode(&raw).into_bytes()),
        needle("URL-safe base64 of its secret", URL_SAFE_NO_PAD.encode(&raw).into_bytes()),
        needle("its secret", raw),
    ])
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgevZzL1gdAFr88hb2\n\
                       OF/2NxApJCzGCEDdfSp6VQO30hyhRANCAAQRWz+jn65BtOMvdyHKcvjBeBSDZH2r\n-----END PRIVATE KEY-----\n";

    fn found_in(content: &[u8]) -> usize {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(root.path().join("below")).expect("a directory");
        std::fs::write(root.path().join("below/file"), content).expect("a file");
        let mut seen = Seen::default();
        look_into(root.path(), &[], &key_needles("key", KEY.as_bytes()), &mut seen).expect("a search");
        assert_eq!(seen.files, 1);
        seen.found.len()
    }

    #[test]
    fn a_key_is_found_in_each_of_its_forms_and_nothing_else_is() {
        let body: String = KEY.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = STANDARD.decode(body).expect("base64");
        assert_eq!(found_in(b"nothing here"), 0);
        assert_eq!(found_in(&[b"\0\x01".as_slice(), &der, b"rest"].concat()), 1);
        assert_eq!(found_in(&hex(&der)), 1);
        assert_eq!(found_in(KEY.as_bytes()), 1);
    }
}

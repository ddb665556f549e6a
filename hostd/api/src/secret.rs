//! Secrets that cannot be printed by accident: `Debug` hides them, and there is no `Display`.
//!
//! What may enter the log, the stream, metrics or logs is [`Secret::hash`], never the secret (hazard H27).

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

/// The 32 random bytes inside a token.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    pub const LEN: usize = 32;

    pub fn from_bytes(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The bytes themselves, for the token's text and nothing else.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// blake3: what the log keeps.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.0).as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// A token's text, or another secret text, inside a body. It travels over TLS or a Unix socket only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    pub fn new(text: impl Into<String>) -> SecretText {
        SecretText(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_neither_bytes_nor_text() {
        let shown = format!("{:?} {:?}", Secret::from_bytes([0x41; 32]), SecretText::new("qrt1.AAAA"));
        assert!(!shown.contains("65") && !shown.contains("41") && !shown.contains("AAAA"), "{shown}");
    }
}

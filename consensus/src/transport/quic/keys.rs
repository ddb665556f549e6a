//! The two keys that make a restarted host reachable at once.
//!
//! A peer that still holds a connection to our former life sends packets that we cannot decrypt. We answer with a
//! stateless reset only if the reset key is the old one, and we get as far as answering only if the connection id
//! validates under the old connection-id key. With both persisted the old connection dies in one round trip; with
//! either missing it lives until its idle timeout (measured: 30 s at quinn's defaults).

use std::path::Path;
use std::sync::Arc;

use quinn_proto::crypto::CryptoError;
use quinn_proto::crypto::HmacKey;

use crate::pki::PkiError;
use crate::pki::identity::write_private;
use crate::platform::Entropy;

/// File inside the data directory.
pub const KEYS_FILE: &str = "transport.keys";
const RESET_KEY_LEN: usize = 32;
const FILE_LEN: usize = RESET_KEY_LEN + 8;

#[derive(Clone)]
pub struct TransportKeys {
    reset_key: [u8; RESET_KEY_LEN],
    cid_key: u64,
}

impl TransportKeys {
    pub fn generate(entropy: &dyn Entropy) -> TransportKeys {
        let mut bytes = [0; FILE_LEN];
        entropy.fill(&mut bytes);
        TransportKeys::from_bytes(&bytes)
    }

    /// Reads the keys, or makes them at the first start. A file of the wrong length is replaced: the keys protect
    /// nothing but the speed of reconnection.
    pub fn load_or_create(path: &Path, entropy: &dyn Entropy) -> Result<TransportKeys, PkiError> {
        match std::fs::read(path) {
            Ok(bytes) => {
                if let Ok(bytes) = <&[u8; FILE_LEN]>::try_from(bytes.as_slice()) {
                    return Ok(TransportKeys::from_bytes(bytes));
                }
                tracing::warn!("{} has {} bytes instead of {FILE_LEN}; making new keys", path.display(), bytes.len());
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(PkiError::File { operation: "read", path: path.to_owned(), source }),
        }
        let keys = TransportKeys::generate(entropy);
        let mut bytes = keys.reset_key.to_vec();
        bytes.extend_from_slice(&keys.cid_key.to_le_bytes());
        write_private(path, &bytes)?;
        Ok(keys)
    }

    fn from_bytes(bytes: &[u8; FILE_LEN]) -> TransportKeys {
        let mut reset_key = [0; RESET_KEY_LEN];
        reset_key.copy_from_slice(&bytes[..RESET_KEY_LEN]);
        let mut cid_key = [0; 8];
        cid_key.copy_from_slice(&bytes[RESET_KEY_LEN..]);
        TransportKeys { reset_key, cid_key: u64::from_le_bytes(cid_key) }
    }

    pub(super) fn reset_key(&self) -> Arc<dyn HmacKey> {
        Arc::new(ResetKey(self.reset_key))
    }

    pub(super) fn cid_key(&self) -> u64 {
        self.cid_key
    }
}

/// Keyed blake3 as the pseudo-random function of stateless reset tokens.
struct ResetKey([u8; RESET_KEY_LEN]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0).update(data).finalize_xof().fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let mut expected = [0; 32];
        self.sign(data, &mut expected);
        let given = <[u8; 32]>::try_from(signature).map_err(|_| CryptoError)?;
        // blake3's own hash type compares in constant time.
        if blake3::Hash::from_bytes(expected) == blake3::Hash::from_bytes(given) { Ok(()) } else { Err(CryptoError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::RealEntropy;

    #[test]
    fn the_keys_are_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(KEYS_FILE);
        let first = TransportKeys::load_or_create(&path, &RealEntropy).unwrap();
        let second = TransportKeys::load_or_create(&path, &RealEntropy).unwrap();
        assert_eq!((first.reset_key, first.cid_key), (second.reset_key, second.cid_key));

        std::fs::write(&path, b"torn").unwrap();
        let third = TransportKeys::load_or_create(&path, &RealEntropy).unwrap();
        assert_ne!(third.reset_key, first.reset_key);
    }

    #[test]
    fn a_reset_token_verifies_only_under_its_own_key() {
        let mut token = [0; 32];
        ResetKey([1; 32]).sign(b"cid", &mut token);
        assert!(ResetKey([1; 32]).verify(b"cid", &token).is_ok());
        assert!(ResetKey([2; 32]).verify(b"cid", &token).is_err());
    }
}

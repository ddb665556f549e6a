//! An incremental hash of the whole state, equal on every host at equal seq (invariant E2).
//!
//! [`DigestMap`] is an ordered persistent map that keeps the sum, modulo 2^256, of the hashes of its
//! entries (a multiset hash). Changing one entity costs one hash, and no list of "touched" entities
//! can be wrong. The sum is recomputed in full at each snapshot and compared (DESIGN §3).

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use serde::Deserialize;
use serde::Serialize;

use crate::codec;

/// 256 bits, little-endian limbs; addition is modulo 2^256.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Digest([u64; 4]);

impl Digest {
    /// Hash of one value under a domain name.
    pub fn of<T: Serialize>(domain: &str, value: &T) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(domain.as_bytes());
        hasher.update(&[0]);
        hasher.update(&codec::encode(value));
        let bytes = hasher.finalize();
        let mut limbs = [0; 4];
        for (limb, chunk) in limbs.iter_mut().zip(bytes.as_bytes().chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            *limb = u64::from_le_bytes(word);
        }
        Digest(limbs)
    }

    /// Adds an element to the multiset.
    pub fn add(&mut self, other: Digest) {
        let mut carry = false;
        for (limb, addend) in self.0.iter_mut().zip(other.0) {
            let (sum, first) = limb.overflowing_add(addend);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = first | second;
        }
    }

    /// Removes an element that was added before.
    pub fn remove(&mut self, other: Digest) {
        let mut borrow = false;
        for (limb, subtrahend) in self.0.iter_mut().zip(other.0) {
            let (difference, first) = limb.overflowing_sub(subtrahend);
            let (difference, second) = difference.overflowing_sub(u64::from(borrow));
            *limb = difference;
            borrow = first | second;
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for limb in self.0.iter().rev() {
            write!(f, "{limb:016x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// An entity beside the hash of its canonical encoding.
#[derive(Debug, Clone, PartialEq)]
struct Hashed<V> {
    value: V,
    hash: Digest,
}

/// Ordered persistent map (O(1) clone) whose [`Digest`] is always current.
///
/// A change of a shared map copies the node of up to 64 entries that it is in. So entities are behind `Arc`, and keys should be
/// cheap to clone: copying the strings of 63 neighbours for each commit took a fifth of a host's processor.
#[derive(Debug, Clone, PartialEq)]
pub struct DigestMap<K: Ord + Clone, V: Clone> {
    domain: &'static str,
    entries: OrdMap<K, Arc<Hashed<V>>>,
    sum: Digest,
}

impl<K, V> DigestMap<K, V>
where
    K: Ord + Clone + Serialize,
    V: Clone + Serialize,
{
    /// An empty map; `domain` keeps equal encodings of different kinds apart.
    pub fn new(domain: &'static str) -> Self {
        DigestMap { domain, entries: OrdMap::new(), sum: Digest::default() }
    }

    pub fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Ord + ?Sized,
    {
        self.entries.get(key).map(|entry| &entry.value)
    }

    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, entry)| (key, &entry.value))
    }

    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    pub fn insert(&mut self, key: K, value: V) {
        let hash = Digest::of(self.domain, &(&key, &value));
        self.sum.add(hash);
        if let Some(old) = self.entries.insert(key, Arc::new(Hashed { value, hash })) {
            self.sum.remove(old.hash);
        }
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let old = self.entries.remove(key)?;
        self.sum.remove(old.hash);
        Some(Arc::unwrap_or_clone(old).value)
    }

    /// Changes one entity in place; an absent key is left absent (`evolve` is total).
    pub fn update(&mut self, key: &K, change: impl FnOnce(&mut V)) {
        let Some(entry) = self.entries.get_mut(key).map(Arc::make_mut) else { return };
        change(&mut entry.value);
        let hash = Digest::of(self.domain, &(key, &entry.value));
        let old = std::mem::replace(&mut entry.hash, hash);
        self.sum.remove(old);
        self.sum.add(hash);
    }

    /// The sum kept step by step.
    pub fn digest(&self) -> Digest {
        self.sum
    }

    /// The sum computed again from every entry: equal to [`Self::digest`], or memory lies.
    pub fn recompute(&self) -> Digest {
        let mut sum = Digest::default();
        for (key, entry) in &self.entries {
            sum.add(Digest::of(self.domain, &(key, &entry.value)));
        }
        sum
    }

    /// Entries in key order, as they are written to a snapshot.
    pub fn to_entries(&self) -> Vec<(K, V)> {
        self.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The map that [`Self::to_entries`] described.
    pub fn from_entries(domain: &'static str, entries: Vec<(K, V)>) -> Self {
        let mut map = DigestMap::new(domain);
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

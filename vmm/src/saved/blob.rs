//! Structs of KVM's interface as text and back.
//!
//! They are kept as the bytes that the kernel defines: its interface never changes a struct, so there is nothing in them that could evolve,
//! and what they mean on another host is exactly what they mean here. What may grow (lists of MSRs, CPUID, what the next kernel
//! adds) is beside them in fields of our own. The number of bytes is checked; every pattern of bits is a value of these
//! types, and the kernel refuses those that make no sense.

use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A struct of the kernel's interface.
#[derive(Clone, Copy)]
pub struct Blob<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfSize<T>(PhantomData<T>);

        impl<T: FromBytes> Visitor<'_> for OfSize<T> {
            type Value = Blob<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} bytes in base64", size_of::<T>())
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let bytes = STANDARD.decode(text).map_err(E::custom)?;
                T::read_from_bytes(&bytes).map(Blob).map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }

        deserializer.deserialize_str(OfSize(PhantomData))
    }
}

impl<T: IntoBytes + Immutable> PartialEq for Blob<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T> fmt::Debug for Blob<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_mp_state, kvm_regs};

    use super::*;

    #[test]
    fn a_struct_comes_back_and_another_size_is_refused() {
        let regs = Blob(kvm_regs { rip: 0x10_0000, rflags: 2, ..Default::default() });
        let text = serde_json::to_string(&regs).unwrap();
        assert_eq!(serde_json::from_str::<Blob<kvm_regs>>(&text).unwrap(), regs);
        let refused = serde_json::from_str::<Blob<kvm_mp_state>>(&text).unwrap_err().to_string();
        assert!(refused.contains("invalid length 144, expected 4 bytes"), "{refused}");
        assert!(serde_json::from_str::<Blob<kvm_regs>>("\"???\"").is_err());
        assert!(serde_json::from_str::<Blob<kvm_regs>>("[1, 2]").is_err());
    }
}

//! Proofs and measurements of Quorate's spine.
//!
//! - [`sim`]: whole sites in one process, on a clock, network, disk and power that lie.
//! - [`campaign`]: many seeds, the corpus first; [`mutants`]: deliberate faults of the product, each of which must be caught.
//! - [`bench`]: real processes on real disks, measured beside a peer.

pub mod bench;
pub mod campaign;
pub mod mutants;
pub mod sim;

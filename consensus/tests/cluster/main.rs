//! Whole members in one process, told as stories: over memory, where links are cut, and over real QUIC on loopback.

mod faults;
mod members;
mod pulling;
mod quic;
mod recovery;
mod replication;
mod world;

//! The replicated log of Quorate: Raft, its stores, its transport, and the decider (DESIGN §3, §4).
//!
//! The path of data: a [`statemachine::command::Request`] reaches the leader, is decided into a sealed batch, is
//! proposed inside a log entry, becomes durable in the write-ahead log of a majority, comes out of the log on every host,
//! is appended to the fold by compare-and-append, and is served from event segments.
//!
//! - [`types`]: what openraft is told about us. Nothing outside this crate names openraft.
//! - [`platform`]: clock, disk, entropy and the way to end: everything that a simulation replaces.
//! - [`store`]: what is durable when (README.md has the table).
//! - [`pki`], [`transport`]: who a peer is, and how hosts talk. [`network`]: Raft's messages on it.
//! - [`decider`]: commands become batches on the leader, and answers wait for their ground.
//! - [`recover`]: one host goes on when the majority is lost.
//! - [`node`]: one host's member: the door for hostd. [`membership`]: who should vote. [`feed`]: members are pushed to, others pull.
//!   [`forwarded`]: commands on their way to the leader.
//!
//! Start reading at [`node::NodeOn::propose`], and at [`store::Store::open`] for what is on the disk.

pub mod decider;
pub mod feed;
pub mod forwarded;
pub mod membership;
pub mod network;
pub mod node;
pub mod pki;
pub mod platform;
pub mod recover;
pub mod store;
pub mod transport;
pub mod types;

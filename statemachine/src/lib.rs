//! The pure core of Quorate: what the cluster believes, and every rule about it.
//!
//! Nothing here does I/O, reads a clock or awaits. The path of data (DESIGN §3):
//!
//! ```text
//! Command --decide--> [Event] --seal--> Batch --(log)--> Fold::apply --evolve--> State
//! ```
//!
//! - [`command`]: what somebody wants, or what a host saw.
//! - [`mod@decide`]: the rules. A command becomes events, or a [`rejection::Rejection`] in words. Leader only.
//! - [`event`]: what was decided, append-only and versioned; [`batch`]: one command's events, sealed and chained.
//! - [`mod@evolve`]: how an event changes [`state::State`]. Total, no rules, cannot fail. Every host.
//! - [`fold`]: state + head of the chain: compare-and-append.
//! - [`scheduler`]: filters, weights, rank sum, and the explanation that `quorate why` prints.
//! - [`planner`]: the commands that the leader's duties owe the cluster, as a function of the state.
//! - [`invariants`]: R2, R3, S1, S2, E2 as functions, shared by tests, simulation and production assertions.
//! - [`view`]: statuses that users see, folded from facts (`Unknown` is never an event).
//! - [`codec`]: the one place that knows the encoding.
//!
//! Start reading at [`decide::decide`].

pub mod batch;
pub mod codec;
pub mod command;
pub mod decide;
pub mod digest;
pub mod event;
pub mod evolve;
pub mod fold;
pub mod ids;
pub mod invariants;
pub mod mutant;
pub mod planner;
pub mod rejection;
pub mod scheduler;
pub mod stamp;
pub mod state;
pub mod view;

pub use batch::Batch;
pub use command::Command;
pub use event::Event;
pub use fold::Fold;
pub use ids::{BootId, ClusterId, DataCenterId, Epoch, HostId, Seq, SiteId, TokenId, VmId};
pub use rejection::Rejection;
pub use stamp::Stamp;
pub use state::State;

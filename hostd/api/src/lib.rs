//! The HTTP API of Quorate, as types: what hostd serves under `/v1` and what its clients send.
//!
//! No I/O here. hostd and the clients share these types, so a field that one side forgets does not compile.
//!
//! - [`problem`]: how every refusal looks (RFC 9457), and which HTTP status it has.
//! - [`write`](mod@write) and [`read`]: the envelope of each: a write answers with its seq, a read with the seq that it saw.
//! - [`status`], [`site`], [`cluster`], [`host`], [`vm`] with [`spec`], [`token`], [`digest`]: bodies by resource. Those that show state have a constructor
//!   from `State`, so that every client sees the same folded statuses.
//! - [`guest`]: what is asked of the agent inside a guest.
//! - [`event`]: the stream of DESIGN §10; [`cursor`]: where a reader of it stands.
//! - [`token_text`] and [`secret`]: what a person copies from one terminal to another, and the care that it needs.
//! - [`find`]: hosts and VMs by name or id.
//!
//! Start reading at [`vm`], the largest resource, or at [`problem`].

pub mod cluster;
pub mod cursor;
pub mod digest;
pub mod event;
pub mod find;
pub mod guest;
pub mod host;
pub mod problem;
pub mod read;
pub mod secret;
pub mod site;
pub mod spec;
pub mod status;
pub mod time;
pub mod token;
pub mod token_text;
pub mod vm;
pub mod write;

pub use cursor::Cursor;
pub use problem::Problem;
pub use secret::Secret;
pub use secret::SecretText;
pub use token_text::ApiToken;
pub use token_text::JoinToken;

/// QUIC for Raft on udp, HTTPS for the API on tcp.
pub const PORT: u16 = 7443;
/// Where hostd serves root of its own host.
pub const DEFAULT_SOCKET: &str = "/run/quorate/hostd.sock";
/// Largest request body: a VM with every disk has less than a tenth of it.
pub const MAX_BODY_BYTES: usize = 256 * 1024;

/// A retry of a write with the same key and body is answered as the first time was (hazard H16).
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";
/// Every answer says which seq its host had applied.
pub const APPLIED_SEQ_HEADER: &str = "quorate-applied-seq";
/// Value of `Upgrade:` for `GET /v1/vms/{id}/console`; raw bytes in both directions follow.
pub const CONSOLE_PROTOCOL: &str = "quorate-console";
/// Media type of a [`Problem`].
pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";

//! The daemon of a Quorate host: agent, leader duties, API, metrics.
//!
//! The path of data, from a person to a guest and back (DESIGN §2):
//!
//! ```text
//! api -> member.propose -> (log) -> fold -> agent -> vmm -> report -> (log) -> api::events
//! ```
//!
//! - [`daemon`]: the process and its two phases; [`config`]: `hostd.toml`; [`notify`]: the service manager.
//! - [`bootstrap`]: `init`, `join`, and who gets the authority's key.
//! - [`member`]: this host as a member of a site: proposals, reads, alarms. [`work`]: what it does besides serving.
//! - [`serve`], [`auth`], [`api`], [`console`]: connections, who is there, what they may ask.
//! - [`agent`]: makes running guests equal to the permits of this host. [`lease`]: keeps them confirmed.
//! - [`guest_agent`]: what the agent inside a guest says of it, and does for us.
//! - [`grants`]: the leader's side of leases; silence of hosts. [`duties`]: what a leader owes the cluster. [`watchdog`].
//! - [`peer`]: hostd to hostd. [`facts`]: what this host tells about itself. [`metrics`]: what it counts.
//!
//! Start reading at [`daemon::run`].

// A refusal in full words is made at most once a request; boxing it everywhere would only hide it.
#![allow(clippy::result_large_err)]

pub mod agent;
pub mod api;
pub mod auth;
pub mod bootstrap;
pub mod config;
pub mod console;
pub mod daemon;
pub mod duties;
pub mod facts;
pub mod grants;
pub mod guest_agent;
pub mod lease;
pub mod member;
pub mod metrics;
pub mod migration;
pub mod network;
pub mod notify;
pub mod peer;
pub mod serve;
#[cfg(test)]
pub mod test_host;
#[cfg(test)]
pub mod test_site;
pub mod watchdog;
pub mod work;

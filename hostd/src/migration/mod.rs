//! How a guest gets from one host to another (`docs/protocol/migration.md`): the source's hostd dials the target's 7443 and joins two
//! streams of bytes, that of its own vmm and that of the vmm which waits there. Keys are hostd's alone; a vmm sees a Unix socket.
//!
//! [`carrier`] is the source's side, [`door`] the target's, [`lanes`] what lies between them: one stream over several connections. When
//! either side ends, the log decides what it meant.

pub mod carrier;
pub mod door;
pub mod lanes;

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use hostd_api::Problem;
use hostd_api::problem::Code;
use serde::Deserialize;
use statemachine::ids::HostId;
use statemachine::ids::MigrationId;
use statemachine::ids::VmId;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;

use crate::member::Member;

/// Of the upgraded connection between two hosts.
pub const MIGRATION_PROTOCOL: &str = "quorate-migration";

/// Bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Why there is no stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// The other host has not heard of the migration yet, or its vmm is still starting.
    NotYet(String),
    Never(String),
}

/// One of the connections that a guest comes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lane {
    /// From 0; the first is opened before the others.
    pub lane: u16,
    pub of: u16,
}

/// The way to the process on another host that takes in a guest.
pub trait Road: Send + Sync + 'static {
    /// Over how many connections a guest goes, at least one.
    fn lanes(&self) -> u16;

    fn open(
        &self,
        to: HostId,
        vm: VmId,
        migration: MigrationId,
        lane: Lane,
    ) -> BoxFuture<'static, Result<Box<dyn Stream>, Obstacle>>;
}

/// Over HTTPS with this host's certificate.
pub struct MemberRoad {
    pub member: Arc<Member>,
    pub lanes: u16,
}

impl Road for MemberRoad {
    fn lanes(&self) -> u16 {
        self.lanes
    }

    fn open(
        &self,
        to: HostId,
        vm: VmId,
        migration: MigrationId,
        Lane { lane, of }: Lane,
    ) -> BoxFuture<'static, Result<Box<dyn Stream>, Obstacle>> {
        let member = self.member.clone();
        async move {
            let path = format!("/v1/vms/{vm}/migrations/{migration}?lane={lane}&of={of}");
            match member.peers().upgraded(&member.fold(), to, &path, MIGRATION_PROTOCOL).await {
                Ok(stream) => Ok(Box::new(stream) as Box<dyn Stream>),
                Err(problem) => Err(obstacle(&problem)),
            }
        }
        .boxed()
    }
}

fn obstacle(problem: &Problem) -> Obstacle {
    let words = problem.detail.clone();
    match [Code::Retry, Code::HostUnreachable].iter().any(|code| code.as_str() == problem.code()) {
        true => Obstacle::NotYet(words),
        false => Obstacle::Never(words),
    }
}

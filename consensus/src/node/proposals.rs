//! Commands on their way to the leader.

use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use statemachine::HostId;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Answer;
use statemachine::fold::Decision;

use super::Inner;
use super::NodeOn;
use crate::decider::Leadership;
use crate::decider::ProposeError;
use crate::transport::Channel;
use crate::transport::PeerKind;
use crate::transport::TransportError;

impl<R: AsyncRuntime> NodeOn<R> {
    /// Has a command decided, by this host or by the leader that it knows, and waits until it is applied there.
    ///
    /// Nothing is retried here: [`ProposeError::Retry`] says that the outcome is unknown, and only the caller knows
    /// whether its command carries an idempotency key.
    pub async fn propose(&self, request: Request) -> Result<Answer, ProposeError> {
        let inner = &self.inner;
        let leader = match inner.leadership_now() {
            Leadership::Leading { .. } => match inner.decide(request.clone()).await {
                // It lost the lead between the look and the queue; nothing happened, so forwarding is no retry.
                Err(ProposeError::NotLeader { leader }) => leader,
                decided => return decided,
            },
            Leadership::Following { leader } => leader,
        };
        match leader {
            Some(leader) => inner.forward(leader, request).await,
            None => Err(ProposeError::NoLeader),
        }
    }

    /// A request of the layer above to a host, this one included.
    pub async fn peer_call(
        &self,
        to: HostId,
        kind: PeerKind,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, TransportError> {
        let inner = &self.inner;
        if to == inner.host {
            let call = inner.serve_peer(to, kind, body);
            return match tokio::time::timeout(timeout, call).await {
                Ok(served) => served.map_err(|refusal| TransportError::Refused { host: to, why: refusal.why }),
                Err(_) => Err(TransportError::timeout(to, timeout)),
            };
        }
        let peer = inner
            .peer(to)
            .ok_or_else(|| TransportError::Unreachable { host: to, why: "its address is not known here".to_owned() })?;
        inner.transport.call(peer, Channel::Peer(kind), body, timeout).await
    }
}

impl<R: AsyncRuntime> Inner<R> {
    /// A forwarded command: decided here or not at all. It is never forwarded twice, so it cannot circle.
    pub(super) async fn propose_forwarded(&self, request: Request) -> Result<Answer, ProposeError> {
        match self.leadership_now() {
            Leadership::Leading { .. } => self.decide(request).await,
            Leadership::Following { leader } => Err(ProposeError::NotLeader { leader }),
        }
    }

    /// On the leader. A voter stops being one before its removal is decided: whoever asked for that may switch it off at once,
    /// and of two voters both would be needed to go on without it (found by the simulation, seed 197).
    async fn decide(&self, request: Request) -> Result<Answer, ProposeError> {
        let Command::HostRemove { host } = request.command else {
            return self.decider.propose(request).await;
        };
        let fold = self.fold.borrow().clone();
        if matches!(fold.decide(&request, self.platform.clock.wall_ms()), Decision::Rejected(_)) {
            return self.decider.propose(request).await;
        }
        // Until it is decided nobody makes it a voter again.
        let _turn = self.membership.lock().await;
        let releasing = self.release_voter(host, &fold.state);
        match tokio::time::timeout(self.config.propose_timeout(), releasing).await {
            Ok(Ok(())) => self.decider.propose(request).await,
            Ok(Err(error)) => Err(ProposeError::retry(format!("host {host} still votes: {error}"))),
            Err(_) => Err(ProposeError::retry(format!("host {host} still votes: no majority took it out in time"))),
        }
    }
}

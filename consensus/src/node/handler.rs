//! What this host answers its peers.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::Weak;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use openraft::AsyncRuntime;
use statemachine::HostId;
use statemachine::codec;

use super::Inner;
use super::NodeOn;
use crate::transport::Channel;
use crate::transport::Handler;
use crate::transport::PeerKind;
use crate::transport::PeerStream;
use crate::transport::Refusal;

/// Answers the requests of the layer above (hostd). `from` is proven by its certificate.
pub trait PeerHandler: Send + Sync + 'static {
    fn call(&self, from: HostId, kind: PeerKind, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>>;
}

impl<R: AsyncRuntime> NodeOn<R> {
    /// Who answers [`NodeOn::peer_call`] on this host. The last one set counts.
    pub fn set_peer_handler(&self, handler: Arc<dyn PeerHandler>) {
        *self.inner.peer_handler.write().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }
}

/// Holds the node weakly: the transport outlives it at shutdown, and must not keep it alive.
pub(super) struct NodeHandler<R: AsyncRuntime> {
    inner: Weak<Inner<R>>,
}

impl<R: AsyncRuntime> NodeHandler<R> {
    pub(super) fn new(inner: &Arc<Inner<R>>) -> NodeHandler<R> {
        NodeHandler { inner: Arc::downgrade(inner) }
    }
}

impl<R: AsyncRuntime> Handler for NodeHandler<R> {
    /// Known removed: refused. Unknown: a newer host of this site's authority, served (hazard H22).
    fn admits(&self, host: HostId) -> bool {
        self.inner.upgrade().is_some_and(|inner| inner.admits(host))
    }

    fn call(&self, from: HostId, channel: Channel, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let inner = self.inner.clone();
        async move {
            let inner = inner.upgrade().ok_or_else(|| Refusal::new("this host is stopping"))?;
            inner.serve(from, channel, body).await
        }
        .boxed()
    }

    fn stream(&self, from: HostId, _channel: Channel, stream: PeerStream) -> BoxFuture<'static, ()> {
        let weak = self.inner.clone();
        async move {
            let Some(inner) = weak.upgrade() else {
                return;
            };
            let stop = inner.stop.clone();
            let admits = move || {
                weak.upgrade().is_some_and(|inner| {
                    inner.hear();
                    inner.admits(from)
                })
            };
            stop.run_until_cancelled(inner.service.appends(stream, admits)).await;
        }
        .boxed()
    }
}

impl<R: AsyncRuntime> Inner<R> {
    fn admits(&self, host: HostId) -> bool {
        !self.fold.borrow().state.removed_hosts.contains(&host)
    }

    async fn serve(&self, from: HostId, channel: Channel, body: Bytes) -> Result<Bytes, Refusal> {
        match channel {
            Channel::Vote => self.service.vote(body).await,
            Channel::PreVote => self.service.pre_vote(body).await,
            Channel::TransferLeader => self.service.transfer_leader(body).await,
            Channel::SnapshotOffer => self.service.install(from, body).await,
            Channel::SnapshotChunk => self.service.chunk(body).await,
            Channel::Propose => self.serve_forwarded(from, &body).await,
            Channel::ReadIndex => {
                let seq = self.confirm_lead().await.map_err(Refusal::new)?;
                Ok(Bytes::from(codec::encode(&seq)))
            }
            Channel::Ping => Ok(Bytes::new()),
            Channel::Pull => self.serve_pull(&body).await,
            Channel::Peer(kind) => self.serve_peer(from, kind, body).await,
            Channel::Appends | Channel::Heartbeats => Err(Refusal::new("this is a stream, not a request")),
        }
    }

    pub(super) async fn serve_peer(&self, from: HostId, kind: PeerKind, body: Bytes) -> Result<Bytes, Refusal> {
        let handler = self.peer_handler.read().unwrap_or_else(PoisonError::into_inner).clone();
        let handler = handler.ok_or_else(|| Refusal::new("this host is starting"))?;
        handler.call(from, kind, body).await
    }
}

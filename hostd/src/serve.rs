//! Connections: TLS on tcp and the Unix socket, served by one HTTP router.
//!
//! Both listeners end in [`connection`], which puts what the connection proves ([`Peer`]) beside each request. Bounds
//! on everything that a stranger can hold open: connections, handshake time, time for headers.
//! Start at [`unix`] and [`tls`].

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use consensus::pki::PeerName;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use statemachine::SiteId;
use thiserror::Error;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::auth::Peer;

/// Connections that one listener holds at a time; subscribers of the event stream are among them.
const CONNECTIONS_MAX: usize = 2048;
/// A stranger must finish its handshake, and then its headers, within this.
const PATIENCE: Duration = Duration::from_secs(10);
const STRANGERS_TOLD_EVERY: Duration = Duration::from_secs(10);
/// After an accept that failed (usually for want of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Error)]
pub enum ServeError {
    #[error("cannot {operation} {path}")]
    Socket { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "cannot listen on {address} (tcp): {source}; is another hostd running, and is this address on an interface of this host?"
    )]
    Listen { address: SocketAddr, source: io::Error },
}

/// Makes the socket of root: a stale file is replaced (the caller holds the lock of the data directory), mode 0600.
pub fn bind_unix(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |operation| move |source| ServeError::Socket { operation, path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove the old socket")(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed("set the mode of"))?;
    Ok(listener)
}

pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })
}

/// Serves root of this host until cancelled.
pub async fn unix(listener: UnixListener, router: Router, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some((stream, _)) = next(&cancel, || listener.accept()).await {
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!("{CONNECTIONS_MAX} connections are open on the Unix socket; another one was refused");
            continue;
        };
        let (router, cancel) = (router.clone(), cancel.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match uid_of(&stream) {
                Ok(uid) => connection(stream, Peer::Local { uid }, router, cancel).await,
                Err(error) => tracing::warn!(%error, "a connection without credentials was refused"),
            }
        });
    }
}

fn uid_of(stream: &UnixStream) -> io::Result<u32> {
    Ok(stream.peer_cred()?.uid())
}

/// Serves the network until cancelled.
pub async fn tls(
    listener: TcpListener,
    config: Arc<rustls::ServerConfig>,
    site: SiteId,
    router: Router,
    cancel: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let strangers = Arc::new(Strangers::default());
    while let Some((stream, address)) = next(&cancel, || listener.accept()).await {
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(%address, "{CONNECTIONS_MAX} connections are open; another one was refused");
            continue;
        };
        let (acceptor, router, cancel) = (acceptor.clone(), router.clone(), cancel.clone());
        let strangers = strangers.clone();
        tokio::spawn(async move {
            let _slot = slot;
            match tokio::time::timeout(PATIENCE, handshake(&acceptor, stream, address, site)).await {
                Ok(Ok((stream, peer))) => connection(stream, peer, router, cancel).await,
                Ok(Err(error)) if is_of_another_authority(&error) => strangers.tell(address),
                Ok(Err(error)) => tracing::debug!(%address, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%address, "TLS handshake took too long"),
            }
        });
    }
}

/// A certificate was shown, and this site's authority did not sign it.
fn is_of_another_authority(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::InvalidCertificate(_)))
}

/// Says that hosts of other clusters knock: not for each knock, because anybody can make a certificate.
#[derive(Default)]
struct Strangers {
    last_told: Mutex<Option<Instant>>,
}

impl Strangers {
    fn tell(&self, address: SocketAddr) {
        let mut last = self.last_told.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < STRANGERS_TOLD_EVERY) {
            return;
        }
        *last = Some(Instant::now());
        tracing::warn!(
            %address,
            "refused a machine whose certificate is not of this site's authority: it belongs to another cluster, or to a former \
             life of this one; to move it here, run `quorate leave` there, then `quorate join TOKEN` with a token of this site"
        );
    }
}

/// The next accepted connection; `None` when cancelled.
async fn next<T, F>(cancel: &CancellationToken, accept: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = io::Result<T>>,
{
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return None,
            accepted = accept() => accepted,
        };
        match accepted {
            Ok(connection) => return Some(connection),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn handshake(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    site: SiteId,
) -> io::Result<(tokio_rustls::server::TlsStream<TcpStream>, Peer)> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let host = match certificate.map(|certificate| PeerName::of_certificate(certificate)) {
        None => None,
        Some(Ok(name)) if name.site == site => Some(name.host),
        Some(Ok(name)) => return Err(io::Error::other(format!("the certificate is of site {}", name.site))),
        Some(Err(error)) => return Err(io::Error::other(error)),
    };
    Ok((stream, Peer::Remote { address, host }))
}

/// Serves the requests of one connection, which may end as an upgraded one (consoles).
async fn connection<I>(stream: I, peer: Peer, router: Router, cancel: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer);
        answer(router.clone(), request)
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = cancel.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, ?peer, "a connection ended badly");
    }
}

async fn answer(router: Router, request: hyper::Request<Incoming>) -> Result<Response, Infallible> {
    router.oneshot(request.map(Body::new)).await
}

//! A real host for tests: a daemon on a loopback address of its own, asked through its router.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::Method;
use axum::http::Request;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::api;
use crate::auth::Peer;
use crate::config::Config;
use crate::daemon::Daemon;

/// Far beyond what any step takes; a test that reaches it fails.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub struct TestHost {
    pub daemon: Arc<Daemon>,
    pub directory: TempDir,
    router: axum::Router,
}

/// An answer: its status and body.
pub type Answered = (StatusCode, Value);

pub fn root() -> Peer {
    Peer::Local { uid: 0 }
}

/// Somebody on the network without a certificate.
pub fn stranger() -> Peer {
    Peer::Remote { address: "192.0.2.1:4242".parse().unwrap(), host: None }
}

/// 127.x.y.n: tests run as processes side by side, and hosts of one test need an address each.
fn address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    let host = NEXT.fetch_add(1, Ordering::Relaxed);
    let address = Ipv4Addr::new(127, 1 + (pid >> 8) as u8 % 250, pid as u8, host);
    format!("{address}:7443")
}

impl TestHost {
    /// A host that belongs to no site.
    pub fn bare(name: &str) -> TestHost {
        TestHost::in_directory(name, TempDir::new().unwrap())
    }

    fn in_directory(name: &str, directory: TempDir) -> TestHost {
        let path = directory.path().display();
        let text = format!(
            "name = \"{name}\"\naddress = \"{}\"\ndata_dir = \"{path}/data\"\nrun_dir = \"{path}/run\"\n",
            address()
        );
        let config = Config::parse(Path::new("hostd.toml"), &text).unwrap();
        std::fs::create_dir_all(config.vms_run_dir()).unwrap();
        std::fs::create_dir_all(&config.data_dir).unwrap();
        let daemon = Daemon::new(config, CancellationToken::new());
        let router = api::router(api::Api::new(daemon.clone()));
        TestHost { daemon, directory, router }
    }

    /// The first host of a new site.
    pub async fn first(name: &str) -> TestHost {
        let host = TestHost::bare(name);
        host.daemon.init("lab").await.unwrap();
        host
    }

    pub fn address(&self) -> String {
        self.daemon.config().address.to_string()
    }

    pub async fn send(&self, peer: Peer, request: Request<Body>) -> Response {
        let mut request = request;
        request.extensions_mut().insert(peer);
        let answered = tokio::time::timeout(DEADLINE, self.router.clone().oneshot(request)).await;
        answered.expect("an answer within the deadline").unwrap()
    }

    pub async fn ask(&self, peer: Peer, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Answered {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(peer, request.body(Body::from(body.to_owned())).unwrap()).await;
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into()))
    }

    pub async fn get(&self, path: &str) -> Answered {
        self.ask(root(), Method::GET, path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &str) -> Answered {
        self.ask(root(), Method::POST, path, &[], body).await
    }

    pub async fn delete(&self, path: &str) -> Answered {
        self.ask(root(), Method::DELETE, path, &[], "").await
    }

    /// Text of a new token.
    pub async fn token(&self, purpose: &str, ttl_ms: u64) -> String {
        let body = format!(r#"{{"purpose":"{purpose}","ttl_ms":{ttl_ms}}}"#);
        let (status, answer) = self.post("/v1/tokens", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["token"].as_str().unwrap().to_owned()
    }

    pub async fn join(&self, token: &str) -> Answered {
        self.post("/v1/join", &format!(r#"{{"token":"{token}"}}"#)).await
    }
}

/// What a person reads of a problem.
pub fn sentence(answered: &Answered) -> String {
    let problem: hostd_api::Problem = serde_json::from_value(answered.1.clone()).expect("a problem");
    assert_eq!(problem.status, answered.0.as_u16(), "status line and body agree");
    problem.sentence()
}

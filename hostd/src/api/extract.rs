//! What handlers ask of a request: who sends it and with which right, its parameters, its body.
//!
//! Rights are in the types: a handler that takes an [`Administrator`] cannot be reached by anybody else.

use axum::body::Bytes;
use axum::extract::FromRequest;
use axum::extract::FromRequestParts;
use axum::extract::Query;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header;
use axum::http::request::Parts;
use hostd_api::IDEMPOTENCY_KEY_HEADER;
use hostd_api::MAX_BODY_BYTES;
use hostd_api::Problem;
use hostd_api::problem::Code;
use serde::de::DeserializeOwned;
use statemachine::command::Command;
use statemachine::command::IdempotencyKey;
use statemachine::fold::Answer;
use std::sync::Arc;

use super::Api;
use super::failure::Failure;
use crate::auth;
use crate::auth::Caller;
use crate::auth::Peer;
use crate::auth::Right;
use crate::member::Member;

/// Somebody, on a host that belongs to a site.
pub struct Asked {
    pub member: Arc<Member>,
    pub caller: Caller,
}

/// Somebody who may read.
pub struct Looker {
    pub member: Arc<Member>,
    pub caller: Caller,
}

/// Somebody who may change things.
pub struct Administrator {
    pub member: Arc<Member>,
    pub caller: Caller,
    key: Option<String>,
}

/// root on the Unix socket of this host, whether it belongs to a site or not.
pub struct LocalRoot;

impl FromRequestParts<Api> for Asked {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Asked, Failure> {
        let member = api.member()?;
        let caller = auth::identify(
            peer(parts)?,
            text_header(&parts.headers, header::AUTHORIZATION.as_str())?,
            &member.fold().state,
            member.now_ms(),
            api.own_uid(),
        )?;
        Ok(Asked { member, caller })
    }
}

impl FromRequestParts<Api> for Looker {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Looker, Failure> {
        let Asked { member, caller } = Asked::from_request_parts(parts, api).await?;
        caller.require(Right::Look)?;
        Ok(Looker { member, caller })
    }
}

impl FromRequestParts<Api> for Administrator {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Administrator, Failure> {
        let Asked { member, caller } = Asked::from_request_parts(parts, api).await?;
        caller.require(Right::Administer)?;
        let key = text_header(&parts.headers, IDEMPOTENCY_KEY_HEADER)?.map(str::to_owned);
        Ok(Administrator { member, caller, key })
    }
}

impl FromRequestParts<Api> for LocalRoot {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<LocalRoot, Failure> {
        match peer(parts)? {
            Peer::Local { uid } if uid == 0 || uid == api.own_uid() => Ok(LocalRoot),
            Peer::Local { uid } => Err(auth::Refusal::NotRoot { uid }.into()),
            Peer::Remote { .. } => {
                let problem = Problem::new(Code::Forbidden, "only root on the host itself may ask this");
                Err(problem.action("run the command on that host, over its Unix socket").into())
            }
        }
    }
}

impl Administrator {
    /// Sends a command to the leader in this caller's name. `body` is what makes a retry the same request.
    pub async fn write(&self, body: BodyHash, command: Command) -> Result<Answer, Failure> {
        let idempotency = self.key.clone().map(|key| IdempotencyKey { key, body_hash: body.0 });
        Ok(self.member.propose(self.caller.actor(self.member.own()), idempotency, command).await?)
    }
}

/// Where the connection ends, put beside each request by `serve`.
fn peer(parts: &Parts) -> Result<Peer, Failure> {
    parts.extensions.get::<Peer>().copied().ok_or_else(|| Failure::new(Code::Internal, "the connection has no peer"))
}

fn text_header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Failure> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    match value.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => Err(Failure::new(Code::BadRequest, format!("the header {name} is not plain text"))),
    }
}

/// Parameters of a query, each known.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Api> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Params<T>, Failure> {
        match Query::<T>::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(Params(value)),
            Err(rejection) => {
                let why = rejection.body_text();
                let code = if why.contains("unknown field") { Code::UnknownParameter } else { Code::BadRequest };
                Err(Failure::new(code, why.trim_start_matches("Failed to deserialize query string: ")))
            }
        }
    }
}

/// blake3 over method, path and body: what a repeated idempotency key must repeat.
#[derive(Debug, Clone, Copy)]
pub struct BodyHash(pub [u8; 32]);

/// A body in JSON, bounded, with its hash. An empty body counts as `{}`.
pub struct Body<T> {
    pub value: T,
    pub hash: BodyHash,
}

impl<T: DeserializeOwned> FromRequest<Api> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Api) -> Result<Body<T>, Failure> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(request.method().as_str().as_bytes()).update(b" ");
        hasher.update(request.uri().path().as_bytes()).update(b"\n");
        let bytes = Bytes::from_request(request, api).await.map_err(|rejection| match rejection.status().as_u16() {
            413 => Failure::new(Code::BodyTooLarge, format!("the body has more than {MAX_BODY_BYTES} bytes")),
            _ => Failure::new(Code::BadRequest, "the body did not arrive whole"),
        })?;
        hasher.update(&bytes);
        let json: &[u8] = if bytes.iter().all(u8::is_ascii_whitespace) { b"{}" } else { &bytes };
        // The words of serde_json give line, column and field, and no more of the body than a wrong value's type.
        let value = serde_json::from_slice(json)
            .map_err(|error| Failure::new(Code::BadRequest, format!("the body is not what is expected: {error}")))?;
        Ok(Body { value, hash: BodyHash(*hasher.finalize().as_bytes()) })
    }
}

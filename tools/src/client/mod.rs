//! A client of hostd's API: over root's Unix socket, or over HTTPS with a token.
//!
//! - [`connect`]: where hostd is and how it is trusted. Several servers may be named; the first that answers is used.
//! - this file: one request and its retries. A write carries an idempotency key, so a leader that is lost in the middle of it
//!   costs a second and never does a thing twice (hazard H16).
//! - [`resources`]: the API's resources as methods.
//! - [`events`]: the stream, resumed by its cursor; [`sse`]: its wire format.
//! - [`console`]: a guest's console as a byte stream.

pub mod connect;
pub mod console;
pub mod error;
pub mod events;
pub mod resources;
pub mod sse;

use std::time::Duration;

use backon::BackoffBuilder;
use backon::ExponentialBuilder;
use hostd_api::IDEMPOTENCY_KEY_HEADER;
use hostd_api::PROBLEM_MEDIA_TYPE;
use hostd_api::Problem;
use reqwest::Method;
use reqwest::RequestBuilder;
use reqwest::Response;
use reqwest::StatusCode;
use reqwest::header;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use uuid::Uuid;

pub use connect::Options;
pub use error::ClientError;

use connect::Endpoint;

/// A failover takes about a second (DESIGN §4); this covers several, and a host that catches up.
const RETRY_FOR: Duration = Duration::from_secs(15);
/// An answer that takes longer is not coming. Streams and consoles have no such limit.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Largest answer that is read: 20,000 VMs are below it.
const ANSWER_MAX_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub struct Client {
    endpoints: Vec<Endpoint>,
}

impl Client {
    pub fn new(options: &Options) -> Result<Client, ClientError> {
        Ok(Client { endpoints: connect::endpoints(options)? })
    }

    /// Reads `path`, whose parts are escaped here.
    pub async fn get<T: DeserializeOwned>(&self, path: &[&str], query: &impl Serialize) -> Result<T, ClientError> {
        self.until_settled(|endpoint| endpoint.request(Method::GET, path).query(query)).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &[&str], body: &impl Serialize) -> Result<T, ClientError> {
        self.write(Method::POST, path, body).await
    }

    pub async fn patch<T: DeserializeOwned>(&self, path: &[&str], body: &impl Serialize) -> Result<T, ClientError> {
        self.write(Method::PATCH, path, body).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, ClientError> {
        let key = Uuid::new_v4().to_string();
        self.until_settled(|endpoint| endpoint.request(Method::DELETE, path).header(IDEMPOTENCY_KEY_HEADER, &key)).await
    }

    /// Sends once: what is asked of a guest may not be what can be done twice. Only a host that never heard it is passed over.
    pub async fn post_once<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
        within: Duration,
    ) -> Result<T, ClientError> {
        let request = |endpoint: &Endpoint| endpoint.request(Method::POST, path).json(body).timeout(within);
        let (endpoint, response) = self.send(request).await?;
        body_of(endpoint, response).await
    }

    async fn write<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let key = Uuid::new_v4().to_string();
        let request = |endpoint: &Endpoint| {
            endpoint.request(method.clone(), path).header(IDEMPOTENCY_KEY_HEADER, &key).json(body)
        };
        self.until_settled(request).await
    }

    /// Sends until there is an answer that stands. Every request is safe to send again: reads are, and writes have a key.
    async fn until_settled<T: DeserializeOwned>(
        &self,
        request: impl Fn(&Endpoint) -> RequestBuilder,
    ) -> Result<T, ClientError> {
        let deadline = Instant::now() + RETRY_FOR;
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(150))
            .with_max_delay(Duration::from_secs(1))
            .with_jitter()
            .without_max_times()
            .build();
        loop {
            let error = match self.send(|endpoint| request(endpoint).timeout(ANSWER_WITHIN)).await {
                Ok((endpoint, response)) => match body_of(endpoint, response).await {
                    Ok(body) => return Ok(body),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let pause = pauses.next().filter(|pause| Instant::now() + *pause < deadline);
            match pause {
                Some(pause) if error.is_transient() => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
        }
    }

    /// Sends to the first endpoint that accepts a connection. An answer that is not a success is an error.
    async fn send(&self, request: impl Fn(&Endpoint) -> RequestBuilder) -> Result<(&Endpoint, Response), ClientError> {
        let mut last = None;
        for endpoint in &self.endpoints {
            match request(endpoint).send().await {
                Ok(response) if response.status().is_success() => return Ok((endpoint, response)),
                Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                    return Ok((endpoint, response));
                }
                Ok(response) => return Err(refusal(endpoint, response).await),
                Err(error) => {
                    let error = ClientError::of_transport(endpoint, error);
                    if !error.is_unreachable() {
                        return Err(error);
                    }
                    last.get_or_insert(error);
                }
            }
        }
        Err(last.unwrap_or(ClientError::NoServer))
    }
}

async fn body_of<T: DeserializeOwned>(endpoint: &Endpoint, response: Response) -> Result<T, ClientError> {
    let bytes = bounded_body(endpoint, response).await?;
    serde_json::from_slice(&bytes).map_err(|source| ClientError::NotUnderstood { whom: endpoint.to_string(), source })
}

async fn bounded_body(endpoint: &Endpoint, mut response: Response) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| ClientError::of_transport(endpoint, error))? {
        if bytes.len() + chunk.len() > ANSWER_MAX_BYTES {
            return Err(ClientError::TooLarge { whom: endpoint.to_string(), limit: ANSWER_MAX_BYTES });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// What a server said that was not a success.
async fn refusal(endpoint: &Endpoint, response: Response) -> ClientError {
    let status = response.status();
    let is_problem = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with(PROBLEM_MEDIA_TYPE));
    let bytes = match bounded_body(endpoint, response).await {
        Ok(bytes) => bytes,
        Err(error) => return error,
    };
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) if is_problem => ClientError::Problem(Box::new(problem)),
        _ => ClientError::NotOurs { whom: endpoint.to_string(), status: status.as_u16() },
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

//! A guest's console as a byte stream, from whichever host runs it: any host of the site passes it on.

use hostd_api::CONSOLE_PROTOCOL;
use reqwest::Method;
use reqwest::StatusCode;
use reqwest::Upgraded;
use reqwest::header;

use super::Client;
use super::ClientError;

impl Client {
    pub async fn console(&self, vm: &str) -> Result<Upgraded, ClientError> {
        let request = |endpoint: &super::connect::Endpoint| {
            endpoint
                .request(Method::GET, &["v1", "vms", vm, "console"])
                .header(header::CONNECTION, "Upgrade")
                .header(header::UPGRADE, CONSOLE_PROTOCOL)
        };
        let (endpoint, response) = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(ClientError::NotOurs { whom: endpoint.to_string(), status: response.status().as_u16() });
        }
        response.upgrade().await.map_err(|error| ClientError::of_transport(endpoint, error))
    }
}

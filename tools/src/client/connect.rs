//! Where hostd is, and how it is trusted.

use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use hostd_api::ApiToken;
use hostd_api::SecretText;
use reqwest::Certificate;
use reqwest::Method;
use reqwest::RequestBuilder;
use reqwest::Url;

use super::error::ClientError;

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// A CA file with more in it is something else.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// Where to find hostd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Options {
    /// Root on a host of the site.
    Socket(PathBuf),
    /// Anybody with a token.
    Servers {
        /// `https://host:7443`, tried in this order.
        urls: Vec<String>,
        /// PEM of the site's certificate authority: the only one that is trusted.
        ca_file: PathBuf,
        /// A file with the text of an API token.
        token_file: PathBuf,
    },
}

/// One place where hostd may answer.
pub struct Endpoint {
    http: reqwest::Client,
    base: Url,
    token: Option<SecretText>,
    /// The socket's path or the server's URL, for people.
    label: String,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.label)
    }
}

impl Endpoint {
    pub fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path);
        }
        let request = self.http.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    pub fn is_socket(&self) -> bool {
        self.token.is_none()
    }
}

pub fn endpoints(options: &Options) -> Result<Vec<Endpoint>, ClientError> {
    match options {
        Options::Socket(path) => Ok(vec![socket(path)?]),
        Options::Servers { urls, ca_file, token_file } => servers(urls, ca_file, token_file),
    }
}

fn socket(path: &Path) -> Result<Endpoint, ClientError> {
    let http = builder().unix_socket(path).build().map_err(ClientError::Setup)?;
    // The host part is required by HTTP and of no meaning on a socket.
    let base = Url::parse("http://hostd/").expect("a constant URL is one");
    Ok(Endpoint { http, base, token: None, label: path.display().to_string() })
}

fn servers(urls: &[String], ca_file: &Path, token_file: &Path) -> Result<Vec<Endpoint>, ClientError> {
    let token = read_text(token_file)?;
    let token = token.trim();
    ApiToken::from_text(token).map_err(|source| ClientError::Token { path: token_file.to_owned(), source })?;
    let pem = read_text(ca_file)?;
    let ca = match Certificate::from_pem_bundle(pem.as_bytes()) {
        Ok(certificates) if !certificates.is_empty() => certificates,
        _ => return Err(ClientError::NotACertificate { path: ca_file.to_owned() }),
    };
    let trusted = ca.into_iter().fold(builder().https_only(true), |builder, ca| builder.add_root_certificate(ca));
    let http = trusted.build().map_err(ClientError::Setup)?;
    let endpoint = |url: &String| {
        let base = Url::parse(url).ok().filter(|base| base.scheme() == "https" && base.has_host());
        let base = base.ok_or_else(|| ClientError::NotAServer { url: url.clone() })?;
        Ok(Endpoint { http: http.clone(), base, token: Some(SecretText::new(token)), label: url.clone() })
    };
    urls.iter().map(endpoint).collect()
}

fn builder() -> reqwest::ClientBuilder {
    // reqwest wants one even for a Unix socket. It is refused where the process has one already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .tls_built_in_root_certs(false)
        .connect_timeout(CONNECT_WITHIN)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        // A console is an upgrade of HTTP/1.1.
        .http1_only()
        .user_agent(concat!("quorate/", env!("CARGO_PKG_VERSION")))
}

fn read_text(path: &Path) -> Result<String, ClientError> {
    let failed = |source| ClientError::File { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > FILE_MAX_BYTES {
        return Err(failed(std::io::Error::other("it is larger than 1 MiB")));
    }
    std::fs::read_to_string(path).map_err(failed)
}

//! `quorate join TOKEN`: this machine asks to belong.

use std::path::Path;
use std::time::Duration;

use consensus::pki::HostKey;
use consensus::pki::Identity;
use consensus::pki::PkiError;
use consensus::pki::certificate_key_fingerprint;
use consensus::pki::identity::KEY_FILE;
use consensus::pki::identity::write_private;
use hostd_api::JoinToken;
use hostd_api::Problem;
use hostd_api::SecretText;
use hostd_api::site::HostJoinAnswer;
use hostd_api::site::HostJoinRequest;
use hostd_api::site::Peer;
use statemachine::command::HostCandidate;
use tokio::time::Instant;

use super::BootstrapError;
use super::pin;
use crate::config::Config;
use crate::facts;
use crate::peer::chain;

/// For all addresses and repetitions together.
const PATIENCE: Duration = Duration::from_secs(20);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// Hosts of the site as they were at the join, beside the identity.
const PEERS_FILE: &str = "peers.json";
const PAUSE: Duration = Duration::from_millis(300);

/// What came of one address.
enum Attempt {
    Answered(HostJoinAnswer),
    /// No answer, or one that says "ask again".
    Later(String),
    Refused(Problem),
    OtherSite,
}

/// Asks the site, and writes the identity that it gives. Repeats with the same key pair are answered again, so a lost
/// answer or power cut costs nothing.
pub async fn ask_site(config: &Config, text: &SecretText) -> Result<Identity, BootstrapError> {
    let token = JoinToken::from_text(text.expose())?;
    let key = key_pair(config)?;
    let request = HostJoinRequest {
        token: text.clone(),
        csr: key.signing_request()?,
        candidate: HostCandidate {
            name: config.name.clone(),
            address: config.address.to_string(),
            public_key: key.fingerprint(),
            facts: facts::collect(config, None)?,
        },
    };
    let answer = ask_all(&token, &request).await?;
    let identity = accept(&token, &key, &answer)?;
    // Before the identity, which says that the join is done.
    keep_peers(&config.identity_dir(), &answer.peers)?;
    identity.save(&config.identity_dir())?;
    Ok(identity)
}

fn keep_peers(directory: &Path, peers: &[Peer]) -> Result<(), BootstrapError> {
    let text = serde_json::to_vec(peers).map_err(|_| BootstrapError::BadAnswer { why: "its peers cannot be kept" })?;
    Ok(write_private(&directory.join(PEERS_FILE), &text)?)
}

/// The hosts that this one was told of when it joined; none on the first host of a site.
pub fn known_peers(directory: &Path) -> Vec<consensus::transport::Peer> {
    let path = directory.join(PEERS_FILE);
    let peers: Vec<Peer> = match std::fs::read(&path).map(|text| serde_json::from_slice(&text)) {
        Ok(Ok(peers)) => peers,
        Ok(Err(error)) => {
            tracing::warn!("{} is damaged ({error}); the leader finds this host, or join it again", path.display());
            Vec::new()
        }
        Err(_) => Vec::new(),
    };
    peers.into_iter().map(|peer| consensus::transport::Peer { host: peer.host, address: peer.address }).collect()
}

/// The key of an earlier try, or a new one that is kept before it is shown to anybody.
fn key_pair(config: &Config) -> Result<HostKey, BootstrapError> {
    let directory = config.identity_dir();
    let failed = |operation, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| PkiError::File { operation, path, source }
    };
    std::fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
    let path = directory.join(KEY_FILE);
    match std::fs::read_to_string(&path) {
        Ok(pem) => Ok(HostKey::from_pem(&pem)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = HostKey::generate()?;
            write_private(&path, key.to_pem().as_bytes())?;
            Ok(key)
        }
        Err(source) => Err(failed("read", &path)(source).into()),
    }
}

async fn ask_all(token: &JoinToken, request: &HostJoinRequest) -> Result<HostJoinAnswer, BootstrapError> {
    let tls = pin::client_config(token.site, token.ca).map_err(PkiError::Tls)?;
    let client = reqwest::Client::builder()
        .use_preconfigured_tls(tls)
        .http1_only()
        .no_proxy()
        .connect_timeout(CONNECT_WITHIN)
        .timeout(Duration::from_secs(12))
        .build()
        .map_err(|error| BootstrapError::NobodyAnswers { tried: chain(&error) })?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut tried = Vec::new();
        let mut others = 0;
        for address in &token.addresses {
            match ask(&client, address, request).await {
                Attempt::Answered(answer) => return Ok(answer),
                Attempt::Refused(problem) => return Err(problem.into()),
                Attempt::Later(why) => tried.push(format!("{address}: {why}")),
                Attempt::OtherSite => {
                    others += 1;
                    tried.push(format!("{address}: {}", pin::OTHER_AUTHORITY));
                }
            }
        }
        if others == token.addresses.len() || Instant::now() >= deadline {
            return Err(BootstrapError::NobodyAnswers { tried: tried.join("; ") });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn ask(client: &reqwest::Client, address: &str, request: &HostJoinRequest) -> Attempt {
    let response = match client.post(format!("https://{address}/v1/hosts/join")).json(request).send().await {
        Ok(response) => response,
        Err(error) => {
            let why = chain(&error);
            return if why.contains(pin::OTHER_AUTHORITY) { Attempt::OtherSite } else { Attempt::Later(why) };
        }
    };
    let status = response.status();
    if status.is_success() {
        return match response.json().await {
            Ok(answer) => Attempt::Answered(answer),
            Err(error) => Attempt::Later(chain(&error)),
        };
    }
    match response.json::<Problem>().await {
        Ok(problem) if problem.is_transient() => Attempt::Later(problem.sentence()),
        Ok(problem) => Attempt::Refused(problem),
        Err(_) => Attempt::Later(format!("it answered {status} without saying why")),
    }
}

/// The answer must be of the authority that the token pins, and for our key.
fn accept(token: &JoinToken, key: &HostKey, answer: &HostJoinAnswer) -> Result<Identity, BootstrapError> {
    let bad = |why| Err(BootstrapError::BadAnswer { why });
    if certificate_key_fingerprint(&answer.ca_certificate)? != token.ca {
        return bad("its authority is not the one that the token names");
    }
    if certificate_key_fingerprint(&answer.certificate)? != key.fingerprint() {
        return bad("its certificate is for another key");
    }
    let identity = Identity::new(&answer.ca_certificate, &answer.certificate, &key.to_pem())?;
    if identity.site() != token.site || identity.host() != answer.host {
        return bad("its certificate names another host or site");
    }
    Ok(identity)
}

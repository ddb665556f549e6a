//! Joins between real hosts over TLS and QUIC on loopback: who is let in, and what the others are told.

use axum::http::Method;
use axum::http::StatusCode;
use hostd_api::JoinToken;
use hostd_api::Secret;
use statemachine::HostId;

use crate::auth::Peer;
use crate::test_host::DEADLINE;
use crate::test_host::TestHost;
use crate::test_host::root;
use crate::test_host::sentence;

const HOUR_MS: u64 = 60 * 60 * 1000;

/// Asks until it is so.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_with_one_token_and_sees_what_the_site_sees() {
    let first = TestHost::first("h1").await;
    let second = TestHost::bare("h2");
    let token = first.token("join", HOUR_MS).await;
    let (status, membership) = second.join(&token).await;
    assert_eq!(status, StatusCode::OK, "{membership}");
    assert_eq!((membership["site_name"].as_str(), membership["host_name"].as_str()), (Some("lab"), Some("h2")));

    // A write through the new host, read on the other.
    let (status, created) = second.post("/v1/vms", r#"{"name":"web1","spec":{"kernel":"/images/k"}}"#).await;
    assert_eq!(status, StatusCode::OK, "{created}");
    let (status, _) = first.get(&format!("/v1/vms/web1?min_seq={}", created["seq"])).await;
    assert_eq!(status, StatusCode::OK);

    until("both answer with the same digest at one seq", async || {
        let (_, digests) = second.get("/v1/state/digest").await;
        let hosts = digests["hosts"].as_array().unwrap();
        assert_eq!(hosts.len(), 2);
        hosts.iter().all(|host| host["digest"].is_object()) && hosts[0]["digest"] == hosts[1]["digest"]
    })
    .await;

    let again = second.join(&token).await;
    assert_eq!((again.0, sentence(&again).contains("belongs to site lab already")), (StatusCode::CONFLICT, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_used_expired_revoked_altered_or_foreign_is_refused_in_one_sentence() {
    let first = TestHost::first("h1").await;
    let used = first.token("join", HOUR_MS).await;
    let second = TestHost::bare("h2");
    assert_eq!(second.join(&used).await.0, StatusCode::OK);
    let third = TestHost::bare("h3");

    let expired = first.token("join", 1).await;
    let revoked = first.token("join", HOUR_MS).await;
    let (_, tokens) = first.get("/v1/tokens").await;
    let id = tokens["items"].as_array().unwrap().last().unwrap()["id"].clone();
    first.delete(&format!("/v1/tokens/{id}")).await;
    let admin = first.token("admin", HOUR_MS).await;
    let mut altered = first.token("join", HOUR_MS).await;
    let last = altered.pop().unwrap();
    altered.push(if last == 'A' { 'B' } else { 'A' });
    let mut forged = JoinToken::from_text(&used).unwrap();
    forged.secret = Secret::from_bytes([7; 32]);

    // A token of another site whose hosts are said to be ours: the pinned authority does not fit.
    let elsewhere = TestHost::first("x1").await;
    let mut misdirected = JoinToken::from_text(&elsewhere.token("join", HOUR_MS).await).unwrap();
    misdirected.addresses = vec![first.address()];

    for (token, words) in [
        (used.as_str(), "used by another host"),
        (&expired, "expired"),
        (&revoked, "revoked"),
        (&altered, "damaged"),
        (&admin, "API token"),
        (forged.to_text().expose(), "never issued it"),
        (misdirected.to_text().expose(), "not of the site that the token names"),
        ("hello", "not a token"),
    ] {
        let refused = third.join(token).await;
        assert!(refused.0.is_client_error() || refused.0.is_server_error());
        let sentence = sentence(&refused);
        assert!(sentence.contains(words), "{words}: {sentence}");
        assert!(sentence.contains("token") && !sentence.contains(token), "says what to do, not the secret: {sentence}");
    }
    assert!(third.daemon.member().is_none());
    // And the refused machine is let in with a good one.
    assert_eq!(third.join(&first.token("join", HOUR_MS).await).await.0, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_site_is_told_apart_by_the_site_that_receives_it() {
    let (ours, theirs) = (TestHost::first("h1").await, TestHost::first("x1").await);
    let token = theirs.token("join", HOUR_MS).await;
    let key = consensus::pki::HostKey::generate().unwrap();
    let request = serde_json::json!({
        "token": token,
        "csr": key.signing_request().unwrap(),
        "candidate": {
            "name": "h2",
            "address": "192.0.2.2:7443",
            "public_key": key.fingerprint(),
            "facts": crate::facts::collect(ours.daemon.config(), None).unwrap(),
        },
    });
    let stranger = crate::test_host::stranger();
    let refused = ours.ask(stranger, Method::POST, "/v1/hosts/join", &[], &request.to_string()).await;
    assert_eq!(refused.0, StatusCode::FORBIDDEN);
    assert!(sentence(&refused).contains("ask for a token on a host of this site"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_costs_nothing_because_the_same_key_is_answered_again() {
    let first = TestHost::first("h1").await;
    let second = TestHost::bare("h2");
    let token = hostd_api::SecretText::new(first.token("join", HOUR_MS).await);
    let one = super::join::ask_site(second.daemon.config(), &token).await.unwrap();
    std::fs::remove_file(second.daemon.config().identity_dir().join("host.pem")).unwrap();
    let two = super::join::ask_site(second.daemon.config(), &token).await.unwrap();
    assert_eq!(one.host(), two.host());
    assert_eq!(first.daemon.member().unwrap().fold().state.hosts.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_host_with_a_valid_certificate_is_refused_by_name() {
    let first = TestHost::first("h1").await;
    let second = TestHost::bare("h2");
    let token = first.token("join", HOUR_MS).await;
    let (_, membership) = second.join(&token).await;
    let host = HostId(membership["host"].as_u64().unwrap());
    let certified = Peer::Remote { address: "192.0.2.2:1".parse().unwrap(), host: Some(host) };
    assert_eq!(first.ask(certified, Method::GET, "/v1/vms", &[], "").await.0, StatusCode::OK);

    assert_eq!(first.post("/v1/hosts/h2/maintenance", "").await.0, StatusCode::OK);
    let (status, removed) = first.delete("/v1/hosts/h2").await;
    assert_eq!(status, StatusCode::OK, "{removed}");
    let refused = first.ask(certified, Method::GET, "/v1/vms", &[], "").await;
    assert_eq!(refused.0, StatusCode::FORBIDDEN);
    let sentence = sentence(&refused);
    assert!(sentence.contains("was removed from this site at seq") && sentence.contains("new token"), "{sentence}");

    // Over its own TLS connection, too.
    let identity = second.daemon.member().unwrap().identity().clone();
    let fold = first.daemon.member().unwrap().fold();
    let clients = crate::peer::PeerClients::new(identity);
    let problem = clients.get_json::<serde_json::Value>(&fold, HostId(1), "/v1/hosts").await.unwrap_err();
    assert!(problem.detail.contains("was removed from this site"), "{problem:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_leaves_is_bare_again_and_may_join_anew() {
    let first = TestHost::first("h1").await;
    let second = TestHost::bare("h2");
    assert_eq!(second.join(&first.token("join", HOUR_MS).await).await.0, StatusCode::OK);
    let refused = second.ask(root(), Method::POST, "/v1/leave", &[], "").await;
    assert!(sentence(&refused).contains("maintenance first"));
    second.post("/v1/hosts/h2/maintenance", "").await;
    let (status, answer) = second.post("/v1/leave", "").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(second.daemon.member().is_none());
    assert!(!second.daemon.config().identity_dir().exists());
    until("the site forgets it", async || first.get("/v1/hosts/h2").await.0 == StatusCode::NOT_FOUND).await;
    let (status, again) = second.join(&first.token("join", HOUR_MS).await).await;
    assert_eq!(status, StatusCode::OK, "{again}");
}

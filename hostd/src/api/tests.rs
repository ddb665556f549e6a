//! The API over a real single-host site.

use axum::body::Body;
use axum::http::Method;
use axum::http::Request;
use axum::http::StatusCode;
use axum::http::header;
use futures::StreamExt;
use utoipa::OpenApi;

use super::openapi::Description;
use crate::test_host::DEADLINE;
use crate::test_host::TestHost;
use crate::test_host::root;
use crate::test_host::sentence;
use crate::test_host::stranger;

const WEB1: &str = r#"{"name":"web1","spec":{"kernel":"/images/vmlinuz"}}"#;

#[tokio::test]
async fn a_bare_host_says_how_to_begin_and_takes_orders_from_its_own_root_only() {
    let host = TestHost::bare("h1");
    let (status, answer) = host.get("/v1/status").await;
    assert_eq!((status, &answer["member"]), (StatusCode::OK, &serde_json::Value::Null));
    let refused = host.get("/v1/vms").await;
    assert_eq!(refused.0, StatusCode::CONFLICT);
    assert!(sentence(&refused).contains("quorate init"));
    for path in ["/v1/init", "/v1/join", "/v1/leave"] {
        let refused = host.ask(stranger(), Method::POST, path, &[], "{}").await;
        assert_eq!(refused.0, StatusCode::FORBIDDEN, "{path}");
        assert!(sentence(&refused).contains("Unix socket"));
    }
    let refused = host.post("/v1/init", r#"{"name":"No such Name"}"#).await;
    assert_eq!(refused.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(!host.daemon.config().identity_dir().exists(), "a refused init leaves nothing behind");
}

#[tokio::test]
async fn a_vm_is_defined_read_changed_and_deleted() {
    let host = TestHost::first("h1").await;
    let (status, created) = host.post("/v1/vms", WEB1).await;
    assert_eq!(status, StatusCode::OK, "{created}");
    let id = created["id"].as_str().unwrap();
    let path = format!("/v1/vms/web1?min_seq={}", created["seq"]);
    let (_, shown) = host.get(&path).await;
    assert_eq!((shown["item"]["id"].as_str(), shown["item"]["status"].as_str()), (Some(id), Some("Down")));
    assert!(shown["applied_seq"].as_u64() >= created["seq"].as_u64());

    let (status, changed) = host.ask(root(), Method::PATCH, "/v1/vms/web1", &[], r#"{"spec":{"vcpus":2}}"#).await;
    assert_eq!(status, StatusCode::OK, "{changed}");
    let (_, shown) = host.get(&format!("/v1/vms/{id}?consistency=linearizable")).await;
    assert_eq!(shown["item"]["spec"]["vcpus"], 2);
    assert_eq!(shown["item"]["spec"]["kernel"], "/images/vmlinuz");

    let (status, _) = host.delete("/v1/vms/web1").await;
    assert_eq!(status, StatusCode::OK);
    let missing = host.get("/v1/vms/web1").await;
    assert_eq!(missing.0, StatusCode::NOT_FOUND);
    assert!(sentence(&missing).contains("quorate vm list"));
}

#[tokio::test]
async fn a_repeated_key_is_answered_again_and_another_body_under_it_is_refused() {
    let host = TestHost::first("h1").await;
    let key = [("idempotency-key", "k-1")];
    let create = async |body: &str| host.ask(root(), Method::POST, "/v1/vms", &key, body).await;
    let first = create(WEB1).await;
    assert_eq!(first.0, StatusCode::OK);
    assert_eq!(create(WEB1).await, first);
    let other = create(r#"{"name":"web2","spec":{"kernel":"/images/vmlinuz"}}"#).await;
    assert_eq!(other.0, StatusCode::CONFLICT);
    assert!(sentence(&other).contains("idempotency key"));
    // Without a key the same request is a new one.
    let again = host.post("/v1/vms", WEB1).await;
    assert_eq!((again.0, sentence(&again).contains("exists already")), (StatusCode::CONFLICT, true));
}

#[tokio::test]
async fn a_token_does_what_its_purpose_says_until_it_is_revoked() {
    let host = TestHost::first("h1").await;
    let (admin, viewer) = (host.token("admin", 60_000).await, host.token("viewer", 60_000).await);
    let ask = async |token: &str, method: Method, path: &str, body: &str| {
        let bearer = format!("Bearer {token}");
        host.ask(stranger(), method, path, &[("authorization", &bearer)], body).await
    };
    assert_eq!(ask(&viewer, Method::GET, "/v1/vms", "").await.0, StatusCode::OK);
    let refused = ask(&viewer, Method::POST, "/v1/vms", WEB1).await;
    assert_eq!((refused.0, sentence(&refused).contains("may only look")), (StatusCode::FORBIDDEN, true));
    assert_eq!(ask(&admin, Method::POST, "/v1/vms", WEB1).await.0, StatusCode::OK);

    let (_, tokens) = host.get("/v1/tokens").await;
    let id = &tokens["items"][0]["id"];
    assert_eq!(host.delete(&format!("/v1/tokens/{id}")).await.0, StatusCode::OK);
    let refused = ask(&admin, Method::GET, "/v1/vms", "").await;
    assert_eq!((refused.0, sentence(&refused).contains("revoked")), (StatusCode::UNAUTHORIZED, true));
}

#[tokio::test]
async fn a_stranger_is_told_what_to_send() {
    let host = TestHost::first("h1").await;
    for path in ["/v1/status", "/v1/vms", "/v1/events", "/metrics", "/v1/tokens", "/v1/vms/web1/console"] {
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        let response = host.send(stranger(), request).await;
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(response.headers()[header::CONTENT_TYPE], hostd_api::PROBLEM_MEDIA_TYPE);
        assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
    }
    assert_eq!(host.ask(stranger(), Method::GET, "/healthz", &[], "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_bad_request_is_refused_in_words() {
    let host = TestHost::first("h1").await;
    let huge = format!(r#"{{"name":"{}"}}"#, "x".repeat(hostd_api::MAX_BODY_BYTES));
    for (method, path, body, status, words) in [
        (Method::GET, "/v1/vms?colour=blue", "", 400, "colour"),
        (Method::GET, "/v1/events?colour=blue", "", 400, "colour"),
        (Method::GET, "/v1/events?kind=NoSuchKind", "", 400, "NoSuchKind"),
        (Method::GET, "/v1/events?after=qrc1.xyz", "", 400, "not a cursor"),
        (Method::GET, "/v1/vms?min_seq=many", "", 400, ""),
        (Method::GET, "/v1/vms/web1/console", "", 426, "Upgrade"),
        (Method::POST, "/v1/vms", "{", 400, "line 1"),
        (Method::POST, "/v1/vms", r#"{"name":"a","spec":{},"more":1}"#, 400, "more"),
        (Method::POST, "/v1/vms", &huge, 413, "bytes"),
        (Method::POST, "/v1/vms", r#"{"name":"a","spec":{}}"#, 422, "kernel"),
        (Method::POST, "/v1/vms/none/start", "", 404, "none"),
        (Method::DELETE, "/v1/tokens/x", "", 400, "number"),
        (Method::GET, "/v1/cats", "", 404, "openapi.json"),
        (Method::PUT, "/v1/vms", "", 405, "openapi.json"),
    ] {
        let answered = host.ask(root(), method.clone(), path, &[], body).await;
        assert_eq!(answered.0.as_u16(), status, "{method} {path}: {}", answered.1);
        assert!(sentence(&answered).contains(words), "{method} {path}: {}", answered.1);
    }
    let (_, problem) = host.get("/v1/events?colour=blue").await;
    assert_eq!(problem["type"], "urn:quorate:problem:unknown-parameter");
}

#[tokio::test]
async fn everything_that_the_description_lists_is_served() {
    let host = TestHost::first("h1").await;
    let description = serde_json::to_value(Description::openapi()).unwrap();
    let paths = description["paths"].as_object().unwrap();
    assert!(paths.len() >= 20, "{}", paths.len());
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            // Nobody in particular, so nothing is done; an unknown path or method would answer before it asks who that is.
            let path = path.replace(['{', '}'], "");
            let (status, problem) = host.ask(stranger(), method.clone(), &path, &[], "").await;
            let unknown = status == StatusCode::NOT_FOUND || status == StatusCode::METHOD_NOT_ALLOWED;
            assert!(!unknown, "{method} {path}: {problem}");
        }
    }
}

#[tokio::test]
async fn the_stream_carries_what_was_written_and_resumes_by_its_ids() {
    let host = TestHost::first("h1").await;
    let (_, created) = host.post("/v1/vms", WEB1).await;
    let read = async |query: &str, last: &str| {
        let request = Request::builder().uri(format!("/v1/events?follow=false{query}")).header("last-event-id", last);
        let request =
            if last.is_empty() { Request::builder().uri(format!("/v1/events?follow=false{query}")) } else { request };
        let response = host.send(root(), request.body(Body::empty()).unwrap()).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        let mut body = response.into_body().into_data_stream();
        let mut text = String::new();
        while let Some(chunk) = tokio::time::timeout(DEADLINE, body.next()).await.unwrap() {
            text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        }
        text
    };
    let whole = read("&from=oldest", "").await;
    for kind in ["SiteInitialised", "HostJoined", "CertificateIssued", "VmDefined"] {
        assert!(whole.contains(&format!("\"kind\":\"{kind}\"")), "{kind}");
    }
    let first_id = whole.lines().find_map(|line| line.strip_prefix("id: ")).unwrap();
    let rest = read("", first_id).await;
    assert!(!rest.contains("SiteInitialised") && rest.contains("HostJoined"));
    let only = read("&from=oldest&kind=VmDefined", "").await;
    assert_eq!(only.matches("event: event").count(), 1);
    assert!(only.contains(created["id"].as_str().unwrap()));
    let state = read("&from=state", "").await;
    assert!(state.contains("event: state") && state.contains("event: synced"));
}

#[tokio::test]
async fn a_scrape_shows_this_host() {
    let host = TestHost::first("h1").await;
    let (_, text) = host.get("/metrics").await;
    let text = text.as_str().unwrap().to_owned();
    for line in ["quorate_raft_is_leader 1", "quorate_raft_voters 1", "quorate_events_oldest_seq 1", "name=\"h1\""] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    assert_eq!(host.get("/metrics/vms").await.0, StatusCode::OK);
}

#[tokio::test]
async fn no_secret_reaches_the_log_the_stream_or_the_snapshot() {
    let host = TestHost::first("h1").await;
    let text = host.token("join", 60_000).await;
    let secret = *hostd_api::JoinToken::from_text(&text).unwrap().secret.expose();
    let key = std::fs::read_to_string(host.daemon.config().identity_dir().join("ca.key")).unwrap();
    let key_line = key.lines().nth(1).unwrap().to_owned();
    let mut files = vec![host.daemon.config().raft_dir()];
    let mut searched = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        searched += bytes.len();
        for needle in [&secret[..], text.as_bytes(), key_line.as_bytes()] {
            assert!(!bytes.windows(needle.len()).any(|window| window == needle), "{}", path.display());
        }
    }
    assert!(searched > 1000, "the log was searched");
}

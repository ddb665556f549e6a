//! The client against a hostd of a few lines, over a real Unix socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use hostd_api::Cursor;
use hostd_api::event::EventsQuery;
use hostd_api::event::Mark;
use hostd_api::event::StartFrom;
use hostd_api::problem::Code;
use hostd_api::vm::VmStart;
use statemachine::Seq;
use statemachine::SiteId;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::net::UnixStream;

use super::events::StreamItem;
use super::*;

/// Serves one answer a connection, in order, and keeps the requests.
struct FakeHostd {
    requests: Arc<Mutex<Vec<String>>>,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl FakeHostd {
    /// An empty answer is a connection that breaks.
    fn answering(answers: Vec<String>) -> FakeHostd {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("hostd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let request = read_request(&mut stream).await;
                let upgrades = request.contains("quorate-console");
                seen.lock().unwrap().push(request);
                stream.write_all(answer.as_bytes()).await.unwrap();
                if upgrades {
                    let mut typed = [0; 3];
                    stream.read_exact(&mut typed).await.unwrap();
                    stream.write_all(&typed).await.unwrap();
                }
            }
        });
        FakeHostd { requests, socket, _directory: directory }
    }

    fn client(&self) -> Client {
        Client::new(&Options::Socket(self.socket.clone())).unwrap()
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = header_of(head, "content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
            if body.len() >= length {
                return text;
            }
        }
        assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "the request breaks off: {text}");
    }
}

fn header_of(request: &str, name: &str) -> Option<String> {
    let lines = request.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
}

fn answer(status: u16, media_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: {media_type}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

fn ok(body: &str) -> String {
    answer(200, "application/json", body)
}

fn problem(code: Code) -> String {
    let problem = Problem::new(code, "no");
    answer(problem.status, PROBLEM_MEDIA_TYPE, &serde_json::to_string(&problem).unwrap())
}

#[tokio::test]
async fn a_write_is_sent_again_with_the_same_key_until_a_leader_answers() {
    let answers = vec![problem(Code::NoLeader), String::new(), ok(r#"{"seq": 12, "id": null}"#)];
    let hostd = FakeHostd::answering(answers);
    let answer = hostd.client().vm_start("web1", &VmStart::default()).await.unwrap();
    assert_eq!(answer.seq, Seq(12));
    let keys: Vec<_> = hostd.requests().iter().map(|request| header_of(request, IDEMPOTENCY_KEY_HEADER)).collect();
    assert_eq!(keys.len(), 3);
    assert!(keys[0].is_some() && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

#[tokio::test]
async fn a_refusal_stands_and_keeps_its_words() {
    let hostd = FakeHostd::answering(vec![problem(Code::NotFound)]);
    let error = hostd.client().vm("web1", None).await.unwrap_err();
    assert!(error.is_not_found(), "{error}");
    assert_eq!(error.to_string(), "no");
}

#[tokio::test]
async fn names_are_escaped_and_never_become_another_path() {
    let hostd = FakeHostd::answering(vec![problem(Code::NotFound)]);
    let _ = hostd.client().vm("../hosts/1?x#y", Some(Seq(7))).await;
    let request = hostd.requests().remove(0);
    assert!(request.starts_with("GET /v1/vms/..%2Fhosts%2F1%3Fx%23y?min_seq=7 HTTP/1.1\r\n"), "{request}");
}

#[tokio::test]
async fn a_server_that_is_not_hostd_is_told_apart() {
    let hostd = FakeHostd::answering(vec![answer(404, "text/html", "<h1>nginx</h1>")]);
    let error = hostd.client().status().await.unwrap_err();
    assert!(matches!(error, ClientError::NotOurs { status: 404, .. }), "{error}");
}

#[tokio::test]
async fn without_a_hostd_the_error_says_where_it_was_sought_and_what_to_do() {
    let options = Options::Socket("/nonexistent/hostd.sock".into());
    let error = Client::new(&options).unwrap().status().await.unwrap_err();
    assert!(error.is_unreachable());
    let words = error.to_string();
    assert!(words.contains("/nonexistent/hostd.sock") && words.contains("systemctl start hostd"), "{words}");
}

fn sse(frames: &[(&str, String)]) -> String {
    let body: String = frames.iter().map(|(name, data)| format!("event: {name}\ndata: {data}\n\n")).collect();
    answer(200, "text/event-stream", &body)
}

fn mark(seq: u64) -> String {
    serde_json::to_string(&Mark::after(SiteId::default(), Seq(seq))).unwrap()
}

#[tokio::test]
async fn a_stream_that_breaks_goes_on_behind_its_last_item() {
    let overflow = serde_json::to_string(&Problem::new(Code::Overflow, "too slow")).unwrap();
    let answers = vec![
        sse(&[("bookmark", mark(4))]),
        sse(&[("bookmark", mark(9)), ("closed", overflow)]),
        sse(&[("kind of a newer version", "1".into()), ("end", mark(11))]),
    ];
    let hostd = FakeHostd::answering(answers);
    let client = hostd.client();
    let query = EventsQuery { from: Some(StartFrom::Oldest), ..Default::default() };
    let mut stream = client.events(query).await.unwrap();
    let mut seqs = Vec::new();
    while let Some(item) = stream.next().await.unwrap() {
        match item {
            StreamItem::Bookmark(mark) | StreamItem::End(mark) => seqs.push(mark.seq.0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seqs, [4, 9, 11]);
    let requests = hostd.requests();
    assert!(requests[0].starts_with("GET /v1/events?from=oldest HTTP"), "{}", requests[0]);
    for (request, seq) in requests[1..].iter().zip([4, 9]) {
        let cursor = Cursor::after_batch(SiteId::default(), Seq(seq));
        assert!(request.starts_with(&format!("GET /v1/events?after={cursor} HTTP")), "{request}");
    }
}

#[tokio::test]
async fn a_trimmed_cursor_ends_the_stream_with_the_reason() {
    let hostd = FakeHostd::answering(vec![problem(Code::CursorTrimmed)]);
    let error = hostd.client().events(EventsQuery::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::Problem(problem) if problem.is(Code::CursorTrimmed)));
}

#[tokio::test]
async fn a_console_is_a_stream_of_bytes_both_ways() {
    let switching = "HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: quorate-console\r\n\r\n";
    let hostd = FakeHostd::answering(vec![switching.to_owned()]);
    let mut console = hostd.client().console("web1").await.unwrap();
    console.write_all(b"ls\n").await.unwrap();
    let mut echoed = [0; 3];
    console.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"ls\n");
}

//! The client against a guest that answers late, not at all, without end, or nonsense.

use serde_json::json;
use tokio::io::DuplexStream;

use super::AgentError;
use super::client::GuestAgent;
use super::client::MAX_ANSWER_BYTES;
use super::commands::Command;
use super::commands::ShutdownMode;
use super::exec::ExecRequest;
use super::exec::ExecStatus;
use super::exec::MAX_OUTPUT_BYTES;
use super::fake_guest::FakeGuest;
use super::fake_guest::pair;
use super::freeze::FrozenGuard;

fn agent() -> (GuestAgent<DuplexStream>, FakeGuest) {
    let (near, guest) = pair();
    (GuestAgent::new(near), guest)
}

/// Runs a client's work beside a guest's script, to the end of both.
macro_rules! together {
    ($work:expr, $script:expr) => {
        tokio::join!($work, $script).0
    };
}

#[tokio::test]
async fn a_request_is_answered_after_one_sync() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        guest.answer(json!({"host-name": "web-1\u{1b}[2J"})).await;
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    };
    let work = async {
        assert_eq!(agent.host_name().await.unwrap().as_deref(), Some("web-1[2J"));
        agent.ping().await.unwrap();
    };
    together!(work, script);
}

#[tokio::test]
async fn what_was_said_before_the_sync_is_skipped() {
    let (mut agent, mut guest) = agent();
    let script = async {
        // Half an answer, a complaint about our mark, marks among garbage, and an earlier sync's answer.
        guest
            .say(b"turn\": {\"host-name\": \"old\"}}\n{\"error\": {\"class\": \"x\", \"desc\": \"Invalid JSON\"}}\n")
            .await;
        guest.say(b"\xff\xff{\"return\": 1}\n\xffgarbage").await;
        guest.say(&[b'x'; 10_000]).await;
        let arguments = guest.expect("guest-sync-delimited").await;
        let earlier = json!({"id": arguments["id"].as_u64().unwrap() - 1});
        guest.answer_sync(&earlier).await;
        guest.answer_sync(&arguments).await;
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    };
    let work = async { agent.ping().await.unwrap() };
    together!(work, script);
}

#[tokio::test(start_paused = true)]
async fn the_late_answer_of_an_earlier_request_is_not_taken_for_the_next() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        // The client gives up, and syncs before it asks again.
        let arguments = guest.expect("guest-sync-delimited").await;
        guest.answer(json!({"host-name": "late"})).await;
        guest.answer_sync(&arguments).await;
        guest.expect("guest-get-host-name").await;
        guest.answer(json!({"host-name": "now"})).await;
    };
    let work = async {
        let silent = agent.host_name().await;
        assert!(matches!(silent, Err(AgentError::Silent { command: Command::HostName, .. })), "{silent:?}");
        assert_eq!(agent.host_name().await.unwrap().as_deref(), Some("now"));
    };
    together!(work, script);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_was_cancelled_leaves_nothing_behind() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        guest.say(b"{\"return\": {\"host-na").await;
        let arguments = guest.expect("guest-sync-delimited").await;
        guest.say(b"me\": \"late\"}}\n").await;
        guest.answer_sync(&arguments).await;
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    };
    let work = async {
        let cancelled = tokio::time::timeout(std::time::Duration::from_secs(1), agent.host_name()).await;
        assert!(cancelled.is_err());
        agent.ping().await.unwrap();
    };
    together!(work, script);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_hangs_costs_a_bounded_time() {
    let (mut agent, _guest) = agent();
    let silent = agent.ping().await.unwrap_err();
    assert!(matches!(silent, AgentError::Silent { command: Command::Sync, .. }), "{silent}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_talks_without_end_costs_a_bounded_time() {
    let (mut agent, mut guest) = agent();
    let script = async {
        let until = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
        while tokio::time::Instant::now() < until {
            guest.say(&[b'['; 4096]).await;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        result = agent.ping() => assert!(matches!(result, Err(AgentError::Silent { .. })), "{result:?}"),
        () = script => panic!("the client still waits"),
    }
}

#[tokio::test]
async fn an_answer_in_pieces_is_one_answer() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        for byte in b"\r\n{\"return\": {\"host-name\": \"web\"}}\r\n" {
            guest.say(&[*byte]).await;
            tokio::task::yield_now().await;
        }
    };
    let work = async { assert_eq!(agent.host_name().await.unwrap().as_deref(), Some("web")) };
    together!(work, script);
}

#[tokio::test]
async fn a_huge_answer_is_refused_and_skipped() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        let huge = vec![b'x'; MAX_ANSWER_BYTES + 100_000];
        guest.say(&huge).await;
        guest.say(b"\n{\"return\": {}}\n").await;
        guest.sync_then("guest-ping").await;
        guest.answer(json!({})).await;
    };
    let work = async {
        let long = agent.host_name().await.unwrap_err();
        assert!(matches!(long, AgentError::TooLong { command: Command::HostName, .. }), "{long}");
        agent.ping().await.unwrap();
    };
    together!(work, script);
}

#[tokio::test]
async fn nonsense_is_an_error_and_the_next_request_starts_clean() {
    let (mut agent, mut guest) = agent();
    let deep = format!("{{\"return\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let bad = ["hello", "{}", "{\"return\": {\"host-name\": 5}}", "{\"return\": null}", "[]", "\u{0}", &deep];
    let script = async {
        for line in bad {
            guest.sync_then("guest-get-host-name").await;
            guest.say(format!("{line}\n").as_bytes()).await;
        }
    };
    let work = async {
        for line in bad {
            let error = agent.host_name().await.unwrap_err();
            assert!(matches!(error, AgentError::Nonsense { .. }), "{line}: {error}");
        }
    };
    together!(work, script);
}

#[tokio::test]
async fn a_refusal_is_told_in_the_guests_words_and_costs_no_sync() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-get-host-name").await;
        guest.refuse(&format!("no\u{7} name {}", "x".repeat(1000))).await;
        guest.expect("guest-ping").await;
        guest.say(b"{\"error\": {}}\n").await;
    };
    let work = async {
        let AgentError::Refused { words, .. } = agent.host_name().await.unwrap_err() else { panic!("refused") };
        assert!(words.starts_with("no name xxx") && words.len() <= 256, "{words}");
        assert!(matches!(agent.ping().await, Err(AgentError::Refused { .. })));
    };
    together!(work, script);
}

#[tokio::test]
async fn the_end_of_the_stream_is_the_end_of_the_conversation() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-ping").await;
        guest.say(b"{\"return\"").await;
        drop(guest);
    };
    let error = together!(async { agent.ping().await.unwrap_err() }, script);
    assert!(matches!(error, AgentError::Closed) && error.is_the_end());
    assert!(agent.ping().await.unwrap_err().is_the_end());
}

#[tokio::test]
async fn only_what_is_offered_and_allowed_is_asked() {
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-info").await;
        let commands = json!([
            {"name": "guest-ping", "enabled": true, "success-response": true},
            {"name": "guest-exec", "enabled": false},
            {"name": "guest-get-host-name"},
            {"name": "guest-unheard-of", "enabled": true},
        ]);
        guest.answer(json!({"version": "8.2.0", "supported_commands": commands})).await;
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    };
    let work = async {
        let info = agent.info().await.unwrap();
        assert_eq!(info.version.as_deref(), Some("8.2.0"));
        let offered = [Command::Sync, Command::Ping, Command::Info, Command::HostName];
        assert_eq!(info.supported, offered.into());
        let refused = agent.exec(&ExecRequest { path: "/bin/true".into(), ..ExecRequest::default() }).await;
        assert!(matches!(refused, Err(AgentError::Unsupported { command: Command::Exec })), "{refused:?}");
        assert!(matches!(agent.os().await, Err(AgentError::Unsupported { .. })));
        agent.ping().await.unwrap();
    };
    together!(work, script);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_obeys_an_order_to_stop_says_nothing() {
    for (mode, word) in
        [(ShutdownMode::PowerOff, "powerdown"), (ShutdownMode::Reboot, "reboot"), (ShutdownMode::Halt, "halt")]
    {
        let (mut agent, mut guest) = agent();
        let script = async {
            assert_eq!(guest.sync_then("guest-shutdown").await, json!({"mode": word}));
            // The second guest is gone at once, the others while the client waits for a refusal.
            if mode == ShutdownMode::Reboot { None } else { Some(guest) }
        };
        together!(async { agent.shutdown(mode).await.unwrap() }, script);
    }
    let (mut agent, mut guest) = agent();
    let script = async {
        guest.sync_then("guest-shutdown").await;
        guest.refuse("not allowed").await;
    };
    let refused = together!(agent.shutdown(ShutdownMode::PowerOff), script);
    assert!(matches!(refused, Err(AgentError::Refused { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn an_order_that_was_not_even_heard_is_an_error() {
    let (mut agent, _guest) = agent();
    let silent = agent.shutdown(ShutdownMode::PowerOff).await;
    assert!(matches!(silent, Err(AgentError::Silent { command: Command::Sync, .. })), "{silent:?}");
}

#[tokio::test]
async fn the_clock_is_set_in_nanoseconds() {
    let (mut agent, mut guest) = agent();
    let now = std::time::UNIX_EPOCH + std::time::Duration::new(1_700_000_000, 5);
    let script = async {
        let arguments = guest.sync_then("guest-set-time").await;
        assert_eq!(arguments, json!({"time": 1_700_000_000_000_000_005u64}));
        guest.answer(json!({})).await;
    };
    together!(async { agent.set_time(now).await.unwrap() }, script);
}

#[tokio::test]
async fn a_program_runs_and_its_output_is_bounded() {
    let (mut agent, mut guest) = agent();
    use base64::Engine;
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let long = vec![b'x'; MAX_OUTPUT_BYTES + 1];
    let script = async {
        let arguments = guest.sync_then("guest-exec").await;
        let expected = json!({
            "path": "/bin/sh", "arg": ["-c", "cat"], "env": ["A=b"], "input-data": base64(b"in"), "capture-output": true,
        });
        assert_eq!(arguments, expected);
        guest.answer(json!({"pid": 77})).await;
        assert_eq!(guest.expect("guest-exec-status").await, json!({"pid": 77}));
        guest.answer(json!({"exited": false})).await;
        guest.expect("guest-exec-status").await;
        let output = json!({"exited": true, "exitcode": 3, "out-data": base64(&long), "err-data": base64(b"\xff\n"), "err-truncated": true});
        guest.answer(output).await;
        guest.expect("guest-exec-status").await;
        guest.answer(json!({"exited": true, "signal": 9, "out-data": "not base64!"})).await;
    };
    let work = async {
        let request = ExecRequest {
            path: "/bin/sh".into(),
            arguments: vec!["-c".into(), "cat".into()],
            environment: vec!["A=b".into()],
            input: b"in".to_vec(),
        };
        let program = agent.exec(&request).await.unwrap();
        assert_eq!(agent.exec_status(program).await.unwrap(), ExecStatus::Running);
        let ExecStatus::Exited(outcome) = agent.exec_status(program).await.unwrap() else { panic!("it ended") };
        assert_eq!((outcome.code, outcome.signal), (Some(3), None));
        assert_eq!((outcome.output.bytes.len(), outcome.output.cut), (MAX_OUTPUT_BYTES, true));
        assert_eq!((&*outcome.errors.bytes, outcome.errors.cut), (&b"\xff\n"[..], true));
        assert!(matches!(agent.exec_status(program).await, Err(AgentError::Nonsense { .. })));
    };
    together!(work, script);
}

#[tokio::test]
async fn a_command_without_bounds_never_reaches_the_guest() {
    let (mut agent, _guest) = agent();
    let path = || "/bin/true".to_owned();
    for bad in [
        ExecRequest::default(),
        ExecRequest { path: path(), arguments: vec!["x".repeat(40_000)], ..ExecRequest::default() },
        ExecRequest { path: path(), arguments: vec!["a\0b".into()], ..ExecRequest::default() },
        ExecRequest { path: path(), input: vec![0; 70_000], ..ExecRequest::default() },
    ] {
        assert!(matches!(agent.exec(&bad).await, Err(AgentError::BadArgument { .. })));
    }
}

#[tokio::test]
async fn a_guard_tells_when_what_it_guarded_was_thawed_behind_it() {
    let answers = [Ok(2), Ok(1), Err(AgentError::Closed)];
    let mut results = Vec::new();
    for answer in answers {
        let (guard, released) = FrozenGuard::new(2);
        assert_eq!(guard.filesystems(), 2);
        let task = async {
            let reply: super::freeze::ThawReply = released.await.unwrap();
            reply.send(answer).unwrap();
        };
        results.push(together!(guard.thaw(), task));
    }
    assert!(matches!(results[..], [Ok(()), Err(AgentError::ThawedEarly), Err(AgentError::Closed)]), "{results:?}");
    let (guard, released) = FrozenGuard::new(2);
    drop(released);
    assert!(matches!(guard.thaw().await, Err(AgentError::ThawedEarly)), "its time was over");
}

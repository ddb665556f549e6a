use hostd_api::Cursor;
use hostd_api::digest::DigestAt;
use hostd_api::digest::HostDigest;
use hostd_api::digest::StateDigest;
use hostd_api::event::EventView;
use hostd_api::token::TokenState;
use hostd_api::token::TokenView;
use jiff::Timestamp;
use serde_json::json;
use statemachine::HostId;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::TokenId;
use statemachine::state::TokenPurpose;

use super::*;

#[test]
fn columns_line_up_and_no_line_ends_in_blanks() {
    let mut table = Table::with_header(&["NAME", "STATUS", "HOST"]);
    table.row(vec!["web1".into(), "Up".into(), "n1".into()]);
    table.row(vec!["a-longer-name".into(), "WaitForLaunch".into(), "".into()]);
    let expected = "\
NAME           STATUS         HOST
web1           Up             n1
a-longer-name  WaitForLaunch
";
    assert_eq!(table.render(), expected);
}

#[test]
fn a_cell_cannot_break_its_row_or_move_the_cursor() {
    let mut table = Table::bare();
    table.field("detail", "two\nlines\x1b[2J");
    assert_eq!(table.render(), "detail:  two lines [2J\n");
}

#[test]
fn tokens_show_who_used_them_and_how_long_they_last() {
    let now = Timestamp::from_second(1_000_000).unwrap();
    let token = |id, status, used_by, expires| TokenView {
        id: TokenId(id),
        purpose: TokenPurpose::Join,
        status,
        used_by,
        created: now,
        expires: Timestamp::from_second(expires).unwrap(),
        note: String::new(),
    };
    let tokens =
        [token(5, TokenState::Valid, None, 1_010_800), token(9, TokenState::Used, Some(HostId(10)), 1_000_060)];
    let text = site::tokens(&tokens, now);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("5   join     valid            in 3h"), "{text}");
    assert!(lines[2].contains("used by host 10"), "{text}");
}

fn digest(host: u64, seq: u64, digest: &str) -> HostDigest {
    let digest = DigestAt { seq: Seq(seq), digest: digest.into(), head_hash: "cc".into(), feature_level: 1 };
    HostDigest { host: HostId(host), name: format!("n{host}"), digest: Some(digest), unreachable: None }
}

#[test]
fn digests_are_compared_at_equal_seq_only() {
    let hosts = vec![digest(1, 70, "aa"), digest(2, 70, "aa"), digest(3, 69, "bb")];
    assert_eq!(disagreement(&StateDigest { hosts }), None);
    let hosts = vec![digest(1, 70, "aa"), digest(2, 69, "bb"), digest(3, 70, "ab")];
    let differing = StateDigest { hosts };
    assert_eq!(disagreement(&differing), Some(Seq(70)));
    assert!(differing.table().contains("DIFFER at seq 70"));
}

#[test]
fn a_host_that_does_not_answer_is_named_in_the_verdict() {
    let silent =
        HostDigest { host: HostId(3), name: "n3".into(), digest: None, unreachable: Some("no answer in 2 s".into()) };
    let text = StateDigest { hosts: vec![digest(1, 70, "aa"), digest(2, 70, "aa"), silent] }.table();
    assert!(text.contains("2 hosts at seq 70, digests equal; 1 host did not answer"), "{text}");
    assert!(text.contains("no answer in 2 s"), "{text}");
}

fn event(kind: &str, entity: &str, data: serde_json::Value) -> EventView {
    EventView {
        cursor: Cursor { site: SiteId::default(), seq: Seq(42), position: 0 },
        seq: Seq(42),
        position: 0,
        at: Timestamp::from_second(1_700_000_000).unwrap(),
        kind: kind.into(),
        entities: vec![entity.into()],
        actor: "root@host/1".into(),
        origin: HostId(1),
        data,
    }
}

#[test]
fn an_event_line_names_what_the_stream_has_named_before() {
    let mut lines = EventLines::new(Format::Table, Names::default());
    let vm = "vm/00000000-0000-0000-0000-000000000001";
    lines.event(&event("VmDefined", vm, json!({"vm": &vm[3..], "name": "web1"}))).unwrap();
    let line = lines.event(&event("VmDesiredChanged", vm, json!({"vm": &vm[3..], "desired": "Running"}))).unwrap();
    assert!(line.contains("vm/web1") && line.contains("desired=Running"), "{line}");
    assert!(!line.contains(&vm[3..]), "the id is in the column already: {line}");
}

#[test]
fn a_line_names_the_actor_and_shortens_hashes() {
    let mut names = Names::default();
    names.learn("host/1".into(), "n1");
    let mut lines = EventLines::new(Format::Table, names);
    let data = json!({"fingerprint": "ab".repeat(32), "not_after_ms": 1_826_795_216_000_u64, "ttl_ms": 5000});
    let line = lines.event(&event("CertificateIssued", "host/1", data)).unwrap();
    assert!(line.contains("host/n1") && line.contains("root@n1"), "{line}");
    assert!(line.contains("fingerprint=abababababab.. not_after_ms=2027-11-2"), "{line}");
    assert!(line.contains("ttl_ms=5000"), "{line}");
}

#[test]
fn events_for_programs_are_one_json_object_a_line() {
    let mut lines = EventLines::new(Format::Json, Names::default());
    let text = lines.event(&event("VmDeleted", "vm/1", json!({}))).unwrap();
    assert_eq!(text.matches('\n').count(), 1);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["kind"], "VmDeleted");
}

#[test]
fn a_name_that_was_typed_becomes_the_id_that_the_stream_filters_by() {
    let mut names = Names::default();
    names.learn("host/7".into(), "n2");
    assert_eq!(names.entity("host/n2"), "host/7");
    assert_eq!(names.entity("host/7"), "host/7");
    assert_eq!(names.entity("vm/n2"), "vm/n2");
}

#[test]
fn memory_is_shown_without_rounding() {
    assert_eq!(table::memory(512), "512 MiB");
    assert_eq!(table::memory(1536), "1.5 GiB");
    assert_eq!(table::memory(2048), "2 GiB");
    assert_eq!(table::memory(2049), "2049 MiB");
}

//! Bodies and queries of the API, in JSON: what is accepted is decided against the small site, one after another.
//!
//! The input is a list of requests: which one (`tag`), and its body.
#![no_main]

use std::sync::LazyLock;

use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::site;
use fuzz::site::LEADER;
use fuzz::site::SmallSite;
use hostd_api::Cursor;
use hostd_api::JoinToken;
use hostd_api::event::EventFilter;
use hostd_api::event::EventView;
use hostd_api::event::EventsQuery;
use hostd_api::event::StateItem;
use hostd_api::find;
use hostd_api::site::HostJoinRequest;
use hostd_api::token::TokenCreate;
use hostd_api::vm::VmCreate;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmStart;
use hostd_api::vm::VmStop;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::Fold;
use statemachine::SiteId;
use statemachine::VmId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;

const CREATE: u8 = 0;
const PATCH: u8 = 1;
const START: u8 = 2;
const STOP: u8 = 3;
const TOKEN: u8 = 4;
const JOIN: u8 = 5;
const EVENTS: u8 = 6;
const DELETE: u8 = 7;
const KINDS: u8 = 8;

static SITE: LazyLock<SmallSite> = LazyLock::new(SmallSite::new);

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut fold = SITE.fold.clone();
    for (tag, body) in Pieces(data) {
        // The higher bits choose among the VMs.
        let vms: Vec<VmId> = fold.state.vms.iter().map(|(vm, _)| *vm).collect();
        let vm = vms.get(usize::from(tag / KINDS) % vms.len().max(1)).copied().unwrap_or_default();
        if tag % KINDS == EVENTS {
            query(&fold, body);
        } else if let Some(command) = command(&fold, tag % KINDS, vm, body) {
            let actor = if matches!(command, Command::HostJoin { .. }) { Actor::Joiner } else { Actor::Root(LEADER) };
            let request = Request { actor, origin: LEADER, idempotency: None, command };
            site::decide(&mut fold, &request);
        }
    }
    if fold.head != SITE.fold.head {
        let items: Vec<StateItem> = StateItem::all(&fold.state, fold.head.seq).collect();
        serde_json::to_string(&items).expect("a state can be shown");
    }
});

/// What the API makes of a body.
fn command(fold: &Fold, kind: u8, vm: VmId, body: &[u8]) -> Option<Command> {
    Some(match kind {
        CREATE => {
            let VmCreate { name, cluster, run_strategy, spec } = read(body)?;
            Command::VmDefine { name, cluster, spec: spec.into_spec(), run_strategy }
        }
        PATCH => Command::VmChange { vm, change: read::<VmPatch>(body)?.into_change() },
        START => {
            let VmStart { host } = read(body)?;
            let host = host.map(|host| find::host(&fold.state, &host)).transpose().ok()?;
            Command::VmStart { vm, host }
        }
        STOP => Command::VmStop { vm, mode: read::<VmStop>(body)?.mode },
        TOKEN => {
            let TokenCreate { purpose, ttl_ms, note } = read(body)?;
            let secret_hash = *blake3::hash(body).as_bytes();
            Command::TokenCreate { purpose, secret_hash, ttl_ms, note }
        }
        JOIN => {
            let HostJoinRequest { token, candidate, .. } = read(body)?;
            let secret_hash = match JoinToken::from_text(token.expose()) {
                Ok(token) => token.secret.hash(),
                // The newest is a join token that nobody used, so that the candidate is looked at.
                Err(_) => fold.state.tokens.values().last()?.secret_hash,
            };
            Command::HostJoin { secret_hash, candidate }
        }
        DELETE => Command::VmDelete { vm: find::vm(&fold.state, std::str::from_utf8(body).ok()?).ok()? },
        _ => return None,
    })
}

/// Reads a body. What is read means the same when it is written again, as the command line does.
fn read<T: DeserializeOwned + Serialize + PartialEq>(body: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(body).ok()?;
    let again = serde_json::to_vec(&value).expect("a body can be written");
    assert!(serde_json::from_slice::<T>(&again).is_ok_and(|again| again == value), "a body survives being written");
    Some(value)
}

fn query(fold: &Fold, query: &[u8]) {
    let Some(query) = read::<EventsQuery>(query) else { return };
    let _ = query.after.as_ref().map(|after| after.parse::<Cursor>());
    let Ok(filter) = EventFilter::of(&query) else { return };
    for batch in SITE.batches.iter().filter_map(|sealed| sealed.open().ok()) {
        let passed = EventView::of_batch(SiteId::default(), &batch).iter().filter(|event| filter.passes(event)).count();
        assert!(!filter.is_everything() || passed == batch.events.len(), "no filter leaves nothing out");
    }
    for item in StateItem::all(&fold.state, fold.head.seq) {
        let _ = filter.passes_state(&item);
    }
}

fn samples() -> Vec<Vec<u8>> {
    let candidate = SITE.requests.iter().find_map(|request| match &request.command {
        Command::HostJoin { candidate, .. } => serde_json::to_string(candidate).ok(),
        _ => None,
    });
    let candidate = candidate.expect("a host has joined").replace("host2", "host9").replace("0.2:", "0.9:");
    let spec = r#"{"machine":"q-direct-1","vcpus":2,"memory_mib":512,"kernel":"/srv/vmlinuz","initrd":"/srv/initrd","cmdline":"quiet","disks":[{"id":"root","path":"/srv/a.raw","read_only":false,"shareable":true}],"highly_available":false,"release":"lease"}"#;
    let create = format!(r#"{{"name":"web9","cluster":1,"run_strategy":"Always","spec":{spec}}}"#);
    let patch = format!(r#"{{"name":"web8","run_strategy":"Halted","spec":{spec}}}"#);
    let join = format!(r#"{{"token":"qrt1.","csr":"","candidate":{candidate}}}"#);
    let bodies: [(u8, &str); 14] = [
        (CREATE, &create),
        (CREATE, r#"{"name":"b","run_strategy":"Manual","spec":{"kernel":"/k"}}"#),
        (PATCH, &patch),
        (PATCH + KINDS, r#"{"spec":{"initrd":"","disks":[],"highly_available":true,"release":"operator"}}"#),
        (START, r#"{"host":"host2"}"#),
        (START + KINDS, "{}"),
        (STOP, r#"{"mode":"power_off"}"#),
        (STOP + KINDS, r#"{"mode":"shutdown"}"#),
        (TOKEN, r#"{"purpose":"join","ttl_ms":10800000,"note":"rack 4"}"#),
        (TOKEN, r#"{"purpose":"admin","ttl_ms":18446744073709551615}"#),
        (JOIN, &join),
        (
            EVENTS,
            r#"{"from":"oldest","kind":"VmDefined,HostJoined","entity":"host/2","actor":"joiner","follow":false}"#,
        ),
        (EVENTS, r#"{"after":"qrc1.AAAA","actor":"root@host/1,duty@host/1","entity":"vm/1"}"#),
        (DELETE, "web2"),
    ];
    let pieces = bodies.map(|(tag, body)| (tag, body.as_bytes()));
    let mut samples: Vec<Vec<u8>> = pieces.iter().map(|piece| joined([*piece])).collect();
    samples.push(joined([pieces[8], pieces[10], pieces[0], pieces[4]]));
    samples.push(joined([pieces[6], pieces[13], pieces[1], pieces[5]]));
    samples
}

//! What another host sends: requests, answers, records on a stream.
//!
//! The input is a list of messages. A request (`tag` 0) is served as the node serves it, up to where a Raft or a disk would
//! be needed: what it proposes is decided on the small site, its heartbeats are judged by the keeper of grants.
#![no_main]

use std::path::Path;
use std::pin::pin;
use std::sync::LazyLock;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use consensus::feed::Committed;
use consensus::feed::Outlook;
use consensus::feed::PullRequest;
use consensus::feed::Pulled;
use consensus::forwarded;
use consensus::forwarded::EncodedCommand;
use consensus::network::SnapshotOffer;
use consensus::store::entry_codec;
use consensus::store::snapshot::Manifest;
use consensus::store::snapshot::Part;
use consensus::store::snapshot::StateId;
use consensus::transport::Channel;
use consensus::transport::frame;
use consensus::transport::frame::RequestFrame;
use consensus::types::Entry;
use consensus::types::LeaderId;
use consensus::types::LogId;
use consensus::types::Vote;
use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::log;
use fuzz::sealed;
use fuzz::site;
use fuzz::site::LEADER;
use fuzz::site::SmallSite;
use hostd::grants::keeper::Keeper;
use hostd::grants::keeper::Timers;
use hostd::grants::wire::Grant;
use hostd::grants::wire::GrantAnswer;
use hostd::grants::wire::HEARTBEAT;
use hostd::grants::wire::Heartbeat;
use hostd::grants::wire::Nonce;
use hostd::grants::wire::Refusal;
use hostd::peer::kind;
use hostd_api::site::HostJoinRequest;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use statemachine::Epoch;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::codec;
use statemachine::codec::RecordKind;
use statemachine::fold::Answer;

const REQUEST: u8 = 0;
const RESPONSE: u8 = 1;
const GRANT: u8 = 2;
const PULLED: u8 = 3;
const STREAM: u8 = 4;
const KINDS: u8 = 5;

/// Fields of an openraft message, in order: nothing outside `consensus` names openraft.
type VoteRequest = (Vote, Option<LogId>);
type AppendRequest = (Vote, Option<LogId>, Vec<Entry>, Option<LogId>);

static SITE: LazyLock<SmallSite> = LazyLock::new(SmallSite::new);

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    let mut leader = Leader { fold: SITE.fold.clone(), keeper: Keeper::new(Timers::default()), now: Duration::ZERO };
    leader.keeper.lead(1, true, leader.now);
    for (tag, message) in Pieces(data) {
        match tag % KINDS {
            REQUEST => leader.serve(message),
            RESPONSE => response(message),
            GRANT => drop(read::<GrantAnswer>(message)),
            PULLED => pulled(message),
            _ => stream(message),
        }
    }
    stream(data);
});

struct Leader {
    fold: Fold,
    keeper: Keeper,
    now: Duration,
}

impl Leader {
    fn serve(&mut self, payload: &[u8]) {
        let Ok(frame) = RequestFrame::decode(Bytes::copy_from_slice(payload)) else { return };
        assert_eq!(RequestFrame::decode(frame.encode().into()).as_ref(), Ok(&frame), "a frame survives being written");
        let body = &frame.body;
        match frame.channel {
            Channel::Vote | Channel::PreVote | Channel::TransferLeader => drop(read::<VoteRequest>(body)),
            Channel::Appends | Channel::Heartbeats => appends(body),
            Channel::SnapshotOffer => drop(read::<SnapshotOffer>(body)),
            Channel::SnapshotChunk => {
                let part = read::<(String, u64)>(body).and_then(|(name, _)| Part::from_name(&name));
                assert!(
                    part.is_none_or(|part| Part::from_name(&part.name()) == Some(part)),
                    "a part survives its name"
                );
            }
            Channel::Propose => self.propose(body),
            Channel::Pull => drop(read::<PullRequest>(body)),
            Channel::Peer(HEARTBEAT) => self.heartbeat(body),
            Channel::Peer(kind::JOIN) => drop(serde_json::from_slice::<HostJoinRequest>(body)),
            Channel::ReadIndex | Channel::Ping | Channel::Peer(_) => {}
        }
    }

    fn propose(&mut self, body: &[u8]) {
        let Ok(requests) = forwarded::decode(body) else { return };
        for request in requests {
            // Whichever host it names: its certificate would say the same.
            let from = request.origin;
            if request.may_come_from(from) {
                site::decide(&mut self.fold, &request);
            }
        }
    }

    fn heartbeat(&mut self, body: &[u8]) {
        let Ok(heartbeat) = Heartbeat::decode(body) else { return };
        assert_eq!(
            Heartbeat::decode(&heartbeat.encode()).as_ref(),
            Ok(&heartbeat),
            "a heartbeat survives being written"
        );
        self.now += Duration::from_secs(1);
        self.keeper.heartbeat(heartbeat.clone(), self.now, site::WALL_MS);
        let Some((round, _)) = self.keeper.begin_round(self.now) else { return };
        let verdicts = self.keeper.end_round(round, Some(self.fold.head.seq), &self.fold, self.now);
        for grant in verdicts.into_iter().filter_map(|verdict| verdict.outcome.ok()) {
            assert_eq!((grant.host, grant.boot, grant.nonce), (heartbeat.host, heartbeat.boot, heartbeat.nonce));
            let permits = self.fold.state.permits_on(grant.host).filter(|(_, _, permit)| permit.boot == grant.boot);
            let held: Vec<Epoch> = permits.map(|(_, _, permit)| permit.epoch).collect();
            assert_eq!(grant.epochs, held, "what is granted is what this incarnation holds");
        }
        let _ = self.keeper.due(&self.fold, self.now);
        let _ = self.keeper.clock_error(self.now);
    }
}

fn read<T: DeserializeOwned + Serialize + PartialEq>(bytes: &[u8]) -> Option<T> {
    let value: T = codec::decode(bytes).ok()?;
    assert!(codec::decode::<T>(&codec::encode(&value)).is_ok_and(|again| again == value), "it survives being written");
    Some(value)
}

fn appends(body: &[u8]) {
    let Some((_, _, entries, _)) = read::<AppendRequest>(body) else { return };
    for entry in entries {
        let mut stored = Vec::new();
        entry_codec::encode_entry(&entry, &mut stored);
        assert_eq!(entry_codec::decode_log_id(&stored), Ok(entry.log_id));
        assert!(entry_codec::decode_entry(&stored).is_ok_and(|again| again == entry), "an entry survives the log");
    }
}

fn response(payload: &[u8]) {
    let Ok(body) = frame::decode_response(LEADER, Bytes::copy_from_slice(payload)) else { return };
    assert_eq!(frame::encode_response(&Ok(body.clone())), payload, "an answer survives being written");
    let _ = read::<Option<LogId>>(&body);
    let _ = read::<Result<Answer, String>>(&body);
}

fn pulled(body: &[u8]) {
    match read::<Pulled>(body).map(|pulled| pulled.what) {
        Some(Committed::Batches { batches, .. }) => {
            let mut fold = Fold::default();
            // A receiver stops at the first that it cannot apply.
            let _ = batches.iter().try_for_each(|sealed| fold.apply_sealed(sealed).map(drop));
        }
        Some(Committed::Snapshot { manifest }) => drop(Manifest::decode(&manifest, Path::new("manifest"))),
        None => {}
    }
}

/// Records one after another, as they come from a connection: with the checksums that they have, and with a right one.
fn stream(bytes: &[u8]) {
    for bytes in [bytes, &sealed(RecordKind::RaftAppend, bytes)] {
        let mut rest = bytes;
        while let Some(payload) = now(frame::read_record(LEADER, &mut rest, RecordKind::RaftAppend)) {
            assert!(bytes.ends_with(rest) && payload.len() < bytes.len(), "a record is made of what came");
        }
    }
}

/// The next record of a stream that is all there.
fn now<T, E>(reading: impl Future<Output = Result<Option<T>, E>>) -> Option<T> {
    match pin!(reading).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(read) => read.ok().flatten(),
        Poll::Pending => panic!("bytes in memory do not make a reader wait"),
    }
}

fn samples() -> Vec<Vec<u8>> {
    let request =
        |channel, body: Vec<u8>| (REQUEST, RequestFrame { channel, timeout_ms: 900, body: body.into() }.encode());
    let host = SITE.fold.state.hosts.get(&LEADER).expect("it is the first host");
    let heartbeat = Heartbeat {
        host: LEADER,
        boot: host.facts.boot,
        nonce: Nonce(4),
        applied: SITE.fold.head.seq,
        wall_ms: site::WALL_MS,
        watchdog_armed: true,
        running: SITE.fold.state.permits_on(LEADER).map(|(_, _, permit)| permit.epoch).collect(),
    };
    let grant = Grant {
        host: LEADER,
        boot: heartbeat.boot,
        nonce: heartbeat.nonce,
        epochs: heartbeat.running.clone(),
        applied: heartbeat.applied,
        session: 3,
    };
    let id = LogId::new_term_index(log::TERM, 42);
    let vote = Vote { leader_id: LeaderId { term: log::TERM, voted_for: LEADER.0 }, committed: true };
    let entries = vec![log::entry(43, &SITE.batches[..1]), log::entry(44, &SITE.batches[1..3])];
    let state = StateId { bytes: 700, hash: [5; 32] };
    let offer = SnapshotOffer { address: "10.0.0.1:7443".to_owned(), vote, manifest: vec![1, 2, 3] };
    let batches = SITE.batches[..2].iter().cloned().map(Into::into).collect();
    let (head, voters) = (SITE.fold.head.seq, vec![LEADER, HostId(4)]);
    let outlook = Outlook { leader: Some(LEADER), voters, learners: vec![HostId(7)], since: None };
    let answer = Answer { seq: SITE.fold.head.seq, created: None };
    let served = |body: Vec<u8>| (RESPONSE, frame::encode_response(&Ok(body.into())));

    let mut messages: Vec<(u8, Vec<u8>)> = vec![
        request(Channel::Vote, codec::encode(&(vote, Some(id)))),
        request(Channel::Heartbeats, codec::encode(&(vote, Some(id), Vec::<Entry>::new(), Some(id)))),
        request(Channel::Appends, codec::encode(&(vote, Some(id), entries, Some(id)))),
        request(Channel::SnapshotOffer, codec::encode(&offer)),
        request(Channel::SnapshotChunk, codec::encode(&(Part::State(state).name(), 512u64))),
        request(Channel::Pull, codec::encode(&PullRequest { after: SITE.fold.head.seq, wait_ms: 10 })),
        request(Channel::Peer(HEARTBEAT), heartbeat.encode().to_vec()),
        served(codec::encode(&Ok::<Answer, String>(answer))),
        (RESPONSE, vec![1, b'n', b'o']),
        (GRANT, GrantAnswer::Granted(grant).encode().to_vec()),
        (GRANT, GrantAnswer::Refused(Refusal::NotReady).encode().to_vec()),
        (PULLED, codec::encode(&Pulled { what: Committed::Batches { batches, head }, outlook: outlook.clone() })),
        (PULLED, codec::encode(&Pulled { what: Committed::Snapshot { manifest: vec![1, 2, 3] }, outlook })),
        (STREAM, [sealed(RecordKind::RaftAppend, b"one"), sealed(RecordKind::RaftAppend, b"")].concat()),
    ];
    let further = SITE.further();
    let requests = SITE.requests.iter().chain(further.iter().map(|(request, _)| request));
    messages.extend(requests.map(|it| request(Channel::Propose, forwarded::encode(&[EncodedCommand::of(it)]))));
    messages.iter().map(|(tag, message)| joined([(*tag, message.as_slice())])).collect()
}

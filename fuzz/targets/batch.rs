//! Batches of events, as they come out of the log or from a peer: read or refused, written back the same, and folded.
//!
//! The input is a history on top of the small site. Each piece is one batch, which is given the head that it must name:
//! the piece is the rest of its bytes, or, where the tag is the number of a kind, its only event.
#![no_main]

use std::sync::LazyLock;

use fuzz::Pieces;
use fuzz::joined;
use fuzz::keep_samples;
use fuzz::payload;
use fuzz::sealed;
use fuzz::site;
use fuzz::site::LEADER;
use fuzz::site::SmallSite;
use hostd_api::event::EventView;
use libfuzzer_sys::fuzz_target;
use statemachine::Batch;
use statemachine::Event;
use statemachine::Fold;
use statemachine::SiteId;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::RecordKind;
use statemachine::command::Actor;
use statemachine::event::EncodedEvent;
use statemachine::fold::Applied;

/// Of a piece: no kind of event has this number.
const BYTES: u8 = 0;

static SITE: LazyLock<SmallSite> = LazyLock::new(SmallSite::new);

fuzz::mutate_pieces!();

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    take(&mut Fold::default(), &SealedBatch::from_bytes(data.to_vec()));
    let mut fold = SITE.fold.clone();
    for (tag, piece) in Pieces(data) {
        let batch = match tag {
            BYTES => Some(of_bytes(&fold, piece)),
            kind => of_event(&fold, kind, piece),
        };
        if let Some(batch) = batch {
            take(&mut fold, &batch);
        }
    }
    if fold.head != SITE.fold.head {
        site::look_at(&fold);
    }
});

/// The head, then the bytes: a batch begins with the head that it follows.
fn of_bytes(fold: &Fold, rest: &[u8]) -> SealedBatch {
    let mut payload = codec::encode(&fold.head);
    payload.extend_from_slice(rest);
    SealedBatch::from_bytes(sealed(RecordKind::Batch, &payload))
}

fn of_event(fold: &Fold, kind: u8, payload: &[u8]) -> Option<SealedBatch> {
    let encoded = EncodedEvent { kind: kind.into(), version: 1, payload: payload.to_vec() };
    let events = vec![Event::decode(&encoded).ok()?];
    let (actor, origin) = (Actor::Root(LEADER), LEADER);
    let stamp = fold.stamp.advance(site::WALL_MS);
    Some(Batch { previous: fold.head, stamp, actor, origin, idempotency: None, created: None, events }.seal())
}

fn take(fold: &mut Fold, sealed: &SealedBatch) {
    let opened = sealed.open();
    if let Ok(batch) = &opened {
        assert_eq!(batch.seal().open().as_ref(), Ok(batch), "a batch survives being written");
        serde_json::to_string(&EventView::of_batch(SiteId::default(), batch)).expect("a batch can be shown");
    }
    let before = fold.clone();
    match fold.apply_sealed(sealed) {
        Ok(Applied::Applied(seq)) => assert_eq!((fold.head.seq, fold.head.hash), (seq, sealed.hash())),
        Ok(Applied::Superseded) | Err(_) => assert_eq!(*fold, before, "what is not applied changes nothing"),
    }
}

/// Every kind of event that the rules make: as whole batches, as batches on top of the site, and alone.
fn samples() -> Vec<Vec<u8>> {
    let further = SITE.further();
    let mut samples = Vec::new();
    for sealed in SITE.batches.iter().chain(further.iter().map(|(_, sealed)| sealed)) {
        let batch = sealed.open().expect("the site's batches open");
        let head_len = codec::encode(&batch.previous).len();
        let events: Vec<EncodedEvent> = batch.events.iter().map(Event::encode).collect();
        samples.push(sealed.as_bytes().to_vec());
        samples.push(joined([(BYTES, &payload(sealed.as_bytes())[head_len..])]));
        samples.push(joined(events.iter().map(|event| (event.kind as u8, event.payload.as_slice()))));
    }
    samples
}

use statemachine::TokenId;
use statemachine::VmId;
use statemachine::batch::Head;
use statemachine::event::TokenCreated;
use statemachine::event::VmDeleted;
use statemachine::stamp::Stamp;
use statemachine::state::TokenPurpose;

use super::*;

fn batch(events: Vec<Event>) -> Batch {
    Batch {
        previous: Head { seq: Seq(41), ..Head::default() },
        stamp: Stamp { at_ms: 1_700_000_000_000, wall_ms: 1_700_000_000_000 },
        actor: Actor::Root(HostId(1)),
        origin: HostId(1),
        idempotency: None,
        created: None,
        events,
    }
}

fn deleted(vm: u128) -> Event {
    Event::from(VmDeleted { vm: VmId(uuid::Uuid::from_u128(vm)) })
}

#[test]
fn each_event_of_a_batch_has_a_cursor_behind_it() {
    let views = EventView::of_batch(SiteId::default(), &batch(vec![deleted(1), deleted(2)]));
    assert_eq!(views.len(), 2);
    assert_eq!((views[0].seq, views[0].position, views[1].position), (Seq(42), 0, 1));
    assert!(!views[0].cursor.precedes(Seq(42), 0) && views[0].cursor.precedes(Seq(42), 1));
    assert_eq!(views[0].at.to_string(), "2023-11-14T22:13:20Z");
    assert_eq!(views[0].actor, "root@host/1");
    let json = serde_json::to_string(&views[1]).unwrap();
    assert_eq!(serde_json::from_str::<EventView>(&json).unwrap(), views[1]);
}

#[test]
fn the_stream_never_shows_the_hash_of_a_token() {
    let created = TokenCreated {
        token: TokenId(42),
        purpose: TokenPurpose::Join,
        secret_hash: [7; 32],
        expires_ms: 5,
        note: String::new(),
    };
    let views = EventView::of_batch(SiteId::default(), &batch(vec![created.into()]));
    assert_eq!(views[0].data["purpose"], "join");
    assert!(views[0].data.get("secret_hash").is_none());
}

#[test]
fn hashes_are_shown_in_hexadecimal() {
    let mut value = serde_json::json!({"ca": vec![255; 32], "list": [1, 2]});
    hashes_to_hex(&mut value);
    assert_eq!(value["ca"], "ff".repeat(32));
    assert_eq!(value["list"], serde_json::json!([1, 2]));
}

#[test]
fn a_filter_lets_through_what_each_of_its_lists_names() {
    let query = |kind: Option<&str>, entity: Option<&str>| EventsQuery {
        kind: kind.map(str::to_owned),
        entity: entity.map(str::to_owned),
        ..EventsQuery::default()
    };
    let views = EventView::of_batch(SiteId::default(), &batch(vec![deleted(1), deleted(2)]));
    let entity = views[0].entities[0].clone();

    assert!(EventFilter::of(&query(None, None)).unwrap().passes(&views[0]));
    let of_vm = EventFilter::of(&query(Some("VmDefined, VmDeleted"), Some(&entity))).unwrap();
    assert!(of_vm.passes(&views[0]) && !of_vm.passes(&views[1]));
    assert!(!EventFilter::of(&query(Some("VmDefined"), None)).unwrap().passes(&views[0]));
}

#[test]
fn a_filter_that_could_never_match_is_refused() {
    let kind = EventsQuery { kind: Some("VmDelted".into()), ..Default::default() };
    assert_eq!(EventFilter::of(&kind), Err(FilterError::UnknownKind("VmDelted".into())));
    let entity = EventsQuery { entity: Some("web1".into()), ..Default::default() };
    assert_eq!(EventFilter::of(&entity), Err(FilterError::NotAnEntity("web1".into())));
    let actor = EventsQuery { actor: Some("root".into()), ..Default::default() };
    assert_eq!(EventFilter::of(&actor), Err(FilterError::NotAnActor("root".into())));
    let many = EventsQuery { entity: Some("vm/1,".repeat(65)), ..Default::default() };
    assert_eq!(EventFilter::of(&many), Err(FilterError::TooMany));
}

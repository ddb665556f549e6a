//! Bodies of the API: whatever is accepted is decided without a panic.
#![no_main]

use hostd_api::vm::VmCreate;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmStart;
use hostd_api::vm::VmStop;
use libfuzzer_sys::fuzz_target;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;

fuzz_target!(|data: &[u8]| {
    let _ = serde_json::from_slice::<VmPatch>(data);
    let _ = serde_json::from_slice::<VmStart>(data);
    let _ = serde_json::from_slice::<VmStop>(data);
    let _ = serde_json::from_slice::<hostd_api::token::TokenCreate>(data);
    let _ = serde_json::from_slice::<hostd_api::site::InitRequest>(data);
    let _ = serde_json::from_slice::<hostd_api::event::EventsQuery>(data);
    let Ok(create) = serde_json::from_slice::<VmCreate>(data) else { return };
    let VmCreate { name, cluster, run_strategy, spec } = create;
    let command = Command::VmDefine { name, cluster, spec: spec.into_spec(), run_strategy };
    let request = Request { actor: Actor::Root(HostId(1)), origin: HostId(1), idempotency: None, command };
    let _ = Fold::default().decide(&request, 1);
});

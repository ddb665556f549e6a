//! What another host sends: frames of requests and answers, heartbeats and grants.
#![no_main]

use bytes::Bytes;
use consensus::transport::frame;
use consensus::transport::frame::RequestFrame;
use hostd::grants::wire::GrantAnswer;
use hostd::grants::wire::Heartbeat;
use libfuzzer_sys::fuzz_target;
use statemachine::HostId;

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(request) = RequestFrame::decode(bytes.clone()) {
        assert!(RequestFrame::decode(Bytes::from(request.encode())).is_ok(), "a frame survives being written");
    }
    let _ = frame::decode_response(HostId(1), bytes);
    if let Ok(heartbeat) = Heartbeat::decode(data) {
        assert_eq!(Heartbeat::decode(&heartbeat.encode()), Ok(heartbeat));
    }
    if let Ok(answer) = GrantAnswer::decode(data) {
        assert_eq!(GrantAnswer::decode(&answer.encode()), Ok(answer));
    }
});

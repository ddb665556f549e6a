//! A batch of events, as it comes out of the log or from a peer: read or refused, and what is read is written back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use statemachine::Fold;
use statemachine::batch::SealedBatch;
use statemachine::codec;
use statemachine::codec::RecordKind;

fn take(sealed: &SealedBatch) {
    let _ = sealed.previous();
    if let Ok(batch) = sealed.open() {
        let again = batch.seal();
        assert_eq!(again.open().as_ref(), Ok(&batch), "a batch survives being written");
    }
    let _ = Fold::default().apply_sealed(sealed);
}

fuzz_target!(|data: &[u8]| {
    take(&SealedBatch::from_bytes(data.to_vec()));
    // Past the checksum, where random bytes rarely get.
    if data.len() <= codec::MAX_PAYLOAD {
        take(&SealedBatch::from_bytes(codec::seal(RecordKind::Batch, data)));
    }
});

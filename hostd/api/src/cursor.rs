//! Where a reader of the event stream stands: (site, seq, position), written as an opaque text (DESIGN §10).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::Serialize;
use statemachine::Seq;
use statemachine::SiteId;
use thiserror::Error;
use uuid::Uuid;

const PREFIX: &str = "qrc1.";
const CHECKSUM_LEN: usize = 4;
const FIELDS_LEN: usize = 16 + 8 + 4;

/// Everything up to and including event `position` of batch `seq` was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    pub site: SiteId,
    pub seq: Seq,
    /// Index of the event in its batch; [`Cursor::WHOLE_BATCH`] when nothing of the batch is left.
    pub position: u32,
}

impl Cursor {
    pub const WHOLE_BATCH: u32 = u32::MAX;

    /// All of batch `seq`, and so all before it, was delivered. `after_batch(site, Seq::ZERO)` is before everything.
    pub fn after_batch(site: SiteId, seq: Seq) -> Cursor {
        Cursor { site, seq, position: Self::WHOLE_BATCH }
    }

    /// Is event `position` of batch `seq` still to be delivered?
    pub fn precedes(&self, seq: Seq, position: u32) -> bool {
        (self.seq, self.position) < (seq, position)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "this is not a cursor, or a part of it is missing; pass a cursor as the stream gave it, or `from=oldest`, `from=now`, `from=state`"
)]
pub struct CursorError;

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(FIELDS_LEN + CHECKSUM_LEN);
        bytes.extend_from_slice(self.site.0.as_bytes());
        bytes.extend_from_slice(&self.seq.0.to_be_bytes());
        bytes.extend_from_slice(&self.position.to_be_bytes());
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Cursor {
    type Err = CursorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // 43 characters after the prefix; anything much longer is not decoded at all.
        let body = text.strip_prefix(PREFIX).filter(|body| body.len() <= 64).ok_or(CursorError)?;
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| CursorError)?;
        let (fields, sum) = bytes.split_at_checked(FIELDS_LEN).ok_or(CursorError)?;
        if sum != checksum(fields) {
            return Err(CursorError);
        }
        let (site, rest) = fields.split_first_chunk::<16>().ok_or(CursorError)?;
        let (seq, rest) = rest.split_first_chunk::<8>().ok_or(CursorError)?;
        let position = rest.first_chunk::<4>().ok_or(CursorError)?;
        Ok(Cursor {
            site: SiteId(Uuid::from_bytes(*site)),
            seq: Seq(u64::from_be_bytes(*seq)),
            position: u32::from_be_bytes(*position),
        })
    }
}

fn checksum(fields: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut sum = [0; CHECKSUM_LEN];
    sum.copy_from_slice(&blake3::hash(fields).as_bytes()[..CHECKSUM_LEN]);
    sum
}

impl Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_altered_or_shortened_cursor_is_refused_and_never_points_elsewhere() {
        let text = Cursor { site: SiteId(Uuid::from_u128(3)), seq: Seq(70_000), position: 2 }.to_string();
        for at in 0..text.len() {
            let mut altered: Vec<u8> = text.bytes().collect();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(String::from_utf8(altered).unwrap().parse::<Cursor>(), Err(CursorError), "character {at}");
            assert_eq!(text[..at].parse::<Cursor>(), Err(CursorError), "length {at}");
        }
        assert_eq!(format!("{text}A").parse::<Cursor>(), Err(CursorError));
    }

    #[test]
    fn a_cursor_in_the_middle_of_a_batch_leaves_the_rest_of_it() {
        let cursor = Cursor { site: SiteId::default(), seq: Seq(5), position: 1 };
        assert!(!cursor.precedes(Seq(5), 0) && !cursor.precedes(Seq(5), 1));
        assert!(cursor.precedes(Seq(5), 2) && cursor.precedes(Seq(6), 0));
        assert!(Cursor::after_batch(SiteId::default(), Seq::ZERO).precedes(Seq(1), 0));
        assert!(!Cursor::after_batch(SiteId::default(), Seq(5)).precedes(Seq(5), 9));
    }

    proptest! {
        #[test]
        fn a_cursor_is_read_back_as_it_was_written(site: u128, seq: u64, position: u32) {
            let cursor = Cursor { site: SiteId(Uuid::from_u128(site)), seq: Seq(seq), position };
            prop_assert_eq!(cursor.to_string().parse::<Cursor>(), Ok(cursor));
        }
    }
}

//! Stamps of the log (milliseconds since the Unix epoch) as times for people.

use jiff::Timestamp;

/// A stamp beyond what a calendar can say becomes the last moment that it can.
pub fn of_ms(ms: u64) -> Timestamp {
    i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).unwrap_or(Timestamp::MAX)
}

//! Small parts of tables that several resources share.

use jiff::SignedDuration;
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A moment on the reader's own calendar.
pub fn moment(at: Timestamp) -> String {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// How far a moment is away: `in 2h 59m`, `5m ago`, at most two units.
pub fn distance(at: Timestamp, now: Timestamp) -> String {
    let seconds = at.as_second().saturating_sub(now.as_second());
    let text = two_units(seconds.unsigned_abs());
    match seconds {
        0 => "now".to_owned(),
        1.. => format!("in {text}"),
        _ => format!("{text} ago"),
    }
}

fn two_units(seconds: u64) -> String {
    let days = seconds / 86_400;
    let kept = match seconds {
        0..3600 => seconds,
        3600..86_400 => seconds / 60 * 60,
        _ => seconds / 3600 * 3600,
    };
    let rest = i64::try_from(kept % 86_400).unwrap_or_default();
    let below_a_day = format!("{:#}", SignedDuration::from_secs(rest));
    match (days, rest) {
        (0, _) => below_a_day,
        (days, 0) => format!("{days}d"),
        (days, _) => format!("{days}d {below_a_day}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_have_at_most_two_units() {
        let now = Timestamp::from_second(1_000_000_000).unwrap();
        let away = |seconds: i64| distance(Timestamp::from_second(1_000_000_000 + seconds).unwrap(), now);
        assert_eq!(away(0), "now");
        assert_eq!(away(10_799), "in 2h 59m");
        assert_eq!(away(-65), "1m 5s ago");
        assert_eq!(away(-30), "30s ago");
        assert_eq!(away(2_592_000 + 4000), "in 30d 1h");
        assert_eq!(away(86_400), "in 1d");
    }
}

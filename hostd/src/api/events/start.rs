//! Where a reader begins, or why it cannot.

use std::time::Duration;

use hostd_api::Cursor;
use hostd_api::Problem;
use hostd_api::event::EventsQuery;
use hostd_api::event::StartFrom;
use hostd_api::problem::Code;
use statemachine::Seq;
use statemachine::SiteId;

use super::Source;
use super::rendered::Rendered;

/// A cursor from another host may be ahead of this one for a moment.
const CATCH_UP: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    pub after: Cursor,
    /// First the state as it is, then live.
    pub with_state: bool,
}

pub async fn resolve<S: Source>(
    query: &EventsQuery,
    last_event_id: Option<&str>,
    site: SiteId,
    source: &Rendered<S>,
) -> Result<Begin, Problem> {
    // A browser that reconnects repeats its URL, so the header is the newer word.
    let (after, from) = match (last_event_id, &query.after) {
        (Some(id), _) => (Some(id), None),
        (None, Some(_)) if query.from.is_some() => {
            return Err(Problem::new(Code::BadRequest, "`after` and `from` both say where to begin").action("send one"));
        }
        (None, after) => (after.as_deref(), query.from),
    };
    let Some(after) = after else {
        let seq = match from.unwrap_or(StartFrom::Now) {
            StartFrom::Oldest => Seq(source.oldest().0.saturating_sub(1)),
            StartFrom::Now | StartFrom::State => source.head(),
        };
        return Ok(Begin { after: Cursor::after_batch(site, seq), with_state: from == Some(StartFrom::State) });
    };
    let cursor: Cursor = after
        .parse()
        .map_err(|error: hostd_api::cursor::CursorError| Problem::new(Code::BadRequest, error.to_string()))?;
    wait_until_reached(cursor, source).await;
    check(cursor, site, source.oldest(), source.head())?;
    Ok(Begin { after: cursor, with_state: false })
}

async fn wait_until_reached<S: Source>(cursor: Cursor, source: &Rendered<S>) {
    let mut head = source.watch_head();
    let reached = head.wait_for(|head| *head >= cursor.seq);
    // Late or never: `check` says it in words.
    let _ = tokio::time::timeout(CATCH_UP, reached).await;
}

/// Is everything behind the cursor here?
pub fn check(cursor: Cursor, site: SiteId, oldest: Seq, head: Seq) -> Result<(), Problem> {
    if cursor.site != site {
        let words = format!("the cursor is of site {}, and this host belongs to site {site}", cursor.site);
        return Err(
            Problem::new(Code::CursorForeign, words).action("begin with `from=oldest`, `from=state` or `from=now`")
        );
    }
    if cursor.seq > head {
        let words = format!("the cursor is at seq {}, and this host is at seq {head}", cursor.seq);
        let action = "ask again, or another host; if every host says this, the site was restored to an older state, and the reader must begin anew";
        return Err(Problem::new(Code::CursorFuture, words).action(action).at(Cursor::after_batch(site, head)));
    }
    let needed = match cursor.position {
        Cursor::WHOLE_BATCH => cursor.seq.next(),
        _ => cursor.seq,
    };
    if needed < oldest {
        return Err(trimmed(site, oldest));
    }
    Ok(())
}

pub fn trimmed(site: SiteId, oldest: Seq) -> Problem {
    let before = Cursor::after_batch(site, Seq(oldest.0.saturating_sub(1)));
    let words = format!("the events behind this cursor are trimmed; the oldest kept is of seq {oldest}");
    Problem::new(Code::CursorTrimmed, words)
        .action("go on with the `cursor` of this answer, or begin with `from=state` to miss nothing that still is")
        .at(before)
}

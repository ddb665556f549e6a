//! `--wait`: look again until it is so, with a spinner for people who watch.

use std::future::Future;
use std::time::Duration;

use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use tokio::time::Instant;
use tools::client::ClientError;

use crate::args::Wait;
use crate::exit::Failure;

const LOOK_EVERY: Duration = Duration::from_millis(300);

/// What one look found.
pub enum Look<T> {
    Done(T),
    /// Not yet; what it is doing, in a few words.
    NotYet(String),
    /// It will not come: why.
    Never(String),
}

/// Looks until done. A host that restarts or a leader that changes meanwhile is waited out like everything else.
pub async fn until<T, F>(wait: Wait, what: &str, mut look: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<Look<T>, ClientError>>,
{
    let deadline = Instant::now() + wait.timeout;
    let spinner = spinner(what);
    loop {
        let doing = match look().await {
            Ok(Look::Done(found)) => return Ok(found),
            Ok(Look::Never(why)) => return Err(Failure::CameDifferently(why)),
            Ok(Look::NotYet(doing)) => doing,
            Err(error) if error.is_transient() || error.is_unreachable() => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        if Instant::now() + LOOK_EVERY > deadline {
            let limit = humane(wait.timeout);
            let why = format!("gave up on {what} after {limit}: {doing}; what was asked for goes on");
            return Err(Failure::WaitedTooLong(why));
        }
        spinner.set_message(doing);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Draws on stderr, and only on a terminal.
fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed}: {msg}") {
        spinner.set_style(style);
    }
    spinner.set_prefix(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

pub fn humane(duration: Duration) -> String {
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    format!("{:#}", jiff::SignedDuration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn patience(milliseconds: u64) -> Wait {
        Wait { wait: true, timeout: Duration::from_millis(milliseconds) }
    }

    #[tokio::test]
    async fn it_looks_until_it_is_so() {
        let looks = Cell::new(0);
        let found = until(patience(60_000), "web1", || async {
            looks.set(looks.get() + 1);
            Ok(if looks.get() == 2 { Look::Done("Up") } else { Look::NotYet("PoweringUp".into()) })
        });
        assert_eq!(found.await.unwrap(), "Up");
        assert_eq!(looks.get(), 2);
    }

    #[tokio::test]
    async fn it_gives_up_with_its_own_exit_code_and_says_what_it_saw_last() {
        let late = until::<(), _>(patience(1_000), "vm web1", || async { Ok(Look::NotYet("PoweringUp".into())) });
        let failure = late.await.unwrap_err();
        assert_eq!(failure.code(), 5);
        assert!(failure.to_string().contains("PoweringUp") && failure.to_string().contains("1s"), "{failure}");
    }

    #[tokio::test]
    async fn what_cannot_come_any_more_ends_the_wait_at_once() {
        let never = until::<(), _>(patience(60_000), "vm web1", || async { Ok(Look::Never("it ended".into())) });
        assert_eq!(never.await.unwrap_err().code(), 1);
    }
}

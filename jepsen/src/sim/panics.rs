//! A task that panics dies silently in tokio; here it is a violation.

use std::cell::RefCell;
use std::panic;
use std::sync::Once;

thread_local! {
    static SEEN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From here on panics of this process are remembered by the thread that had them, and not printed.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if tokio::runtime::Handle::try_current().is_err() {
                // Not a simulated host's: the simulator's own, or a test's.
                before(info);
                return;
            }
            SEEN.with_borrow_mut(|seen| _ = seen.get_or_insert_with(|| info.to_string()));
        }));
    });
    SEEN.take();
}

pub fn take() -> Option<String> {
    SEEN.take()
}

//! Turns panics of libraries on bad input into errors.
//!
//! For readers of files that others wrote, never for code of this program: a panic there is a bug that must
//! be visible.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Is this thread inside [`refuse_panics`]?
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Run `read`, which reads a file with a library that panics on some damaged ones; nothing is printed of such
/// a panic.
///
/// # Errors
/// It panicked: what it said.
pub fn refuse_panics<T>(read: impl FnOnce() -> T) -> io::Result<T> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                hook(info);
            }
        }));
    });
    let before = EXPECTED.replace(true);
    // What `read` had opened is dropped, and nothing of it is used again.
    let outcome = panic::catch_unwind(AssertUnwindSafe(read));
    EXPECTED.set(before);
    outcome.map_err(|payload| io::Error::other(format!("its reader gave up: {}", text(&*payload))))
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it did not say why")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_and_values_stay() {
        assert_eq!(refuse_panics(|| 3).unwrap(), 3);
        let said = refuse_panics(|| -> u8 { panic!("a field is absent") }).unwrap_err().to_string();
        assert_eq!(said, "its reader gave up: a field is absent");
        assert!(!EXPECTED.get(), "panics of others are printed again");
    }
}

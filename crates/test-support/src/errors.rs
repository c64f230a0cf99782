//! What an error says, and checks of it.

use pkv_core::Hinted;

/// The error's chain in one line, and its first hint; empty without one.
pub fn text_and_hint(error: &anyhow::Error) -> (String, String) {
    let hint = error.downcast_ref::<Hinted>().or_else(|| error.chain().find_map(|e| e.downcast_ref()));
    (format!("{error:#}"), hint.map(|h| h.hint().to_owned()).unwrap_or_default())
}

/// The chain of an error must hold all of `parts`, and a hint.
#[track_caller]
pub fn assert_error<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("expected an error with {parts:?}") };
    let (text, hint) = text_and_hint(&error);
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert!(!hint.is_empty(), "no hint with: {text}");
}

/// The chain of an error must hold `part`.
#[track_caller]
pub fn assert_error_text<T>(result: anyhow::Result<T>, part: &str) {
    let Err(error) = result else { panic!("expected an error with `{part}`") };
    let text = format!("{error:#}");
    assert!(text.contains(part), "`{part}` is not in: {text}");
}

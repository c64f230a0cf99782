//! Error messages for invalid JSON files, with the place and the repair.

use serde::de::DeserializeOwned;

use crate::{Hinted, hinted};

/// `text` as JSON.
///
/// # Errors
/// It is none; `hint` is the repair, unless the mistake is one that has its own.
pub fn parse_json<T: DeserializeOwned>(text: &str, hint: &str) -> Result<T, Hinted> {
    serde_json::from_str(text).map_err(|e| match lone_surrogate(text) {
        Some(escape) => hinted(
            format!("`{escape}` is half of a character (a lone surrogate)"),
            "replace the escape by `\\ufffd`: a program cut the text in the middle of a character",
        ),
        None if text.trim().is_empty() => hinted("it is empty", hint),
        None => not_json(text, &e).unwrap_or_else(|| hinted(format!("it is no JSON: {e}"), hint)),
    })
}

/// The error for a number that JSON does not have, or for Python, where JSON was expected.
fn not_json(text: &str, e: &serde_json::Error) -> Option<Hinted> {
    let line = text.lines().nth(e.line().checked_sub(1)?)?;
    let is_of_word = |b: &u8| b.is_ascii_alphabetic() || b"-'".contains(b);
    let at = e.column().checked_sub(1)?.min(line.len());
    let (before, after) = line.as_bytes().split_at(at);
    let start = before.iter().rposition(|b| !is_of_word(b)).map_or(0, |i| i + 1);
    let end = at + after.iter().position(|b| !is_of_word(b)).unwrap_or(after.len());
    let word = line.get(start..end)?;
    Some(match word.trim_start_matches('-').to_ascii_lowercase().as_str() {
        "nan" | "infinity" | "inf" => hinted(
            format!("`{word}` is no number of JSON (line {}, column {})", e.line(), e.column()),
            "write `null` in its place: pandas' `to_json` does, and `json.dumps(..., allow_nan=False)` finds such numbers",
        ),
        "none" | "true" | "false" | "'" => python(word, e),
        quoted if quoted.starts_with('\'') => python(word, e),
        _ => return None,
    })
}

fn python(word: &str, e: &serde_json::Error) -> Hinted {
    hinted(
        format!("`{word}` is Python, not JSON (line {}, column {})", e.line(), e.column()),
        "write it with `json.dumps`, not with `str` or `print`",
    )
}

/// The kind of the value, for messages.
pub fn json_kind(value: &serde_json::Value) -> &'static str {
    use serde_json::Value;
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The first escape of a UTF-16 surrogate without its other half.
fn lone_surrogate(text: &str) -> Option<&str> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = 0;
    while let Some(found) = text[at..].find('\\') {
        at += found;
        at += match unit(at) {
            Some(0xd800..=0xdbff) if matches!(unit(at + 6), Some(0xdc00..=0xdfff)) => 12,
            Some(0xd800..=0xdfff) => return text.get(at..at + 6),
            // Another escape is a backslash and one more character.
            _ => 1 + text[at + 1..].chars().next().map_or(0, char::len_utf8),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn half_a_character_is_named() {
        for (text, escape) in [
            (r#"{"text": "a \ud83d b"}"#, r"\ud83d"),
            (r#"{"text": "\ud83d\ude00 \ude00"}"#, r"\ude00"),
            (r#"{"text": "\ud83d"}"#, r"\ud83d"),
            (r#"{"text": "\\ud83d \uD83D\n"}"#, r"\uD83D"),
        ] {
            let error = parse_json::<Value>(text, "").unwrap_err();
            assert_eq!(error.to_string(), format!("`{escape}` is half of a character (a lone surrogate)"));
            assert!(error.hint().contains("ufffd"));
        }
        let whole = parse_json::<Value>(r#"{"text": "\\ud83d \ud83d\ude00"}"#, "").unwrap();
        assert_eq!(whole["text"], "\\ud83d 😀");
    }

    #[test]
    fn numbers_that_json_has_not_and_python_are_named() {
        for (text, expected) in [
            ("{\"a\": NaN, \"b\": 1}", "`NaN` is no number of JSON (line 1, column 7)"),
            ("{\"a\": 1,\n \"b\": -Infinity}", "`-Infinity` is no number of JSON (line 2, column "),
            ("[nan]", "`nan` is no number of JSON"),
            ("{\"a\": None}", "`None` is Python, not JSON"),
            ("[True]", "`True` is Python, not JSON"),
            ("{'a': 1}", "`'a'` is Python, not JSON"),
        ] {
            let error = parse_json::<Value>(text, "write it").unwrap_err();
            assert!(error.to_string().starts_with(expected), "{text}: {error}");
            assert!(error.hint().contains("json.dumps"), "{error}");
        }
        for text in ["{\"NaN\": }", "[nul]", "[truth]", "{a: 1}", "[-]", "{\"é\": }", "[1 2]"] {
            let error = parse_json::<Value>(text, "write it").unwrap_err();
            assert!(error.to_string().starts_with("it is no JSON"), "{text}: {error}");
        }
    }

    #[test]
    fn other_mistakes_have_the_callers_hint() {
        for (text, expected) in
            [("", "it is empty"), (" \n", "it is empty"), ("{\"a\": ", "it is no JSON: EOF")]
        {
            let error = parse_json::<Value>(text, "write it").unwrap_err();
            assert!(error.to_string().starts_with(expected) && error.hint() == "write it", "{error}");
        }
        assert!(parse_json::<Value>("\"é\\", "x").is_err());
    }
}

//! Escaping of untrusted text before it is shown: names, licences, documents and file names may contain
//! control characters or markup.
//!
//! Used for stdout, stderr, the model card and the report. Stored data is not changed.

use std::borrow::Cow;
use std::fmt::Write;

/// `text` without characters that a terminal obeys or that reorder what is read: each is spelt out as
/// `\\u001b`, as in JSON. Line ends and tabs stay.
pub fn neutral(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_unsafe(c) {
            // Writing to a string cannot fail.
            true => drop(write!(out, "\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// `text` as prose of a Markdown page: one line, no HTML, no link, no image, no code.
pub fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in one_line(text).chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '&' => out.push_str("&amp;"),
            '[' | ']' | '`' | '\\' => out.extend(['\\', c]),
            _ => out.push(c),
        }
    }
    out
}

/// `text` as code of a Markdown page, which it cannot end.
pub fn markdown_code(text: &str) -> String {
    format!("`{}`", one_line(text).replace('`', "'"))
}

/// Words of a server, fit for a terminal: one line without control characters, of at most 300 letters and
/// three dots.
pub fn short_line(text: &str) -> String {
    const LONGEST: usize = 300;
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let plain = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    match plain.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &plain[..end]),
        None => plain,
    }
}

fn one_line(text: &str) -> String {
    neutral(text).replace(['\n', '\t'], " ")
}

/// Control characters (those of a terminal, C0, DEL and C1) and the marks that change the direction of what
/// follows.
fn is_unsafe(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_server_are_one_short_line() {
        assert_eq!(short_line("a\u{1b}[31m\r\n  b"), "a [31m b");
        assert_eq!(short_line(&"ä".repeat(1000)).chars().count(), 303);
    }

    #[test]
    fn what_a_terminal_obeys_is_spelt_out() {
        let text = "a\tb\n\u{1b}[31mred\u{9b}2J\u{7}\r\u{202e}é😀";
        assert_eq!(neutral(text), "a\tb\n\\u001b[31mred\\u009b2J\\u0007\\u000d\\u202eé😀");
        assert!(matches!(neutral("plain\ntext"), Cow::Borrowed(_)));
    }

    #[test]
    fn markup_of_others_is_text_in_markdown() {
        assert_eq!(markdown("<b>&\n[x](y)`z`"), "&lt;b>&amp; \\[x\\](y)\\`z\\`");
        assert_eq!(markdown_code("a`<b>\u{1b}"), "`a'<b>\\u001b`");
        assert_eq!(markdown("Apache-2.0, see the file"), "Apache-2.0, see the file");
    }
}

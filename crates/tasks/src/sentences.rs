//! English prose into sentences, where RULER puts needles between them.

/// Sentences of `text`, which has single spaces: a sentence ends with `.`, `!` or `?` (and closing quotes or
/// brackets) before a space and a capital, a digit or an opening quote.
///
/// The reference uses NLTK's trained splitter, which also knows abbreviations; a needle after `Mr.` does
/// no harm.
pub fn split(text: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices(' ') {
        let before = text[start..at].trim_end_matches(['"', '\'', ')', ']', '”', '’']);
        let ends = before.ends_with(['.', '!', '?']);
        let begins = text[at + 1..].chars().next().is_some_and(|c| {
            c.is_uppercase() || c.is_ascii_digit() || matches!(c, '"' | '\'' | '(' | '[' | '“' | '‘')
        });
        if ends && begins {
            sentences.push(&text[start..at]);
            start = at + 1;
        }
    }
    if start < text.len() {
        sentences.push(&text[start..]);
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_join_to_the_text() {
        let text = "It cost 3.5 dollars. \"Really?\" he said. (Yes!) And so on... 5 more. the end";
        let split = split(text);
        assert_eq!(
            split,
            ["It cost 3.5 dollars.", "\"Really?\" he said.", "(Yes!)", "And so on...", "5 more. the end"]
        );
        assert_eq!(split.join(" "), text);
        assert!(super::split("").is_empty());
    }
}

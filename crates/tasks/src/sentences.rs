//! English prose into sentences, where RULER puts needles between them.

use pkv_core::sentence_gaps;

/// Sentences of `text`, which has single spaces.
///
/// Differs: the reference uses NLTK's trained splitter; `pkv_core` goes by marks, capitals and common
/// abbreviations.
pub fn split(text: &str) -> Vec<&str> {
    let gaps = sentence_gaps(text);
    let starts = std::iter::once(0).chain(gaps.iter().map(|g| g.end));
    let ends = gaps.iter().map(|g| g.start).chain(std::iter::once(text.len()));
    starts.zip(ends).map(|(start, end)| &text[start..end]).filter(|sentence| !sentence.is_empty()).collect()
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
        assert_eq!(super::split("Ask Mr. Smith in the U.S. Army."), ["Ask Mr. Smith in the U.S. Army."]);
    }
}

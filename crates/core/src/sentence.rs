//! Sentence boundaries, where other text can be inserted.
//!
//! A rule over punctuation and letters, not a trained splitter: a missed boundary costs nothing, because
//! there are many; a false one would split a sentence. Insertion is left to `data` and `tasks`.

use std::ops::Range;

/// Marks that end a sentence where white space follows.
const MARKS: [char; 9] = ['.', '!', '?', '…', '؟', '۔', '।', '॥', '։'];
/// Marks of scripts that write no space between sentences.
const WIDE_MARKS: [char; 6] = ['。', '！', '？', '．', '｡', '︒'];
/// What may close between a mark and the space.
const CLOSING: [char; 20] = [
    '"', '\'', ')', ']', '}', '”', '’', '»', '›', '*', '_', '`', '」', '』', '）', '】', '》', '〉', '］',
    '｝',
];
const OPENING: [char; 14] = ['"', '\'', '(', '[', '{', '“', '‘', '«', '¿', '¡', '*', '_', '`', '<'];
/// Words that end with a period inside a sentence, in small letters; single letters and `e.g.` are known by
/// their form.
const ABBREVIATIONS: [&str; 40] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "gen", "col", "lt", "sgt", "capt", "rev", "hon",
    "sen", "rep", "gov", "vs", "cf", "al", "fig", "figs", "eq", "eqs", "sec", "ch", "no", "nos", "vol", "pp",
    "ed", "approx", "ca", "inc", "ltd", "co", "corp", "dept", "mt",
];

/// The gap after every sentence of `text` that another one follows: its white space, which may be empty after
/// marks of Chinese and Japanese.
///
/// Ends of lines and of `text` are no ends of sentences by themselves.
///
/// ```
/// let text = "Mr. Ames left at 3.15 p.m. again. He came back.";
/// assert_eq!(pkv_core::sentence_gaps(text), [33..34]);
/// ```
pub fn sentence_gaps(text: &str) -> Vec<Range<usize>> {
    let mut gaps: Vec<Range<usize>> = Vec::new();
    for (at, mark) in text.char_indices() {
        let wide = WIDE_MARKS.contains(&mark);
        if !wide && !MARKS.contains(&mark) {
            continue;
        }
        let rest = &text[at + mark.len_utf8()..];
        let closed = rest.trim_start_matches(CLOSING);
        let start = text.len() - closed.len();
        let next = closed.trim_start();
        let end = text.len() - next.len();
        let Some(first) = next.chars().next() else { break };
        let follows = if wide {
            // Marks in a row: the last one ends the sentence.
            !WIDE_MARKS.contains(&first)
                && !MARKS.contains(&first)
                && !matches!(first, '，' | '、' | '；' | '：')
        } else {
            start < end && begins(first, &text[start..end]) && !(mark == '.' && abbreviates(&text[..at]))
        };
        if follows && gaps.last().is_none_or(|last| last.end < end) {
            gaps.push(start..end);
        }
    }
    gaps
}

/// Sentences of `text`, without the white space between them; one empty sentence if there is no text.
pub fn sentences(text: &str) -> impl Iterator<Item = &str> {
    let gaps = sentence_gaps(text);
    let starts = std::iter::once(0).chain(gaps.clone().into_iter().map(|gap| gap.end));
    let ends = gaps.into_iter().map(|gap| gap.start).chain(std::iter::once(text.len()));
    starts.zip(ends).map(|(start, end)| &text[start..end])
}

/// Whether a sentence may begin with `first` after `space`.
fn begins(first: char, space: &str) -> bool {
    let letter = first.is_alphanumeric() && !first.is_lowercase();
    // A new line may begin with a bullet or another sign.
    letter || OPENING.contains(&first) || (space.contains('\n') && !first.is_lowercase())
}

/// Whether a period after `before` belongs to its last word: an initial, an abbreviation, or the number of a
/// list.
fn abbreviates(before: &str) -> bool {
    let word = before.rsplit(|c: char| c.is_whitespace() || OPENING.contains(&c)).next().unwrap_or_default();
    let mut letters = word.chars();
    if matches!((letters.next(), letters.next()), (Some(c), None) if c.is_alphabetic() && c.is_ascii()) {
        return true;
    }
    // `e.g.`, `U.S.`: single letters with periods between.
    if word.contains('.')
        && word.split('.').all(|part| part.chars().count() == 1 && !part.contains(char::is_numeric))
    {
        return true;
    }
    let number = !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    let numbered = number
        && matches!(
            before[..before.len() - word.len()].trim_end_matches([' ', '\t']).chars().last(),
            None | Some('\n')
        );
    numbered || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    fn sentences(text: &str) -> Vec<&str> {
        super::sentences(text).collect()
    }

    #[test]
    fn sentences_end_with_marks_before_white_space() {
        for (text, expected) in [
            ("One. Two! Three? Four", &["One.", "Two!", "Three?", "Four"][..]),
            ("It cost 3.5 dollars. 5 were left.", &["It cost 3.5 dollars.", "5 were left."]),
            (
                "\"Really?\" he said. (Yes!) And so on... More",
                &["\"Really?\" he said.", "(Yes!)", "And so on...", "More"],
            ),
            ("the end.\n\nNext page. the same", &["the end.", "Next page. the same"]),
            ("One.\n- two. more\n- Three.", &["One.", "- two. more\n- Three."]),
            ("see a.b.c and file.Name.", &["see a.b.c and file.Name."]),
            ("Wrapped at\nthe line. Next", &["Wrapped at\nthe line.", "Next"]),
            ("", &[""]),
            ("No mark", &["No mark"]),
        ] {
            assert_eq!(sentences(text), expected, "{text}");
        }
    }

    #[test]
    fn abbreviations_and_numbers_end_nothing() {
        for text in [
            "Mr. Smith and Dr. Who met J. R. Tall",
            "Use e.g. Rust or i.e. It in the U.S. Army",
            "1. First\n2. Second\n 2.1. Third",
            "See Fig. 3 and vs. Others",
        ] {
            assert_eq!(sentences(text), [text]);
        }
        let text = "It cost 3.5 dollars. \"Really?\" he said. (Yes!) And so on... 5 more. the end";
        assert_eq!(sentences(text).join(" "), text);
        assert_eq!(sentences("It was 1999. Then"), ["It was 1999.", "Then"]);
    }

    #[test]
    fn scripts_without_spaces_have_sentences_too() {
        assert_eq!(sentences("今天下雨。我们走吧！好吗？好"), ["今天下雨。", "我们走吧！", "好吗？", "好"]);
        assert_eq!(sentences("他说：「好。」然后走了。\n完"), ["他说：「好。」", "然后走了。", "完"]);
        assert_eq!(sentences("什么？！真的"), ["什么？！", "真的"]);
        assert_eq!(sentences("यह है। वह है"), ["यह है।", "वह है"]);
    }
}

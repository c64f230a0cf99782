//! Places for facts in a context, and how they are spelt there so that the text reads on.
//!
//! Documents are cut by tokens, so a place is a boundary between two tokens. It is chosen by the decoded
//! text: after a sentence; where a context has no end of a sentence inside, after a line; where it has no
//! line either, after a word; and else after any character. The facts themselves come from `facts`.

use std::ops::Range;

use anyhow::Result;
use pkv_core::{Rng, sentence_gaps};
use rand::Rng as _;
use rand::seq::index;

use crate::tokens::Encode;

/// Token ids to text.
pub(crate) type Decode<'a> = dyn Fn(&[u32]) -> Result<String> + Sync + 'a;

/// A character takes no more tokens than it has bytes; what is no character by then is damaged text.
const TOKENS_OF_A_CHARACTER: usize = 4;

/// White space around a fact, by what is beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spacing {
    before: &'static str,
    after: &'static str,
}

/// Every spacing that a place may ask for.
pub(crate) const SPACINGS: [Spacing; 6] = [
    Spacing { before: " ", after: "" },
    Spacing { before: " ", after: " " },
    Spacing { before: "", after: "" },
    Spacing { before: "", after: " " },
    Spacing { before: "", after: "\n" },
    Spacing { before: "", after: "\n\n" },
];

/// A boundary between tokens where a fact may be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Tokens before it.
    pub at: usize,
    pub spacing: Spacing,
}

impl Spacing {
    pub fn around(self, sentence: &str) -> String {
        format!("{}{sentence}{}", self.before, self.after)
    }

    /// Between `before` and `after`. White space that the place already has before it is used, and written
    /// once more after the fact where none follows: a fact before a paragraph becomes a paragraph.
    fn between(before: &str, after: &str) -> Self {
        let had = &before[before.trim_end().len()..];
        let has = &after[..after.len() - after.trim_start().len()];
        let written = match had.matches('\n').count() {
            _ if has.contains('\n') => "",
            0 => " ",
            1 => "\n",
            _ => "\n\n",
        };
        match (had.is_empty(), has.is_empty()) {
            (true, false) => Self { before: " ", after: "" },
            (true, true) => Self { before: " ", after: " " },
            (false, _) => Self { before: "", after: written },
        }
    }
}

/// `count` of the places inside `tokens`, before token `end` at the latest, in order of position: all
/// different while there are as many.
///
/// # Errors
/// The tokens cannot be decoded.
pub(crate) fn draw(
    rng: &mut Rng,
    tokens: &[u32],
    end: usize,
    count: usize,
    decode: &Decode,
) -> Result<Vec<Place>> {
    let mut all = places(tokens, end, decode)?;
    if all.is_empty() {
        // No boundary between two characters: any between two tokens.
        let spacing = Spacing { before: " ", after: "" };
        all.extend((usize::from(end > 1)..end.max(1)).map(|at| Place { at, spacing }));
    }
    let mut chosen: Vec<usize> = index::sample(rng, all.len(), count.min(all.len())).into_vec();
    chosen.extend((chosen.len()..count).map(|_| rng.random_range(0..all.len())));
    chosen.sort_unstable();
    Ok(chosen.into_iter().map(|i| all[i]).collect())
}

/// The places of the best kind that `tokens` have inside before `end`; none at the beginning.
fn places(tokens: &[u32], end: usize, decode: &Decode) -> Result<Vec<Place>> {
    let (text, boundaries) = spell(tokens, decode)?;
    let of = |gaps: Vec<Range<usize>>| -> Vec<Place> {
        gaps.into_iter().filter_map(|gap| place(&text, &boundaries, gap)).filter(|p| p.at < end).collect()
    };
    let spaces = || {
        let words = text.split_whitespace().map(|w| {
            let start = w.as_ptr() as usize - text.as_ptr() as usize;
            start..start + w.len()
        });
        let words: Vec<_> = words.collect();
        words.windows(2).map(|w| w[0].end..w[1].start).collect::<Vec<_>>()
    };
    let mut found = of(sentence_gaps(&text));
    if found.is_empty() {
        found = of(spaces().into_iter().filter(|gap| text[gap.clone()].contains('\n')).collect());
    }
    if found.is_empty() {
        found = of(spaces());
    }
    if found.is_empty() {
        found = of(boundaries.iter().map(|&(byte, _)| byte..byte).collect());
    }
    Ok(found)
}

/// The boundary inside `gap` where a fact reads best: right after the text before it where white space
/// follows, so that the text after keeps its own; else right before the text after it; else wherever one is.
fn place(text: &str, boundaries: &[(usize, usize)], gap: Range<usize>) -> Option<Place> {
    let from = boundaries.partition_point(|&(byte, _)| byte < gap.start);
    let inside = boundaries[from..].iter().take_while(|&&(byte, _)| byte <= gap.end);
    let (byte, at) = *inside.clone().find(|&&(byte, _)| byte == gap.start).or_else(|| inside.last())?;
    Some(Place { at, spacing: Spacing::between(&text[..byte], &text[byte..]) })
}

/// The text of `tokens`, and the boundaries between two of them that lie between two characters: byte and
/// token.
///
/// A character may need several tokens, and a token's text may depend on the one before it.
fn spell(tokens: &[u32], decode: &Decode) -> Result<(String, Vec<(usize, usize)>)> {
    let mut text = String::new();
    let mut boundaries = Vec::new();
    // Tokens before `done` are in the text; those from `from` on are decoded for what comes next.
    let (mut from, mut done) = (0, 0);
    for i in 1..=tokens.len() {
        let all = decode(&tokens[from..i])?;
        if all.ends_with('\u{fffd}') && i < tokens.len() && i - done < TOKENS_OF_A_CHARACTER {
            continue;
        }
        let before = decode(&tokens[from..done])?;
        text.push_str(all.get(before.len()..).unwrap_or_default());
        (from, done) = (done, i);
        if i < tokens.len() && !all.ends_with('\u{fffd}') {
            boundaries.push((text.len(), i));
        }
    }
    Ok((text, boundaries))
}

/// The tokens of `text` where it follows `before`.
///
/// Some tokenizers put a space of their own before whatever they encode; there the text without its space is
/// what fits.
///
/// # Errors
/// The tokenizer fails.
pub(crate) fn encode_after(before: u32, text: &str, encode: &Encode, decode: &Decode) -> Result<Vec<u32>> {
    let as_it_is = encode(text)?;
    let context = decode(&[before])?;
    for tokens in [as_it_is.clone(), encode(text.trim_start())?] {
        let whole = decode(&[&[before], &tokens[..]].concat())?;
        if whole.strip_prefix(context.as_str()) == Some(text) {
            return Ok(tokens);
        }
    }
    Ok(as_it_is)
}

#[cfg(test)]
mod tests {
    use pkv_core::Seed;

    use super::*;

    /// A token per byte: characters of several tokens, and boundaries everywhere.
    fn bytes(text: &str) -> Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn text_of_bytes(tokens: &[u32]) -> Result<String> {
        let bytes: Vec<u8> = tokens.iter().map(|&t| t as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The text with a bar at every place, and the spacings of a fact `F.` there.
    fn marked(text: &str) -> (String, Vec<String>) {
        let tokens = bytes(text).unwrap();
        let places = places(&tokens, tokens.len(), &text_of_bytes).unwrap();
        let mut out = text.to_owned();
        for place in places.iter().rev() {
            out.insert(place.at, '|');
        }
        (out, places.iter().map(|p| p.spacing.around("F.")).collect())
    }

    #[test]
    fn places_are_after_sentences_or_else_lines_or_else_words() {
        for (text, expected, spelt) in [
            ("art. One two. Three! fo", "art.| One two.| Three! fo", &[" F.", " F."][..]),
            ("One.\n\nTwo.\nThree", "One.|\n\nTwo.|\nThree", &[" F.", " F."]),
            ("一。二。三", "一。|二。|三", &[" F. ", " F. "]),
            ("a line\nand Mr. Who", "a line|\nand Mr. Who", &[" F."]),
            ("just some words", "just| some| words", &[" F.", " F."]),
            ("天地玄", "天|地|玄", &[" F. ", " F. "]),
        ] {
            assert_eq!(marked(text), (expected.to_owned(), spelt.iter().map(|s| (*s).to_owned()).collect()));
        }
    }

    #[test]
    fn white_space_before_a_fact_is_written_again_after_it() {
        for (before, after, expected) in [
            ("One.", " Two", " F."),
            ("One.\n\n", "Two", "F.\n\n"),
            ("One.\n", "Two", "F.\n"),
            ("One.\n\n", "    code", "F.\n\n"),
            ("One. ", "Two", "F. "),
            ("One. ", "\nTwo", "F."),
            ("一。", "二", " F. "),
        ] {
            assert_eq!(Spacing::between(before, after).around("F."), expected, "{before:?} {after:?}");
            assert!(SPACINGS.contains(&Spacing::between(before, after)));
        }
    }

    #[test]
    fn facts_stand_apart_while_there_are_places() {
        let tokens = bytes("One. Two. Three. Four. Five. Six").unwrap();
        for seed in 0..50 {
            let mut rng = Seed(seed).stream("places", 0);
            let mut at = |end, count| -> Vec<usize> {
                let drawn = draw(&mut rng, &tokens, end, count, &text_of_bytes).unwrap();
                drawn.iter().map(|p| p.at).collect()
            };
            assert_eq!(at(tokens.len(), 5), [4, 9, 16, 22, 28]);
            assert!(at(tokens.len(), 3).is_sorted_by(|a, b| a < b));
            // More facts than places, and the places before token 10 alone.
            let crowded = at(10, 7);
            assert!(
                crowded.len() == 7 && crowded.is_sorted() && crowded.contains(&4) && crowded.contains(&9)
            );
        }
        let mut rng = Seed(1).stream("places", 0);
        assert_eq!(draw(&mut rng, &[], 0, 1, &text_of_bytes).unwrap()[0].at, 0);
        assert_eq!(draw(&mut rng, &[0xff, 0xff], 2, 1, &text_of_bytes).unwrap()[0].at, 1);
    }

    #[test]
    fn characters_of_several_tokens_stay_whole() {
        let (text, boundaries) = spell(&bytes("aé🤝 b").unwrap(), &text_of_bytes).unwrap();
        assert_eq!((text.as_str(), boundaries), ("aé🤝 b", vec![(1, 1), (3, 3), (7, 7), (8, 8)]));
        // A window may begin and end inside a character.
        let cut = bytes("🤝ab🤝").unwrap();
        let (_, boundaries) = spell(&cut[2..8], &text_of_bytes).unwrap();
        assert_eq!(boundaries.iter().map(|b| b.1).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn a_tokenizer_that_adds_a_space_is_given_none() {
        let adding = |text: &str| bytes(&format!(" {text}"));
        let spelt = |text| encode_after(46, text, &adding, &text_of_bytes).unwrap();
        assert_eq!(spelt(" F."), bytes(" F.").unwrap());
        assert_eq!(encode_after(46, " F.", &bytes, &text_of_bytes).unwrap(), bytes(" F.").unwrap());
    }
}

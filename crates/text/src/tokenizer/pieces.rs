//! Where a long text may be cut so that its pieces have the tokens of the whole: encoding a text of 20 MB at
//! once takes 2.6 GB.
//!
//! A tokenizer decides by what is near, but what is near differs from one to the next: blanks before a word,
//! runs of line ends, special tokens that take the blanks around them. So a cut is not derived from the
//! rules; it is tried on the text around it.

use std::ops::Range;

use anyhow::Result;

/// Bytes of a piece, and of the part after it that is searched for a cut.
pub(super) const PIECE: usize = 256 << 10;

/// Bytes on each side of a cut that it is tried with. Several, of no common factor: in a long run of one
/// character the tokens depend on where the run begins, and one length alone could fit by chance.
const AROUND: [usize; 4] = [127, 509, 1021, 1024];

/// Places that are tried in each part of a text.
const TRIES: usize = 8;

/// The pieces of `text`, of about `piece` bytes or, where it cannot be cut, more. `encode` gives the tokens
/// of a text.
///
/// # Errors
/// `encode` fails.
pub(super) fn pieces(
    text: &str,
    piece: usize,
    encode: impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<Vec<Range<usize>>> {
    let (mut pieces, mut start, mut from) = (Vec::new(), 0, piece);
    while from + piece < text.len() {
        let part = boundary(text, from)..boundary(text, from + piece);
        match cut(text, part, &encode)? {
            Some(at) => {
                pieces.push(start..at);
                (start, from) = (at, at + piece);
            }
            None => from += piece,
        }
    }
    pieces.push(start..text.len());
    Ok(pieces)
}

/// The first place in `part` of `text` that keeps the tokens: after a line, else before a word, else beside
/// any sign.
fn cut(text: &str, part: Range<usize>, encode: &impl Fn(&str) -> Result<Vec<u32>>) -> Result<Option<usize>> {
    let line = |a: char, b: char| a == '\n' && !b.is_whitespace();
    let word = |a: char, b: char| !a.is_whitespace() && b == ' ';
    let sign = |a: char, b: char| a.is_alphanumeric() != b.is_alphanumeric();
    for fits in [line, word, sign] {
        let mut before = None;
        let places = text[part.clone()].char_indices().filter_map(|(i, c)| {
            let fits = before.is_some_and(|b| fits(b, c));
            before = Some(c);
            fits.then_some(part.start + i)
        });
        for at in places.take(TRIES) {
            if keeps_tokens(text, at, encode)? {
                return Ok(Some(at));
            }
        }
    }
    Ok(None)
}

fn keeps_tokens(text: &str, at: usize, encode: &impl Fn(&str) -> Result<Vec<u32>>) -> Result<bool> {
    for around in AROUND {
        let start = boundary(text, at.saturating_sub(around));
        let end = boundary(text, (at + around).min(text.len()));
        let apart = [encode(&text[start..at])?, encode(&text[at..end])?].concat();
        if encode(&text[start..end])? != apart {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The last place up to `at` where a character begins or `text` ends.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pkv_test_support::files::nano;
    use serde_json::{Value, json};

    use super::*;
    use crate::TextTokenizer;

    /// Splits before the tokens are made, as they are published.
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn tokenizer(edit: impl Fn(&mut Value)) -> TextTokenizer {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer_config.json", "tokenizer.json"] {
            fs::copy(nano("target").join(name), folder.path().join(name)).unwrap();
        }
        let path = folder.path().join("tokenizer.json");
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut json);
        fs::write(path, json.to_string()).unwrap();
        TextTokenizer::open(folder.path()).unwrap()
    }

    fn tokenizers() -> Vec<(&'static str, TextTokenizer)> {
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})
        };
        let mut all = vec![("as it is", tokenizer(|_| ()))];
        for (name, regex) in [("llama 3", LLAMA3), ("qwen2", QWEN2)] {
            all.push((name, tokenizer(|t| t["pre_tokenizer"] = split(regex))));
        }
        all.push(("nfc", tokenizer(|t| t["normalizer"] = json!({"type": "NFC"}))));
        // Nothing is split: merges may reach over blanks and lines.
        all.push((
            "no split",
            tokenizer(|t| {
                t["pre_tokenizer"] =
                    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
            }),
        ));
        // A special token that takes the blanks around it.
        all.push((
            "strips",
            tokenizer(|t| {
                for token in t["added_tokens"].as_array_mut().unwrap() {
                    token["lstrip"] = json!(true);
                    token["rstrip"] = json!(true);
                }
            }),
        ));
        all
    }

    /// Name, text, whether it can be cut.
    fn texts() -> Vec<(&'static str, String, bool)> {
        let prose = include_str!("../../../lm/tests/goldens/context.txt");
        let special = "<|im_end|>\n<|im_start|> user\n  <|im_end|>  \n";
        vec![
            ("prose", prose.repeat(1 + 20_000 / prose.len()), true),
            ("code", "fn main() {\n    let x = vec![1, 22, 333];\n\n\tif x {\n        y();\n    }\n}\n\n\n".repeat(250), true),
            ("other scripts", "\u{4f60}\u{597d}\u{3002}\u{4e16}\u{754c}\u{ff0c}\u{0939}\u{093f}\u{0928}\u{094d}\u{0926}\u{0940} cafe\u{301} \u{1f469}\u{200d}\u{1f4bb}".repeat(350), true),
            ("one line of JSON", "{\"key\":[1,-2.5e3,\"a b\"],\"other_key\":null},".repeat(450), true),
            ("special tokens", format!("Some words. {special}And more").repeat(250), true),
            ("windows lines", "One line\r\n\r\nand, (another)\r\n".repeat(500), true),
            ("blank lines", format!("{}word", "\n".repeat(2_999)).repeat(7), true),
            ("blanks", format!("{}word", " ".repeat(1_777)).repeat(10), true),
            ("signs", format!("{}word\n", "=".repeat(2_777)).repeat(7), true),
            ("numbers", (0..4000).map(|i| (i * i).to_string()).collect::<Vec<_>>().join(" "), true),
            ("one letter", "a".repeat(20_001), false),
            ("line ends", "\n".repeat(20_001), false),
        ]
    }

    #[test]
    fn pieces_have_the_tokens_of_the_whole() {
        for (name, tokenizer) in tokenizers() {
            for (kind, text, divisible) in texts() {
                let whole = tokenizer.encode_whole(&text).unwrap();
                for piece in [1_500, 2_567] {
                    let pieces = pieces(&text, piece, |part| tokenizer.encode_whole(part)).unwrap();
                    let joined: Vec<u32> = pieces
                        .iter()
                        .flat_map(|p| tokenizer.encode_whole(&text[p.clone()]).unwrap())
                        .collect();
                    assert!(joined == whole, "{name}, {kind}, pieces of {piece}");
                    let most = pieces.iter().map(|p| p.len()).max().unwrap();
                    if name != "no split" {
                        assert!(!divisible || most <= 4 * piece, "{name}, {kind}: a piece of {most}");
                    }
                    assert!(pieces.windows(2).all(|p| p[0].end == p[1].start), "{name}, {kind}");
                }
            }
        }
    }

    #[test]
    fn a_long_text_is_encoded_as_a_whole_would_be() {
        let tokenizer = tokenizer(|_| ());
        let prose = include_str!("../../../lm/tests/goldens/context.txt");
        let text = prose.repeat(1 + 3 * PIECE / prose.len());
        assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_whole(&text).unwrap());
    }
}

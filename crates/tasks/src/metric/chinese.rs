//! Chinese text, cut into words as the reference cuts it: jieba's dictionary with its model for unknown
//! words.

use std::sync::LazyLock;

use jieba_rs::Jieba;

use super::f1;

/// LongBench `metrics.py`, `normalize_zh_answer`.
const PUNCTUATION: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// F1 of the words of two texts (LongBench `qa_f1_zh_score`).
pub fn f1(answer: &str, wanted: &str) -> f64 {
    let words = |text: &str| {
        let words = cut(text).into_iter().map(|w| normalized(&w));
        words.filter(|w| !w.is_empty()).collect::<Vec<_>>()
    };
    f1::f1(&words(answer), &words(wanted))
}

/// The words of a text with spaces between them.
pub fn spaced(text: &str) -> String {
    cut(text).join(" ")
}

/// Lower case, no punctuation of either script, no white space.
pub fn normalized(text: &str) -> String {
    let text = text.to_lowercase();
    let kept = |c: &char| !c.is_ascii_punctuation() && !PUNCTUATION.contains(*c) && !c.is_whitespace();
    text.chars().filter(kept).collect()
}

/// Differs from the crate's own cut in what it restores: Python's jieba cuts `GPT-4` into three, since only a
/// full stop holds digits together (`finalseg`, `re_skip`), the crate takes any character for that stop.
fn cut(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in JIEBA.cut(text, true) {
        let word = word.to_string();
        if word.is_ascii() && word.len() > 1 && !JIEBA.has_word(&word) {
            words.extend(cut_ascii(&word));
        } else {
            words.push(word);
        }
    }
    words
}

/// Pieces that match `[a-zA-Z0-9]+(?:\.\d+)?%?`, and what lies between them.
fn cut_ascii(word: &str) -> Vec<String> {
    let bytes = word.as_bytes();
    let run = |from: usize, of: fn(&u8) -> bool| from + bytes[from..].iter().take_while(|b| of(b)).count();
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let mut end = run(at, u8::is_ascii_alphanumeric);
        if end > at {
            if bytes.get(end) == Some(&b'.') && run(end + 1, u8::is_ascii_digit) > end + 1 {
                end = run(end + 1, u8::is_ascii_digit);
            }
            end += usize::from(bytes.get(end) == Some(&b'%'));
        } else {
            end = run(at, |b| !b.is_ascii_alphanumeric());
        }
        pieces.push(word[at..end].to_owned());
        at = end;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_is_cut_as_finalseg_does() {
        assert_eq!(cut_ascii("GPT-4"), ["GPT", "-", "4"]);
        assert_eq!(cut_ascii("1.8"), ["1.8"]);
        assert_eq!(cut_ascii("a1.50%b_c.d"), ["a1.50%", "b", "_", "c", ".", "d"]);
        assert_eq!(cut_ascii("..x."), ["..", "x", "."]);
    }
}

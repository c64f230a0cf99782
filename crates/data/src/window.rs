//! The sliding window over a document's tokens.

use std::ops::Range;

use pkv_core::Split;
use pkv_recipe::DataSection;

/// Windows of a document of `tokens` tokens: every `stride * window` tokens one of `window` tokens;
/// the last one ends with the document. Shorter ones than `min_tokens` are left out.
///
/// Only training windows overlap. Others are measured: overlapping ones would count a text twice, and
/// other strides would measure on other texts.
///
/// Each is given with its number, which counts the ones left out too.
pub(crate) fn windows(
    tokens: usize,
    window: usize,
    split: Split,
    data: &DataSection,
) -> Vec<(u32, Range<usize>)> {
    let stride = if split == Split::Train { data.stride } else { 1.0 };
    let step = ((window as f64 * stride).round() as usize).max(1);
    let mut out = Vec::new();
    for number in 0.. {
        let start = number * step;
        let end = tokens.min(start + window);
        if end.saturating_sub(start) >= data.min_tokens {
            out.push((number as u32, start..end));
        }
        // Whatever comes after a window that reaches the end lies inside it.
        if start + window >= tokens {
            return out;
        }
    }
    unreachable!("a window reaches the end of every document")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(tokens: usize, window: usize, stride: f64, min_tokens: usize) -> Vec<(u32, usize, usize)> {
        cut_for(Split::Train, tokens, window, stride, min_tokens)
    }

    fn cut_for(
        split: Split,
        tokens: usize,
        window: usize,
        stride: f64,
        min_tokens: usize,
    ) -> Vec<(u32, usize, usize)> {
        let data = DataSection {
            manifest: String::new(),
            files: Vec::new(),
            train: 1,
            validation: 0,
            test: 0,
            window_tokens: vec![window],
            stride,
            min_tokens,
            validation_share: 0.1,
            test_share: 0.1,
            test_window_tokens: None,
            special_tokens: pkv_recipe::SpecialTokens::default(),
            shard_examples: 64,
        };
        windows(tokens, window, split, &data).into_iter().map(|(n, r)| (n, r.start, r.end)).collect()
    }

    #[test]
    fn windows_are_exact() {
        assert_eq!(cut(1000, 400, 1.0, 100), [(0, 0, 400), (1, 400, 800), (2, 800, 1000)]);
        assert_eq!(cut(1000, 400, 1.0, 201), [(0, 0, 400), (1, 400, 800)]);
        assert_eq!(cut(800, 400, 1.0, 2), [(0, 0, 400), (1, 400, 800)]);
        assert_eq!(cut(801, 400, 1.0, 1), [(0, 0, 400), (1, 400, 800), (2, 800, 801)]);
        assert_eq!(cut(1000, 400, 0.5, 300), [(0, 0, 400), (1, 200, 600), (2, 400, 800), (3, 600, 1000)]);
        // A shorter document is one example of its own length.
        assert_eq!(cut(300, 400, 0.5, 300), [(0, 0, 300)]);
        assert_eq!(cut(299, 400, 0.5, 300), []);
        assert_eq!(cut(1, 400, 1.0, 2), []);
        assert_eq!(cut(0, 400, 1.0, 2), []);
    }

    #[test]
    fn only_training_windows_overlap() {
        let apart = cut(1000, 400, 1.0, 100);
        for split in [Split::Validation, Split::Test] {
            assert_eq!(cut_for(split, 1000, 400, 0.5, 100), apart);
        }
        assert_ne!(cut(1000, 400, 0.5, 100), apart);
    }

    #[test]
    fn every_token_is_in_a_window_when_nothing_is_too_short() {
        for tokens in [1, 2, 399, 400, 401, 799, 1234] {
            for stride in [1.0, 0.7, 0.5, 0.001] {
                let cut = cut(tokens, 400, stride, 1);
                let mut reached = 0;
                for (_, start, end) in cut {
                    assert!(start <= reached && end > start && end - start <= 400, "{tokens} {stride}");
                    reached = end;
                }
                assert_eq!(reached, tokens, "{tokens} {stride}");
            }
        }
    }
}

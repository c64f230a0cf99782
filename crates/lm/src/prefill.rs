//! Chunked prefill: the length of each chunk, and the retry with shorter ones when memory runs out.

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;
use tch::Tensor;

use crate::cache::KvCache;
use crate::model::LanguageModel;
use crate::tap::{LayerView, Tap};

/// Below this many tokens, a shorter prefill chunk saves little memory.
const LEAST_TOKENS: usize = 512;

/// The next prefill chunk of a context of `tokens` of which `done` are read: `size` tokens, or all that are
/// left if those are at most a quarter more. A last chunk of a few tokens would read all weights for little.
pub fn prefill_chunk(done: usize, tokens: usize, size: usize) -> Range<usize> {
    let (left, size) = (tokens - done, size.max(1));
    done..done + if left <= size + size / 4 { left } else { size }
}

/// The chunks of a context, read one after the other. They become shorter where memory runs out; results do
/// not depend on them but for rounding.
#[derive(Debug)]
pub struct Chunks {
    tokens: usize,
    done: usize,
    size: usize,
    /// Memory has run out before.
    short: bool,
    /// Cache positions that the tap has been shown of each layer.
    seen: Vec<usize>,
}

impl Chunks {
    /// `tokens` in chunks of `size`.
    pub fn new(tokens: usize, size: usize) -> Self {
        Self { tokens, done: 0, size: size.max(1), short: false, seen: Vec::new() }
    }

    pub fn is_done(&self) -> bool {
        self.done >= self.tokens
    }

    /// Read the next chunk by `read`, which gets its range of tokens and what to show it to.
    ///
    /// A chunk that memory has no room for is read again, half as long. `read` must then have left the cache
    /// as it was; `tap` sees every token of every layer once, whatever failed.
    ///
    /// # Errors
    /// Those of `read`; memory has no room for 512 tokens either, or none for the tap's own work.
    pub fn read<T>(
        &mut self,
        tap: &mut dyn Tap,
        mut read: impl FnMut(Range<usize>, &mut dyn Tap) -> Result<T>,
    ) -> Result<T> {
        loop {
            let Self { tokens, done, size, short, .. } = *self;
            // Where memory is short, the last chunk is not stretched.
            let chunk = if short { done..tokens.min(done + size) } else { prefill_chunk(done, tokens, size) };
            let tried = chunk.len();
            let mut once = Once { tap: &mut *tap, seen: &mut self.seen, at_work: false };
            if let Some(value) = unless_exhausted(|| read(chunk.clone(), &mut once))? {
                self.done = chunk.end;
                return Ok(value);
            }
            let part = if once.at_work { "the work beside a prefill chunk" } else { "a prefill chunk" };
            // What a tap left half done cannot be done over.
            if once.at_work || tried <= LEAST_TOKENS {
                bail!(
                    hinted(
                        format!("memory ran out in {part} of {tried} tokens"),
                        "free the device of other work, or use shorter contexts or a smaller model; `plan` tells \
                         what is needed",
                    )
                    .environment()
                );
            }
            (self.size, self.short) = ((tried / 2).max(LEAST_TOKENS), true);
            tracing::warn!(
                "memory ran out in a prefill chunk of {tried} tokens; going on with {}",
                self.size
            );
        }
    }
}

/// Shows a tap each token of each layer once, though a chunk may be read again.
struct Once<'a> {
    tap: &'a mut dyn Tap,
    seen: &'a mut Vec<usize>,
    /// The tap is at work.
    at_work: bool,
}

impl Tap for Once<'_> {
    fn wants_lse(&self) -> bool {
        self.tap.wants_lse()
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let end = view.start + view.q_qsd.size()[1] as usize;
        if self.seen.len() <= view.layer {
            self.seen.resize(view.layer + 1, 0);
        }
        let skipped = self.seen[view.layer].saturating_sub(view.start);
        let left = (end - view.start).saturating_sub(skipped) as i64;
        if left == 0 {
            return Ok(());
        }
        self.at_work = true;
        if skipped == 0 {
            self.tap.layer(view)?;
        } else {
            let rest = |x: &Tensor, axis| x.narrow(axis, skipped as i64, left);
            self.tap.layer(&LayerView {
                start: view.start + skipped,
                q_qsd: &rest(view.q_qsd, 1),
                hidden_sm: &rest(view.hidden_sm, 0),
                normed_sm: &rest(view.normed_sm, 0),
                lse_qs: view.lse_qs.map(|lse| rest(lse, 1)).as_ref(),
                ..*view
            })?;
        }
        (self.at_work, self.seen[view.layer]) = (false, end);
        Ok(())
    }
}

impl LanguageModel {
    /// Read a whole context in chunks of at most `chunk_tokens`; taps see every chunk.
    ///
    /// Returns the hidden states of the last chunk, `[tokens of the last chunk, hidden]`.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`]; also an empty context or chunk, and as [`Chunks::read`].
    pub fn prefill(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        chunk_tokens: usize,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        check(ids, cache, chunk_tokens)?;
        let mut chunks = Chunks::new(ids.len(), chunk_tokens);
        loop {
            let last = chunks.read(tap, |chunk, tap| {
                let (last, ids) = (chunk.end == ids.len(), self.ids(&ids[chunk]));
                // The other chunks' hidden states are not read, so their last layer may end early.
                match last {
                    true => self.forward(&ids, cache, tap).map(Some),
                    false => self.forward_for_tap(&ids, cache, tap).map(|()| None),
                }
            })?;
            if let Some(hidden_sm) = last {
                return Ok(hidden_sm);
            }
        }
    }

    /// Like [`LanguageModel::prefill`], where only taps and the cache are of interest: the last layer
    /// ends early in every chunk.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn prefill_for_tap(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        chunk_tokens: usize,
        tap: &mut dyn Tap,
    ) -> Result<()> {
        check(ids, cache, chunk_tokens)?;
        let mut chunks = Chunks::new(ids.len(), chunk_tokens);
        while !chunks.is_done() {
            chunks.read(tap, |chunk, tap| self.forward_for_tap(&self.ids(&ids[chunk]), cache, tap))?;
        }
        Ok(())
    }
}

fn check(ids: &[u32], cache: &KvCache, chunk_tokens: usize) -> Result<()> {
    ensure!(chunk_tokens > 0, hinted("a prefill chunk of 0 tokens", "use 1 token or more per prefill chunk"));
    ensure!(!ids.is_empty(), "there is no token to prefill");
    cache.check_room(ids.len())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::tap::NoTap;

    /// tch's words where libtorch finds no room.
    fn exhaust() -> Result<()> {
        panic!(
            "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.00 GiB\")"
        )
    }

    #[test]
    fn chunks_are_halved_until_they_fit() {
        let mut read = Vec::new();
        let mut chunks = Chunks::new(10_000, 8000);
        while !chunks.is_done() {
            chunks
                .read(&mut NoTap, |chunk, _| {
                    if chunk.len() > 2500 {
                        return exhaust();
                    }
                    read.push(chunk);
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(read, [0..2500, 2500..5000, 5000..7500, 7500..10_000]);
        let mut tried = Vec::new();
        let error = Chunks::new(5000, 3000)
            .read(&mut NoTap, |chunk, _| {
                tried.push(chunk.len());
                exhaust()
            })
            .unwrap_err();
        assert_eq!(tried, [3000, 1500, 750, 512]);
        assert!(error.to_string().contains("512 tokens"), "{error}");
        assert!(error.downcast_ref::<pkv_core::Hinted>().is_some());
        let other = Chunks::new(9, 4).read(&mut NoTap, |_, _| -> Result<()> { bail!("no such file") });
        assert_eq!(other.unwrap_err().to_string(), "no such file");
    }

    /// Adds up what it is shown: a token that is shown twice counts twice.
    #[derive(Default)]
    struct Sums {
        tokens: Vec<(usize, Vec<i64>)>,
        fails: bool,
    }

    impl Tap for Sums {
        fn layer(&mut self, view: &LayerView) -> Result<()> {
            if self.fails {
                return exhaust();
            }
            if self.tokens.len() == view.layer {
                self.tokens.push((0, Vec::new()));
            }
            let (next, tokens) = &mut self.tokens[view.layer];
            assert_eq!(view.start, *next, "layer {}", view.layer);
            for part in [view.hidden_sm, view.normed_sm] {
                assert_eq!(part.size(), [view.q_qsd.size()[1], 1]);
            }
            assert_eq!(view.lse_qs.unwrap().size(), [1, view.q_qsd.size()[1]]);
            tokens.extend(Vec::<i64>::try_from(view.q_qsd.view([-1])).unwrap());
            *next += view.q_qsd.size()[1] as usize;
            Ok(())
        }
    }

    /// Memory runs out in the second of three layers, then in the third; chunks end within what the first was
    /// shown.
    #[test]
    fn a_tap_sees_every_token_of_a_layer_once() {
        let show = |chunk: &Range<usize>, layer: usize, tap: &mut dyn Tap| {
            let row = Tensor::arange_start(chunk.start as i64, chunk.end as i64, (Kind::Int64, Device::Cpu));
            let (s, keys) = (chunk.len() as i64, Tensor::zeros([1, 1, 1], (Kind::Int64, Device::Cpu)));
            tap.layer(&LayerView {
                layer,
                q_qsd: &row.view([1, s, 1]),
                k_hkd: &keys,
                v_hkd: &keys,
                start: chunk.start,
                scale: 1.0,
                hidden_sm: &row.view([s, 1]),
                normed_sm: &row.view([s, 1]),
                lse_qs: Some(&row.view([1, s])),
            })
        };
        let (mut sums, mut chunks, mut read) = (Sums::default(), Chunks::new(3000, 1300), Vec::new());
        while !chunks.is_done() {
            chunks
                .read(&mut sums, |chunk, tap| {
                    for layer in 0..3 {
                        if (layer, chunk.len()) == (1, 1300) || (layer, chunk.len()) == (2, 650) {
                            return exhaust();
                        }
                        show(&chunk, layer, &mut *tap)?;
                    }
                    read.push(chunk);
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(read, [0..512, 512..1024, 1024..1536, 1536..2048, 2048..2560, 2560..3000]);
        let all: Vec<i64> = (0..3000).collect();
        assert!(sums.tokens.iter().all(|(_, tokens)| *tokens == all) && sums.tokens.len() == 3);

        // What the tap itself has begun is not begun again.
        let mut tap = Sums { fails: true, ..Sums::default() };
        let error = Chunks::new(3000, 1300).read(&mut tap, |chunk, tap| show(&chunk, 0, tap)).unwrap_err();
        assert_eq!(error.to_string(), "memory ran out in the work beside a prefill chunk of 1300 tokens");
    }
}

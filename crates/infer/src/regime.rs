//! The three regimes of proxy and target, with one interface.
//!
//! `sequential`: the proxy's side first, then the target; the least memory. `streams`: both at once on
//! one device, on two CUDA streams, or two threads of a CPU. `dual`: both at once on two devices, the
//! scores copied once. What a regime hands over is the same.

mod parallel;
mod sequential;

use std::sync::Arc;

use anyhow::{Context as _, Error, Result, bail, ensure};
use pkv_core::{Stop, hinted};
use pkv_extract::ContextFeatures;
use pkv_lm::{Chunks, KvCache, LanguageModel, NoTap, RaggedCache};
use tch::{Device, Tensor};

pub use parallel::Parallel;
pub use sequential::Sequential;

use crate::keep::{Keep, Kept};
use crate::lane::Lane;
use crate::proxy::Given;
use crate::target_side::TargetSide;
use crate::timeline::Timeline;
use crate::worker::caught;

pkv_core::named! {
    /// A regime's name.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum RegimeName {
        Sequential = "sequential", "Proxy and mapper first, then the target; needs the least memory";
        Streams = "streams", "Both at once on one GPU";
        Dual = "dual", "Both at once, proxy and mapper on a GPU of their own";
    }
}

/// A context to read, and how.
pub struct PrefillInput<'a> {
    pub target: &'a LanguageModel,
    /// Tokens of the chat template before the context.
    pub prefix: &'a [u32],
    /// At least one token.
    pub tokens: &'a [u32],
    pub keep: Keep<'a>,
    /// Tokens per forward of the target.
    pub chunk_tokens: usize,
    /// Tokens that the pruned cache has room for before it must grow.
    pub room_tokens: usize,
    /// The mapper, where it reads the target's prefill.
    pub target_side: Option<&'a TargetSide>,
    pub stop: Stop,
}

/// A context in a cache that answers questions.
pub struct Prefilled {
    /// Pruned; whole if the source failed.
    pub cache: RaggedCache,
    pub kept: Kept,
    pub timeline: Arc<Timeline>,
    /// Why nothing was pruned, if nothing was.
    pub fallback: Option<Error>,
    /// Time that the target waited for the scores after its prefill.
    pub waited_secs: f64,
}

/// A way to prefill and prune.
pub trait Regime {
    fn name(&self) -> RegimeName;

    /// Read the context with both models, prune the target's cache once.
    ///
    /// # Errors
    /// The target fails, or the user stopped. A source that fails is no error: the cache is then whole,
    /// and [`Prefilled::fallback`] says why.
    fn prefill(&mut self, context: &PrefillInput) -> Result<Prefilled>;
}

/// Refuse devices that a regime cannot work with.
///
/// # Errors
/// `dual` with one GPU for both, or another regime with two devices. Two threads of a CPU count as two
/// devices: there the regime's logic can be tried.
pub fn check_devices(regime: RegimeName, target: Device, proxy: Device) -> Result<()> {
    match regime {
        RegimeName::Dual => ensure!(
            target != proxy || target == Device::Cpu,
            hinted(
                format!(
                    "the regime `dual` needs two GPUs, one for the target and one for the proxy; there is only {target:?}"
                ),
                "use `--regime streams` for one GPU, or name a second one with `--proxy-device cuda:1`"
            )
            .environment()
        ),
        _ => ensure!(
            target == proxy,
            hinted(
                format!("the regime `{regime}` works on one device, not on {target:?} and {proxy:?}"),
                "use `--regime dual` for two devices"
            )
        ),
    }
    Ok(())
}

/// Refuse a context of `tokens`, the chat template's prefix included, that fills the target's positions.
///
/// # Errors
/// There is no position left for a question.
pub fn check_length(tokens: usize, limit: usize) -> Result<()> {
    ensure!(
        tokens < limit,
        hinted(
            format!("the context takes {tokens} positions, the target was made for {limit}"),
            "shorten the context, so that a question has room after it"
        )
    );
    Ok(())
}

impl PrefillInput<'_> {
    /// The target's full cache of prefix and context, and nothing more; beside it the target's features,
    /// where the mapper reads them. An extraction that fails costs the pruning alone: the target then
    /// prefills once more without.
    fn prefill_target(&self) -> Result<(KvCache, Option<Result<ContextFeatures>>)> {
        let _no_grad = tch::no_grad_guard();
        let Some(side) = self.target_side else { return Ok((self.prefill_bare()?, None)) };
        match caught(|| side.prefill(self.target, self.prefix, self.tokens, self.chunk_tokens, &self.stop)) {
            Ok((cache, features)) => Ok((cache, Some(Ok(features)))),
            Err(why) => {
                self.stop.check()?;
                Ok((self.prefill_bare()?, Some(Err(why))))
            }
        }
    }

    /// The target's full cache of prefix and context, nothing pruned: what a pruned one is compared with.
    ///
    /// # Errors
    /// The target fails, there is no memory for it, or the user stopped.
    pub fn whole(&self) -> Result<RaggedCache> {
        let _no_grad = tch::no_grad_guard();
        self.check()?;
        RaggedCache::whole(self.prefill_bare()?, self.room_tokens)
            .context("cannot keep the target's whole cache")
    }

    fn prefill_bare(&self) -> Result<KvCache> {
        let ids: Vec<u32> = [self.prefix, self.tokens].concat();
        let mut cache = self.target.new_cache(ids.len());
        let mut chunks = Chunks::new(ids.len(), self.chunk_tokens);
        while !chunks.is_done() {
            self.stop.check()?;
            // Questions come later: the context's hidden states are not read.
            chunks.read(&mut NoTap, |chunk, tap| {
                self.target.forward_for_tap(&self.target.ids(&ids[chunk]), &mut cache, tap)
            })?;
        }
        Ok(cache)
    }

    /// Scores from what the proxy's side gave and, where the mapper reads it, the target's own prefill.
    fn scores(
        &self,
        given: Result<Given>,
        own: Option<Result<ContextFeatures>>,
        lane: &Lane,
        timeline: &Timeline,
    ) -> Result<Tensor> {
        match (self.target_side, own) {
            (Some(side), Some(own)) => {
                let (given, own) = (given?, own?);
                let mapper = Lane::here("mapper", lane.device())?;
                timeline.time(&mapper, "scores", || {
                    let _no_grad = tch::no_grad_guard();
                    caught(|| side.scores(own, given, &self.target.shape()))
                })
            }
            _ => match given? {
                Given::Scores(scores_lht) => Ok(scores_lht),
                Given::Features(_) | Given::Nothing => bail!("the proxy's side gave no scores"),
            },
        }
    }

    /// An empty context has nothing to prune, a too long one no room for questions.
    fn check(&self) -> Result<()> {
        ensure!(
            !self.tokens.is_empty(),
            hinted(
                "the context is empty: it has no KV pairs to prune",
                "give a file with text as `--context`"
            )
        );
        check_length(self.prefix.len() + self.tokens.len(), self.target.config().max_positions)
    }

    /// Prune the full cache by the scores, or keep it whole and say why.
    fn finish(
        &self,
        (full, own): (KvCache, Option<Result<ContextFeatures>>),
        given: Result<Given>,
        lane: &Lane,
        timeline: Arc<Timeline>,
        waited_secs: f64,
    ) -> Result<Prefilled> {
        self.stop.check()?;
        let scores = self.scores(given, own, lane, &timeline);
        let full_bytes = full_bytes(&full);
        let mask = scores.and_then(|scores_lht| {
            let expected = [full.layers(), self.target.shape().kv_heads, self.tokens.len()];
            let size: Vec<usize> = scores_lht.size().iter().map(|n| *n as usize).collect();
            ensure!(size == expected, "expected scores of shape {expected:?}, found {size:?}");
            let here = match scores_lht.device() == lane.device() {
                true => scores_lht,
                false => timeline.time(lane, "copy scores", || Ok(scores_lht.to_device(lane.device())))?,
            };
            timeline.time(lane, "prune", || self.keep.mask(&here, &full, self.prefix.len()))
        });
        let (cache, fallback) = match mask {
            Ok(keep_lht) => {
                let pruned =
                    timeline.time(lane, "prune", || RaggedCache::prune(full, &keep_lht, self.room_tokens));
                (pruned.context("cannot prune the target's cache")?, None)
            }
            Err(why) => {
                let whole = timeline.time(lane, "keep whole", || RaggedCache::whole(full, self.room_tokens));
                (whole.context("cannot keep the target's cache")?, Some(why))
            }
        };
        let kept = Kept::of(&cache, self.prefix.len(), self.tokens.len(), full_bytes);
        Ok(Prefilled { cache, kept, timeline, fallback, waited_secs })
    }
}

/// Keys and values of a full cache.
fn full_bytes(cache: &KvCache) -> usize {
    let keys = cache.keys(0);
    2 * cache.layers() * keys.numel() * keys.kind().elt_size_in_bytes()
}

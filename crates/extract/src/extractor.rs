//! Runs a model over a context and assembles its features.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position.

use anyhow::{Context, Result};
use pkv_lm::{KvCache, LanguageModel};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::{Requests, Scorer};
use pkv_text::TextTokenizer;
use tch::Tensor;

use crate::HiddenProjection;
use crate::channels::{Compute, chosen};

/// Features of one context, raw: `mapper` standardizes them.
pub struct ContextFeatures {
    /// `[layers * kv_heads, channels, positions]`, f32, in [-16, 16], on the model's device; layer-major.
    pub heads_pct: Tensor,
    /// `[globals, positions]`, f32, same device.
    pub globals_ct: Tensor,
}

/// Extracts the channels of a recipe with one model.
pub struct Extractor<'a> {
    pub(crate) model: &'a LanguageModel,
    pub(crate) prefix: Vec<u32>,
    pub(crate) extract: ExtractSection,
    pub(crate) requests: Requests,
    /// Present if a reconstruction channel is chosen.
    scorer: Option<Scorer<'a>>,
    /// For the channel that reads hidden states.
    pub(crate) hidden: Option<&'a HiddenProjection>,
}

impl<'a> Extractor<'a> {
    /// `label` is read only by channels of a repeat, run or not: the proxy repeats as the target does.
    ///
    /// # Errors
    /// The tokenizer fails on the texts of the requests.
    pub fn new(
        model: &'a LanguageModel,
        tokenizer: &TextTokenizer,
        extract: &ExtractSection,
        label: &LabelSection,
    ) -> Result<Self> {
        let requests = Requests::new(tokenizer, label)?;
        Ok(Self::with_requests(model, &requests, tokenizer.prefix(), extract, label))
    }

    /// An extractor without a tokenizer: requests and prefix are token ids.
    pub fn with_requests(
        model: &'a LanguageModel,
        requests: &Requests,
        prefix: &[u32],
        extract: &ExtractSection,
        label: &LabelSection,
    ) -> Self {
        let repeats = extract.channels.iter().any(|c| c.is_reconstruction());
        let mut computed = chosen(&extract.channels);
        let means = computed.any(|(_, c)| matches!(c, Compute::Replay { reads_means: true, .. }));
        let scorer = repeats.then(|| {
            let scorer = Scorer::with_requests(model, requests.clone(), prefix, label);
            if means { scorer } else { scorer.maxima_only() }
        });
        let (prefix, requests) = (prefix.to_vec(), requests.clone());
        Self { model, prefix, extract: extract.clone(), requests, scorer, hidden: None }
    }

    /// With the map of hidden states that [`pkv_core::Channel::HiddenLinear`] needs, on the model's device.
    ///
    /// # Errors
    /// The channel is chosen and there is no map, or one of another model.
    pub fn with_hidden(mut self, hidden: Option<&'a HiddenProjection>) -> Result<Self> {
        if self.extract.channels.iter().any(|c| c.is_fitted()) {
            let hidden =
                hidden.context("the channel `hidden_linear` is chosen, and its projection is absent")?;
            hidden.check(self.model)?;
            self.hidden = Some(hidden);
        }
        Ok(self)
    }

    /// Features of a context, given without the prefix.
    ///
    /// # Errors
    /// The context is empty, or the model fails on it.
    pub fn features(&self, context: &[u32]) -> Result<ContextFeatures> {
        Ok(self.read(context)?.1)
    }

    /// The same, and the model's cache of prefix and context.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn read(&self, context: &[u32]) -> Result<(KvCache, ContextFeatures)> {
        let mut stream = self.stream(context)?;
        while stream.step().with_context(|| format!("prefilling a context of {} tokens", context.len()))? {}
        Ok(stream.into_cache_and_features())
    }

    /// Fill in the reconstruction channels, if there are any.
    pub(crate) fn reconstruction(&self, context: &[u32], cache: &KvCache, heads_pct: &Tensor) -> Result<()> {
        let Some(scorer) = &self.scorer else { return Ok(()) };
        let scores = scorer.score_cached(context, cache)?;
        for (slot, compute) in chosen(&self.extract.channels) {
            if let Compute::Replay { values, .. } = compute {
                heads_pct.select(1, slot).copy_(&values(&scores)?);
            }
        }
        Ok(())
    }

    /// Fill in the channels that read all keys of a layer, if there are any.
    pub(crate) fn of_keys(&self, cache: &KvCache, heads_pct: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (slot, compute) in chosen(&self.extract.channels) {
            let Compute::Keys(values) = compute else { continue };
            for layer in 0..cache.layers() {
                let values_ht = values(&cache.keys(layer), self.prefix.len())?;
                let heads = values_ht.size()[0];
                heads_pct.narrow(0, layer as i64 * heads, heads).select(1, slot).copy_(&values_ht);
            }
        }
        Ok(())
    }
}

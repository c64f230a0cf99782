//! Runs the proxy over a context and assembles its features.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position.

use anyhow::{Context, Result};
use pkv_core::Channel;
use pkv_lm::{KvCache, LanguageModel, TextTokenizer};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::{Requests, Scorer};
use tch::Tensor;

use crate::HiddenProjection;
use crate::statistics::{LOG_LIMIT, MEAN_FLOOR};

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
    /// Present if a reconstruction channel is chosen.
    scorer: Option<Scorer<'a>>,
    /// For the channel that reads hidden states.
    pub(crate) hidden: Option<&'a HiddenProjection>,
}

impl<'a> Extractor<'a> {
    /// `label` is read by the reconstruction channels only: the proxy repeats as the target does.
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
        let means = extract.channels.contains(&Channel::ReconMean);
        let scorer = repeats.then(|| {
            let scorer = Scorer::with_requests(model, requests.clone(), prefix, label);
            if means { scorer } else { scorer.maxima_only() }
        });
        Self { model, prefix: prefix.to_vec(), extract: extract.clone(), scorer, hidden: None }
    }

    /// With the map of hidden states that [`Channel::HiddenLinear`] needs, on the model's device.
    ///
    /// # Errors
    /// The channel is chosen and there is no map, or one of another model.
    pub fn with_hidden(mut self, hidden: Option<&'a HiddenProjection>) -> Result<Self> {
        if self.extract.channels.contains(&Channel::HiddenLinear) {
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
        let mut stream = self.stream(context)?;
        while stream.step().with_context(|| format!("prefilling a context of {} tokens", context.len()))? {}
        Ok(stream.into_features())
    }

    /// Fill in the reconstruction channels, if there are any.
    pub(crate) fn reconstruction(&self, context: &[u32], cache: &KvCache, heads_pct: &Tensor) -> Result<()> {
        let Some(scorer) = &self.scorer else { return Ok(()) };
        let scores = scorer.score_cached(context, cache)?;
        // [layers, kv_heads, positions] flattened layer-major is p.
        let max_pt = scores.max_lht.flatten(0, 1);
        let mean_pt = scores.mean_lht.map(|mean_lht| mean_lht.flatten(0, 1));
        for (slot, channel) in self.extract.channels.iter().enumerate() {
            let values_pt = match channel {
                Channel::ReconLog => max_pt.log().clamp(-LOG_LIMIT, 0.0),
                Channel::ReconLogOdds => pkv_prune::log_odds(&max_pt),
                Channel::ReconMean => {
                    (mean_pt.as_ref().context("the scorer left out the means")? + MEAN_FLOOR).log()
                }
                _ => continue,
            };
            heads_pct.select(1, slot as i64).copy_(&values_pt);
        }
        Ok(())
    }
}

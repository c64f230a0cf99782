//! The target's own features: taken from its only prefill, and mapped to scores together with the proxy's, if
//! any.
//!
//! Dimension key: l layer, h KV head, t context position, p KV head of a source, c channel.

use anyhow::{Context as _, Result, bail};
use pkv_core::{FeatureLayout, ModelShape, Source, Stop};
use pkv_extract::{ContextFeatures, Extractor, HiddenProjection, join_features};
use pkv_lm::{KvCache, LanguageModel};
use pkv_mapper::Mapper;
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::Requests;
use tch::Tensor;

use crate::proxy::Given;

/// A mapper that reads the target's own prefill.
pub struct TargetSide {
    /// On the target's device.
    mapper: Mapper,
    layout: FeatureLayout,
    /// Settings of the target's features.
    extract: ExtractSection,
    label: LabelSection,
    requests: Requests,
    /// Map of hidden states, if a channel reads them; on the target's device.
    hidden: Option<HiddenProjection>,
    /// Positions that the mapper scores in one forward.
    window_tokens: usize,
}

impl TargetSide {
    /// `extract` and `label` as the mapper was trained; its sources include the target.
    pub fn new(
        mapper: Mapper,
        extract: &ExtractSection,
        label: &LabelSection,
        requests: Requests,
        hidden: Option<HiddenProjection>,
        window_tokens: usize,
    ) -> Self {
        Self {
            mapper,
            layout: extract.layout(),
            extract: extract.of(Source::Target),
            label: label.clone(),
            requests,
            hidden,
            window_tokens,
        }
    }

    /// Whether a proxy's features are needed as well.
    pub fn reads_proxy(&self) -> bool {
        self.layout.has(Source::Proxy)
    }

    /// Prefill prefix and context, `chunk_tokens` at a time: the cache, and the features that fell off.
    ///
    /// # Errors
    /// The model or the extraction fails, or the user stopped.
    pub(crate) fn prefill(
        &self,
        target: &LanguageModel,
        prefix: &[u32],
        tokens: &[u32],
        chunk_tokens: usize,
        stop: &Stop,
    ) -> Result<(KvCache, ContextFeatures)> {
        let extract = ExtractSection { prefill_chunk_tokens: chunk_tokens.max(1), ..self.extract.clone() };
        let extractor = Extractor::with_requests(target, &self.requests, prefix, &extract, &self.label)
            .with_hidden(self.hidden.as_ref())?;
        let mut stream = extractor.stream(tokens)?;
        while {
            stop.check()?;
            stream.step()?
        } {}
        Ok(stream.into_cache_and_features())
    }

    /// The mapper's scores, f32 `[layers, KV heads, positions]` of the target, on its device.
    ///
    /// # Errors
    /// The proxy's features are needed and did not come, or do not fit.
    pub(crate) fn scores(&self, own: ContextFeatures, given: Given, target: &ModelShape) -> Result<Tensor> {
        let mut own = Some(own);
        let mut proxys = match given {
            Given::Features(features) => Some(features),
            Given::Nothing => None,
            Given::Scores(_) => bail!("the proxy's side gave scores where its features are wanted"),
        };
        let part = |source| match source {
            Source::Target => own.take(),
            Source::Proxy => proxys.take(),
        };
        let parts: Option<Vec<_>> = self.layout.sources().iter().map(|s| s.source).map(part).collect();
        let parts = parts.context("the mapper reads features of a proxy, and there are none")?;
        let here = |x: Tensor| x.to_device(self.mapper.device());
        let ContextFeatures { heads_pct, globals_ct } = join_features(parts, &self.layout)?;
        let (heads_bpct, globals_bct) = (here(heads_pct).unsqueeze(0), here(globals_ct).unsqueeze(0));
        self.mapper.dims().check_features(&heads_bpct, &globals_bct)?;
        let positions = heads_bpct.size()[3];
        let scores_bot = self.mapper.forward_long(&heads_bpct, &globals_bct, self.window_tokens);
        Ok(scores_bot.view([target.layers as i64, target.kv_heads as i64, positions]))
    }
}

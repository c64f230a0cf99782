//! Runs the proxy over a context and assembles its features.
//!
//! Dimension key: p proxy KV head (all layers x heads flattened, layer-major), c channel,
//! t context position.

use anyhow::{Context, Result, ensure};
use pkv_core::{Channel, GlobalChannel, hinted};
use pkv_gpu::has_fused_scores;
use pkv_lm::{KvCache, LanguageModel, TextTokenizer, prefill_chunk};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::{Requests, Scorer};
use tch::Tensor;

use crate::globals::{Surprisal, globals};
use crate::statistics::{LOG_LIMIT, MEAN_FLOOR, QueryStatistics};
use crate::tap::FeatureTap;

/// Features of one context, raw: `mapper` standardizes them.
pub struct ContextFeatures {
    /// `[layers * kv_heads, channels, positions]`, f32, in [-16, 16], on the model's device; layer-major.
    pub heads_pct: Tensor,
    /// `[globals, positions]`, f32, same device.
    pub globals_ct: Tensor,
}

/// Extracts the channels of a recipe with one model.
pub struct Extractor<'a> {
    model: &'a LanguageModel,
    prefix: Vec<u32>,
    extract: ExtractSection,
    /// Present if a reconstruction channel is chosen.
    scorer: Option<Scorer<'a>>,
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
        Self { model, prefix: prefix.to_vec(), extract: extract.clone(), scorer }
    }

    /// Features of a context, given without the prefix.
    ///
    /// # Errors
    /// The context is empty, or the model fails on it.
    pub fn features(&self, context: &[u32]) -> Result<ContextFeatures> {
        ensure!(
            !context.is_empty(),
            hinted(
                "an empty context has no features: it has no KV pairs",
                "leave documents without tokens out of the manifest"
            )
        );
        let _no_grad = tch::no_grad_guard();
        let mut cache = self.model.new_cache(self.prefix.len() + context.len());
        let shape = self.model.shape();
        let statistics = QueryStatistics::new(&self.extract, self.prefix.len(), context.len());
        let heads_pct = statistics.zeros(shape.total_kv_heads(), self.model.device());

        let surprisal = self
            .prefill(context, &mut cache, &statistics, &heads_pct)
            .with_context(|| format!("prefilling a context of {} tokens", context.len()))?;
        statistics.finish(&heads_pct, shape.group());
        self.reconstruction(context, &cache, &heads_pct)?;
        let mut all = heads_pct.shallow_clone();
        let _ = all.clamp_(-LOG_LIMIT, LOG_LIMIT);
        let globals_ct =
            globals(&self.extract.globals, surprisal.as_ref(), context.len(), self.model.device())?;
        Ok(ContextFeatures { heads_pct, globals_ct })
    }

    fn prefill(
        &self,
        context: &[u32],
        cache: &mut KvCache,
        statistics: &QueryStatistics,
        heads_pct: &Tensor,
    ) -> Result<Option<Surprisal>> {
        let ids = [&self.prefix, context].concat();
        let prefix = self.prefix.len();
        let (device, kind) = (self.model.device(), self.model.kind());
        let fused = has_fused_scores(device, kind, self.model.shape().head_dim as i64);
        let mut tap = FeatureTap { statistics, channels: &self.extract.channels, prefix, fused, heads_pct };
        let wanted = self.extract.globals.contains(&GlobalChannel::Surprisal);
        let mut surprisal = wanted.then(|| Surprisal::new(self.model, &ids, prefix));
        while cache.len() < ids.len() {
            let start = cache.len();
            let chunk = prefill_chunk(start, ids.len(), self.extract.prefill_chunk_tokens);
            let chunk = self.model.ids(&ids[chunk]);
            match &mut surprisal {
                Some(surprisal) => {
                    let hidden_sm = self.model.forward(&chunk, cache, &mut tap)?;
                    surprisal.add(self.model, &hidden_sm, start);
                }
                // Keys and values of the last layer are in the cache all the same.
                None => self.model.forward_for_tap(&chunk, cache, &mut tap)?,
            }
        }
        Ok(surprisal)
    }

    /// Fill in the reconstruction channels, if there are any.
    fn reconstruction(&self, context: &[u32], cache: &KvCache, heads_pct: &Tensor) -> Result<()> {
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

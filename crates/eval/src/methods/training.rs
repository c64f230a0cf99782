//! Inputs with which methods start and learn: the models, and the training examples with labels and features.
//!
//! Methods that learn are fitted to what the mapper is trained on: log-odds of KVzip's scores, span-pooled as
//! the recipe says.
//!
//! Dimension key: o target KV head, p proxy KV head, c channel, t context position.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, ensure};
use pkv_core::{Channel, Seed, hinted};
use pkv_extract::ContextFeatures;
use pkv_lm::{KvCache, LanguageModel, Tap};
use pkv_mapper::Mapper;
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::TargetPool;
use pkv_shard::{ExampleRows, FeatureRow, LabelRow};
use tch::{Device, Tensor};

/// Training contexts that methods learn from; more of them change nothing in the third digit.
const MAX_CONTEXTS: u64 = 512;

/// Inputs with which methods start.
pub struct Setup<'a> {
    pub target: Target<'a>,
    /// Linear methods share its standardization and ridge penalty.
    pub mapper: &'a Mapper,
    /// Channels of the features, in their order.
    pub channels: &'a [Channel],
    /// Span pooling that the mapper was trained with.
    pub pool: TargetPool,
    pub training: TrainingSet<'a>,
    pub seed: Seed,
    /// Folder for what takes long to fit.
    pub scorers: &'a Path,
}

/// The target, ready to prefill contexts.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub model: &'a LanguageModel,
    /// The chat template's tokens before a context.
    pub prefix: &'a [u32],
    pub prefill_chunk_tokens: usize,
}

impl Target<'_> {
    /// Read the prefix and `context`; the cache has room for `capacity` positions.
    ///
    /// # Errors
    /// The target cannot read it, or `tap` fails.
    pub fn prefill(&self, context: &[u32], capacity: usize, tap: &mut dyn Tap) -> Result<KvCache> {
        let ids = [self.prefix, context].concat();
        let mut cache = self.model.new_cache(capacity.max(ids.len()));
        self.model.prefill_for_tap(&ids, &mut cache, self.prefill_chunk_tokens, tap)?;
        Ok(cache)
    }
}

/// The training examples.
pub struct TrainingSet<'a> {
    pub examples: &'a ExampleRows,
    /// Rows of the training split.
    pub rows: Range<u64>,
}

/// One training example.
pub struct TrainingContext {
    pub tokens: Vec<u32>,
    /// Raw features.
    pub features: ContextFeatures,
    /// Log-odds of its labels, f32 `[target heads, positions]`.
    pub raw_ot: Tensor,
    /// The same, span-pooled.
    pub y_ot: Tensor,
}

impl TrainingSet<'_> {
    /// Number of contexts that methods learn from.
    pub fn contexts(&self) -> u64 {
        (self.rows.end - self.rows.start).min(MAX_CONTEXTS)
    }

    /// The rows of those contexts, evenly spread, so that every source of the mixture is there.
    pub fn chosen(&self) -> impl Iterator<Item = u64> + use<> {
        let (first, all, n) = (self.rows.start, self.rows.end - self.rows.start, self.contexts());
        (0..n).map(move |i| first + i * all / n)
    }
}

impl Setup<'_> {
    /// Read one row of the training set.
    ///
    /// # Errors
    /// The row is absent, or its example, labels and features are not of one context and of the target.
    pub fn training_context(&self, row: u64) -> Result<TrainingContext> {
        let (label, features) = self.training.examples.get(row)?;
        let tokens = self.training.examples.example(row)?.tokens;
        let shape = self.target.model.shape();
        let found = (label.layers as usize, label.kv_heads as usize);
        ensure!(
            found == (shape.layers, shape.kv_heads),
            hinted(
                format!(
                    "row {row}: labels are {} layers x {} KV heads, the target is {} x {}",
                    found.0, found.1, shape.layers, shape.kv_heads
                ),
                "labels must be of this target: `--redo label`"
            )
        );
        let device = self.target.model.device();
        let raw_ot = log_odds(&label_tensor(&label, device)).flatten(0, 1);
        let y_ot = pool_targets(&raw_ot, &self.pool);
        Ok(TrainingContext { tokens, features: feature_tensors(&features, device), raw_ot, y_ot })
    }
}

/// f32 `[layers, KV heads, positions]`.
pub fn label_tensor(row: &LabelRow, device: Device) -> Tensor {
    let size = [row.layers, row.kv_heads, row.positions].map(i64::from);
    Tensor::from_slice(&row.scores).view(size).to_device(device)
}

/// Raw features of a row, on `device`.
pub fn feature_tensors(row: &FeatureRow, device: Device) -> ContextFeatures {
    let size = [row.layers * row.kv_heads, row.channels, row.positions].map(i64::from);
    ContextFeatures {
        heads_pct: Tensor::from_slice(&row.heads).view(size).to_device(device),
        globals_ct: Tensor::from_slice(&row.globals).view([-1, i64::from(row.positions)]).to_device(device),
    }
}

//! A decoder-only language model: its weights, and what comes before and after the layers.
//!
//! The loop over layers is in `forward`, one sequence over a full cache in `full`, several continuations of
//! one context in [`crate::Branches`].
//!  Text, pruning and what taps compute are other modules' and crates'.
//!
//! Dimension key: s new token, m hidden.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pkv_core::{ModelShape, Seed, hinted};
use pkv_gpu::{Attention, Movement, nats};
use tch::{Device, Kind, Tensor};

use crate::cache::KvCache;
use crate::config::LmConfig;
use crate::layer::{Layer, bytes, rms_norm};
use crate::placement::{Part, PerPart, Placement};
use crate::rope::Rope;
use crate::weights::{Checkpoint, EMBEDDING, HEAD, Places};

/// A target or proxy, loaded in one kind onto one device, or onto several that share its layers.
#[derive(Debug)]
pub struct LanguageModel {
    config: LmConfig,
    placement: Placement,
    kind: Kind,
    embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    final_norm: Tensor,
    /// `[vocab, hidden]`; where the two are tied, the embedding itself, or its copy on the last device.
    head: Tensor,
    pub(crate) ropes: PerPart<Rope>,
    pub(crate) attention: Attention,
}

impl LanguageModel {
    /// Load a checkpoint folder: `config.json` and single or sharded safetensors.
    ///
    /// Weights are streamed to `device` through a few buffers and converted to `kind`.
    ///
    /// # Errors
    /// The model is not supported, a file is missing or damaged, weights do not fit `config.json`,
    /// or the device has too little memory.
    pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        Self::load_over(folder, kind, |shape| Ok(Placement::whole(device, shape.layers)))
    }

    /// As [`LanguageModel::load`], every weight straight to the device that `place` gives its layer.
    ///
    /// # Errors
    /// As [`LanguageModel::load`], and those of `place`.
    pub fn load_over(
        folder: &Path,
        kind: Kind,
        place: impl FnOnce(&ModelShape) -> Result<Placement>,
    ) -> Result<Self> {
        let begun = Instant::now();
        let mut config = LmConfig::from_folder(folder)?;
        let placement = place(&config.shape)?;
        let devices: Vec<Device> = placement.parts().iter().map(|part| part.device).collect();
        let checkpoint = Checkpoint::open(folder)?;
        config.tied_head = is_tied(&config, &checkpoint, folder)?;
        let mut model = Self::empty(config, placement, kind).with_context(|| match &*devices {
            [device] => format!("making room for the model of `{}` on {device:?}", folder.display()),
            _ => format!("making room for the model of `{}` on {devices:?}", folder.display()),
        })?;
        let mut places = model.places();
        let tied = model.config.tied_head;
        if tied && !checkpoint.holds(EMBEDDING) && checkpoint.holds(HEAD) {
            // The one matrix may be stored under either name.
            let matrix = places.remove(EMBEDDING).expect("every model has an embedding");
            places.insert(HEAD.to_owned(), matrix);
        }
        // Old exports store rotary frequencies, cosines and sines; those of tied models may repeat the
        // embedding.
        let ignored = |name: &str| name.contains("rotary_emb.") || (tied && name == HEAD);
        checkpoint.load(places, ignored)?;
        model.complete();
        let secs = begun.elapsed().as_secs_f64();
        tracing::debug!(folder = %folder.display(), shape = %model.shape(), ?kind, ?devices, secs, "model loaded");
        Ok(model)
    }

    /// A model of this shape with random weights: for benchmarks and tests.
    ///
    /// Matrices are normal with deviation 1/sqrt(inputs), norms near 1, biases near 0.
    ///
    /// # Panics
    /// The device has no room for the model, or `kind` is no floating-point kind.
    pub fn random(config: LmConfig, device: Device, kind: Kind, seed: u64) -> Self {
        let placement = Placement::whole(device, config.shape.layers);
        Self::random_over(config, placement, kind, seed)
    }

    /// As [`LanguageModel::random`], the same weights wherever they are placed.
    ///
    /// # Panics
    /// As [`LanguageModel::random`], or the placement is of another number of layers.
    pub fn random_over(config: LmConfig, placement: Placement, kind: Kind, seed: u64) -> Self {
        let mut model = Self::empty(config, placement, kind).expect("room for a random model");
        let mut places: Vec<(String, Tensor)> = model.places().into_iter().collect();
        places.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, mut place) in places {
            tch::manual_seed(Seed(seed).derive(&name, 0) as i64);
            if name.ends_with("norm.weight") {
                let _ = place.normal_(1.0, 0.1);
            } else if place.dim() == 1 {
                let _ = place.normal_(0.0, 0.1);
            } else {
                let inputs = place.size()[1] as f64;
                let _ = place.normal_(0.0, inputs.powf(-0.5));
            }
        }
        model.complete();
        model
    }

    /// Once all places are filled: what checkpoints store once and several places hold.
    fn complete(&mut self) {
        self.layers.iter_mut().for_each(Layer::finish);
        if self.config.tied_head && self.placement.is_split() {
            self.head.copy_(&self.embedding);
        }
    }

    /// Another handle on the same weights, for another thread: tensors may move between threads, not be
    /// shared.
    pub fn share(&self) -> Self {
        Self {
            config: self.config.clone(),
            placement: self.placement.clone(),
            kind: self.kind,
            embedding: self.embedding.shallow_clone(),
            layers: self.layers.iter().map(Layer::share).collect(),
            final_norm: self.final_norm.shallow_clone(),
            head: self.head.shallow_clone(),
            ropes: self.ropes.map(|rope| Ok(rope.share())).expect("handles cost nothing"),
            attention: self.attention,
        }
    }

    fn empty(config: LmConfig, placement: Placement, kind: Kind) -> Result<Self> {
        let (first, device) = (placement.first(), placement.home());
        ensure!(
            placement.layers() == config.shape.layers,
            "the placement is of {} layers, the model has {}",
            placement.layers(),
            config.shape.layers
        );
        // f64 is for references; CUDA's attention kernels do not have it.
        let reference = kind == Kind::Double && !device.is_cuda();
        ensure!(
            reference || matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half),
            "models compute in f32, bf16 or f16 on {device:?}, not in {kind:?}"
        );
        let shape = config.shape;
        let matrix = [shape.vocab as i64, shape.hidden as i64];
        // The embedding is the largest tensor: the first to fail where memory is short.
        let embedding = Tensor::f_empty(matrix, (kind, first))?;
        let head = match config.tied_head && !placement.is_split() {
            true => embedding.shallow_clone(),
            false => Tensor::f_empty(matrix, (kind, device))?,
        };
        Ok(Self {
            layers: (0..shape.layers).map(|l| Layer::empty(&config, placement.of(l), kind)).collect(),
            final_norm: Tensor::empty([shape.hidden as i64], (kind, device)),
            ropes: placement.each(|part| Ok(Rope::new(&config.rope, shape.head_dim, part.device, kind)))?,
            attention: Attention::new(config.architecture.score_scale),
            config,
            placement,
            kind,
            embedding,
            head,
        })
    }

    fn places(&self) -> Places {
        let mut places = Places::new();
        places.insert(EMBEDDING.to_owned(), self.embedding.shallow_clone());
        places.insert("model.norm.weight".to_owned(), self.final_norm.shallow_clone());
        if !self.config.tied_head {
            places.insert(HEAD.to_owned(), self.head.shallow_clone());
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.places(index, &mut places);
        }
        places
    }

    pub fn config(&self) -> &LmConfig {
        &self.config
    }

    pub fn shape(&self) -> ModelShape {
        self.config.shape
    }

    /// Where hidden states and logits come out, and where what is gathered from all layers belongs: the last
    /// of [`LanguageModel::placement`], or the only one.
    pub fn device(&self) -> Device {
        self.placement.home()
    }

    pub const fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Bytes of the weights of each part of the placement.
    pub fn weight_bytes(&self) -> Vec<usize> {
        let last = self.placement.parts().len() - 1;
        let of = |(at, part): (usize, &Part)| {
            let layers: usize = self.layers[part.layers.clone()].iter().map(Layer::bytes).sum();
            let is_one = self.head.data_ptr() == self.embedding.data_ptr();
            let first = if at == 0 { bytes(&self.embedding) } else { 0 };
            let head = if is_one { 0 } else { bytes(&self.head) };
            layers + first + if at == last { head + bytes(&self.final_norm) } else { 0 }
        };
        self.placement.parts().iter().enumerate().map(of).collect()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// An empty cache with room for `capacity` positions.
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(self.shape(), capacity, &self.placement, self.kind)
    }

    /// A cache of `tokens` positions of noise and room for `spare` more: for benchmarks of what follows.
    pub fn noise_cache(&self, tokens: usize, spare: usize) -> KvCache {
        let mut cache = self.new_cache(tokens + spare);
        cache.fill_with_noise(tokens);
        cache
    }

    /// W_O of a layer: `[hidden, query_heads * head_dim]`, input columns grouped by query head.
    pub fn output_projection(&self, layer: usize) -> &Tensor {
        &self.layers[layer].output
    }

    /// Next-token logits, f32 `[.., vocab]`, of hidden states after the final norm.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.products(hidden).to_kind(Kind::Float)
    }

    /// Logits in the model's kind.
    fn products(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.linear::<&Tensor>(&self.head, None);
        match self.config.architecture.logits_divisor {
            1.0 => logits,
            divisor => logits / divisor,
        }
    }

    /// Negative log-likelihood (nats) of the token `next_s`, i64 `[s]` at home, by each of
    /// `hidden_sm`, the hidden states after the final norm: f32 `[s]`. All their logits are held at once.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn nats(&self, hidden_sm: &Tensor, next_s: &Tensor) -> Result<Tensor> {
        nats(&self.products(hidden_sm), next_s)
    }

    /// The move of rotated queries or keys `by` positions further on, on each device.
    pub fn movements(&self, by: i64) -> PerPart<Movement> {
        let _no_grad = tch::no_grad_guard();
        self.ropes.map(|rope| Ok(rope.movement(by))).expect("a movement is a few numbers")
    }

    /// Token ids as a tensor that forwards take: on the host, where they are checked.
    pub fn ids(&self, ids: &[u32]) -> Tensor {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        Tensor::from_slice(&ids)
    }

    /// The first layer's input: rows of the embedding matrix, scaled, `[.., hidden]`.
    ///
    /// # Errors
    /// An id outside the vocabulary, if the ids are on the host.
    pub(crate) fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        ensure!(ids.kind() == Kind::Int64, "token ids must be i64, not {:?}", ids.kind());
        ensure!(ids.numel() > 0, "there is no token to read");
        if ids.device() == Device::Cpu {
            self.check_ids(ids)?;
        }
        let ids = pkv_gpu::upload(ids, self.placement.first())?;
        let rows = Tensor::embedding(&self.embedding, &ids, -1, false, false);
        Ok(match self.config.architecture.embedding_scale {
            1.0 => rows,
            scale => rows * scale,
        })
    }

    fn check_ids(&self, ids: &Tensor) -> Result<()> {
        let (low, high) = (ids.min().int64_value(&[]), ids.max().int64_value(&[]));
        let vocab = self.shape().vocab as i64;
        ensure!(
            0 <= low && high < vocab,
            hinted(
                format!(
                    "token id {} is outside the model's vocabulary of {vocab}",
                    if low < 0 { low } else { high }
                ),
                "tokens and model must be of one family: check the tokenizer's folder"
            )
        );
        Ok(())
    }

    /// The final norm.
    pub(crate) fn finish(&self, hidden: &Tensor) -> Tensor {
        rms_norm(hidden, &self.final_norm, self.config.architecture.norm_eps)
    }
}

/// Whether the embedding is the output matrix too: `tie_word_embeddings`, unless the checkpoint holds both
/// and they differ. Then transformers 5 does not tie them and warns (`PreTrainedModel.tie_weights`), and so
/// does this.
fn is_tied(config: &LmConfig, checkpoint: &Checkpoint, folder: &Path) -> Result<bool> {
    let differ = config.tied_head
        && checkpoint.holds(EMBEDDING)
        && checkpoint.holds(HEAD)
        && !checkpoint.equal(EMBEDDING, HEAD)?;
    if differ {
        tracing::warn!(
            folder = %folder.display(),
            "config.json says `tie_word_embeddings`, but the weights hold an lm_head.weight that differs from the \
             embedding: they are not tied, lm_head.weight is used, as transformers 5 does. Set \
             `tie_word_embeddings` to false if that is right"
        );
    }
    Ok(config.tied_head && !differ)
}

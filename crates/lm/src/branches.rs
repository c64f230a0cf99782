//! Several continuations of one prefilled context, each blind to KV pairs of its own choice.
//!
//! The context's keys and values are stored once and shared by all branches; hiding a pair gives
//! what evicting it would give, exactly, because a softmax does not know pairs it cannot see. That
//! makes one forward enough for all retention ratios and questions of a context. Memory: the
//! branches' own tokens and one block of attention weights.
//!
//! Dimension key: n keep mask, r row (mask x question, mask-major), s new token, l layer, h KV head,
//! g query heads per KV head, t context position, o own token of a row, d head_dim.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use tch::{Kind, Tensor};

use crate::attention::logits;
use crate::cache::KvCache;
use crate::kept::KeptPairs;
use crate::model::LanguageModel;

/// Attention weights held at a time: 64 Mi f32 are 256 MiB.
const BLOCK_ELEMENTS: i64 = 64 << 20;

/// Continuations of one context, one per keep mask and question.
pub struct Branches {
    /// The context, shared: per layer `[kv_heads, t, head_dim]`.
    context_keys: Vec<Tensor>,
    context_values: Vec<Tensor>,
    /// Pairs that are hidden: per layer bool `[kv_heads, n, t]`; `None` where all are seen.
    hidden_lhnt: Option<Vec<Tensor>>,
    /// The pairs that are seen, where gathering them is cheaper than hiding the others.
    kept: Option<KeptPairs>,
    questions: usize,
    /// Each row's own tokens: per layer `[kv_heads, rows, capacity, head_dim]`.
    own_keys: Vec<Tensor>,
    own_values: Vec<Tensor>,
    /// Own tokens of each row.
    lengths: Vec<usize>,
    capacity: usize,
    /// Position of a row's first own token.
    first_position: usize,
}

impl Branches {
    /// Branch off `cache`, which is shared, not copied: it must not be written or truncated and
    /// written again while the branches are in use.
    ///
    /// # Shapes
    /// - `keep`: bool `[n_masks, layers, kv_heads, cache.len()]`, true where the pair is seen; `None`
    ///   is one mask that sees all
    /// - rows: `n_masks * questions`, mask-major; `capacity` is each row's room for own tokens
    ///
    /// # Errors
    /// The mask is of another shape or not bool; no question.
    pub fn new(cache: &KvCache, keep: Option<&Tensor>, questions: usize, capacity: usize) -> Result<Self> {
        ensure!(questions > 0 && capacity > 0, "branches need a question and room for a token");
        let layers = cache.layers();
        let context_keys: Vec<Tensor> = (0..layers).map(|l| cache.keys(l)).collect();
        let context_values: Vec<Tensor> = (0..layers).map(|l| cache.values(l)).collect();
        let (heads, t, d) = context_keys[0].size3()?;
        let options = (context_keys[0].kind(), context_keys[0].device());
        let (mut masks, mut kept) = (1, None);
        let hidden_lhnt = match keep {
            None => None,
            Some(keep) => {
                let size = keep.size();
                ensure!(
                    size.len() == 4 && size[0] > 0 && size[1..] == [layers as i64, heads, t],
                    "expected a keep mask of shape [masks, {layers}, {heads}, {t}], found {size:?}"
                );
                ensure!(keep.kind() == Kind::Bool, "a keep mask must be bool, not {:?}", keep.kind());
                masks = size[0];
                kept = KeptPairs::gather(&context_keys, &context_values, keep);
                let hidden = keep.to_device(options.1).logical_not().permute([1, 2, 0, 3]).contiguous();
                Some((0..layers).map(|l| hidden.get(l as i64)).collect())
            }
        };
        let rows = masks * questions as i64;
        let own = || -> Vec<Tensor> {
            // Zeros: what lies behind a row's end is masked, but must be finite.
            (0..layers).map(|_| Tensor::zeros([heads, rows, capacity as i64, d], options)).collect()
        };
        Ok(Self {
            context_keys,
            context_values,
            hidden_lhnt,
            kept,
            questions,
            own_keys: own(),
            own_values: own(),
            lengths: vec![0; rows as usize],
            capacity,
            first_position: cache.next_position(),
        })
    }

    /// Number of branches: masks times questions.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Own tokens of each row.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Drop each row's own tokens from `lengths[row]` on: padding, or an answer that was tried.
    ///
    /// # Errors
    /// Another number of rows, or a length beyond what the row holds.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        ensure!(lengths.len() == self.rows(), "expected {} lengths, found {}", self.rows(), lengths.len());
        for (row, (new, old)) in lengths.iter().zip(&self.lengths).enumerate() {
            ensure!(new <= old, "row {row} holds {old} tokens, it cannot be cut to {new}");
        }
        self.lengths.copy_from_slice(lengths);
        Ok(())
    }
}

/// What one forward of all branches needs in every layer.
struct Step {
    /// i64 `[rows, s]`: where in its row's own tokens each new token goes.
    slot_rs: Tensor,
    /// bool `[rows, s, own]`: own tokens that come later than the query, padding included.
    later_rso: Tensor,
    /// Own tokens to look at: the longest row's.
    own: i64,
}

impl LanguageModel {
    /// Read new tokens in every branch and append them to it.
    ///
    /// # Shapes
    /// - `ids`: i64 `[rows, s]`, mask-major. Shorter rows are padded on the right with any id: no
    ///   token sees a later one, so padding changes only its own hidden states;
    ///   [`Branches::truncate`] drops it before the row goes on
    /// - returns hidden states after the final norm, `[rows, s, hidden]`
    ///
    /// # Errors
    /// Another number of rows, no room, or an id outside the vocabulary.
    pub fn forward_branches(&self, ids: &Tensor, branches: &mut Branches) -> Result<Tensor> {
        let size = ids.size();
        ensure!(
            size.len() == 2 && size[0] == branches.rows() as i64,
            "expected ids of shape [{}, tokens], found {size:?}",
            branches.rows()
        );
        ensure!(branches.own_keys.len() == self.layers.len(), "the branches are of another model");
        let s = size[1];
        let longest = branches.lengths.iter().max().copied().unwrap_or(0);
        ensure!(
            longest + s as usize <= branches.capacity,
            hinted(
                format!("a branch holds {longest} of {} own tokens; {s} more do not fit", branches.capacity),
                "make the branches with a larger capacity"
            )
        );
        let mut hidden_rsm = self.embed(ids)?;
        let step = branches.step(s, self.device());
        let rotation = self.rope.at(&(&step.slot_rs + branches.first_position as i64).to_kind(Kind::Float));
        for (index, layer) in self.layers.iter().enumerate() {
            let new = layer.project(&layer.normed(&hidden_rsm), &rotation)?;
            let heads_first = |x: &Tensor| x.transpose(-3, -2);
            branches.write(index, &step.slot_rs, &heads_first(&new.k), &heads_first(&new.v));
            let attended = branches.attend(index, &heads_first(&new.q).contiguous(), &step);
            hidden_rsm = layer.finish_block(&hidden_rsm, &heads_first(&attended))?;
        }
        branches.lengths.iter_mut().for_each(|n| *n += s as usize);
        Ok(self.finish(&hidden_rsm))
    }
}

impl Branches {
    fn step(&self, s: i64, device: tch::Device) -> Step {
        let lengths: Vec<i64> = self.lengths.iter().map(|n| *n as i64).collect();
        let own = lengths.iter().max().copied().unwrap_or(0) + s;
        let options = (Kind::Int64, device);
        let slot_rs =
            Tensor::from_slice(&lengths).to_device(device).unsqueeze(1) + Tensor::arange(s, options);
        let later_rso = Tensor::arange(own, options).gt_tensor(&slot_rs.unsqueeze(-1));
        Step { slot_rs, later_rso, own }
    }

    /// Put new keys and values `[rows, kv_heads, s, head_dim]` at their rows' ends.
    fn write(&mut self, layer: usize, slot_rs: &Tensor, k_rhsd: &Tensor, v_rhsd: &Tensor) {
        for (own, new) in [(&mut self.own_keys[layer], k_rhsd), (&mut self.own_values[layer], v_rhsd)] {
            let new_hrsd = new.transpose(0, 1);
            let index = slot_rs.unsqueeze(0).unsqueeze(-1).expand_as(&new_hrsd);
            let _ = own.scatter_(2, &index, &new_hrsd);
        }
    }

    /// Attention of all rows over what they see of the context and over their own tokens.
    ///
    /// Rows are taken in blocks, so that the weights of one block are all that is stored. One softmax
    /// runs over both parts: a head whose context is hidden whole still has its own tokens.
    ///
    /// # Shapes
    /// - `q_rqsd`: `[rows, query_heads, s, head_dim]`
    /// - returns `[rows, query_heads, s, head_dim]`
    fn attend(&self, layer: usize, q_rqsd: &Tensor, step: &Step) -> Tensor {
        let (rows, heads_q, s, d) = q_rqsd.size4().expect("queries have four axes");
        let (k_htd, v_htd) = (&self.context_keys[layer], &self.context_values[layer]);
        let (heads, t) = (k_htd.size()[0], k_htd.size()[1]);
        let group = heads_q / heads;
        if let Some(kept) = &self.kept {
            return self.attend_kept(kept, layer, q_rqsd, step);
        }
        let per_row = heads_q * s * (t + step.own);
        let block = (BLOCK_ELEMENTS / per_row).clamp(1, rows);
        let scale = (d as f64).powf(-0.5);
        // Query heads and tokens of a row are rows of its KV head's matrix product.
        let q_hrxd = (q_rqsd * scale).view([rows, heads, group * s, d]).transpose(0, 1);
        let own = |all: &Tensor, first, n| all.narrow(1, first, n).narrow(2, 0, step.own);
        let out: Vec<Tensor> = (0..rows)
            .step_by(block as usize)
            .map(|first| {
                let n = block.min(rows - first);
                let q = q_hrxd.narrow(1, first, n);
                // The context's keys are one matrix for all rows: no copy per row.
                let flat = q.reshape([heads, n * group * s, d]);
                let mut context = logits(&flat, &k_htd.transpose(1, 2)).view([heads, n, group * s, t]);
                if let Some(hidden) = &self.hidden_lhnt {
                    let mask_r = Tensor::arange_start(first, first + n, (Kind::Int64, q.device()))
                        .divide_scalar_mode(self.questions as i64, "floor");
                    let hidden_hrt = hidden[layer].index_select(1, &mask_r);
                    let _ = context.masked_fill_(&hidden_hrt.unsqueeze(2), f64::NEG_INFINITY);
                }
                let own_hrxo = self.own_logits(layer, &q, first, step);
                let weights =
                    Tensor::cat(&[&context, &own_hrxo], -1).softmax(-1, Kind::Float).to_kind(q.kind());
                let seen = weights.narrow(-1, 0, t).reshape([heads, n * group * s, t]).matmul(v_htd);
                let recent = weights.narrow(-1, t, step.own).matmul(&own(&self.own_values[layer], first, n));
                (seen.view([heads, n, group * s, d]) + recent).transpose(0, 1)
            })
            .collect();
        Tensor::cat(&out, 0).reshape([rows, heads_q, s, d])
    }

    /// As [`Branches::attend`], over gathered pairs.
    fn attend_kept(&self, kept: &KeptPairs, layer: usize, q_rqsd: &Tensor, step: &Step) -> Tensor {
        let (rows, heads_q, s, d) = q_rqsd.size4().expect("queries have four axes");
        let heads = self.context_keys[layer].size()[0];
        let group = heads_q / heads;
        let masks = rows / self.questions as i64;
        let scale = (d as f64).powf(-0.5);
        let q_hrxd = (q_rqsd * scale).view([rows, heads, group * s, d]).transpose(0, 1).contiguous();
        let own_hrxo = self.own_logits(layer, &q_hrxd, 0, step);
        let (seen, weights) = kept.attend(
            layer,
            &q_hrxd.view([heads, masks, -1, d]),
            &own_hrxo.view([heads, masks, -1, step.own]),
        );
        let own_values = self.own_values[layer].narrow(2, 0, step.own);
        let recent = weights.view([heads, rows, group * s, step.own]).matmul(&own_values);
        (seen.view([heads, rows, group * s, d]) + recent).transpose(0, 1).reshape([rows, heads_q, s, d])
    }

    /// Logits of own tokens for the rows from `first` on, later ones at minus infinity.
    ///
    /// # Shapes
    /// - `q_hrxd`: `[kv_heads, n, group * s, d]`, scaled
    /// - returns `[kv_heads, n, group * s, own]`
    fn own_logits(&self, layer: usize, q_hrxd: &Tensor, first: i64, step: &Step) -> Tensor {
        let (heads, n, x, d) = q_hrxd.size4().expect("queries have four axes");
        let keys = self.own_keys[layer].narrow(1, first, n).narrow(2, 0, step.own);
        let keys = keys.flatten(0, 1).transpose(1, 2);
        let mut own_hrxo = logits(&q_hrxd.reshape([heads * n, x, d]), &keys).view([heads, n, x, step.own]);
        let s = step.slot_rs.size()[1];
        let later = step.later_rso.narrow(0, first, n).unsqueeze(1);
        let later = later.expand([n, x / s, s, step.own], false).reshape([1, n, x, step.own]);
        own_hrxo.masked_fill_(&later, f64::NEG_INFINITY)
    }
}

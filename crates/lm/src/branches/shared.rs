//! Branches whose context is stored once: a row's mask hides what it may not see.
//!
//! Hiding a pair gives what evicting it would give, exactly, because a softmax does not know pairs it
//! cannot see. Memory: the branches' own tokens and one block of attention weights.
//!
//! Dimension key: as [`super`]; g query heads per KV head, o own token of a row.

use std::ops::Range;

use anyhow::{Result, ensure};
use pkv_gpu::{Projected, logits};
use tch::{Kind, Tensor};

use crate::cache::KvCache;
use crate::forward::{KvStore, LayerInput};
use crate::kept::KeptPairs;
use crate::model::LanguageModel;
use crate::placement::{PerPart, Placement};
use crate::rope::Rope;

/// Attention weights held at a time: 64 Mi f32 are 256 MiB.
const BLOCK_ELEMENTS: i64 = 64 << 20;

/// Rows of one context, mask-major.
pub(super) struct SharedBranches {
    placement: Placement,
    /// The context, shared: per layer `[kv_heads, t, head_dim]`.
    context_keys: Vec<Tensor>,
    context_values: Vec<Tensor>,
    /// Pairs that are hidden: per layer bool `[kv_heads, n, t]`; `None` where all are seen.
    hidden_lhnt: Option<Vec<Tensor>>,
    /// The pairs that are seen, where gathering them is cheaper than hiding the others.
    kept: Option<KeptPairs>,
    /// Which mask hides pairs of each row; ascending.
    masks: Vec<usize>,
    /// Each row's own tokens: per layer `[kv_heads, rows, capacity, head_dim]`.
    own_keys: Vec<Tensor>,
    own_values: Vec<Tensor>,
    /// Own tokens of each row.
    pub lengths: Vec<usize>,
    /// Position of a row's first own token.
    first_position: usize,
}

impl SharedBranches {
    /// As [`super::Branches::with_storage`].
    pub fn new(cache: &KvCache, keep: Option<&Tensor>, questions: usize, capacity: usize) -> Result<Self> {
        let layers = cache.layers();
        let context_keys: Vec<Tensor> = (0..layers).map(|l| cache.keys(l)).collect();
        let context_values: Vec<Tensor> = (0..layers).map(|l| cache.values(l)).collect();
        let (heads, t, d) = context_keys[0].size3()?;
        let kind = context_keys[0].kind();
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
                let hidden = keep.logical_not().permute([1, 2, 0, 3]).contiguous();
                let of_layer = |(l, keys): (usize, &Tensor)| hidden.get(l as i64).to_device(keys.device());
                Some(context_keys.iter().enumerate().map(of_layer).collect())
            }
        };
        let rows = masks * questions as i64;
        let own = || -> Vec<Tensor> {
            // Zeros: what follows a row's end is masked, but must be finite.
            let size = [heads, rows, capacity as i64, d];
            context_keys.iter().map(|keys| Tensor::zeros(size, (kind, keys.device()))).collect()
        };
        let (own_keys, own_values) = (own(), own());
        Ok(Self {
            placement: cache.placement().clone(),
            context_keys,
            context_values,
            hidden_lhnt,
            kept,
            masks: (0..rows as usize).map(|row| row / questions).collect(),
            own_keys,
            own_values,
            lengths: vec![0; rows as usize],
            first_position: cache.next_position(),
        })
    }

    /// Keep these rows alone; `rows` ascends.
    pub fn retain(&mut self, rows: &[usize]) {
        let index: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let index = Tensor::from_slice(&index);
        for own in self.own_keys.iter_mut().chain(&mut self.own_values) {
            *own = own.index_select(1, &index.to_device(own.device()));
        }
        self.masks = rows.iter().map(|&row| self.masks[row]).collect();
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect();
    }

    /// Masks that rows are left of, each with its rows.
    fn rows_by_mask(&self) -> Vec<(usize, Range<usize>)> {
        let mut all: Vec<(usize, Range<usize>)> = Vec::new();
        for (row, mask) in self.masks.iter().enumerate() {
            match all.last_mut() {
                Some((last, rows)) if last == mask => rows.end = row + 1,
                _ => all.push((*mask, row..row + 1)),
            }
        }
        all
    }
}

/// Data of one forward pass of all branches, for every layer of a part.
struct Step {
    /// i64 `[rows, s]`: where in its row's own tokens each new token goes.
    slot_rs: Tensor,
    /// bool `[rows, s, own]`: own tokens that come later than the query, padding included.
    later_rso: Tensor,
    /// i64 `[rows]`: which mask hides pairs of each row.
    mask_r: Tensor,
    /// Own tokens to look at: the longest row's.
    own: i64,
    /// Scale of products of queries and keys.
    scale: f64,
}

impl LanguageModel {
    /// As [`LanguageModel::forward_branches`].
    pub(super) fn forward_shared(&self, ids: &Tensor, branches: &mut SharedBranches) -> Result<Tensor> {
        let s = ids.size()[1];
        ensure!(branches.own_keys.len() == self.layers.len(), "the branches are of another model");
        let hidden_rsm = self.embed(ids)?;
        let step = branches.step(s, self)?;
        let first = branches.first_position as i64;
        let rotation = |rope: &Rope, step: &Step| Ok(rope.at(&(&step.slot_rs + first).to_kind(Kind::Float)));
        let rotations = self.ropes.zip(&step, rotation)?;
        let hidden_rsm =
            self.run(hidden_rsm, &rotations, &mut SharedStore { branches: &mut *branches, step }, true)?;
        branches.lengths.iter_mut().for_each(|n| *n += s as usize);
        Ok(self.finish(&hidden_rsm))
    }
}

/// Branches and where their new tokens go.
struct SharedStore<'a> {
    branches: &'a mut SharedBranches,
    step: PerPart<Step>,
}

impl KvStore for SharedStore<'_> {
    fn attend(&mut self, input: &LayerInput, new: &Projected, _: bool) -> Result<Option<Tensor>> {
        let heads_first = |x: &Tensor| x.transpose(-3, -2);
        let Self { branches, step } = self;
        let step = step.of(input.layer);
        branches.write(input.layer, &step.slot_rs, &heads_first(&new.k), &heads_first(&new.v));
        let attended = branches.attend(input.layer, &heads_first(&new.q).contiguous(), step);
        Ok(Some(heads_first(&attended)))
    }
}

impl SharedBranches {
    fn step(&self, s: i64, model: &LanguageModel) -> Result<PerPart<Step>> {
        let lengths: Vec<i64> = self.lengths.iter().map(|n| *n as i64).collect();
        let own = lengths.iter().max().copied().unwrap_or(0) + s;
        let masks: Vec<i64> = self.masks.iter().map(|mask| *mask as i64).collect();
        self.placement.each(|part| {
            let options = (Kind::Int64, part.device);
            let on = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(part.device);
            let slot_rs = on(&lengths).unsqueeze(1) + Tensor::arange(s, options);
            let later_rso = Tensor::arange(own, options).gt_tensor(&slot_rs.unsqueeze(-1));
            Ok(Step { slot_rs, later_rso, mask_r: on(&masks), own, scale: model.attention.scale })
        })
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
        // Query heads and tokens of a row are rows of its KV head's matrix product.
        let q_hrxd = (q_rqsd * step.scale).view([rows, heads, group * s, d]).transpose(0, 1);
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
                    let mask_r = step.mask_r.narrow(0, first, n);
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

    /// As [`SharedBranches::attend`], over gathered pairs.
    fn attend_kept(&self, kept: &KeptPairs, layer: usize, q_rqsd: &Tensor, step: &Step) -> Tensor {
        let (rows, heads_q, s, d) = q_rqsd.size4().expect("queries have four axes");
        let heads = self.context_keys[layer].size()[0];
        let group = heads_q / heads;
        let q_hrxd = (q_rqsd * step.scale).view([rows, heads, group * s, d]).transpose(0, 1).contiguous();
        let own_hrxo = self.own_logits(layer, &q_hrxd, 0, step);
        let (seen, weights) = kept.attend(layer, &q_hrxd, &own_hrxo, &self.rows_by_mask());
        let own_values = self.own_values[layer].narrow(2, 0, step.own);
        let recent = weights.matmul(&own_values);
        (seen + recent).transpose(0, 1).reshape([rows, heads_q, s, d])
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

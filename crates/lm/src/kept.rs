//! Gathers the KV pairs that each mask keeps, so that attention on a CPU costs only those.
//!
//! Hiding pairs by a mask costs as much as seeing them. Where most are hidden it is cheaper to copy
//! the others together once, head by head, because every head of every mask keeps another number.
//! On CUDA that would be thousands of small kernels; there the mask is faster.
//!
//! Dimension key: n keep mask, r row, l layer, h KV head, t context position, c kept position, x query of a
//! row and KV head, o own token of a row, d head_dim.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

/// Most elements of keys and values that are copied: 128 Mi f32 are 512 MiB.
const GATHERED_ELEMENTS: f64 = (128 << 20) as f64;
/// Above this share kept, a mask costs no more.
const GATHERED_SHARE: f64 = 0.5;

/// Kept keys and values of every layer, KV head and mask.
pub(crate) struct KeptPairs {
    /// `[layer][KV head][mask]`.
    pairs: Vec<Vec<Vec<Pairs>>>,
}

/// `[c, d]` each.
struct Pairs {
    keys: Tensor,
    values: Tensor,
}

impl KeptPairs {
    /// Copy what `keep_nlht` (bool) leaves of the layers' keys and values `[kv_heads, t, d]`; `None`
    /// where a mask is the better way.
    pub(crate) fn gather(keys: &[Tensor], values: &[Tensor], keep_nlht: &Tensor) -> Option<Self> {
        let head_dim = keys.first()?.size()[2];
        if keys[0].device() != Device::Cpu || keep_nlht.numel() == 0 {
            return None;
        }
        let kept = keep_nlht.sum(Kind::Int64).int64_value(&[]) as f64;
        if kept > GATHERED_SHARE * keep_nlht.numel() as f64
            || kept * 2.0 * head_dim as f64 > GATHERED_ELEMENTS
        {
            return None;
        }
        let (masks, layers, heads, _) = keep_nlht.size4().ok()?;
        let pairs = |l: i64, h: i64, n: i64| {
            let index = keep_nlht.get(n).get(l).get(h).nonzero().squeeze_dim(1);
            let pick = |all: &[Tensor]| all[l as usize].get(h).index_select(0, &index);
            Pairs { keys: pick(keys), values: pick(values) }
        };
        let head = |l, h| (0..masks).map(|n| pairs(l, h, n)).collect();
        let layer = |l| (0..heads).map(|h| head(l, h)).collect();
        Some(Self { pairs: (0..layers).map(layer).collect() })
    }

    /// One softmax over kept pairs and own tokens: the kept values' part of the output, and the
    /// weights of own tokens.
    ///
    /// # Shapes
    /// - `q_hrxd`: `[kv_heads, rows, x, d]`, scaled
    /// - `own_hrxo`: `[kv_heads, rows, x, own]`, logits of own tokens, later ones at minus infinity
    /// - `rows_by_mask`: masks and the rows that see their pairs, all rows together
    /// - returns `[kv_heads, rows, x, d]` and `[kv_heads, rows, x, own]`, kind of the queries
    pub(crate) fn attend(
        &self,
        layer: usize,
        q_hrxd: &Tensor,
        own_hrxo: &Tensor,
        rows_by_mask: &[(usize, Range<usize>)],
    ) -> (Tensor, Tensor) {
        let own = own_hrxo.size()[3];
        let seen_hrxd = q_hrxd.empty_like();
        let weights_hrxo = Tensor::empty(own_hrxo.size(), (q_hrxd.kind(), q_hrxd.device()));
        for (h, masks) in self.pairs[layer].iter().enumerate() {
            for (mask, rows) in rows_by_mask {
                let at = |all: &Tensor| {
                    all.get(h as i64).narrow(0, rows.start as i64, rows.len() as i64).flatten(0, 1)
                };
                let Pairs { keys, values } = &masks[*mask];
                let kept = keys.size()[0];
                let logits_xc = at(q_hrxd).matmul(&keys.transpose(0, 1));
                let all = Tensor::cat(&[logits_xc, at(own_hrxo)], -1);
                let weights = all.softmax(-1, Kind::Float).to_kind(q_hrxd.kind());
                at(&seen_hrxd).copy_(&weights.narrow(-1, 0, kept).matmul(values));
                at(&weights_hrxo).copy_(&weights.narrow(-1, kept, own));
            }
        }
        (seen_hrxd, weights_hrxo)
    }
}

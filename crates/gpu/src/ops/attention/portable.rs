//! Attention kernels of CPUs and of f32 on CUDA: no shared KV heads, heads first in memory.

use std::ops::Range;

use anyhow::Result;
use tch::Tensor;

use super::Part;

/// New tokens after `start` cached ones; shapes as [`super::attend`].
pub fn causal(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, start: i64, scale: f64) -> Result<Part> {
    let s = q_sqd.size()[0];
    if s == 1 {
        return Ok(rectangle(q_sqd, k_hkd, v_hkd, scale));
    }
    let part = |x: &Tensor, first, n| x.narrow(1, first, n);
    let mut all = square(q_sqd, &part(k_hkd, start, s), &part(v_hkd, start, s), scale);
    if start > 0 {
        all.add(0, &rectangle(q_sqd, &part(k_hkd, 0, start), &part(v_hkd, 0, start), scale))?;
    }
    Ok(all)
}

/// Each segment over itself; shapes as [`super::attend_segments`].
pub fn squares(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    segments: &[Range<usize>],
    scale: f64,
) -> Part {
    let one = |range: &Range<usize>| {
        let rows = |x: &Tensor| x.narrow(0, range.start as i64, range.len() as i64);
        let heads_first = |x: &Tensor| rows(x).transpose(0, 1).contiguous();
        square(&rows(q_rqd), &heads_first(k_rhd), &heads_first(v_rhd), scale)
    };
    if let [range] = segments {
        return one(range);
    }
    let (outs, lses): (Vec<_>, Vec<_>) =
        segments.iter().map(one).map(|part| (part.out_rqd, part.lse_qr)).unzip();
    Part { out_rqd: Tensor::cat(&outs, 0), lse_qr: Tensor::cat(&lses, 1) }
}

/// All rows over all keys.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`; `k_hkd`, `v_hkd`: `[kv_heads, keys, head_dim]`
pub fn rectangle(q_rqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, scale: f64) -> Part {
    let (rows, q_heads, d) = q_rqd.size3().expect("queries have three axes");
    let kv_heads = k_hkd.size()[0];
    // Query heads of a KV head are further rows of it: keys are not copied.
    let folded = q_rqd.transpose(0, 1).contiguous().view([kv_heads, q_heads / kv_heads * rows, d]);
    let (out, lse) = kernel(&folded, k_hkd, v_hkd, false, scale);
    Part { out_rqd: out.reshape([q_heads, rows, d]).transpose(0, 1), lse_qr: lse.reshape([q_heads, rows]) }
}

/// Merge `other` into outputs and log-sum-exps, in place; shapes as [`Part`].
pub fn merge(out_rqd: &mut Tensor, lse_qr: &Tensor, other: &Part) {
    // exp(a) / (exp(a) + exp(b)) = sigmoid(a - b)
    let weight_qr = (&other.lse_qr - lse_qr).sigmoid().to_kind(out_rqd.kind());
    let weight_rqd = weight_qr.transpose(0, 1).unsqueeze(-1).expand_as(&*out_rqd);
    let _ = out_rqd.lerp_tensor_(&other.out_rqd, &weight_rqd);
    lse_qr.shallow_clone().copy_(&lse_qr.logaddexp(&other.lse_qr));
}

/// As many keys as rows, causal.
fn square(q_sqd: &Tensor, k_hsd: &Tensor, v_hsd: &Tensor, scale: f64) -> Part {
    let group = q_sqd.size()[1] / k_hsd.size()[0];
    let q_qsd = q_sqd.transpose(0, 1).contiguous();
    let (out, lse) = kernel(&q_qsd, &repeat_heads(k_hsd, group), &repeat_heads(v_hsd, group), true, scale);
    Part { out_rqd: out.transpose(0, 1), lse_qr: lse }
}

/// One fused attention kernel: output and the log-sum-exp of its rows.
///
/// # Shapes
/// - `q`: `[heads, rows, head_dim]`; `k`, `v`: `[heads, keys, head_dim]`; causal needs rows = keys
/// - returns `[heads, rows, head_dim]` and f32 `[heads, rows]`
fn kernel(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool, scale: f64) -> (Tensor, Tensor) {
    let rows = q.size()[1];
    let (q, k, v) = (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0));
    if q.device().is_cuda() {
        let (out, lse, _, _) = Tensor::internal_scaled_dot_product_efficient_attention::<Tensor>(
            &q, &k, &v, None, true, 0.0, causal, scale,
        );
        // The kernel pads its log-sum-exps to whole tiles.
        (out.squeeze_dim(0), lse.squeeze_dim(0).narrow(1, 0, rows))
    } else {
        let (out, lse) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(
            &q, &k, &v, 0.0, causal, None, scale,
        );
        (out.squeeze_dim(0), lse.squeeze_dim(0))
    }
}

/// Give each query head its own copy of its KV head: `[heads, k, d]` to `[heads * group, k, d]`.
fn repeat_heads(x: &Tensor, group: i64) -> Tensor {
    if group == 1 {
        return x.shallow_clone();
    }
    let (heads, k, d) = x.size3().expect("keys have three axes");
    x.unsqueeze(1).expand([heads, group, k, d], false).reshape([heads * group, k, d])
}

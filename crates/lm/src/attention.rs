//! Causal attention of new tokens over a cache, in memory that grows with the cache only.
//!
//! New tokens behind a cache split into two parts that need no mask: the rectangle over the cache,
//! which every query sees whole, and the causal square over the new tokens. Each is one fused
//! kernel; their log-sum-exps merge them exactly. No matrix of queries times keys is ever stored.
//!
//! Dimension key: q query head, h KV head, g query heads per KV head, s new token, k key, d head_dim.

use tch::{Kind, Tensor};

/// Attention output of new tokens that follow `start` cached ones.
///
/// Softmax of queries times keys over sqrt(head_dim), causal among the new tokens.
///
/// # Shapes
/// - `q_qsd`: `[query_heads, s, head_dim]`, contiguous
/// - `k_hkd`, `v_hkd`: `[kv_heads, start + s, head_dim]`, kind and device of the queries
/// - returns `[query_heads, s, head_dim]`, same kind
pub(crate) fn causal(q_qsd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, start: usize) -> Tensor {
    let (q_heads, s, d) = q_qsd.size3().expect("queries have three axes");
    let kv_heads = k_hkd.size()[0];
    let (start, group) = (start as i64, q_heads / kv_heads);
    // Query heads of a KV head are further rows of it: nothing is copied.
    let rows = || q_qsd.view([kv_heads, group * s, d]);
    if s == 1 {
        // Not by libtorch's choice: cuDNN would plan anew for every length of the cache, 50 ms each.
        return kernel(&rows(), k_hkd, v_hkd, false).0.reshape([q_heads, s, d]);
    }
    if start == 0 {
        return whole(q_qsd, k_hkd, v_hkd, group);
    }
    let new = |x: &Tensor| repeat_heads(&x.narrow(1, start, s), group);
    let (square, square_lse) = kernel(q_qsd, &new(k_hkd), &new(v_hkd), true);
    let (rect, rect_lse) = kernel(&rows(), &k_hkd.narrow(1, 0, start), &v_hkd.narrow(1, 0, start), false);
    let rect = rect.reshape([q_heads, s, d]);
    // exp(a) / (exp(a) + exp(b)) = sigmoid(a - b)
    let weight = (rect_lse.reshape([q_heads, s]) - square_lse).sigmoid().unsqueeze(-1);
    square.lerp_tensor(&rect, &weight.to_kind(rect.kind()).expand_as(&rect))
}

/// A sequence from its first token: no log-sum-exp is needed, so libtorch may pick the kernel.
fn whole(q_qsd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, group: i64) -> Tensor {
    // Neither the CPU nor CUDA in f32 has a kernel that shares KV heads and stores no weights.
    if !q_qsd.device().is_cuda() || q_qsd.kind() == Kind::Float {
        return kernel(q_qsd, &repeat_heads(k_hkd, group), &repeat_heads(v_hkd, group), true).0;
    }
    let [q, k, v] = [q_qsd, k_hkd, v_hkd].map(|x| x.unsqueeze(0));
    Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, group > 1)
        .squeeze_dim(0)
}

/// One fused attention kernel: output and the log-sum-exp of its rows.
///
/// # Shapes
/// - `q`: `[heads, rows, head_dim]`; `k`, `v`: `[heads, keys, head_dim]`; causal needs rows = keys
/// - returns `[heads, rows, head_dim]` and f32 `[heads, rows]`
fn kernel(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> (Tensor, Tensor) {
    let rows = q.size()[1];
    let (q, k, v) = (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0));
    if q.device().is_cuda() {
        let (out, lse, _, _) = Tensor::internal_scaled_dot_product_efficient_attention::<Tensor>(
            &q, &k, &v, None, true, 0.0, causal, None,
        );
        // The kernel pads its log-sum-exps to whole tiles.
        (out.squeeze_dim(0), lse.squeeze_dim(0).narrow(1, 0, rows))
    } else {
        let (out, lse) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(
            &q, &k, &v, 0.0, causal, None, None,
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

/// Products of queries and keys, `[n, rows, d]` by `[n, d, keys]`; f32 where the device can.
///
/// In bf16 a logit of 10 is off by up to 0.03, its weight by 3%.
pub(crate) fn logits(q: &Tensor, k: &Tensor) -> Tensor {
    let half = matches!(q.kind(), Kind::BFloat16 | Kind::Half);
    if half && q.device().is_cuda() { q.bmm_dtype(k, Kind::Float) } else { q.bmm(k) }
}

//! Attention by its definition, in f64 and with whole matrices: a reference for tests.
//!
//! Dimension key: q query head, h KV head, s row, k key, d head_dim.

use tch::{Device, Kind, Tensor};

/// Reproducible, normal, the same on each device.
pub fn random(seed: i64, size: &[i64], kind: Kind, device: Device) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(device).to_kind(kind)
}

pub fn exact(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Double)
}

/// Output `[s, query_heads, d]` and log-sum-exp `[query_heads, s]` of rows that see `seen_sk`, bool
/// `[s, keys]`; queries are `[s, query_heads, d]`, keys and values `[kv_heads, keys, d]`. On the CPU,
/// wherever they come from.
pub fn attention(
    q_sqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    scale: f64,
    seen_sk: &Tensor,
) -> [Tensor; 2] {
    let [q_sqd, k_hkd, v_hkd, seen_sk] = [q_sqd, k_hkd, v_hkd, seen_sk].map(|x| x.to_device(Device::Cpu));
    let (weights, lse) = softmax(&q_sqd.transpose(0, 1), &k_hkd, scale, &seen_sk);
    [weights.matmul(&spread(&v_hkd, q_sqd.size()[1])).transpose(0, 1), lse]
}

/// Softmax over the keys that a row sees, and its log-sum-exp, where the tensors are.
///
/// `q_qsd`: `[query_heads, s, d]`, `k_hkd`: `[kv_heads, keys, d]`, `seen_sk`: bool `[s, keys]`; returns
/// `[query_heads, s, keys]` and `[query_heads, s]`.
pub fn softmax(q_qsd: &Tensor, k_hkd: &Tensor, scale: f64, seen_sk: &Tensor) -> (Tensor, Tensor) {
    let logits = exact(q_qsd).matmul(&spread(k_hkd, q_qsd.size()[0]).transpose(1, 2)) * scale;
    let logits = logits.masked_fill(&seen_sk.logical_not(), f64::NEG_INFINITY);
    (logits.softmax(-1, None), logits.logsumexp([-1i64], false))
}

/// A KV head for each query head.
pub fn spread(x_hkd: &Tensor, query_heads: i64) -> Tensor {
    exact(x_hkd).repeat_interleave_self_int(query_heads / x_hkd.size()[0], 0, None)
}

/// Bool `[rows, keys]`, true where the key is at most `row + first`.
pub fn up_to(first: i64, rows: i64, keys: i64, device: Device) -> Tensor {
    Tensor::ones([rows, keys], (Kind::Bool, device)).tril(first)
}

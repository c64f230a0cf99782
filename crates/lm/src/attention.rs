//! Attention of new tokens over a cache and over each other, in memory that grows with the cache only.
//!
//! New tokens after a cache split into two parts that need no mask: the rectangle over the cache,
//! which every query sees whole, and the causal square over the new tokens. Each is one fused
//! kernel; their log-sum-exps merge them exactly. No matrix of queries times keys is ever stored.
//! `policy` decides which kernel takes which part on CUDA, `portable` has those of all other places.
//!
//! Dimension key: q query head, h KV head, g query heads per KV head, s or r new token, k key, d head_dim.

mod policy;
mod portable;

use std::ops::Range;

use anyhow::Result;
use pkv_gpu::{
    Attended, Mask, Softmax, cudnn, flash, flash_segments, has_elementwise, has_fused_attention,
    merge_attended, upload,
};
use tch::{Device, Kind, Tensor};

pub use policy::{AttentionPolicy, Rectangle};

/// Attention settings of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Scale of products of queries and keys.
    pub scale: f64,
    pub policy: AttentionPolicy,
}

impl Attention {
    fn softmax(&self, mask: Mask) -> Softmax {
        Softmax { mask, scale: self.scale }
    }
}

/// Attention of rows over some of the keys they see.
pub(crate) struct Part {
    /// `[rows, query_heads, head_dim]`, kind of the queries; any strides.
    pub out_rqd: Tensor,
    /// Natural log-sum-exp of each row's scaled logits: `[query_heads, rows]`, f32 (f64 of f64 queries).
    pub lse_qr: Tensor,
}

impl Part {
    /// Let rows `first..` also see the keys of `other`: in place, exact.
    ///
    /// One pass over the outputs of both. Without a kernel of our own the weights are in the outputs' kind:
    /// in bf16 their rounding is that of the outputs themselves.
    ///
    /// # Errors
    /// The kernel fails.
    fn add(&mut self, first: i64, other: &Self) -> Result<()> {
        let n = other.out_rqd.size()[0];
        let mut out_rqd = self.out_rqd.narrow(0, first, n);
        let lse_qr = self.lse_qr.narrow(1, first, n);
        if has_elementwise(out_rqd.device(), out_rqd.kind(), out_rqd.size()[2]) {
            return merge_attended(&out_rqd, &lse_qr, &other.out_rqd, &other.lse_qr);
        }
        // exp(a) / (exp(a) + exp(b)) = sigmoid(a - b)
        let weight_qr = (&other.lse_qr - &lse_qr).sigmoid().to_kind(out_rqd.kind());
        let weight_rqd = weight_qr.transpose(0, 1).unsqueeze(-1).expand_as(&out_rqd);
        let _ = out_rqd.lerp_tensor_(&other.out_rqd, &weight_rqd);
        lse_qr.shallow_clone().copy_(&lse_qr.logaddexp(&other.lse_qr));
        Ok(())
    }

    /// Of a kernel that works on a batch of one, `[1, s, q, d]`.
    fn of_one(attended: &Attended) -> Self {
        Self { out_rqd: attended.out.squeeze_dim(0), lse_qr: attended.lse.squeeze_dim(0) }
    }
}

/// Queries `[s, query_heads, head_dim]` in the memory order that the device's kernels want.
pub(crate) fn arranged(q_sqd: &Tensor) -> Tensor {
    if has_fused_attention(q_sqd) {
        return q_sqd.shallow_clone();
    }
    q_sqd.transpose(0, 1).contiguous().transpose(0, 1)
}

/// Attention output of new tokens that follow `start` cached ones.
///
/// Softmax of scaled products of queries and keys, causal among the new tokens.
///
/// # Shapes
/// - `q_sqd`: `[s, query_heads, head_dim]`, see [`arranged`]
/// - `k_hkd`, `v_hkd`: `[kv_heads, start + s, head_dim]`, kind and device of the queries
/// - returns `[s, query_heads, head_dim]`, same kind; and if wanted the log-sum-exp of every row over
///   all keys it sees, f32 `[query_heads, s]`
///
/// # Errors
/// A kernel fails.
pub(crate) fn causal(
    q_sqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    start: usize,
    wants_lse: bool,
    attention: &Attention,
) -> Result<(Tensor, Option<Tensor>)> {
    let fused = has_fused_attention(q_sqd);
    if fused && start == 0 && q_sqd.size()[0] > 1 && !wants_lse {
        return Ok((whole(q_sqd, k_hkd, v_hkd, attention.scale), None));
    }
    let part = match fused {
        true => fused_causal(q_sqd, k_hkd, v_hkd, start as i64, attention)?,
        false => portable::causal(q_sqd, k_hkd, v_hkd, start as i64, attention.scale)?,
    };
    Ok((part.out_rqd, wants_lse.then(|| part.lse_qr.to_kind(Kind::Float))))
}

/// A sequence from its first token whose log-sum-exp is not needed: libtorch picks the kernel.
fn whole(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, scale: f64) -> Tensor {
    let [q, k, v] = [&q_sqd.transpose(0, 1), k_hkd, v_hkd].map(|x| x.unsqueeze(0));
    let shared = q.size()[1] > k.size()[1];
    Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, scale, shared)
        .squeeze_dim(0)
        .transpose(0, 1)
}

/// CUDA in bf16 or f16.
fn fused_causal(
    q_sqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    start: i64,
    attention: &Attention,
) -> Result<Part> {
    let s = q_sqd.size()[0];
    if s == 1 {
        // A plan of cuDNN's for every length of the cache would take far longer than the kernel.
        return flash_over(q_sqd, k_hkd, v_hkd, attention.softmax(Mask::All));
    }
    if start == 0 {
        return square(q_sqd, k_hkd, v_hkd, attention);
    }
    let Some((rows, keys)) = attention.policy.cudnn_share(s, start) else {
        return flash_over(q_sqd, k_hkd, v_hkd, attention.softmax(Mask::Causal));
    };
    // The first rows: cuDNN over the first keys, and what follows those up to the rows themselves.
    let q_head = q_sqd.narrow(0, 0, rows);
    let behind = |x: &Tensor| x.narrow(1, keys, start + rows - keys);
    let mut part = if keys == start {
        square(&q_head, &behind(k_hkd), &behind(v_hkd), attention)?
    } else {
        flash_over(&q_head, &behind(k_hkd), &behind(v_hkd), attention.softmax(Mask::Causal))?
    };
    part.add(
        0,
        &cudnn_over(&q_head, &k_hkd.narrow(1, 0, keys), &v_hkd.narrow(1, 0, keys), false, attention.scale)?,
    )?;
    if rows == s {
        return Ok(part);
    }
    // The last rows see everything up to the end.
    let tail = flash_over(&q_sqd.narrow(0, rows, s - rows), k_hkd, v_hkd, attention.softmax(Mask::Causal))?;
    Ok(Part {
        out_rqd: Tensor::cat(&[part.out_rqd, tail.out_rqd], 0),
        lse_qr: Tensor::cat(&[part.lse_qr, tail.lse_qr], 1),
    })
}

/// As many keys as rows, causal.
fn square(q_sqd: &Tensor, k_hsd: &Tensor, v_hsd: &Tensor, attention: &Attention) -> Result<Part> {
    match attention.policy.rectangle {
        Rectangle::Flash => flash_over(q_sqd, k_hsd, v_hsd, attention.softmax(Mask::Causal)),
        Rectangle::Cudnn => cudnn_over(q_sqd, k_hsd, v_hsd, true, attention.scale),
    }
}

fn flash_over(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, softmax: Softmax) -> Result<Part> {
    let token_major = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let attended = flash(&q_sqd.unsqueeze(0), &token_major(k_hkd), &token_major(v_hkd), softmax)?;
    Ok(Part::of_one(&attended))
}

/// cuDNN, or flash where cuDNN has no plan. Causal only for as many keys as rows.
fn cudnn_over(q_sqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, causal: bool, scale: f64) -> Result<Part> {
    let [q, k, v] = [&q_sqd.transpose(0, 1), k_hkd, v_hkd].map(|x| x.unsqueeze(0));
    match cudnn(&q, &k, &v, causal, scale) {
        Ok(Attended { out, lse }) => Ok(Part::of_one(&Attended { out: out.transpose(1, 2), lse })),
        Err(error) => {
            tracing::debug!(q = ?q.size(), k = ?k.size(), "flash in place of cuDNN: {error:#}");
            let mask = if causal { Mask::Causal } else { Mask::All };
            flash_over(q_sqd, k_hkd, v_hkd, Softmax { mask, scale })
        }
    }
}

/// Rows of several segments in sequence, each of which sees only itself.
pub(crate) struct Segments {
    pub ranges: Vec<Range<usize>>,
    longest: usize,
    /// int32 `[segments + 1]`: where segments begin and the last ends.
    starts: Tensor,
}

impl Segments {
    /// # Errors
    /// The device has no room.
    pub fn new(lengths: impl IntoIterator<Item = usize>, device: Device) -> Result<Self> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for n in lengths {
            let start = ranges.last().map_or(0, |r| r.end);
            ranges.push(start..start + n);
        }
        let starts: Vec<i32> = std::iter::once(0).chain(ranges.iter().map(|r| r.end as i32)).collect();
        Ok(Self {
            longest: ranges.iter().map(Range::len).max().unwrap_or(0),
            starts: upload(&Tensor::from_slice(&starts), device)?,
            ranges,
        })
    }
}

/// Causal attention of each segment over itself.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`; `k_rhd`, `v_rhd`: `[rows, kv_heads, head_dim]`
///
/// # Errors
/// A kernel fails.
pub(crate) fn squares(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    segments: &Segments,
    attention: &Attention,
) -> Result<Part> {
    if !has_fused_attention(q_rqd) {
        return Ok(portable::squares(q_rqd, k_rhd, v_rhd, &segments.ranges, attention.scale));
    }
    let starts = [&segments.starts; 2];
    let attended =
        flash_segments(q_rqd, k_rhd, v_rhd, starts, [segments.longest; 2], attention.softmax(Mask::Causal))?;
    Ok(Part { out_rqd: attended.out, lse_qr: attended.lse })
}

/// Let all rows of `part` see all keys as well.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`; `k_hkd`, `v_hkd`: `[kv_heads, keys, head_dim]`
///
/// # Errors
/// A kernel fails.
pub(crate) fn add_rectangle(
    part: &mut Part,
    q_rqd: &Tensor,
    k_hkd: &Tensor,
    v_hkd: &Tensor,
    attention: &Attention,
) -> Result<()> {
    let (r, k) = (q_rqd.size()[0], k_hkd.size()[1]);
    if k == 0 {
        return Ok(());
    }
    if !has_fused_attention(q_rqd) {
        return part.add(0, &portable::rectangle(q_rqd, k_hkd, v_hkd, attention.scale));
    }
    let Some((rows, keys)) = attention.policy.cudnn_share(r, k) else {
        return part.add(0, &flash_over(q_rqd, k_hkd, v_hkd, attention.softmax(Mask::All))?);
    };
    let q_head = q_rqd.narrow(0, 0, rows);
    part.add(
        0,
        &cudnn_over(&q_head, &k_hkd.narrow(1, 0, keys), &v_hkd.narrow(1, 0, keys), false, attention.scale)?,
    )?;
    if keys < k {
        let rest = |x: &Tensor| x.narrow(1, keys, k - keys);
        part.add(0, &flash_over(&q_head, &rest(k_hkd), &rest(v_hkd), attention.softmax(Mask::All))?)?;
    }
    if rows < r {
        part.add(
            rows,
            &flash_over(&q_rqd.narrow(0, rows, r - rows), k_hkd, v_hkd, attention.softmax(Mask::All))?,
        )?;
    }
    Ok(())
}

/// Products of queries and keys, `[n, rows, d]` by `[n, d, keys]`; f32 where the device can.
///
/// In bf16 a logit of 10 is off by up to 0.03, its weight by 3%.
pub(crate) fn logits(q: &Tensor, k: &Tensor) -> Tensor {
    let half = matches!(q.kind(), Kind::BFloat16 | Kind::Half);
    if half && q.device().is_cuda() { q.bmm_dtype(k, Kind::Float) } else { q.bmm(k) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn random(seed: i64, size: &[i64], kind: Kind, device: Device) -> Tensor {
        tch::manual_seed(seed);
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(device).to_kind(kind)
    }

    /// Not 1/sqrt(16), which kernels would take by themselves.
    const SCALE: f64 = 0.3;

    fn with(policy: AttentionPolicy) -> Attention {
        Attention { scale: SCALE, policy }
    }

    /// Output and log-sum-exp in f64 of rows that see `seen[row]`, `[keys]` bool.
    fn naive(q_rqd: &Tensor, k_hkd: &Tensor, v_hkd: &Tensor, seen_rk: &Tensor) -> (Tensor, Tensor) {
        let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double);
        let q = exact(q_rqd).transpose(0, 1);
        let group = q.size()[0] / k_hkd.size()[0];
        let [k, v] = [k_hkd, v_hkd].map(|t| exact(t).repeat_interleave_self_int(group, 0, None));
        let logits = q.matmul(&k.transpose(1, 2)) * SCALE;
        let logits = logits.masked_fill(&seen_rk.logical_not(), f64::NEG_INFINITY);
        let out = logits.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1);
        (out, logits.logsumexp([-1i64], false))
    }

    #[track_caller]
    fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
        let off = (got.to_device(Device::Cpu).to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
        assert!(off <= tolerance, "{what}: off by {off:e}, tolerance {tolerance:e}");
    }

    /// Every place that this machine has: device, kind, tolerances of outputs and log-sum-exps.
    fn places() -> Vec<(Device, Kind, f64, f64)> {
        let mut places = vec![
            (Device::Cpu, Kind::Float, 1e-5, 1e-5),
            (Device::Cpu, Kind::Double, 1e-6, 1e-6),
            (Device::Cpu, Kind::BFloat16, 3e-2, 1e-2),
        ];
        if pkv_gpu::cuda_count() > 0 {
            places.push((Device::Cuda(0), Kind::Float, 1e-4, 1e-4));
            places.push((Device::Cuda(0), Kind::BFloat16, 3e-2, 2e-3));
        } else {
            writeln!(std::io::stderr(), "SKIPPED: attention on CUDA").unwrap();
        }
        places
    }

    /// cuDNN in blocks as small as the cases, and flash alone.
    fn policies() -> [AttentionPolicy; 3] {
        let blocks =
            |row_block, key_block| AttentionPolicy { rectangle: Rectangle::Cudnn, row_block, key_block };
        [
            AttentionPolicy { rectangle: Rectangle::Flash, ..AttentionPolicy::default() },
            blocks(64, 64),
            blocks(1, 1),
        ]
    }

    #[test]
    fn causal_attention_over_a_cache_equals_f64() {
        for (device, kind, tolerance, lse_tolerance) in places() {
            for policy in policies() {
                for (start, s) in
                    [(0, 1), (0, 130), (1, 1), (50, 1), (130, 7), (128, 64), (200, 150), (64, 64)]
                {
                    let q = random(1, &[s, 6, 16], kind, device);
                    let [k, v] = [2, 3].map(|seed| {
                        random(seed, &[2, start + s + 5, 16], kind, device).narrow(1, 0, start + s)
                    });
                    let all = Tensor::ones([s, start + s], (Kind::Bool, Device::Cpu));
                    let (out, lse) = naive(&q, &k, &v, &all.tril(start));
                    let what = format!("{device:?} {kind:?} {policy:?} {start} + {s}");
                    for wants in [true, false] {
                        let (got, got_lse) =
                            causal(&arranged(&q), &k, &v, start as usize, wants, &with(policy)).unwrap();
                        close(&what, &got, &out, tolerance);
                        assert_eq!(got_lse.is_some(), wants);
                        if let Some(got) = got_lse {
                            assert_eq!(got.kind(), Kind::Float);
                            close(&format!("{what}: log-sum-exp"), &got, &lse, lse_tolerance);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn squares_and_rectangle_equal_f64() {
        for (device, kind, tolerance, lse_tolerance) in places() {
            for policy in policies() {
                for (keys, lengths) in
                    [(0i64, vec![9usize]), (70, vec![5]), (200, vec![70, 1, 64]), (129, vec![30; 5])]
                {
                    let segments = Segments::new(lengths.iter().copied(), device).unwrap();
                    let rows = lengths.iter().sum::<usize>() as i64;
                    let q = random(1, &[rows, 6, 16], kind, device);
                    let own = [4, 5].map(|seed| random(seed, &[rows, 2, 16], kind, device));
                    let [k, v] =
                        [2, 3].map(|seed| random(seed, &[2, keys + 5, 16], kind, device).narrow(1, 0, keys));
                    let own_seen = Tensor::zeros([rows, rows], (Kind::Bool, Device::Cpu));
                    for range in &segments.ranges {
                        let (first, n) = (range.start as i64, range.len() as i64);
                        let block = Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).tril(0);
                        own_seen.narrow(0, first, n).narrow(1, first, n).copy_(&block);
                    }
                    let what = format!("{device:?} {kind:?} {policy:?} {keys} keys, {lengths:?}");
                    let mut part = squares(&q, &own[0], &own[1], &segments, &with(policy)).unwrap();
                    let heads_first = |x: &Tensor| x.transpose(0, 1);
                    let (out, lse) = naive(&q, &heads_first(&own[0]), &heads_first(&own[1]), &own_seen);
                    close(&format!("{what}: squares"), &part.out_rqd, &out, tolerance);
                    close(&format!("{what}: their log-sum-exp"), &part.lse_qr, &lse, lse_tolerance);

                    add_rectangle(&mut part, &q, &k, &v, &with(policy)).unwrap();
                    let cache_seen = Tensor::ones([rows, keys], (Kind::Bool, Device::Cpu));
                    let both = |cache: &Tensor, own: &Tensor| Tensor::cat(&[cache, &heads_first(own)], 1);
                    let seen = Tensor::cat(&[cache_seen, own_seen], 1);
                    let (out, lse) = naive(&q, &both(&k, &own[0]), &both(&v, &own[1]), &seen);
                    close(&what, &part.out_rqd, &out, tolerance);
                    close(&format!("{what}: log-sum-exp"), &part.lse_qr, &lse, lse_tolerance);
                }
            }
        }
    }

    /// Seconds of a second run, the first one plans.
    fn timed<T>(work: impl Fn() -> T) -> (f64, T) {
        drop(work());
        pkv_gpu::synchronize(Device::Cuda(0)).unwrap();
        let begun = std::time::Instant::now();
        let result = work();
        pkv_gpu::synchronize(Device::Cuda(0)).unwrap();
        (begun.elapsed().as_secs_f64(), result)
    }

    /// What the policy is tuned by: `cargo test --release -p pkv-lm --lib -- --ignored --nocapture
    /// policies_agree`.
    #[test]
    #[ignore = "needs a GPU with 30 GB free"]
    fn policies_agree_at_full_size_and_tell_their_speed() {
        let (device, kind) = (Device::Cuda(0), Kind::BFloat16);
        let (q_heads, heads, d) = (32, 8, 128);
        let flash = AttentionPolicy { rectangle: Rectangle::Flash, ..AttentionPolicy::default() };
        let cudnn = AttentionPolicy::default();
        let report = |what: &str, pairs: f64, a: (f64, Tensor), b: (f64, Tensor)| {
            let teraflops = |s: f64| 4.0 * pairs * (q_heads * d) as f64 / s / 1e12;
            let off = (a.1 - b.1).abs().max().double_value(&[]);
            println!(
                "{what}: flash {:.2} ms ({:.0} TFLOP/s), cuDNN {:.2} ms ({:.0} TFLOP/s), apart by {off:.1e}",
                a.0 * 1e3,
                teraflops(a.0),
                b.0 * 1e3,
                teraflops(b.0)
            );
            assert!(off < 2e-2, "{what}: the policies differ by {off}");
        };
        for keys in [8192i64, 32_768, 33_000, 131_072] {
            for rows in [2058i64, 16_464] {
                let q = random(1, &[rows, q_heads + heads, d], kind, device).narrow(1, 0, q_heads);
                let own = [4, 5].map(|seed| random(seed, &[rows, heads, d], kind, device));
                let [k, v] = [2, 3].map(|seed| random(seed, &[heads, keys, d], kind, device));
                let segments = Segments::new(vec![2058; (rows / 2058) as usize], device).unwrap();
                let (alone, _) =
                    timed(|| squares(&q, &own[0], &own[1], &segments, &with(flash)).unwrap().out_rqd);
                let run = |policy: AttentionPolicy| {
                    timed(|| {
                        let mut part = squares(&q, &own[0], &own[1], &segments, &with(policy)).unwrap();
                        add_rectangle(&mut part, &q, &k, &v, &with(policy)).unwrap();
                        part.out_rqd
                    })
                };
                let what = format!("{rows} rows over {keys} keys, squares alone {:.2} ms", alone * 1e3);
                report(&what, (rows * keys) as f64, run(flash), run(cudnn));
            }
        }
        for (start, s) in [
            (0i64, 8192i64),
            (0, 32_768),
            (16_000, 16_000),
            (16_384, 16_384),
            (114_688, 16_384),
            (32_000, 768),
        ] {
            let q = random(1, &[s, q_heads + heads, d], kind, device).narrow(1, 0, q_heads);
            let [k, v] = [2, 3].map(|seed| random(seed, &[heads, start + s, d], kind, device));
            let run = |policy: AttentionPolicy, wants_lse| {
                timed(|| causal(&q, &k, &v, start as usize, wants_lse, &with(policy)).unwrap().0)
            };
            let pairs = s as f64 * (start as f64 + s as f64 / 2.0);
            report(&format!("prefill {start} + {s}"), pairs, run(flash, true), run(cudnn, true));
            println!("  without log-sum-exp: {:.2} ms", run(cudnn, false).0 * 1e3);
        }
    }
}

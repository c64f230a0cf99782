//! CUDA attention kernels that tch does not wrap: FlashAttention-2 as it is, and cuDNN's, both with
//! the log-sum-exp of their rows.
//!
//! Which one to use for which shape is the decision of `ops/attention`. Both compute in bf16 or f16; query
//! heads that share a KV head are neighbours.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use crate::shim::{self, Raw};

/// Result of an attention kernel.
#[derive(Debug)]
pub struct Attended {
    /// Weighted values, kind of the queries.
    pub out: Tensor,
    /// Natural log-sum-exp of each row's scaled logits, f32.
    pub lse: Tensor,
}

/// Which keys a row of [`flash`] sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    All,
    /// Bottom-right: the last query row sees the last key, each row above one key fewer.
    Causal,
}

/// The softmax of an attention kernel.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    pub mask: Mask,
    /// Scale of products of queries and keys.
    pub scale: f64,
}

/// Can [`flash`] and [`cudnn`] work on these queries?
pub fn has_fused_attention(q: &Tensor) -> bool {
    let d = q.size().last().copied().unwrap_or(0);
    q.device().is_cuda()
        && matches!(q.kind(), Kind::BFloat16 | Kind::Half)
        && (8..=256).contains(&d)
        && d % 8 == 0
}

/// FlashAttention-2 (arXiv 2307.08691) as libtorch carries it. Any strides with head_dim innermost.
///
/// # Shapes
/// - `q_bsqd`: `[batch, s, query_heads, head_dim]`, bf16 or f16, CUDA
/// - `k_bkhd`, `v_bkhd`: `[batch, keys, kv_heads, head_dim]`; query_heads a multiple of kv_heads
/// - returns `out` `[batch, s, query_heads, head_dim]`, contiguous, and `lse` `[batch, query_heads, s]`
///
/// # Errors
/// Shapes, kind or device are not the kernel's, or a launch fails.
pub fn flash(q_bsqd: &Tensor, k_bkhd: &Tensor, v_bkhd: &Tensor, softmax: Softmax) -> Result<Attended> {
    check(q_bsqd, k_bkhd, v_bkhd, 2)?;
    let (s, keys) = (q_bsqd.size()[1], k_bkhd.size()[1]);
    launch_flash([q_bsqd, k_bkhd, v_bkhd], None, None, [s, keys], softmax)
}

/// As [`flash`], over segments of different lengths that follow each other; each query segment
/// sees the key segment of its number only.
///
/// # Shapes
/// - `q_rqd`: `[rows, query_heads, head_dim]`, bf16 or f16, CUDA
/// - `k_rhd`, `v_rhd`: `[key rows, kv_heads, head_dim]`
/// - `starts_q`, `starts_k`: int32 `[segments + 1]` on the same device, where segments begin and the
///   last ends; `longest`: the most rows, and the most keys, of a segment
/// - returns `out` `[rows, query_heads, head_dim]`, contiguous, and `lse` `[query_heads, rows]`
///
/// # Errors
/// As [`flash`].
pub fn flash_segments(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    [starts_q, starts_k]: [&Tensor; 2],
    longest: [usize; 2],
    softmax: Softmax,
) -> Result<Attended> {
    check_segments(q_rqd, k_rhd, v_rhd, [starts_q, starts_k])?;
    let longest = longest.map(|n| n as i64);
    launch_flash([q_rqd, k_rhd, v_rhd], Some([starts_q, starts_k]), None, longest, softmax)
}

/// As [`flash_segments`], where only the first keys of each segment are there: after them is room for
/// more. `longest` counts those that are there.
///
/// # Shapes
/// - `used_k`: int32 `[segments]` on the same device, contiguous, 1 or more each
///
/// # Errors
/// As [`flash`].
pub fn flash_used_segments(
    q_rqd: &Tensor,
    k_rhd: &Tensor,
    v_rhd: &Tensor,
    [starts_q, starts_k]: [&Tensor; 2],
    used_k: &Tensor,
    longest: [usize; 2],
    softmax: Softmax,
) -> Result<Attended> {
    check_segments(q_rqd, k_rhd, v_rhd, [starts_q, starts_k])?;
    ensure!(
        used_k.kind() == Kind::Int && used_k.numel() + 1 == starts_k.numel(),
        "used keys must be int32, one number per segment, not {:?} {:?}",
        used_k.kind(),
        used_k.size()
    );
    let longest = longest.map(|n| n as i64);
    launch_flash([q_rqd, k_rhd, v_rhd], Some([starts_q, starts_k]), Some(used_k), longest, softmax)
}

fn check_segments(q_rqd: &Tensor, k_rhd: &Tensor, v_rhd: &Tensor, starts: [&Tensor; 2]) -> Result<()> {
    check(q_rqd, k_rhd, v_rhd, 1)?;
    for starts in starts {
        ensure!(
            starts.kind() == Kind::Int && starts.dim() == 1 && starts.device() == q_rqd.device(),
            "segment starts must be int32 [segments + 1] beside the queries, not {:?} {:?}",
            starts.kind(),
            starts.size()
        );
    }
    Ok(())
}

fn launch_flash(
    qkv: [&Tensor; 3],
    starts: Option<[&Tensor; 2]>,
    used_k: Option<&Tensor>,
    [max_q, max_k]: [i64; 2],
    softmax: Softmax,
) -> Result<Attended> {
    let [q, k, v] = qkv.map(pointer);
    let [cu_q, cu_k] = starts.map_or([std::ptr::null_mut(); 2], |s| s.map(pointer));
    let used = used_k.map_or(std::ptr::null_mut(), pointer);
    let causal = i32::from(softmax.mask == Mask::Causal);
    // SAFETY: pointers to tensors that live beyond the call, or null where the shim allows it; on
    // success both results are tensors on the heap that only this code frees.
    unsafe {
        owned(|out, lse| {
            shim::pkv_flash(
                q,
                k,
                v,
                cu_q,
                cu_k,
                used,
                max_q,
                max_k,
                causal,
                // No window, to the left or to the right.
                -1,
                -1,
                softmax.scale,
                out,
                lse,
            )
        })
    }
    .context("flash attention")
}

/// cuDNN's fused attention: on Hopper 1.7 times as fast as [`flash`] on long rows.
///
/// It plans anew, about 50 ms, for every combination of sizes and strides that this *thread* has not
/// shown it yet. Causal is top-left: with more keys than rows it is not what a cache needs.
///
/// # Shapes
/// - `q_bqsd`: `[batch, query_heads, s, head_dim]`, bf16 or f16, CUDA; any strides with head_dim innermost
/// - `k_bhkd`, `v_bhkd`: `[batch, kv_heads, keys, head_dim]`; query_heads a multiple of kv_heads
/// - returns `out` `[batch, query_heads, s, head_dim]` in the memory order of the queries, and `lse`
///   `[batch, query_heads, s]`
///
/// # Errors
/// cuDNN has no plan for the shape, shapes, kind or device are not the kernel's, or a launch fails.
pub fn cudnn(
    q_bqsd: &Tensor,
    k_bhkd: &Tensor,
    v_bhkd: &Tensor,
    causal: bool,
    scale: f64,
) -> Result<Attended> {
    check(q_bqsd, k_bhkd, v_bhkd, 1)?;
    let [q, k, v] = [q_bqsd, k_bhkd, v_bhkd].map(pointer);
    // SAFETY: as in `launch_flash`.
    let Attended { out, lse } =
        unsafe { owned(|out, lse| shim::pkv_cudnn_attention(q, k, v, causal.into(), scale, out, lse)) }
            .context("cuDNN attention")?;
    // cuDNN's own shape has a last axis of 1.
    let lse = if lse.dim() == 4 { lse.squeeze_dim(-1) } else { lse };
    Ok(Attended { out, lse })
}

/// Run a shim function that writes an output and its log-sum-exps.
///
/// # Safety
/// On success `run` has put a tensor that the caller owns at each pointer.
unsafe fn owned(run: impl FnOnce(*mut Raw, *mut Raw) -> i32) -> Result<Attended> {
    let (mut out, mut lse) = (std::ptr::null_mut(), std::ptr::null_mut());
    shim::check(run(&mut out, &mut lse))?;
    // SAFETY: by this function's contract.
    unsafe { Ok(Attended { out: Tensor::from_ptr(out), lse: Tensor::from_ptr(lse) }) }
}

fn pointer(t: &Tensor) -> Raw {
    t.as_ptr().cast_mut()
}

/// libtorch checks the rest; these would otherwise be a crash or a bare message.
fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads_axis: usize) -> Result<()> {
    ensure!(
        has_fused_attention(q),
        "fused attention works on CUDA in bf16 or f16 with a head_dim that is a multiple of 8 up to 256, found \
         {:?} {:?} {:?}",
        q.device(),
        q.kind(),
        q.size()
    );
    let (sq, sk, sv) = (q.size(), k.size(), v.size());
    ensure!(
        sk == sv && sq.len() == sk.len() && sq.last() == sk.last() && sk[heads_axis] > 0,
        "queries {sq:?}, keys {sk:?} and values {sv:?} do not fit"
    );
    ensure!(
        sq[heads_axis] % sk[heads_axis] == 0,
        "{} query heads cannot share {} KV heads",
        sq[heads_axis],
        sk[heads_axis]
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_test_support::attention as naive;
    use std::io::Write as _;
    use tch::Device;

    /// Random tensors, reproducible, on the first GPU; `None` without one.
    fn gpu(kind: Kind, sizes: &[&[i64]]) -> Option<Vec<Tensor>> {
        if crate::cuda_count() == 0 {
            // Not by a macro: the test harness would hide it.
            writeln!(std::io::stderr(), "SKIPPED: a fused attention kernel; it needs a GPU").unwrap();
            return None;
        }
        tch::manual_seed(3);
        let one = |size: &&[i64]| {
            (Tensor::randn(*size, (Kind::Float, Device::Cpu)) * 2.0).to_device(Device::Cuda(0)).to_kind(kind)
        };
        Some(sizes.iter().map(one).collect())
    }

    /// Not 1/sqrt(64), which the kernels would take by themselves.
    const SCALE: f64 = 0.1;

    const CAUSAL: Softmax = Softmax { mask: Mask::Causal, scale: SCALE };

    /// Output and log-sum-exp: q `[s, H, d]`, k and v `[t, H', d]`; a row sees all keys, or those up to its
    /// number and `first`.
    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, first: Option<i64>) -> [Tensor; 2] {
        let (rows, keys) = (q.size()[0], k.size()[0]);
        let seen = naive::up_to(first.unwrap_or(keys), rows, keys, Device::Cpu);
        naive::attention(q, &k.transpose(0, 1), &v.transpose(0, 1), SCALE, &seen)
    }

    #[track_caller]
    fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
        let got = got.to_device(Device::Cpu).to_kind(Kind::Double);
        assert_eq!(got.size(), expected.size(), "{what}");
        let off = (got - expected).abs().max().double_value(&[]);
        println!("{what}: off by {off:.2e}, tolerance {tolerance:.0e}");
        assert!(off <= tolerance, "{what}: off by {off:e}");
    }

    #[test]
    fn the_cpu_and_wrong_shapes_are_refused() {
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let (q, k) = (zeros(&[1, 4, 2, 8]), zeros(&[1, 4, 2, 8]));
        assert!(!has_fused_attention(&q));
        let error = flash(&q, &k, &k, CAUSAL).unwrap_err().to_string();
        assert!(error.contains("bf16 or f16"), "{error}");
        assert!(cudnn(&q, &k, &k, false, SCALE).is_err());
        assert!(check(&q, &k, &k, 2).is_err());
        if let Some(t) = gpu(Kind::BFloat16, &[&[1, 4, 6, 64], &[1, 4, 4, 64]]) {
            assert!(flash(&t[0], &t[1], &t[1], CAUSAL).is_err(), "6 heads cannot share 4");
        }
    }

    #[test]
    fn flash_equals_f64_with_bottom_right_mask() {
        for (s, keys) in [(1, 40), (7, 7), (70, 300), (130, 131)] {
            let Some(t) = gpu(Kind::BFloat16, &[&[1, s, 8, 64], &[2, keys + 9, 64], &[2, keys + 9, 64]])
            else {
                return;
            };
            // As a cache gives them: heads first, a part of the capacity.
            let cached = |x: &Tensor| x.narrow(1, 0, keys).transpose(0, 1).unsqueeze(0);
            let (k, v) = (cached(&t[1]), cached(&t[2]));
            for mask in [Mask::All, Mask::Causal] {
                let got = flash(&t[0], &k, &v, Softmax { mask, scale: SCALE }).unwrap();
                let first = (mask == Mask::Causal).then_some(keys - s);
                let [out, lse] = naive(&t[0].get(0), &k.get(0), &v.get(0), first);
                close(&format!("flash {s} x {keys} {mask:?}"), &got.out.get(0), &out, 3e-2);
                close("its log-sum-exp", &got.lse.get(0), &lse, 1e-3);
            }
        }
    }

    #[test]
    fn flash_segments_do_not_see_each_other() {
        let Some(t) = gpu(Kind::BFloat16, &[&[50, 8, 64], &[50, 2, 64], &[50, 2, 64]]) else { return };
        let lengths = [13, 1, 36];
        let starts = Tensor::from_slice(&[0i32, 13, 14, 50]).to_device(Device::Cuda(0));
        let got = flash_segments(&t[0], &t[1], &t[2], [&starts, &starts], [36, 36], CAUSAL).unwrap();
        let mut first = 0;
        for n in lengths {
            let part = |x: &Tensor| x.narrow(0, first, n);
            let [out, lse] = naive(&part(&t[0]), &part(&t[1]), &part(&t[2]), Some(0));
            close(&format!("segment of {n}"), &part(&got.out), &out, 3e-2);
            close("its log-sum-exp", &got.lse.narrow(1, first, n), &lse, 1e-3);
            first += n;
        }
    }

    /// Decoding (one row, which takes the kernel's split path) and questions, after segments with room.
    #[test]
    fn flash_sees_only_the_keys_that_are_used() {
        for rows in [1, 5] {
            let segments = 3;
            let Some(t) = gpu(Kind::BFloat16, &[&[segments * rows, 4, 64], &[900, 1, 64], &[900, 1, 64]])
            else {
                return;
            };
            let here = |x: &[i32]| Tensor::from_slice(x).to_device(Device::Cuda(0));
            let (first, used) = ([0i32, 600, 640, 900], [517i32, 5, 200]);
            let starts_q = Tensor::arange(segments + 1, (Kind::Int, Device::Cuda(0))) * rows;
            let got = flash_used_segments(
                &t[0],
                &t[1],
                &t[2],
                [&starts_q, &here(&first)],
                &here(&used),
                [rows as usize, 517],
                CAUSAL,
            )
            .unwrap();
            for x in 0..segments {
                let keys = i64::from(used[x as usize]);
                let part = |of: &Tensor| of.narrow(0, i64::from(first[x as usize]), keys);
                let q = t[0].narrow(0, x * rows, rows);
                let [out, _] = naive(&q, &part(&t[1]), &part(&t[2]), Some(keys - rows));
                close(&format!("{rows} rows, segment {x}"), &got.out.narrow(0, x * rows, rows), &out, 3e-2);
            }
        }
    }

    #[test]
    fn cudnn_equals_f64_and_shares_kv_heads() {
        for (s, keys, causal) in [(128, 128, true), (100, 100, true), (70, 300, false), (512, 1024, false)] {
            let Some(t) = gpu(Kind::BFloat16, &[&[s, 10, 64], &[2, keys + 9, 64], &[2, keys + 9, 64]]) else {
                return;
            };
            // Token-major queries beside other heads, a cache's keys: strided views, nothing is copied.
            let q = t[0].narrow(1, 0, 8);
            let (k, v) = (t[1].narrow(1, 0, keys), t[2].narrow(1, 0, keys));
            let got = cudnn(&q.transpose(0, 1).unsqueeze(0), &k.unsqueeze(0), &v.unsqueeze(0), causal, SCALE)
                .unwrap();
            let [out, lse] = naive(&q, &k.transpose(0, 1), &v.transpose(0, 1), causal.then_some(0));
            close(&format!("cuDNN {s} x {keys}"), &got.out.get(0).transpose(0, 1), &out, 3e-2);
            close("its log-sum-exp", &got.lse.get(0), &lse, 1e-3);
        }
    }
}

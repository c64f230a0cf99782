//! Fused elementwise kernels of a decoder layer: gated SiLU, rotary, token likelihoods, and the lengths and
//! moves of keys and values that features need: `kernels/elementwise.cu`.
//!
//! Each is one pass over its bytes; libtorch's operators take two to six. At 32,768 tokens of an 8B model the
//! gated product moves 2.8 GB: 0.66 ms at an H200's 4.3 TB/s, 2.65 ms as two operators.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::module::{Arg, Launch, capability, kernel};
use super::source::{Unit, Variant};

/// Can these kernels work on such tensors? CUDA from compute capability 8.0 on, bf16 or f16, head_dim a
/// multiple of 8.
pub fn has_elementwise(device: Device, kind: Kind, head_dim: i64) -> bool {
    let Device::Cuda(gpu) = device else { return false };
    Variant::bf16(kind).is_some()
        && head_dim % 8 == 0
        && (8..=256).contains(&head_dim)
        && capability(gpu).is_ok_and(|(major, _)| major >= 8)
}

fn variant(x: &Tensor, head_dim: i64) -> Result<Variant> {
    let (Device::Cuda(gpu), Some(bf16)) = (x.device(), Variant::bf16(x.kind())) else {
        anyhow::bail!("no elementwise kernel for {:?} on {:?}", x.kind(), x.device())
    };
    Ok(Variant { unit: Unit::Elementwise, head_dim: head_dim as u32, bf16, capability: capability(gpu)? })
}

fn aligned(x: &Tensor) -> bool {
    x.is_contiguous() && (x.data_ptr() as usize).is_multiple_of(16)
}

/// silu(gate) * up.
///
/// # Shapes
/// - `gate_up`: `[rows, 2 * width]`, gates first, contiguous, bf16 or f16, CUDA; width a multiple of 8
/// - returns `[rows, width]`, same kind
///
/// # Errors
/// The shape or kind is another, or the driver refuses.
pub fn gated_silu(gate_up: &Tensor) -> Result<Tensor> {
    let size = gate_up.size();
    ensure!(
        size.len() == 2 && size[1] % 16 == 0 && aligned(gate_up),
        "gates and ups must be [rows, 2 * width], contiguous, width a multiple of 8; found {size:?}"
    );
    let (rows, width) = (size[0], size[1] / 2);
    let out = Tensor::empty([rows, width], (gate_up.kind(), gate_up.device()));
    let pieces = rows * width / 8;
    if pieces == 0 {
        return Ok(out);
    }
    // The kernel does not depend on head_dim; 64 spares a compilation of its own.
    let kernel = kernel(gate_up.device(), variant(gate_up, 64)?, "gated_silu", 0)?;
    let launch = Launch { grid: [(pieces as usize).div_ceil(256), 1, 1], threads: 256, shared: 0 };
    let args = [Arg::Tensor(gate_up), Arg::Tensor(&out), Arg::Long(pieces), Arg::Int((width / 8) as i32)];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&launch, &args)? };
    Ok(out)
}

/// Where keys and values of `rotate` go: packed rows `[n, head_dim]`, at `slot_n`, i64
/// `[sequences * kv_heads * tokens]`, sequences outside and tokens inside; slots are not checked. New rows
/// are `tokens` of one sequence after the other.
pub struct PackedSlots<'a> {
    pub k_nd: &'a Tensor,
    pub v_nd: &'a Tensor,
    pub slot_n: &'a Tensor,
    pub tokens: usize,
}

impl PackedSlots<'_> {
    /// Check what kernels rely on.
    fn check(&self, kv_heads: i64, rows: i64, d: i64, kind: Kind) -> Result<()> {
        let Self { k_nd, v_nd, slot_n, tokens } = self;
        for t in [k_nd, v_nd] {
            ensure!(
                t.dim() == 2 && t.size()[1] == d && t.kind() == kind && t.is_contiguous(),
                "the packed cache is {:?} {:?}, expected {kind:?} [rows, {d}]",
                t.kind(),
                t.size()
            );
        }
        ensure!(
            *tokens > 0
                && rows % *tokens as i64 == 0
                && slot_n.size() == [rows * kv_heads]
                && slot_n.kind() == Kind::Int64
                && slot_n.device() == k_nd.device()
                && slot_n.is_contiguous(),
            "{:?} slots {:?} for {rows} rows of {kv_heads} heads, {tokens} tokens of a sequence",
            slot_n.kind(),
            slot_n.size()
        );
        Ok(())
    }
}

/// Rotary embedding of new queries and keys in place, after their RMS norm if there is one.
///
/// With a `cache` keys and values go there, and those in `qkv_rnd` stay as they were.
///
/// # Shapes
/// - `qkv_rnd`: `[rows, query_heads + 2 kv_heads, head_dim]`: queries, keys, values; contiguous, bf16 or f16,
///   CUDA
/// - `norm`: `[query_heads + kv_heads, head_dim]`, same kind; `eps` belongs to it
/// - `cos_rd`, `sin_rd`: f32 `[rows, head_dim / 2]`, contiguous
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn rotate(
    qkv_rnd: &Tensor,
    query_heads: usize,
    norm: Option<(&Tensor, f64)>,
    cos_rd: &Tensor,
    sin_rd: &Tensor,
    cache: Option<&PackedSlots>,
) -> Result<()> {
    let size = qkv_rnd.size();
    ensure!(
        size.len() == 3 && size[1] > query_heads as i64 && aligned(qkv_rnd),
        "queries, keys and values must be [rows, heads, head_dim], contiguous; found {size:?}"
    );
    let (rows, heads, d) = (size[0], size[1], size[2]);
    let kv_heads = (heads - query_heads as i64) / 2;
    for t in [cos_rd, sin_rd] {
        ensure!(
            t.size() == [rows, d / 2] && t.kind() == Kind::Float && t.is_contiguous(),
            "cosines and sines must be contiguous f32 [{rows}, {}], found {:?} {:?}",
            d / 2,
            t.kind(),
            t.size()
        );
    }
    if let Some((norm, _)) = norm {
        ensure!(
            norm.size() == [query_heads as i64 + kv_heads, d]
                && norm.kind() == qkv_rnd.kind()
                && aligned(norm),
            "norm weights of {:?} {:?} do not fit {size:?}",
            norm.kind(),
            norm.size()
        );
    }
    cache.map_or(Ok(()), |slots| slots.check(kv_heads, rows, d, qkv_rnd.kind()))?;
    if rows == 0 {
        return Ok(());
    }
    let kernel = kernel(qkv_rnd.device(), variant(qkv_rnd, d)?, "rotate", 0)?;
    let launch = Launch { grid: [((rows * heads) as usize).div_ceil(8), 1, 1], threads: 256, shared: 0 };
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe {
        kernel.launch(
            &launch,
            &[
                Arg::Tensor(qkv_rnd),
                norm.map_or(Arg::Absent, |n| Arg::Tensor(n.0)),
                Arg::Tensor(cos_rd),
                Arg::Tensor(sin_rd),
                cache.map_or(Arg::Absent, |slots| Arg::Tensor(slots.k_nd)),
                cache.map_or(Arg::Absent, |slots| Arg::Tensor(slots.v_nd)),
                Arg::Int(rows as i32),
                Arg::Int(query_heads as i32),
                Arg::Int(kv_heads as i32),
                // Between the heads of a cache without slots, which is not in use.
                Arg::Long(0),
                Arg::Float(norm.map_or(0.0, |n| n.1) as f32),
                cache.map_or(Arg::Absent, |slots| Arg::Tensor(slots.slot_n)),
                Arg::Int(cache.map_or(1, |slots| slots.tokens) as i32),
            ],
        )
    }
}

/// Vectors with each pair of dimensions (i, i + head_dim / 2) turned by an angle, which all vectors share.
///
/// # Shapes
/// - `vectors_hsd`: `[heads, rows, head_dim]`, see [`has_elementwise`]; rows contiguous, heads any distance
///   apart
/// - `cos_d`, `sin_d`: f32 `[head_dim / 2]`, contiguous, same device
/// - `out_hsd`: the same shape, kind and device, rows contiguous; written
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn turn(vectors_hsd: &Tensor, cos_d: &Tensor, sin_d: &Tensor, out_hsd: &Tensor) -> Result<()> {
    let (size, kind) = (vectors_hsd.size(), vectors_hsd.kind());
    for t in [vectors_hsd, out_hsd] {
        ensure!(
            size.len() == 3
                && t.size() == size
                && t.kind() == kind
                && t.stride()[1..] == [size[2], 1]
                && t.stride()[0] % 2 == 0
                && t.device() == vectors_hsd.device()
                && has_elementwise(t.device(), kind, size[2]),
            "no kernel turns {kind:?} {size:?} on {:?} into {:?} {:?} of strides {:?} on {:?}",
            vectors_hsd.device(),
            t.kind(),
            t.size(),
            t.stride(),
            t.device()
        );
    }
    for t in [cos_d, sin_d] {
        ensure!(
            t.size() == [size[2] / 2]
                && t.kind() == Kind::Float
                && t.is_contiguous()
                && t.device() == vectors_hsd.device(),
            "cosines and sines must be contiguous f32 [{}], found {:?} {:?}",
            size[2] / 2,
            t.kind(),
            t.size()
        );
    }
    if size[0] * size[1] == 0 {
        return Ok(());
    }
    let kernel = kernel(vectors_hsd.device(), variant(vectors_hsd, size[2])?, "turn", 0)?;
    let grid = [((size[1] * size[2] / 4) as usize).div_ceil(256), size[0] as usize, 1];
    let args = [
        Arg::Tensor(vectors_hsd),
        Arg::Tensor(out_hsd),
        Arg::Tensor(cos_d),
        Arg::Tensor(sin_d),
        Arg::Int(i32::try_from(size[1])?),
        Arg::Long(vectors_hsd.stride()[0]),
        Arg::Long(out_hsd.stride()[0]),
    ];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&Launch { grid, threads: 256, shared: 0 }, &args) }
}

/// Attention of rows whose keys were attended to in two parts: merge `b` into `a` by their log-sum-exps, in
/// place.
///
/// # Shapes
/// - `a_rqd`, `b_rqd`: `[rows, query_heads, head_dim]`, bf16 or f16, CUDA, head_dim innermost, any strides
/// - `a_lse_qr`: f32 `[query_heads, rows]`, rows contiguous, natural log; becomes that of both
/// - `b_lse_qr`: the same shape, any strides
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn merge_attended(a_rqd: &Tensor, a_lse_qr: &Tensor, b_rqd: &Tensor, b_lse_qr: &Tensor) -> Result<()> {
    let size = a_rqd.size();
    let (a, b, lse) = (a_rqd.stride(), b_rqd.stride(), b_lse_qr.stride());
    ensure!(
        size.len() == 3
            && b_rqd.size() == size
            && a_rqd.kind() == b_rqd.kind()
            && a[2] == 1
            && b[2] == 1
            && a.iter().chain(&b).all(|n| *n == 1 || n % 2 == 0)
            && [a_lse_qr, b_lse_qr].iter().all(|t| t.size() == [size[1], size[0]] && t.kind() == Kind::Float)
            && a_lse_qr.stride()[1] == 1,
        "attention outputs {size:?} and {:?} with log-sum-exps {:?} and {:?} do not fit",
        b_rqd.size(),
        a_lse_qr.size(),
        b_lse_qr.size()
    );
    if size[0] == 0 {
        return Ok(());
    }
    let kernel = kernel(a_rqd.device(), variant(a_rqd, size[2])?, "merge", 0)?;
    let launch = Launch { grid: [((size[0] * size[1]) as usize).div_ceil(8), 1, 1], threads: 256, shared: 0 };
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe {
        kernel.launch(
            &launch,
            &[
                Arg::Tensor(a_rqd),
                Arg::Tensor(b_rqd),
                Arg::Tensor(a_lse_qr),
                Arg::Tensor(b_lse_qr),
                Arg::Int(size[0] as i32),
                Arg::Int(size[1] as i32),
                Arg::Long(a[0]),
                Arg::Long(a[1]),
                Arg::Long(b[0]),
                Arg::Long(b[1]),
                Arg::Long(a_lse_qr.stride()[0]),
                Arg::Long(lse[1]),
                Arg::Long(lse[0]),
            ],
        )
    }
}

/// Negative log-likelihood (nats) of the next token by each row of logits, in f32 from one pass over them.
///
/// libtorch's cross-entropy wants the logits in f32 and passes over them four times: at 32,768 tokens, a
/// hidden size of 2,048 and a vocabulary of 128,256 surprisal took 63 ms on an H100, most of it not the LM
/// head; with this kernel 36 ms.
///
/// # Shapes
/// - `logits_sv`: `[rows, vocabulary]`, contiguous, bf16 or f16, CUDA; vocabulary a multiple of 8
/// - `next_s`: i64 `[rows]`, contiguous, same device; every id below the vocabulary, which is not checked
/// - returns f32 `[rows]`
///
/// # Errors
/// The shape or kind is another, or the driver refuses.
pub fn row_nats(logits_sv: &Tensor, next_s: &Tensor) -> Result<Tensor> {
    let size = logits_sv.size();
    ensure!(
        size.len() == 2
            && size[1] % 8 == 0
            && aligned(logits_sv)
            && next_s.size() == [size[0]]
            && next_s.kind() == Kind::Int64
            && next_s.is_contiguous()
            && next_s.device() == logits_sv.device(),
        "logits {size:?} and next tokens {:?} {:?} do not fit",
        next_s.kind(),
        next_s.size()
    );
    let nats_s = Tensor::empty([size[0]], (Kind::Float, logits_sv.device()));
    if size[0] == 0 {
        return Ok(nats_s);
    }
    // The kernel does not depend on head_dim; 64 spares a compilation of its own.
    let kernel = kernel(logits_sv.device(), variant(logits_sv, 64)?, "row_nats", 0)?;
    let launch = Launch { grid: [size[0] as usize, 1, 1], threads: 256, shared: 0 };
    let args =
        [Arg::Tensor(logits_sv), Arg::Tensor(next_s), Arg::Tensor(&nats_s), Arg::Int((size[1] / 8) as i32)];
    // SAFETY: the kernel's arguments; sizes were checked, ids are the caller's.
    unsafe { kernel.launch(&launch, &args)? };
    Ok(nats_s)
}

/// What kernels that read one vector after the other rely on.
fn check_vectors(vectors_hsd: &Tensor) -> Result<[i64; 3]> {
    let (size, stride) = (vectors_hsd.size(), vectors_hsd.stride());
    ensure!(
        size.len() == 3
            && stride[1..] == [size[2], 1]
            && stride[0] % 8 == 0
            && (vectors_hsd.data_ptr() as usize).is_multiple_of(16)
            && has_elementwise(vectors_hsd.device(), vectors_hsd.kind(), size[2]),
        "no kernel reads vectors of {:?} {size:?} with strides {stride:?} on {:?}",
        vectors_hsd.kind(),
        vectors_hsd.device()
    );
    Ok([size[0], size[1], size[2]])
}

/// Logarithms of vectors' lengths, in one pass; libtorch's operators take five, one of them in f32.
///
/// # Shapes
/// - `vectors_hsd`: `[heads, rows, head_dim]`, see [`has_elementwise`]; rows contiguous, heads any distance
///   apart
/// - `out_hs`: f32 `[heads, rows]`, rows contiguous, same device; written
///
/// A vector shorter than `floor` counts as `floor` long.
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn log_norms(vectors_hsd: &Tensor, floor: f64, out_hs: &Tensor) -> Result<()> {
    let [heads, rows, d] = check_vectors(vectors_hsd)?;
    ensure!(
        out_hs.size() == [heads, rows]
            && out_hs.stride()[1] == 1
            && out_hs.kind() == Kind::Float
            && out_hs.device() == vectors_hsd.device(),
        "room for norms is {:?} {:?}, expected f32 [{heads}, {rows}]",
        out_hs.kind(),
        out_hs.size(),
    );
    if heads * rows == 0 {
        return Ok(());
    }
    let kernel = kernel(vectors_hsd.device(), variant(vectors_hsd, d)?, "log_norms", 0)?;
    let grid = [(rows as usize).div_ceil(32), heads as usize, 1];
    let args = [
        Arg::Tensor(vectors_hsd),
        Arg::Tensor(out_hs),
        Arg::Int(i32::try_from(rows)?),
        Arg::Long(vectors_hsd.stride()[0]),
        Arg::Long(out_hs.stride()[0]),
        Arg::Float(floor as f32),
    ];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&Launch { grid, threads: 256, shared: 0 }, &args) }
}

/// Rows that one block of `unit_sums` adds up.
const BLOCK_ROWS: i64 = 512;

/// One over each vector's length, f32 `[heads, rows]`, and the sums of blocks of vectors that are taken at
/// length 1, f32 `[heads, blocks, head_dim]`: one pass over the vectors.
///
/// # Shapes
/// - `vectors_hsd`: as in [`log_norms`]
///
/// A vector shorter than `shortest` counts as that long.
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn unit_sums(vectors_hsd: &Tensor, shortest: f64) -> Result<(Tensor, Tensor)> {
    let [heads, rows, d] = check_vectors(vectors_hsd)?;
    let blocks = (rows as u64).div_ceil(BLOCK_ROWS as u64) as i64;
    let on = (Kind::Float, vectors_hsd.device());
    let (inverse_hs, sums_hbd) = (Tensor::empty([heads, rows], on), Tensor::empty([heads, blocks, d], on));
    if heads * rows == 0 {
        return Ok((inverse_hs, sums_hbd));
    }
    let kernel = kernel(vectors_hsd.device(), variant(vectors_hsd, d)?, "unit_sums", 0)?;
    let args = [
        Arg::Tensor(vectors_hsd),
        Arg::Tensor(&inverse_hs),
        Arg::Tensor(&sums_hbd),
        Arg::Int(i32::try_from(rows)?),
        Arg::Int(BLOCK_ROWS as i32),
        Arg::Long(vectors_hsd.stride()[0]),
        Arg::Float(shortest as f32),
    ];
    let launch = Launch { grid: [blocks as usize, heads as usize, 1], threads: 256, shared: 0 };
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&launch, &args)? };
    Ok((inverse_hs, sums_hbd))
}

/// Product of each vector with its head's `direction_hd`, times `inverse_hs`: f32 `[heads, rows]`.
///
/// # Shapes
/// - `vectors_hsd`: as in [`log_norms`]
/// - `inverse_hs`: f32 `[heads, rows]`, `direction_hd`: f32 `[heads, head_dim]`, both contiguous, same device
///
/// # Errors
/// Shapes or kinds disagree, or the driver refuses.
pub fn cosines(vectors_hsd: &Tensor, inverse_hs: &Tensor, direction_hd: &Tensor) -> Result<Tensor> {
    let [heads, rows, d] = check_vectors(vectors_hsd)?;
    for (t, expected) in [(inverse_hs, [heads, rows]), (direction_hd, [heads, d])] {
        ensure!(
            t.size() == expected
                && t.kind() == Kind::Float
                && aligned(t)
                && t.device() == vectors_hsd.device(),
            "a factor of cosines is {:?} {:?}, expected contiguous f32 {expected:?}",
            t.kind(),
            t.size()
        );
    }
    let out_hs = inverse_hs.empty_like();
    if heads * rows == 0 {
        return Ok(out_hs);
    }
    let kernel = kernel(vectors_hsd.device(), variant(vectors_hsd, d)?, "cosines", 0)?;
    let args = [
        Arg::Tensor(vectors_hsd),
        Arg::Tensor(inverse_hs),
        Arg::Tensor(direction_hd),
        Arg::Tensor(&out_hs),
        Arg::Int(i32::try_from(rows)?),
        Arg::Long(vectors_hsd.stride()[0]),
    ];
    let grid = [(rows as usize).div_ceil(32), heads as usize, 1];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&Launch { grid, threads: 256, shared: 0 }, &args)? };
    Ok(out_hs)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::{DeviceChoice, device};

    /// Where the kernel of `what` can be tested; says so if nowhere.
    fn gpu(what: &str) -> Option<Device> {
        let on = device(DeviceChoice::Auto).unwrap();
        let able = has_elementwise(on, Kind::BFloat16, 64);
        if !able {
            writeln!(std::io::stderr(), "SKIPPED: the kernel of {what} needs a GPU").unwrap();
        }
        able.then_some(on)
    }

    #[test]
    fn packed_slots_get_what_projections_kept() {
        let Some(on) = gpu("rotary embedding") else { return };
        let _no_grad = tch::no_grad_guard();
        let (sequences, tokens, heads, kv, d) = (3, 2, 4, 2, 96);
        let rows = sequences * tokens;
        let qkv = Tensor::randn([rows, heads + 2 * kv, d], (Kind::BFloat16, on));
        let angles = Tensor::randn([rows, d / 2], (Kind::Float, on));
        let (cos, sin) = (angles.cos(), angles.sin());
        let in_place = qkv.copy();
        rotate(&in_place, heads as usize, None, &cos, &sin, None).unwrap();
        let slot_n = Tensor::randperm(40, (Kind::Int64, on)).narrow(0, 0, rows * kv).contiguous();
        let new = || Tensor::zeros([40, d], (Kind::BFloat16, on));
        let (k_nd, v_nd) = (new(), new());
        let slot = PackedSlots { k_nd: &k_nd, v_nd: &v_nd, slot_n: &slot_n, tokens: tokens as usize };
        let packed = qkv.copy();
        rotate(&packed, heads as usize, None, &cos, &sin, Some(&slot)).unwrap();
        assert!(packed.narrow(1, 0, heads).equal(&in_place.narrow(1, 0, heads)));
        for (cache, first) in [(k_nd, heads), (v_nd, heads + kv)] {
            let of_rows = in_place.narrow(1, first, kv).view([sequences, tokens, kv, d]);
            let expected = new().index_copy(0, &slot_n, &of_rows.transpose(1, 2).reshape([-1, d]));
            assert!(cache.equal(&expected), "heads from {first} on");
        }
    }

    #[test]
    fn turned_vectors_are_those_of_f32_rounded_once() {
        let Some(on) = gpu("turned vectors") else { return };
        for (kind, heads, rows, d) in [
            (Kind::BFloat16, 8, 1000, 128),
            (Kind::Half, 3, 33, 80),
            (Kind::BFloat16, 1, 1, 64),
            (Kind::Half, 2, 70, 256),
            (Kind::BFloat16, 2, 31, 8),
        ] {
            let cache = Tensor::randn([heads, rows + 7, d], (Kind::Float, on)).to_kind(kind);
            let vectors = cache.narrow(1, 5, rows);
            let angles = Tensor::randn([d / 2], (Kind::Float, on)) * 3.0;
            let (cos, sin) = (angles.cos(), angles.sin());
            let room = Tensor::full([heads, rows + 9, d], -7.0, (kind, on));
            let out = room.narrow(1, 2, rows);
            turn(&vectors, &cos, &sin, &out).unwrap();
            let (exact, half) = (vectors.to_kind(Kind::Float), d / 2);
            let (a, b) = (exact.narrow(2, 0, half), exact.narrow(2, half, half));
            let expected = Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin], 2);
            // Half a unit in the last place, and what a fused product rounds otherwise.
            let unit = if kind == Kind::Half { 2f64.powi(-11) } else { 2f64.powi(-8) };
            let off = (out.to_kind(Kind::Float) - &expected).abs() - expected.abs() * unit * 1.01;
            assert!(off.max().double_value(&[]) < 1e-5, "{kind:?}, {d}");
            let _ = out.shallow_clone().fill_(-7.0);
            assert!(room.eq(-7.0).all().int64_value(&[]) == 1, "{kind:?}, {d}: wrote elsewhere");
        }
    }
}

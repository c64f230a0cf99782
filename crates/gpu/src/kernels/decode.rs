//! Attention of one new token per sequence over KV heads of different lengths: `kernels/decode.cu`.
//!
//! Decoding reads every key and value once and computes little with them, so it is bound by memory bandwidth.
//! One launch does a layer: blocks share all segments' rows evenly, whatever the segments' lengths, and the
//! last block of a segment merges what the others found.
//!
//! Dimension key: b sequence, q query head, x segment (sequence x KV head, sequence-major), n row of packed
//! keys and values, d head_dim.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::module::{Arg, Launch, capability, kernel, multiprocessors};
use super::source::{Unit, Variant};

/// As in `decode.cu`: segments at most, keys of a unit.
const SEGMENTS: usize = 1024;
const UNIT_KEYS: usize = 16;
/// The last block of a segment holds two numbers for every other one's part in shared memory.
const MAX_BLOCKS: usize = 384;

/// Is there a kernel for such attention? CUDA from compute capability 8.0 on, bf16 or f16, head_dim 64, 96,
/// 128 or 256, at most 16 query heads per KV head and 1,024 segments.
pub fn has_decode(device: Device, kind: Kind, head_dim: i64, group: usize, segments: usize) -> bool {
    let Device::Cuda(gpu) = device else { return false };
    Variant::bf16(kind).is_some()
        && matches!(head_dim, 64 | 96 | 128 | 256)
        && (1..=16).contains(&group)
        && (1..=SEGMENTS).contains(&segments)
        && capability(gpu).is_ok_and(|(major, _)| major >= 8)
}

/// Bytes of a unit's keys and values in shared memory.
fn unit_bytes(head_dim: u32) -> usize {
    2 * UNIT_KEYS * (head_dim as usize + 8) * 2
}

/// How a block is cut: two of them fit into a multiprocessor of data-centre GPUs, one into others'.
pub(super) fn unit_for(head_dim: u32, wide: bool, capability: (u32, u32)) -> Unit {
    let budget = if matches!(capability, (8, 0) | (9..=10, _)) { 108 << 10 } else { 92 << 10 };
    let budget = if capability == (8, 0) { budget.min(76 << 10) } else { budget };
    let warps = if head_dim <= 128 { 4 } else { 2 };
    let stages = (budget / (warps * unit_bytes(head_dim))).clamp(2, 4);
    Unit::Decode { warps: warps as u32, stages: stages as u32, wide }
}

/// Packed keys and values of a layer, and where each segment's lie; all on one device.
pub struct PackedKv<'a> {
    /// `[n, d]`, contiguous, rotary applied.
    pub keys_nd: &'a Tensor,
    pub values_nd: &'a Tensor,
    /// First row of each segment and the end of the last, i32 `[x + 1]`.
    pub starts_x: &'a Tensor,
    /// Rows of each that are in use, i32 `[x]`.
    pub lengths_x: &'a Tensor,
}

/// Workspace that blocks share, for consecutive launches of one shape on one stream.
#[derive(Debug)]
pub struct DecodeSpace {
    parts: Tensor,
    tops: Tensor,
    arrived_x: Tensor,
    /// Segments, query heads of each, head_dim.
    shape: [usize; 3],
    blocks: usize,
}

impl DecodeSpace {
    /// Space for `segments` of `group` query heads each.
    ///
    /// # Errors
    /// The device is no GPU, or has no memory left.
    pub fn new(device: Device, segments: usize, group: usize, head_dim: usize) -> Result<Self> {
        let Device::Cuda(gpu) = device else { anyhow::bail!("no decoding kernel on {device:?}") };
        let blocks = (2 * multiprocessors(gpu)?).min(MAX_BLOCKS);
        let rows = ((blocks + segments) * group) as i64;
        let empty = |width| Tensor::f_empty([rows, width], (Kind::Float, device));
        let arrived_x = Tensor::f_zeros([segments as i64], (Kind::Int, device))?;
        let shape = [segments, group, head_dim];
        Ok(Self { parts: empty(head_dim as i64)?, tops: empty(2)?, arrived_x, shape, blocks })
    }

    /// Another handle on the same memory.
    pub fn share(&self) -> Self {
        Self {
            parts: self.parts.shallow_clone(),
            tops: self.tops.shallow_clone(),
            arrived_x: self.arrived_x.shallow_clone(),
            ..*self
        }
    }
}

/// Attention of one new token per sequence over all rows of its segments.
///
/// Where segments lie is the caller's word: their rows are not checked against the keys', which would wait
/// for the GPU. `rows`, those of all segments together, only sets how many blocks share the work. `scale` is
/// what products of queries and keys are multiplied with.
///
/// # Shapes
/// - `q_bqd`: `[sequences, query_heads, head_dim]`, bf16 or f16, CUDA; heads contiguous, sequences any even
///   stride apart
/// - returns `[sequences, query_heads, head_dim]`, contiguous, same kind; zeros where a segment is empty
///
/// # Errors
/// Shapes or kinds disagree, there is no kernel for them, or the driver refuses.
pub fn decode(q_bqd: &Tensor, kv: &PackedKv, rows: usize, space: &DecodeSpace, scale: f64) -> Result<Tensor> {
    let (b, heads, d) = q_bqd.size3()?;
    let (kind, device) = (q_bqd.kind(), q_bqd.device());
    let [segments, group, head_dim] = space.shape;
    ensure!(
        d as usize == head_dim
            && heads as usize * b as usize == segments * group
            && (heads as usize).is_multiple_of(group)
            && has_decode(device, kind, d, group, segments),
        "no decoding kernel for {kind:?} queries [{b}, {heads}, {d}] on {device:?}, {segments} segments of {group}"
    );
    let stride = q_bqd.stride();
    let aligned = |t: &Tensor, bytes: usize| (t.data_ptr() as usize).is_multiple_of(bytes);
    ensure!(
        stride[1..] == [d, 1] && stride[0] % 2 == 0 && aligned(q_bqd, 4),
        "queries of strides {stride:?} are not head after head"
    );
    let total = kv.keys_nd.size().first().copied().unwrap_or(0);
    for t in [kv.keys_nd, kv.values_nd] {
        ensure!(
            t.size() == [total, d]
                && t.kind() == kind
                && t.device() == device
                && t.is_contiguous()
                && aligned(t, 16),
            "expected contiguous keys and values {kind:?} [{total}, {d}], found {:?} {:?}",
            t.kind(),
            t.size()
        );
    }
    for t in [kv.starts_x, kv.lengths_x] {
        ensure!(
            t.dim() == 1
                && t.numel() >= segments
                && t.kind() == Kind::Int
                && t.device() == device
                && t.is_contiguous(),
            "expected starts and lengths of {segments} segments as i32 on {device:?}, found {:?} {:?}",
            t.kind(),
            t.size()
        );
    }
    ensure!(space.arrived_x.device() == device, "the space is on another device");
    let out = Tensor::empty([b, heads, d], (kind, device));
    let (Device::Cuda(gpu), Some(bf16)) = (device, Variant::bf16(kind)) else { unreachable!("asked above") };
    let capability = capability(gpu)?;
    let unit = unit_for(head_dim as u32, group > 8, capability);
    let Unit::Decode { warps, stages, .. } = unit else { unreachable!("made as one") };
    let variant = Variant { unit, head_dim: head_dim as u32, bf16, capability };
    let shared = 4 * (SEGMENTS + 4) + (warps * stages) as usize * unit_bytes(head_dim as u32);
    // A unit for every warp at least; the kernel takes any number.
    let blocks = (rows.div_ceil(UNIT_KEYS) / warps as usize).clamp(1, space.blocks);
    let launch = Launch { grid: [blocks, 1, 1], threads: 32 * warps as usize, shared };
    let args = [
        Arg::Tensor(q_bqd),
        Arg::Tensor(kv.keys_nd),
        Arg::Tensor(kv.values_nd),
        Arg::Tensor(kv.starts_x),
        Arg::Tensor(kv.lengths_x),
        Arg::Tensor(&out),
        Arg::Tensor(&space.parts),
        Arg::Tensor(&space.tops),
        Arg::Tensor(&space.arrived_x),
        Arg::Int(segments as i32),
        Arg::Int((heads as usize / group) as i32),
        Arg::Int(group as i32),
        Arg::Long(stride[0]),
        Arg::Float((scale * std::f64::consts::LOG2_E) as f32),
    ];
    // SAFETY: the kernel's arguments; sizes were checked, segments' rows are the caller's.
    unsafe { kernel(device, variant, "decode", shared)?.launch_early(&launch, &args) }
        .context("attention of new tokens over a ragged cache")?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::{DeviceChoice, device};

    #[test]
    fn two_blocks_fit_into_a_hopper_multiprocessor() {
        for head_dim in [64, 96, 128, 256] {
            for (capability, whole, blocks) in
                [((9, 0), 227 << 10, 2), ((8, 0), 163 << 10, 2), ((8, 6), 99 << 10, 1)]
            {
                let Unit::Decode { warps, stages, .. } = unit_for(head_dim, false, capability) else {
                    panic!()
                };
                let ring = (warps * stages) as usize * unit_bytes(head_dim);
                assert!(
                    blocks * (ring + 4 * (SEGMENTS + 4) + 1024) <= whole + 1024,
                    "{head_dim}, {capability:?}"
                );
                // What warps and blocks leave for each other takes the ring's place.
                assert!(warps as usize * 16 * (4 * head_dim as usize + 8) <= ring);
                assert!(16 * 8 * MAX_BLOCKS <= ring, "{head_dim}, {capability:?}");
            }
        }
    }

    /// None of the cases' 1/sqrt(head_dim).
    const SCALE: f64 = 0.1;

    /// Softmax attention in f64, segment by segment.
    fn formula(q_xgd: &Tensor, keys: &Tensor, values: &Tensor, starts: &[i32], lengths: &[i32]) -> Tensor {
        let one = |x: usize| {
            let rows = |t: &Tensor| t.narrow(0, i64::from(starts[x]), i64::from(lengths[x]));
            let q = q_xgd.get(x as i64);
            if lengths[x] == 0 {
                return q.zeros_like();
            }
            let scores = q.matmul(&rows(keys).transpose(0, 1)) * SCALE;
            scores.softmax(-1, None).matmul(&rows(values))
        };
        Tensor::stack(&(0..lengths.len()).map(one).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn the_decoding_attentions_kernel_equals_its_formula() {
        let on = device(DeviceChoice::Auto).unwrap();
        if !has_decode(on, Kind::BFloat16, 128, 4, 8) {
            writeln!(std::io::stderr(), "SKIPPED: the decoding attention's kernel needs a GPU").unwrap();
            return;
        }
        let _no_grad = tch::no_grad_guard();
        tch::manual_seed(7);
        let patterns: [&[i32]; 6] = [
            &[0, 1],
            &[1, 15, 16, 17, 0, 3, 64, 65],
            &[20_000, 5, 0, 900, 1, 33, 7_001, 256],
            &[0, 0, 0, 0],
            &[4_096; 16],
            &[70_001, 1],
        ];
        for (head_dim, group) in
            [64, 96, 128, 256].into_iter().flat_map(|d| [1, 2, 4, 5, 8, 9, 16].map(|g| (d, g)))
        {
            for kind in [Kind::BFloat16, Kind::Half] {
                for lengths in patterns {
                    check(on, kind, head_dim, group, 2, lengths);
                }
            }
        }
        // As many segments as a large batch has, of random lengths; and one sequence of one head.
        let many: Vec<i32> = (0..512).map(|x| (x * 7919) % 601).collect();
        check(on, Kind::BFloat16, 128, 4, 8, &many);
        check(on, Kind::Half, 64, 7, 1, &[12_345]);
    }

    fn check(on: Device, kind: Kind, d: i64, group: usize, kv_heads: usize, lengths: &[i32]) {
        // Segments have rows after them that must not be read: NaN.
        let mut end = 0;
        let starts: Vec<i32> = lengths
            .iter()
            .map(|n| {
                let start = end;
                end += n + 3;
                start
            })
            .collect();
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, on)).to_kind(kind);
        let (keys, values) = (random(&[i64::from(end), d]), random(&[i64::from(end), d]));
        for (start, n) in starts.iter().zip(lengths) {
            for t in [&keys, &values] {
                let _ = t.narrow(0, i64::from(start + n), 3).fill_(f64::NAN);
            }
        }
        let sequences = (lengths.len() / kv_heads) as i64;
        let heads = (kv_heads * group) as i64;
        // Queries lie in front of other numbers, as they do in a projection's output. Some scores are large.
        let q = (random(&[sequences, heads + 3, d]) * 2.0).narrow(1, 0, heads);
        let space = DecodeSpace::new(on, lengths.len(), group, d as usize).unwrap();
        let starts_x = Tensor::from_slice(&starts).to_device(on);
        let lengths_x = Tensor::from_slice(lengths).to_device(on);
        let kv = PackedKv { keys_nd: &keys, values_nd: &values, starts_x: &starts_x, lengths_x: &lengths_x };
        let rows = lengths.iter().map(|n| *n as usize).sum();
        let q_xgd = q.to_kind(Kind::Double).reshape([lengths.len() as i64, group as i64, d]);
        let exact =
            formula(&q_xgd, &keys.to_kind(Kind::Double), &values.to_kind(Kind::Double), &starts, lengths);
        let first = decode(&q, &kv, rows, &space, SCALE).unwrap();
        let got = first.to_kind(Kind::Double).view(exact.size().as_slice());
        let off = (&got - &exact).abs().max().double_value(&[]);
        let most = if kind == Kind::BFloat16 { 3e-2 } else { 4e-3 };
        assert!(off < most, "{kind:?}, {d}, {group} query heads, {lengths:?}: off by {off:e}");
        // Whatever the number of blocks, and whichever comes last; the space is as it was.
        for other in [0, 4_000, 1 << 40] {
            let again = decode(&q, &kv, other, &space, SCALE)
                .unwrap()
                .to_kind(Kind::Double)
                .view(exact.size().as_slice());
            let off = (&again - &exact).abs().max().double_value(&[]);
            assert!(off < most, "{kind:?}, {d}, {group}, {lengths:?}, blocks for {other}: off by {off:e}");
        }
        assert!(decode(&q, &kv, rows, &space, SCALE).unwrap().equal(&first), "the same twice");
    }
}

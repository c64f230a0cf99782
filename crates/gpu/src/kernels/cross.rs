//! Cross-attention over the proxy heads of a position: `kernels/cross.cu`.
//!
//! `mapper` defines the computation; `csrc/train.cpp` connects it to libtorch's autograd and calls the two
//! functions here.

use std::ffi::c_int;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::module::{Arg, Launch, capability, kernel};
use super::source::{Unit, Variant};
use crate::device::tf32;
use crate::shim::{CrossKernels, Raw, answer};

/// Bytes of shared memory that leave room for a second block on a multiprocessor of an A100 or newer.
const SHARED: usize = 80 * 1024;
/// Bytes of shared memory of one block.
const MOST_SHARED: usize = 160 * 1024;

/// Blocks that sum gradients of the weights: four per multiprocessor of an H100.
const WEIGHT_BLOCKS: usize = 528;

/// Functions that the shim calls.
static KERNELS: CrossKernels = CrossKernels { forward, backward, gradients };

/// The kernels, if they can work on tokens `[b, p, t, d]` and `rows` rows of both weights: CUDA from compute
/// capability 8.0 on, bf16 or f16, or f32 where TF32 is allowed; d a multiple of 16 up to 64, rows a multiple
/// of 8, and a position's tokens fit a block.
pub fn cross_kernels(tokens_bptd: &Tensor, rows: i64) -> Option<&'static CrossKernels> {
    let Device::Cuda(gpu) = tokens_bptd.device() else { return None };
    let size = tokens_bptd.size();
    let (p, d) = (size[1], size[3]);
    let kind = tokens_bptd.kind();
    let fits = (Variant::bf16(kind).is_some() || kind == Kind::Float && tf32())
        && d % 16 == 0
        && (16..=64).contains(&d)
        && rows % 8 == 0
        && 2 * shared(kind, p as usize, d as usize, 1) <= MOST_SHARED
        && capability(gpu).is_ok_and(|(major, _)| major >= 8);
    fits.then_some(&KERNELS)
}

/// Bytes that the tokens of `warps` positions take, as the kernel lays them out.
fn shared(kind: Kind, p: usize, d: usize, warps: usize) -> usize {
    let bytes = if kind == Kind::Float { (d + 4) * 4 } else { (d + 8) * 2 };
    warps * p.next_multiple_of(16) * bytes
}

/// Positions of a block.
fn warps(kind: Kind, p: usize, d: usize) -> usize {
    [8, 4, 2].into_iter().find(|w| shared(kind, p, d, *w) <= SHARED).unwrap_or(1)
}

/// Tiles of 16 tokens that a warp of the backward holds: the more, the less often it reads the weights.
fn token_tiles(p: usize) -> usize {
    p.div_ceil(16).clamp(1, 3)
}

fn variant(x: &Tensor, d: i64, warps: usize) -> Result<Variant> {
    let (full, Device::Cuda(gpu)) = (x.kind() == Kind::Float, x.device()) else {
        anyhow::bail!("no cross-attention kernel on {:?}", x.device())
    };
    let bf16 = Variant::bf16(x.kind()).unwrap_or(true);
    let unit = Unit::Cross { warps: warps as u32, tiles: 1, full };
    Ok(Variant { unit, head_dim: d as u32, bf16, capability: capability(gpu)? })
}

/// # Safety
/// Live tensors, or null for the two sums.
unsafe extern "C" fn forward(
    tokens: Raw,
    logit: Raw,
    reading: Raw,
    heads: i64,
    scores: Raw,
    sums: Raw,
    lse2: Raw,
) -> c_int {
    // SAFETY: the caller's; each is a handle of its own.
    let [tokens, logit, reading, scores] =
        [tokens, logit, reading, scores].map(|t| unsafe { Tensor::clone_from_ptr(t) });
    let kept = (!sums.is_null()).then(|| {
        // SAFETY: as above.
        [sums, lse2].map(|t| unsafe { Tensor::clone_from_ptr(t) })
    });
    answer(launch_forward(&tokens, [&logit, &reading], heads, &scores, kept.as_ref()))
}

fn launch_forward(
    tokens_bptd: &Tensor,
    weights_rd: [&Tensor; 2],
    heads: i64,
    scores_bto: &Tensor,
    kept_btr: Option<&[Tensor; 2]>,
) -> Result<()> {
    let (b, p, t, d) = tokens_bptd.size4()?;
    let rows = weights_rd[0].size()[0];
    ensure!(
        tokens_bptd.is_contiguous()
            && weights_rd
                .iter()
                .all(|w| w.size() == [rows, d] && w.is_contiguous() && w.kind() == tokens_bptd.kind())
            && scores_bto.size() == [b, t, rows / heads]
            && scores_bto.kind() == Kind::Float
            && kept_btr.is_none_or(|k| k.iter().all(|x| x.size() == [b, t, rows] && x.kind() == Kind::Float)),
        "tokens {tokens_bptd:?}, weights {weights_rd:?} and scores {scores_bto:?} do not fit {heads} attention heads"
    );
    if b * t == 0 {
        return Ok(());
    }
    let kind = tokens_bptd.kind();
    let warps = warps(kind, p as usize, d as usize);
    let launch = Launch {
        grid: [(t as usize).div_ceil(warps), b as usize, 1],
        threads: 32 * warps,
        shared: shared(kind, p as usize, d as usize, warps),
    };
    let kernel =
        kernel(tokens_bptd.device(), variant(tokens_bptd, d, warps)?, "cross_forward", launch.shared)?;
    let kept = |i: usize| kept_btr.map_or(Arg::Absent, |k| Arg::Tensor(&k[i]));
    let args = [
        Arg::Tensor(tokens_bptd),
        Arg::Tensor(weights_rd[0]),
        Arg::Tensor(weights_rd[1]),
        Arg::Tensor(scores_bto),
        kept(0),
        kept(1),
        Arg::Int(p as i32),
        Arg::Int(t as i32),
        Arg::Int(heads as i32),
        Arg::Int((rows / heads) as i32),
    ];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&launch, &args) }.context("cross-attention over heads")
}

/// # Safety
/// Live tensors.
unsafe extern "C" fn backward(
    tokens: Raw,
    logit: Raw,
    reading: Raw,
    sums: Raw,
    lse2: Raw,
    g: Raw,
    dtokens: Raw,
    dlogit: Raw,
    dreading: Raw,
) -> c_int {
    // SAFETY: the caller's; each is a handle of its own.
    let all = [tokens, logit, reading, sums, lse2, g, dtokens, dlogit, dreading]
        .map(|t| unsafe { Tensor::clone_from_ptr(t) });
    answer(launch_backward(&all))
}

fn launch_backward(
    [tokens_bptd, logit_rd, reading_rd, sums_btr, lse2_btr, g_btr, dtokens, dlogit, dreading]: &[Tensor; 9],
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let (b, p, t, d) = tokens_bptd.size4()?;
    let rows = logit_rd.size()[0];
    ensure!(
        tokens_bptd.is_contiguous()
            && dtokens.is_contiguous()
            && dtokens.size() == tokens_bptd.size()
            && [logit_rd, reading_rd].iter().all(|w| w.size() == [rows, d] && w.is_contiguous())
            && [sums_btr, lse2_btr, g_btr]
                .iter()
                .all(|x| { x.size() == [b, t, rows] && x.is_contiguous() && x.kind() == Kind::Float })
            && rows % 8 == 0,
        "tokens {tokens_bptd:?}, weights {logit_rd:?} and gradient {g_btr:?} do not fit"
    );
    if b * t == 0 {
        return Ok(());
    }
    let positions = (b * t) as usize;
    let device = tokens_bptd.device();
    // The kernels do not depend on the forward's warps; one number spares a compilation.
    let variant = variant(tokens_bptd, d, 1)?;
    let turned = |w: &Tensor| w.transpose(0, 1).contiguous();
    let (logit_dr, reading_dr) = (turned(logit_rd), turned(reading_rd));
    let groups = (p as usize).div_ceil(16 * token_tiles(p as usize));
    let launch = Launch { grid: [(t as usize * groups).div_ceil(4), b as usize, 1], threads: 128, shared: 0 };
    let [int_p, int_t, int_r] = [p, t, rows].map(|n| Arg::Int(n as i32));
    let tiles = Variant {
        unit: Unit::Cross { warps: 1, tiles: token_tiles(p as usize) as u32, full: false },
        ..variant
    };
    // SAFETY: the kernels' arguments; sizes were checked.
    unsafe {
        kernel(device, tiles, "cross_tokens", 0)?.launch(
            &launch,
            &[
                Arg::Tensor(tokens_bptd),
                Arg::Tensor(logit_rd),
                Arg::Tensor(reading_rd),
                Arg::Tensor(&logit_dr),
                Arg::Tensor(&reading_dr),
                Arg::Tensor(sums_btr),
                Arg::Tensor(lse2_btr),
                Arg::Tensor(g_btr),
                Arg::Tensor(dtokens),
                int_p,
                int_t,
                int_r,
            ],
        )?;
    }
    let columns = (rows as usize).div_ceil(128);
    let blocks = (WEIGHT_BLOCKS / columns).clamp(1, positions);
    let per_block = positions.div_ceil(blocks);
    let blocks = positions.div_ceil(per_block);
    let parts = Tensor::zeros([blocks as i64, 2, rows, d], (Kind::Float, device));
    let shared = 2 * shared(tokens_bptd.kind(), p as usize, d as usize, 1);
    let launch = Launch { grid: [columns, blocks, 1], threads: 256, shared };
    // SAFETY: as above.
    unsafe {
        kernel(device, variant, "cross_weights", shared)?.launch(
            &launch,
            &[
                Arg::Tensor(tokens_bptd),
                Arg::Tensor(logit_rd),
                Arg::Tensor(reading_rd),
                Arg::Tensor(sums_btr),
                Arg::Tensor(lse2_btr),
                Arg::Tensor(g_btr),
                Arg::Tensor(&parts),
                Arg::Int(p as i32),
                Arg::Int(t as i32),
                Arg::Int(rows as i32),
                Arg::Int(positions as i32),
                Arg::Int(per_block as i32),
            ],
        )?;
    }
    let both = parts.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    dlogit.shallow_clone().copy_(&both.get(0));
    dreading.shallow_clone().copy_(&both.get(1));
    Ok(())
}

/// # Safety
/// Live tensors.
unsafe extern "C" fn gradients(
    logits: Raw,
    readings: Raw,
    sums: Raw,
    lse2: Raw,
    g: Raw,
    start: i64,
) -> c_int {
    // SAFETY: the caller's; each is a handle of its own.
    let [logits, readings, sums, lse2, g] =
        [logits, readings, sums, lse2, g].map(|t| unsafe { Tensor::clone_from_ptr(t) });
    answer(launch_gradients([&logits, &readings], [&sums, &lse2, &g], start))
}

fn launch_gradients(both_bptr: [&Tensor; 2], kept_btr: [&Tensor; 3], start: i64) -> Result<()> {
    let (b, p, t, rows) = both_bptr[0].size4()?;
    let whole = kept_btr[0].size()[1];
    ensure!(
        both_bptr.iter().all(|x| x.is_contiguous() && x.size() == [b, p, t, rows] && x.kind() == Kind::Float)
            && kept_btr
                .iter()
                .all(|x| { x.is_contiguous() && x.size() == [b, whole, rows] && x.kind() == Kind::Float })
            && start + t <= whole
            && rows % 8 == 0,
        "logits {:?} and sums {:?} do not fit",
        both_bptr[0],
        kept_btr[0]
    );
    let pieces = t * rows / 4;
    if b * pieces == 0 {
        return Ok(());
    }
    let launch = Launch { grid: [(pieces as usize).div_ceil(128), b as usize, 1], threads: 128, shared: 0 };
    // The kernel depends on neither depth nor warps; these spare a compilation of its own.
    let kernel = kernel(both_bptr[0].device(), variant(both_bptr[0], 32, 8)?, "cross_gradients", 0)?;
    let args = [
        Arg::Tensor(both_bptr[0]),
        Arg::Tensor(both_bptr[1]),
        Arg::Tensor(kept_btr[0]),
        Arg::Tensor(kept_btr[1]),
        Arg::Tensor(kept_btr[2]),
        Arg::Int(p as i32),
        Arg::Int(t as i32),
        Arg::Int(whole as i32),
        Arg::Int(start as i32),
        Arg::Int(rows as i32),
    ];
    // SAFETY: the kernel's arguments; sizes were checked.
    unsafe { kernel.launch(&launch, &args) }.context("cross-attention over heads, backward")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_hold_as_many_positions_as_fit() {
        // The tiny pair, an 8B pair, a 32B target's proxy of 28 x 8 heads.
        assert_eq!([13, 129, 225].map(|p| warps(Kind::BFloat16, p, 32)), [8, 4, 4]);
        assert_eq!(warps(Kind::Float, 13, 32), 8);
        assert_eq!(warps(Kind::Half, 3000, 64), 1);
        assert_eq!([1, 13, 17, 129].map(token_tiles), [1, 1, 2, 3]);
        assert!(cross_kernels(&Tensor::zeros([1, 3, 2, 32], (Kind::BFloat16, Device::Cpu)), 8).is_none());
    }
}

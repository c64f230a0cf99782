//! Cases of what lies between a layer's matrix products, and of the mapper's convolution.

use tch::{Device, Kind, Tensor};

use super::{Compared, is_half, positive, rounding};
use crate::PackedSlots;
use crate::ops::{self, Projected, Rotation, gate, mapper, norms, rotary, unit_mean, weights};
use pkv_test_support::attention::{exact, random};

pub fn gated_silu(device: Device, kind: Kind) -> Vec<Compared> {
    // A width without a kernel among them.
    [(30, 24), (7, 20), (1, 8), (513, 1408)]
        .into_iter()
        .map(|(rows, wide)| {
            let gate_up = random(1, &[rows, 2 * wide], Kind::Float, device) * 3.0;
            let gate_up = gate_up.to_kind(kind);
            let [gate, up] = [0, wide].map(|first| exact(&gate_up).narrow(1, first, wide));
            Compared {
                what: format!("{rows} rows of {wide}"),
                operator: ops::gated_silu(&gate_up).unwrap(),
                portable: gate::portable(&gate_up),
                naive: &gate / ((-&gate).exp() + 1.0) * up,
                within: [1e-6, rounding(kind)],
            }
        })
        .collect()
}

pub fn nats(device: Device, kind: Kind) -> Vec<Compared> {
    [(37, 4096, 3.0), (5, 8, 20.0), (3, 128_256, 10.0), (4, 11, 1.0), (0, 64, 1.0)]
        .into_iter()
        .map(|(rows, vocab, scale)| {
            let logits = (random(1, &[rows, vocab], Kind::Float, device) * scale).to_kind(kind);
            tch::manual_seed(2);
            let next = Tensor::randint(vocab, [rows], (Kind::Int64, Device::Cpu)).to_device(device);
            let picked = exact(&logits).log_softmax(1, None).gather(1, &next.unsqueeze(1), false);
            Compared {
                what: format!("{rows} rows of {vocab}"),
                operator: ops::nats(&logits, &next).unwrap(),
                portable: ops::nats::portable(&logits, &next),
                naive: -picked.squeeze_dim(1),
                within: [1e-4, 0.0],
            }
        })
        .collect()
}

pub fn log_norms(device: Device, kind: Kind) -> Vec<Compared> {
    [(8, 1000, 64, 1e-4), (3, 33, 80, 0.5), (1, 1, 96, 0.0), (2, 70, 128, 1e-4), (2, 31, 256, 1e-4)]
        .into_iter()
        .map(|(heads, rows, d, floor)| {
            let cache = random(1, &[heads, rows + 7, d], kind, device);
            let vectors = cache.narrow(1, 5, rows);
            let _ = vectors.select(1, rows / 2).fill_(0.0);
            let lengths = exact(&vectors).square().sum_dim_intlist([-1i64].as_slice(), false, None).sqrt();
            // One channel of several, at positions further on; nothing else is written.
            let written = |kind: Kind, write: &dyn Fn(&mut Tensor)| {
                let all = Tensor::full([heads, 3, rows + 2], -7.0, (kind, device));
                write(&mut all.select(1, 1).narrow(1, 2, rows));
                // The logarithm of nothing.
                all.clamp_min(-99.0)
            };
            Compared {
                what: format!("{heads} heads, {rows} rows of {d}, not below {floor}"),
                operator: written(Kind::Float, &|out| ops::log_norms(&vectors, floor, out).unwrap()),
                portable: written(Kind::Float, &|out| out.copy_(&norms::portable(&vectors, floor))),
                naive: written(Kind::Double, &|out| out.copy_(&lengths.clamp_min(floor).log())),
                within: [2e-6, 0.0],
            }
        })
        .collect()
}

/// Rows beyond one block of the kernel, depths whose pieces of 8 do not fill its eight threads, a vector of
/// zeros.
pub fn mean_cosines(device: Device, kind: Kind) -> Vec<Compared> {
    [(8, 1300, 64), (3, 33, 80), (1, 1, 96), (2, 512, 128), (2, 700, 256)]
        .into_iter()
        .map(|(heads, rows, d)| {
            // Keys have a direction in common.
            let cache = (random(1, &[heads, rows + 7, d], Kind::Float, device) + 0.3).to_kind(kind);
            let vectors = cache.narrow(1, 5, rows);
            let _ = vectors.select(1, rows / 2).fill_(if rows > 1 { 0.0 } else { 0.5 });
            let unit = |x: &Tensor| {
                x / x.square().sum_dim_intlist([-1i64].as_slice(), true, None).sqrt().clamp_min(1e-12)
            };
            let units = unit(&exact(&vectors));
            let mean = unit(&units.mean_dim([1i64].as_slice(), true, None));
            Compared {
                what: format!("{heads} heads, {rows} rows of {d}"),
                operator: ops::mean_cosines(&vectors).unwrap(),
                portable: unit_mean::portable(&vectors),
                naive: (units * mean).sum_dim_intlist([-1i64].as_slice(), false, None),
                within: [2e-6, 0.0],
            }
        })
        .collect()
}

/// Weights of very different sizes in one sum.
pub fn full_weights(device: Device, kind: Kind) -> Vec<Compared> {
    [(1000, 512, 8), (33, 96, 2), (1, 40, 3)]
        .into_iter()
        .map(|(rows, m, n)| {
            let scale = Tensor::from_slice(&[1.0, 1e-3, 3e2]).to_kind(Kind::Float).to_device(device);
            let scale = scale.repeat([(m + 2) / 3]).narrow(0, 0, m).unsqueeze(-1);
            let weight = random(2, &[3, m, n], Kind::Float, device) * &scale;
            // Terms of the same size.
            let x = (random(1, &[rows, m], Kind::Float, device) / scale.transpose(0, 1)).to_kind(kind);
            let by = ops::FullWeights::new(weight.shallow_clone());
            Compared {
                what: format!("{rows} rows of {m} to {n}"),
                operator: by.product(1, &x),
                portable: weights::portable(&x, &weight.get(1)),
                naive: exact(&x).matmul(&exact(&weight.get(1))),
                within: [3e-4, 1e-5],
            }
        })
        .collect()
}

/// Three parts of 8 digits are the 24 of an f32.
#[test]
fn parts_of_weights_are_the_weights() {
    let weight = random(1, &[2, 40, 3], Kind::Float, Device::Cpu) * 0.01;
    let parts = weights::parts(&weight).to_kind(Kind::Double).view([2, 3, 3, 40]);
    let sum = parts.sum_dim_intlist([1i64].as_slice(), false, None).transpose(1, 2);
    let off = (sum - exact(&weight)).abs().max().double_value(&[]);
    assert!(off <= 0.05 * 2f64.powi(-24), "{off:e}");
}

/// Queries, keys and values side by side; with a cache the queries, and what the cache then holds.
pub fn rotate(device: Device, kind: Kind) -> Vec<Compared> {
    let mut cases = Vec::new();
    for sizes in [[1, 37, 64], [3, 2, 96], [2, 1, 128], [2, 3, 10]] {
        for (normed, cached, shared) in [
            (false, false, false),
            (true, false, false),
            (true, true, false),
            (false, true, false),
            (true, false, true),
        ] {
            cases.push(rotated(device, kind, sizes, normed, cached, shared));
        }
    }
    cases
}

/// `shared`: all sequences are at the same positions.
fn rotated(
    device: Device,
    kind: Kind,
    [sequences, tokens, d]: [i64; 3],
    normed: bool,
    cached: bool,
    shared: bool,
) -> Compared {
    let (heads, kv, eps, capacity) = (4, 2, 1e-5, 100);
    let qkv = random(1, &[sequences, tokens, heads + 2 * kv, d], kind, device);
    let weight = positive(2, &[heads + kv, d], device).to_kind(kind);
    let norm = normed.then_some((&weight, eps));
    let positions = if shared { vec![tokens, d / 2] } else { vec![sequences, tokens, d / 2] };
    let angles = random(3, &positions, Kind::Float, device) * 3.0;
    let (cos, sin) = (angles.cos(), angles.sin());
    let rotation = Rotation::new([cos.shallow_clone(), sin.shallow_clone()], kind);
    tch::manual_seed(4);
    let slot_n = Tensor::randperm(capacity, (Kind::Int64, Device::Cpu)).to_device(device);
    let slot_n = slot_n.narrow(0, 0, sequences * tokens * kv).contiguous();
    let room = |kind: Kind| [0, 1].map(|_| Tensor::zeros([capacity, d], (kind, device)));
    let all = |new: &Projected, [k_nd, v_nd]: &[Tensor; 2]| match cached {
        true => Tensor::cat(&[&new.q, k_nd, v_nd].map(|x| x.flatten(0, -1)), 0),
        false => Tensor::cat(&[&new.q, &new.k, &new.v], -2),
    };

    let operator = {
        let [k_nd, v_nd] = &room(kind);
        let slots = PackedSlots { k_nd, v_nd, slot_n: &slot_n, tokens: tokens as usize };
        let new = ops::rotate(&qkv.copy(), heads as usize, norm, &rotation, cached.then_some(&slots));
        all(&new.unwrap(), &[k_nd.shallow_clone(), v_nd.shallow_clone()])
    };
    let portable = {
        let [k_nd, v_nd] = &room(kind);
        let new = rotary::portable(&qkv, heads as usize, norm, &rotation);
        PackedSlots { k_nd, v_nd, slot_n: &slot_n, tokens: tokens as usize }.write(&new.k, &new.v);
        all(&new, &[k_nd.shallow_clone(), v_nd.shallow_clone()])
    };
    let mut qk = exact(&qkv).narrow(2, 0, heads + kv);
    if normed {
        let mean = qk.square().mean_dim([-1i64].as_slice(), true, None);
        qk = qk / (mean + eps).sqrt() * exact(&weight);
    }
    let [a, b] = [0, d / 2].map(|first| qk.narrow(-1, first, d / 2));
    let [cos, sin] = [&cos, &sin].map(|x| exact(x).unsqueeze(-2));
    let qk = Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin], -1);
    let (q, k) = (qk.narrow(2, 0, heads), qk.narrow(2, heads, kv));
    let new = Projected { q, k, v: exact(&qkv).narrow(2, heads + kv, kv) };
    let rows = [&new.k, &new.v].map(|x| x.transpose(1, 2).reshape([-1, d]));
    let [k_nd, v_nd] = room(Kind::Double);
    let naive = [k_nd.index_copy(0, &slot_n, &rows[0]), v_nd.index_copy(0, &slot_n, &rows[1])];
    Compared {
        what: format!(
            "{sequences} sequences of {tokens}, head_dim {d}, normed {normed}, cached {cached}, shared {shared}"
        ),
        operator,
        portable,
        naive: all(&new, &naive),
        within: [1e-5, rounding(kind)],
    }
}

pub fn time_conv(device: Device, kind: Kind) -> Vec<Compared> {
    if is_half(kind) {
        return Vec::new();
    }
    [(2, 11, 3, 4, 5, 2), (1, 1, 2, 2, 5, 8), (3, 4, 5, 2, 3, 1), (2, 9, 4, 4, 1, 3), (2, 300, 32, 32, 5, 4)]
        .into_iter()
        .map(|(rows, t, from, to, taps, dilation)| {
            let x = random(1, &[rows, t, from], kind, device);
            let weight = random(2, &[to, from, taps], kind, device);
            let bias = random(3, &[to], kind, device);
            let wide = exact(&x).constant_pad_nd([0, 0, taps / 2 * dilation, taps / 2 * dilation]);
            let tap =
                |i: i64| wide.narrow(1, i * dilation, t).matmul(&exact(&weight).select(2, i).transpose(0, 1));
            Compared {
                what: format!("{rows} x {t}, {from} to {to}, {taps} taps {dilation} apart"),
                operator: ops::time_conv(&x, &weight, &bias, dilation),
                portable: mapper::by_image(&x, &weight, &bias, dilation),
                naive: (0..taps).map(tap).fold(exact(&bias), |sum, x| sum + x),
                within: [1e-4, 1e-5],
            }
        })
        .collect()
}

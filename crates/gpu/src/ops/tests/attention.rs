//! Cases of attention: over a cache, in segments, merged, and over packed KV heads of different lengths.
//!
//! How CUDA's kernels share the work is tested beside them, in `ops/attention/tests.rs`.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Compared, is_half};
use crate::PackedKv;
use crate::ops::attention::portable;
use crate::ops::{self, Attention, Part, RaggedAttention, RaggedShape, Segments, ragged};
use pkv_test_support::attention::{self as naive, random, up_to};

/// 1/sqrt(head_dim) of none of the cases.
const SCALE: f64 = 0.3;

/// Models do not run in f16 on a CPU, and not every CPU has libtorch's kernel for it.
fn has_none(device: Device, kind: Kind) -> bool {
    device == Device::Cpu && kind == Kind::Half
}

/// Of outputs and of log-sum-exps.
fn within(device: Device, kind: Kind) -> [[f64; 2]; 2] {
    match (device, is_half(kind)) {
        (Device::Cpu, false) => [[1e-5, 0.0]; 2],
        (Device::Cpu, true) => [[3e-2, 0.0], [1e-2, 0.0]],
        (_, false) => [[1e-4, 0.0]; 2],
        (_, true) => [[3e-2, 0.0], [2e-3, 0.0]],
    }
}

/// Outputs, then log-sum-exps, of one case.
fn both(
    what: &str,
    place: (Device, Kind),
    operator: [Tensor; 2],
    portable: [Tensor; 2],
    naive: [Tensor; 2],
) -> impl Iterator<Item = Compared> {
    let names = [what.to_owned(), format!("{what}: log-sum-exps")];
    let within = within(place.0, place.1);
    let forms = operator.into_iter().zip(portable).zip(naive);
    names.into_iter().zip(within).zip(forms).map(|((what, within), ((operator, portable), naive))| Compared {
        what,
        operator,
        portable,
        naive,
        within,
    })
}

fn parts(part: &Part) -> [Tensor; 2] {
    [part.out_rqd.copy(), part.lse_qr.to_kind(Kind::Float)]
}

pub fn attend(device: Device, kind: Kind) -> Vec<Compared> {
    if has_none(device, kind) {
        return Vec::new();
    }
    let attention = Attention::new(SCALE);
    let mut cases = Vec::new();
    for (start, s) in [(0, 1), (0, 130), (1, 1), (50, 1), (130, 7), (64, 64), (2500, 1100)] {
        let q = ops::arranged(&random(1, &[s, 6, 16], kind, device));
        // A part of a cache's capacity.
        let [k, v] =
            [2, 3].map(|seed| random(seed, &[2, start + s + 5, 16], kind, device).narrow(1, 0, start + s));
        let (out, lse) = ops::attend(&q, &k, &v, start as usize, true, &attention).unwrap();
        let (alone, _) = ops::attend(&q, &k, &v, start as usize, false, &attention).unwrap();
        let exact = naive::attention(&q, &k, &v, SCALE, &up_to(start, s, start + s, device));
        let plain = parts(&portable::causal(&q, &k, &v, start, SCALE).unwrap());
        cases.push(Compared {
            what: format!("{start} + {s}, no log-sum-exps"),
            operator: alone,
            portable: plain[0].shallow_clone(),
            naive: exact[0].shallow_clone(),
            within: within(device, kind)[0],
        });
        cases.extend(both(&format!("{start} + {s}"), (device, kind), [out, lse.unwrap()], plain, exact));
    }
    cases
}

/// Queries, own keys and own values of rows, and which rows each sees, by segment.
fn own(lengths: &[usize], device: Device, kind: Kind) -> ([Tensor; 3], Segments, Tensor) {
    let segments = Segments::new(lengths.iter().copied(), device).unwrap();
    let rows = lengths.iter().sum::<usize>() as i64;
    let (q, k, v) = (6, 2, 2);
    let new = [(1, q), (2, k), (3, v)].map(|(seed, heads)| random(seed, &[rows, heads, 16], kind, device));
    let seen = Tensor::zeros([rows, rows], (Kind::Bool, device));
    for range in &segments.ranges {
        let (first, n) = (range.start as i64, range.len() as i64);
        seen.narrow(0, first, n).narrow(1, first, n).copy_(&up_to(0, n, n, device));
    }
    (new, segments, seen)
}

const SEGMENTS: [&[usize]; 4] = [&[9], &[5, 1], &[70, 1, 64], &[30; 5]];

pub fn attend_segments(device: Device, kind: Kind) -> Vec<Compared> {
    if has_none(device, kind) {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for lengths in SEGMENTS {
        let ([q, k, v], segments, seen) = own(lengths, device, kind);
        let got = ops::attend_segments(&q, &k, &v, &segments, &Attention::new(SCALE)).unwrap();
        let plain = portable::squares(&q, &k, &v, &segments.ranges, SCALE);
        let exact = naive::attention(&q, &k.transpose(0, 1), &v.transpose(0, 1), SCALE, &seen);
        cases.extend(both(&format!("{lengths:?}"), (device, kind), parts(&got), parts(&plain), exact));
    }
    cases
}

/// Segments that also see a cache, and so the merge of two parts.
pub fn add_attention(device: Device, kind: Kind) -> Vec<Compared> {
    if has_none(device, kind) {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for lengths in SEGMENTS {
        for keys in [0, 70, 2100] {
            let ([q, own_k, own_v], segments, seen) = own(lengths, device, kind);
            let rows = q.size()[0];
            let [k, v] = [4, 5].map(|seed| random(seed, &[2, keys + 5, 16], kind, device).narrow(1, 0, keys));
            let attention = Attention::new(SCALE);
            let mut got = ops::attend_segments(&q, &own_k, &own_v, &segments, &attention).unwrap();
            ops::add_attention(&mut got, &q, &k, &v, &attention).unwrap();
            let plain = portable::squares(&q, &own_k, &own_v, &segments.ranges, SCALE);
            if keys > 0 {
                let cached = portable::rectangle(&q, &k, &v, SCALE);
                let mut out_rqd = plain.out_rqd.shallow_clone();
                portable::merge(&mut out_rqd, &plain.lse_qr, &cached);
            }
            let all = |cache: &Tensor, own: &Tensor| Tensor::cat(&[cache, &own.transpose(0, 1)], 1);
            let seen = Tensor::cat(&[up_to(keys, rows, keys, device), seen], 1);
            let exact = naive::attention(&q, &all(&k, &own_k), &all(&v, &own_v), SCALE, &seen);
            let what = format!("{lengths:?} over {keys} keys");
            cases.extend(both(&what, (device, kind), parts(&got), parts(&plain), exact));
        }
    }
    cases
}

/// Room after each segment holds NaN, which is not read.
pub fn ragged(device: Device, kind: Kind) -> Vec<Compared> {
    if has_none(device, kind) {
        return Vec::new();
    }
    let (kv_heads, group) = (2usize, 3usize);
    let mut cases = Vec::new();
    for (d, tokens, lengths) in [
        (64, 1, vec![1, 17, 300, 5]),
        (128, 1, vec![4096, 16, 33, 64, 2, 1]),
        (16, 1, vec![7, 9]),
        (64, 5, vec![5, 90, 33, 700]),
        (80, 2, vec![40, 2]),
    ] {
        let sequences = lengths.len() / kv_heads;
        let mut end = 0;
        let rows: Vec<Range<usize>> = lengths
            .iter()
            .map(|n| {
                let start = end;
                end += n + 3;
                start..start + n
            })
            .collect();
        let packed = [2, 3].map(|seed| random(seed, &[end as i64, d], kind, device));
        for (of, rows) in packed.iter().flat_map(|of| rows.iter().map(move |rows| (of, rows))) {
            let _ = of.narrow(0, rows.end as i64, 3).fill_(f64::NAN);
        }
        let ints = |numbers: Vec<usize>| {
            Tensor::from_slice(&numbers.iter().map(|n| *n as i32).collect::<Vec<_>>()).to_device(device)
        };
        let [keys_nd, values_nd] = &packed;
        let starts_x = ints(rows.iter().map(|r| r.start).chain([end]).collect());
        let kv = PackedKv { keys_nd, values_nd, starts_x: &starts_x, lengths_x: &ints(lengths.clone()) };
        let query_heads = (kv_heads * group) as i64;
        // Queries lie in front of other numbers, as they do in a projection's output.
        let q = random(1, &[sequences as i64, tokens, query_heads + 2, d], kind, device);
        let q = q.narrow(2, 0, query_heads);
        let shape =
            RaggedShape { sequences, tokens, query_heads: kv_heads * group, kv_heads, head_dim: d as usize };
        let attention = Attention::new(SCALE);
        let mut space = None;
        let step = RaggedAttention::new(attention, shape, device, kind, &mut space).unwrap();
        let q_xsgd = ragged::by_segment(&q, kv_heads as i64).unwrap();
        let by_row = |out_xsgd: &Tensor| {
            let out = out_xsgd.view([sequences as i64, kv_heads as i64, tokens, group as i64, d]);
            out.transpose(1, 2).reshape([sequences as i64, tokens, query_heads, d])
        };
        let plain = ragged::one_by_one(&q_xsgd, &kv, rows.iter().cloned(), &attention).unwrap();
        let exact: Vec<Tensor> = rows
            .iter()
            .enumerate()
            .map(|(x, rows)| {
                let n = rows.len() as i64;
                let of = |all: &Tensor| all.narrow(0, rows.start as i64, n).unsqueeze(0);
                let seen = up_to(n - tokens, tokens, n, device);
                naive::attention(&q_xsgd.get(x as i64), &of(keys_nd), &of(values_nd), SCALE, &seen)[0]
                    .shallow_clone()
            })
            .collect();
        cases.push(Compared {
            what: format!("{tokens} tokens after {lengths:?} of {d}"),
            operator: step.attend(&q, &kv, rows.iter().cloned()).unwrap(),
            portable: by_row(&plain),
            naive: by_row(&Tensor::stack(&exact, 0)),
            within: within(device, kind)[0],
        });
    }
    cases
}

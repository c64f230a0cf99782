//! Cases of KVzip scores, query statistics and the replay that is never run.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Compared, is_half, positive};
use crate::ops::{self, Movement, Repeats, ReplayScores, Weighting, WeightingOf, replay, scores, statistics};
use crate::{Products, QueryStatistics, ScoreOutput, ScoreRows, StatisticChannels};
use pkv_test_support::attention::{exact, random, softmax, spread, up_to};

/// 1/sqrt(head_dim) of none of the cases.
const SCALE: f64 = 0.1;

/// Blocks that hold all rows of every small case.
const WHOLE: usize = 1 << 25;

/// Heads, group and head_dim; prefix and sink; rows and keys of the scoring chunks.
type ScoreCase = ([i64; 3], [usize; 2], &'static [(usize, usize)]);

const SMALL: [ScoreCase; 11] = [
    // A context of one token, without and with a prefix as sink; a last chunk of one token.
    ([1, 1, 4], [0, 0], &[(1, 1)]),
    ([2, 3, 8], [5, 5], &[(12, 1)]),
    ([2, 2, 8], [40, 4], &[(19, 1)]),
    // A context shorter than the sink, a chunk in the middle, a prefix longer than the sink.
    ([2, 1, 16], [17, 17], &[(23, 5)]),
    ([3, 1, 7], [21, 4], &[(31, 13), (12, 9)]),
    ([2, 3, 5], [3, 3], &[(29, 17), (14, 11)]),
    ([1, 7, 6], [11, 2], &[(53, 37)]),
    ([4, 2, 8], [1, 1], &[(97, 64), (5, 3)]),
    // Around the kernels' tiles.
    ([2, 2, 64], [7, 5], &[(300, 257), (130, 129), (1, 1), (77, 3)]),
    ([1, 7, 96], [4, 4], &[(65, 63), (64, 64), (63, 65)]),
    ([2, 5, 80], [12, 4], &[(301, 300), (17, 1)]),
];

/// Too large for a CPU.
const LARGE: [ScoreCase; 2] = [
    ([8, 4, 128], [30, 30], &[(2058, 2000), (2063, 2000), (600, 541)]),
    ([2, 1, 256], [0, 0], &[(100, 99), (258, 256)]),
];

/// Queries, own keys and cached keys of a case, and which rows and keys belong together.
struct Asked {
    q_rqd: Tensor,
    own_k_rhd: Tensor,
    k_hkd: Tensor,
    chunks: Vec<ScoreRows>,
    prefix: usize,
    sink: usize,
    rows_r: Tensor,
    columns_qt: Tensor,
}

impl Asked {
    fn new(([heads, group, d], [prefix, sink], lengths): ScoreCase, device: Device, kind: Kind) -> Self {
        let (mut chunks, mut first_row, mut first_key) = (Vec::new(), 0, prefix);
        for &(rows, keys) in lengths {
            chunks.push(ScoreRows { first_row, rows, first_key, keys });
            first_row += rows;
            first_key += keys;
        }
        let (rows, context, query_heads) = (first_row as i64, (first_key - prefix) as i64, heads * group);
        // As models have them: queries are a part of a wider row, the cache has room to spare.
        let qkv = random(1, &[rows, query_heads + 2 * heads, d], kind, device);
        let cache = random(2, &[heads, first_key as i64 + 9, d], kind, device);
        Self {
            q_rqd: qkv.narrow(1, 0, query_heads),
            own_k_rhd: qkv.narrow(1, query_heads, heads),
            k_hkd: cache.narrow(1, 0, first_key as i64),
            chunks,
            prefix,
            sink,
            rows_r: positive(3, &[rows], device),
            columns_qt: positive(4, &[query_heads, context], device),
        }
    }

    fn room(&self) -> Tensor {
        let context = self.columns_qt.size()[1];
        Tensor::full([self.k_hkd.size()[0], context], f64::NAN, (Kind::Float, self.q_rqd.device()))
    }

    fn weighting(&self, rows: Range<usize>, positions: Range<usize>) -> Weighting {
        let part = |x: &Tensor, range: Range<usize>| x.narrow(-1, range.start as i64, range.len() as i64);
        let positions = positions.start - self.prefix..positions.end - self.prefix;
        Weighting { rows_s: part(&self.rows_r, rows), columns_qt: part(&self.columns_qt, positions) }
    }

    /// Of each row over its own chunk's rows: f32 `[query_heads, rows]`.
    fn own_lse(&self) -> Tensor {
        let of = |c: &ScoreRows| {
            let part = |x: &Tensor| x.narrow(0, c.first_row as i64, c.rows as i64).transpose(0, 1);
            let n = c.rows as i64;
            softmax(&part(&self.q_rqd), &part(&self.own_k_rhd), SCALE, &up_to(0, n, n, self.q_rqd.device())).1
        };
        Tensor::cat(&self.chunks.iter().map(of).collect::<Vec<_>>(), 1).to_kind(Kind::Float)
    }

    /// Maxima and means by the definition, a chunk's whole matrix of weights at once.
    fn naive(&self, weighted: bool) -> [Tensor; 2] {
        let device = self.q_rqd.device();
        let (heads, query_heads) = (self.k_hkd.size()[0], self.q_rqd.size()[1]);
        let of = |c: &ScoreRows| {
            let (rows, keys, sink) = (c.rows as i64, c.keys as i64, self.sink as i64);
            let own = |x: &Tensor| x.narrow(0, c.first_row as i64, rows).transpose(0, 1);
            let cached = |first: usize, n: i64| self.k_hkd.narrow(1, first as i64, n);
            let k = Tensor::cat(&[cached(0, sink), cached(c.first_key, keys), own(&self.own_k_rhd)], 1);
            let seen = up_to(sink + keys, rows, sink + keys + rows, device);
            // A KV head at a time: in f64 all of them are gigabytes.
            let (q_qsd, group) = (own(&self.q_rqd), query_heads / heads);
            let of_head =
                |h: i64| softmax(&q_qsd.narrow(0, h * group, group), &k.narrow(0, h, 1), SCALE, &seen).0;
            let weights: Vec<Tensor> = (0..heads).map(|h| of_head(h).narrow(2, sink, keys).copy()).collect();
            let weights = Tensor::cat(&weights, 0);
            let weights = match weighted {
                true => {
                    let Weighting { rows_s, columns_qt } =
                        self.weighting(c.first_row..c.first_row + c.rows, c.first_key..c.first_key + c.keys);
                    weights * exact(&rows_s).unsqueeze(1) * exact(&columns_qt).unsqueeze(1)
                }
                false => weights,
            };
            let by_head = weights.reshape([heads, query_heads / heads * rows, keys]);
            [by_head.amax([1], false), by_head.mean_dim([1i64].as_slice(), false, None)]
        };
        let all: Vec<[Tensor; 2]> = self.chunks.iter().map(of).collect();
        [0, 1].map(|i| Tensor::cat(&all.iter().map(|x| &x[i]).collect::<Vec<_>>(), 1))
    }

    /// `run(repeats, weighting, to)` writes scores and means.
    fn run(&self, weighted: bool, run: &dyn Fn(&Repeats, Option<&WeightingOf>, ScoreOutput)) -> [Tensor; 2] {
        let (kind, d) = (self.q_rqd.kind(), self.q_rqd.size()[2] as usize);
        let own_lse = ops::wants_lse(self.q_rqd.device(), kind, d).then(|| self.own_lse());
        let repeats = Repeats {
            of: Products { q_rqd: &self.q_rqd, k_hkd: &self.k_hkd, scale: SCALE },
            own_k_rhd: &self.own_k_rhd,
            own_lse_qr: own_lse.as_ref(),
            sink: self.sink,
        };
        let factors = |rows: Range<usize>, positions: Range<usize>| Ok(self.weighting(rows, positions));
        let weighting = weighted.then_some(&factors as &WeightingOf);
        let (max_ht, mean_ht, alone_ht) = (self.room(), self.room(), self.room());
        let first = self.prefix;
        run(&repeats, weighting, ScoreOutput { max_ht: &max_ht, mean_ht: Some(&mean_ht), first });
        run(&repeats, weighting, ScoreOutput { max_ht: &alone_ht, mean_ht: None, first });
        assert!(max_ht.equal(&alone_ht), "scores change with the means beside them");
        [max_ht, mean_ht]
    }
}

/// f32 is exact relative to size: kernels to 1e-4 of each score, libtorch's products to 2e-6 of the largest.
fn within(device: Device, naive: &Tensor) -> [f64; 2] {
    match device {
        Device::Cpu => [2e-6 * naive.max().double_value(&[]).max(1.0), 0.0],
        _ => [1e-9, 1e-4],
    }
}

pub fn chunk_scores(device: Device, kind: Kind) -> Vec<Compared> {
    let large = if device == Device::Cpu { &[][..] } else { &LARGE[..] };
    let mut cases = Vec::new();
    for &case in SMALL.iter().chain(large) {
        let asked = Asked::new(case, device, kind);
        for weighted in [false, true] {
            let operator = asked.run(weighted, &|repeats, weighting, to| {
                ops::chunk_scores(repeats, &asked.chunks, weighting, to).unwrap();
            });
            let block = scores::block_elements(device);
            let portable = asked.run(weighted, &|repeats, weighting, to| {
                scores::portable(repeats, &asked.chunks, weighting, to, block).unwrap();
            });
            let what = ["scores", "means"].map(|of| format!("{of} of {case:?}, weighted {weighted}"));
            let forms = operator.into_iter().zip(portable).zip(asked.naive(weighted));
            cases.extend(what.into_iter().zip(forms).map(|(what, ((operator, portable), naive))| {
                let within = within(device, &naive);
                Compared { what, operator, portable, naive, within }
            }));
        }
    }
    cases
}

/// One row per block, a few, and all at once.
#[test]
fn blocks_of_rows_change_no_score() {
    let _no_grad = tch::no_grad_guard();
    for case in SMALL {
        let asked = Asked::new(case, Device::Cpu, Kind::Float);
        for weighted in [false, true] {
            let naive = asked.naive(weighted);
            for block in [1, 1000, WHOLE] {
                let found = asked.run(weighted, &|repeats, weighting, to| {
                    scores::portable(repeats, &asked.chunks, weighting, to, block).unwrap();
                });
                for (found, naive) in found.iter().zip(&naive) {
                    let off = (exact(found) - naive).abs().max().double_value(&[]);
                    let tolerance = within(Device::Cpu, naive)[0];
                    assert!(off < tolerance, "{case:?}, weighted {weighted}, blocks of {block}: {off:e}");
                }
            }
        }
    }
}

#[test]
fn scores_of_shapes_that_disagree_are_errors() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let run = |q: &[i64], own: &[i64], k: &[i64], sink, [first_row, rows]: [usize; 2], keys: Range<usize>| {
        let (q_rqd, own_k_rhd, k_hkd, out) = (zeros(q), zeros(own), zeros(k), zeros(&[2, 10]));
        let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: SCALE };
        let repeats = Repeats { of, own_k_rhd: &own_k_rhd, own_lse_qr: None, sink };
        let chunk = ScoreRows { first_row, rows, first_key: keys.start, keys: keys.len() };
        let to = ScoreOutput { max_ht: &out, mean_ht: None, first: 2 };
        ops::chunk_scores(&repeats, &[chunk], None, to)
    };
    let (q, own, k) = ([3, 4, 8], [3, 2, 8], [2, 7, 8]);
    run(&q, &own, &k, 2, [0, 3], 2..7).unwrap();
    let said = |result: anyhow::Result<()>| result.unwrap_err().to_string();
    assert!(said(run(&[3, 3, 8], &own, &k, 2, [0, 3], 2..7)).contains("[3, 3, 8]"), "heads");
    assert!(said(run(&[3, 4, 7], &own, &k, 2, [0, 3], 2..7)).contains("[3, 4, 7]"), "head_dim");
    assert!(said(run(&q, &[2, 2, 8], &k, 2, [0, 3], 2..7)).contains("[2, 2, 8]"), "own keys of other rows");
    assert!(said(run(&q, &own, &k, 2, [1, 3], 2..7)).contains("1..4"), "rows that are not there");
    assert!(said(run(&q, &own, &k, 3, [0, 3], 2..7)).contains("2..7"), "a chunk inside the sink");
    assert!(said(run(&q, &own, &k, 2, [0, 3], 2..8)).contains("2..8"), "a chunk beyond the cache");
    assert!(said(run(&q, &own, &k, 2, [0, 3], 4..4)).contains("4..4"), "an empty chunk");
    assert!(said(run(&q, &own, &[2, 14, 8], 2, [0, 3], 9..13)).contains("[2, 10]"), "no room");
    let wrong =
        |_: Range<usize>, _: Range<usize>| Ok(Weighting { rows_s: zeros(&[3]), columns_qt: zeros(&[2, 5]) });
    let (q_rqd, own_k_rhd, k_hkd, out) = (zeros(&q), zeros(&own), zeros(&k), zeros(&[2, 5]));
    let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: SCALE };
    let repeats = Repeats { of, own_k_rhd: &own_k_rhd, own_lse_qr: None, sink: 2 };
    let chunk = ScoreRows { first_row: 0, rows: 3, first_key: 2, keys: 5 };
    let to = ScoreOutput { max_ht: &out, mean_ht: None, first: 2 };
    assert!(said(ops::chunk_scores(&repeats, &[chunk], Some(&wrong), to)).contains("[2, 5]"), "factors");
    // Log-sum-exps do not make a CPU try the kernel; called all the same, it is an error and no crash.
    let own_lse = zeros(&[4, 3]);
    ops::chunk_scores(&Repeats { own_lse_qr: Some(&own_lse), ..repeats }, &[chunk], None, to).unwrap();
    assert!(crate::kernels::fused_chunk_scores(of, Some(&own_lse), None, &[chunk], 2, to).is_err());
}

/// Heads, group and head_dim; prefix; positions of each forward; which channels; stride.
type StatisticCase = ([i64; 3], usize, &'static [i64], [Option<usize>; 6], usize);

const ALL: [Option<usize>; 6] = [Some(0), Some(1), Some(2), Some(3), Some(4), Some(6)];
const NEAR: [Option<usize>; 6] = [None, None, Some(0), Some(1), Some(2), Some(3)];
const ODD: [Option<usize>; 6] = [Some(0), None, None, None, None, Some(2)];

const FEW: [StatisticCase; 5] = [
    ([2, 2, 64], 7, &[507], ALL, 1),
    ([2, 3, 64], 3, &[300, 200, 80], ALL, 4),
    ([2, 1, 128], 3, &[2, 300, 78], NEAR, 4),
    ([1, 5, 10], 9, &[100, 109], ODD, 3),
    ([2, 1, 64], 3, &[6], ALL, 4),
];
const MANY: [StatisticCase; 3] = [
    ([4, 4, 64], 30, &[1530], ALL, 4),
    ([1, 5, 80], 9, &[800, 709], ODD, 3),
    ([1, 1, 256], 0, &[70], ALL, 1),
];

/// Maxima and sums after all forwards; one channel of seven is not the statistics'.
pub fn query_statistics(device: Device, kind: Kind) -> Vec<Compared> {
    let many = if device == Device::Cpu { &[][..] } else { &MANY[..] };
    FEW.iter().chain(many).map(|case| statistic_case(*case, device, kind)).collect()
}

fn statistic_case(case: StatisticCase, device: Device, kind: Kind) -> Compared {
    let ([heads, group, d], prefix, pieces, channels, stride) = case;
    let total: i64 = pieces.iter().sum();
    let context = total - prefix as i64;
    let [all_max, all_sum, window_max, window_sum, last_max, last_sum] = channels;
    let what = QueryStatistics {
        channels: StatisticChannels { all_max, all_sum, window_max, window_sum, last_max, last_sum },
        prefix,
        min_distance: 4,
        window: 64,
        last: (context - 32).max(0) as usize,
        stride,
        block_tokens: 100,
    };
    let query_heads = heads * group;
    let q_rqd = random(1, &[total, query_heads + 2, d], kind, device).narrow(1, 0, query_heads);
    let k_hkd = random(2, &[heads, total + 5, d], kind, device).narrow(1, 0, total);
    let (weights, lse) = softmax(&q_rqd.transpose(0, 1), &k_hkd, SCALE, &up_to(0, total, total, device));
    let lse = lse.to_kind(Kind::Float);
    let room = || Tensor::zeros([heads, 7, context], (Kind::Float, device));
    let gathered = |add: &dyn Fn(Products, &Tensor, usize, &Tensor)| {
        let (out_hct, mut start) = (room(), 0);
        for &n in pieces {
            let (q_rqd, k_hkd) = (q_rqd.narrow(0, start, n), k_hkd.narrow(1, 0, start + n));
            let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: SCALE };
            add(of, &lse.narrow(1, start, n), start as usize, &out_hct);
            start += n;
        }
        out_hct
    };

    // By distance from key to query, both as context positions.
    let first = prefix as i64;
    let weights_qst = weights.narrow(1, first, context).narrow(2, first, context);
    let at = Tensor::arange(context, (Kind::Int64, device));
    let (query, distance) = (at.unsqueeze(1), at.unsqueeze(1) - &at);
    let far = distance.ge(what.min_distance as i64);
    let counts = [
        query.remainder(stride as i64).eq(0).logical_and(&far),
        distance.le(what.window as i64).logical_and(&far),
        query.ge(what.last as i64).logical_and(&far),
    ];
    let naive = exact(&room());
    for (i, channel) in channels.into_iter().enumerate().filter_map(|(i, c)| Some((i, c?))) {
        let counted = &weights_qst * exact(&counts[i / 2]);
        let by_head = counted.reshape([heads, group * context, context]);
        let folded = match i % 2 {
            0 => by_head.amax([1], false),
            _ => by_head.sum_dim_intlist([1i64].as_slice(), false, None),
        };
        naive.select(1, channel as i64).copy_(&folded);
    }
    Compared {
        what: format!("{case:?}"),
        operator: gathered(&|of, lse, start, out| {
            let lse = ops::wants_lse(device, kind, d as usize).then_some(lse);
            ops::query_statistics(of, lse, start, &what, out).unwrap();
        }),
        portable: gathered(&|of, _, start, out| statistics::portable(of, start, &what, out).unwrap()),
        naive,
        // Features are logarithms of these.
        within: if device == Device::Cpu { [2e-6, 1e-5] } else { [1e-6, 1e-3] },
    }
}

/// Rows before, between and after the chunks' are no one's.
pub fn replay_scores(device: Device, kind: Kind) -> Vec<Compared> {
    let mut shapes: Vec<([i64; 3], i64, &[i64])> = vec![
        ([2, 2, 64], 7, &[257, 129, 1]),
        ([1, 7, 96], 3, &[64]),
        ([2, 5, 80], 1, &[301, 17]),
        ([1, 2, 32], 4, &[40, 40, 9]),
        ([3, 1, 6], 0, &[33, 7]),
        ([1, 1, 64], 0, &[1]),
    ];
    if device != Device::Cpu {
        shapes.push(([8, 4, 128], 0, &[2000, 2000, 192]));
        shapes.push(([2, 1, 256], 0, &[258, 100]));
    }
    shapes.into_iter().flat_map(|shape| replay_case(shape, device, kind)).collect()
}

fn replay_case(
    ([heads, group, d], before, lengths): ([i64; 3], i64, &[i64]),
    device: Device,
    kind: Kind,
) -> [Compared; 2] {
    let total: i64 = lengths.iter().sum();
    let q_rqd = random(1, &[before + total + 5, heads * (group + 2), d], kind, device);
    let q_rqd = q_rqd.narrow(1, 0, heads * group);
    let k_hkd = random(2, &[heads, total, d], kind, device);
    // The kernels round moved keys once more; those that stay where they are they do not change.
    let turn = if device != Device::Cpu && is_half(kind) { 0.0 } else { 1.0 };
    let angles = random(3, &[d / 2], Kind::Float, device) * turn;
    let (cos, sin) = (angles.cos(), angles.sin());
    let movement = Movement::new(cos.shallow_clone(), sin.shallow_clone());
    let mut chunks = Vec::new();
    let mut first = 0;
    for &n in lengths {
        let (first_row, rows, keys) = ((before + first) as usize, n as usize, n as usize);
        chunks.push((ScoreRows { first_row, rows, first_key: first as usize, keys }, &movement));
        first += n;
    }
    let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: SCALE };
    let room = || [0, 1].map(|_| Tensor::full([heads, total], f64::NAN, (Kind::Float, device)));
    let write = |room: &[Tensor; 2], keys: Range<usize>, scores: &ReplayScores| {
        for (room, scores) in room.iter().zip([&scores.max_ht, &scores.mean_ht]) {
            room.narrow(1, keys.start as i64, keys.len() as i64).copy_(scores);
        }
    };
    let (operator, portable) = (room(), room());
    ops::replay_scores(of, &chunks, &mut |keys, scores| write(&operator, keys, scores)).unwrap();
    let (mut max, mut mean) = (Vec::new(), Vec::new());
    for (rows, movement) in &chunks {
        let (first, n) = (rows.first_key as i64, rows.keys as i64);
        let q_qsd = q_rqd.narrow(0, rows.first_row as i64, n).transpose(0, 1);
        let k_htd = k_hkd.narrow(1, first, n);
        let block = scores::block_elements(device);
        let found = replay::portable(&q_qsd, &movement.of(&k_htd), SCALE, block).unwrap();
        write(&portable, rows.first_key..rows.first_key + rows.keys, &found);

        let [a, b] = [0, d / 2].map(|half| exact(&k_htd).narrow(2, half, d / 2));
        let (cos, sin) = (exact(&cos), exact(&sin));
        let moved = Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin], 2);
        let logits = exact(&q_qsd).matmul(&spread(&moved, heads * group).transpose(1, 2)) * SCALE;
        let by_head = logits.softmax(-1, None).reshape([heads, group * n, n]);
        max.push(by_head.amax([1], false));
        mean.push(by_head.mean_dim([1i64].as_slice(), false, None));
    }
    let naive = [Tensor::cat(&max, 1), Tensor::cat(&mean, 1)];
    let names = ["maxima", "means"].map(|of| format!("{of} of {:?}", (heads, group, d, before, lengths)));
    let mut forms = names.into_iter().zip(operator).zip(portable.into_iter().zip(naive));
    std::array::from_fn(|_| {
        let ((what, operator), (portable, naive)) = forms.next().expect("maxima and means");
        Compared {
            what,
            operator,
            portable,
            naive,
            within: if device == Device::Cpu { [1e-5, 0.0] } else { [1e-9, 1e-4] },
        }
    })
}

/// One row of a KV head per block, a few, and all at once.
#[test]
fn blocks_of_rows_change_no_replay() {
    let _no_grad = tch::no_grad_guard();
    for [heads, group, d, n] in [[1, 1, 4, 1], [2, 3, 5, 7], [3, 1, 8, 40], [2, 2, 6, 33]] {
        let q_qsd = random(1, &[heads * group, n, d], Kind::Float, Device::Cpu) * 2.0;
        let k_htd = random(2, &[heads, n, d], Kind::Float, Device::Cpu) * 2.0;
        let logits = exact(&q_qsd).matmul(&spread(&k_htd, heads * group).transpose(1, 2)) * SCALE;
        let by_head = logits.softmax(-1, None).reshape([heads, group * n, n]);
        let naive = [by_head.amax([1], false), by_head.mean_dim([1i64].as_slice(), false, None)];
        for block in [1, 50, 1 << 20] {
            let found = replay::portable(&q_qsd, &k_htd, SCALE, block).unwrap();
            for (found, naive) in [&found.max_ht, &found.mean_ht].into_iter().zip(&naive) {
                let off = (exact(found) - naive).abs().max().double_value(&[]);
                assert!(off < 1e-5, "{heads} x {group} heads of {d}, {n} keys, blocks of {block}: {off:e}");
            }
        }
    }
    let zeros = |heads| Tensor::zeros([heads, 2, 4], (Kind::Float, Device::Cpu));
    assert!(replay::portable(&zeros(3), &zeros(2), SCALE, 10).is_err(), "three query heads for two KV heads");
}

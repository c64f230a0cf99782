//! The scoring maths against plain loops in f64 that share no code with them.

use pkv_core::{Rng, Seed};
use pkv_score::{ChunkAttention, Weighting, chunk_scores};
use rand::Rng as _;
use std::ops::Range;
use tch::{Kind, Tensor};

use crate::support::device;

/// Blocks that hold all rows of every case.
const WHOLE: usize = 1 << 25;

struct Case {
    name: &'static str,
    heads: usize,
    group: usize,
    head_dim: usize,
    /// Cache: `before` positions, the chunk, `after` positions, then the rows.
    sink: usize,
    before: usize,
    chunk: usize,
    after: usize,
    rows: usize,
}

const fn case(name: &'static str, heads_group_dim: [usize; 3], sizes: [usize; 5]) -> Case {
    let [heads, group, head_dim] = heads_group_dim;
    let [sink, before, chunk, after, rows] = sizes;
    Case { name, heads, group, head_dim, sink, before, chunk, after, rows }
}

const CASES: [Case; 8] = [
    case("one-token context, no prefix", [1, 1, 4], [0, 0, 1, 0, 1]),
    case("one-token context, prefix as sink", [2, 3, 8], [5, 5, 1, 0, 12]),
    case("one-token last chunk", [2, 2, 8], [4, 40, 1, 0, 19]),
    case("context shorter than the sink", [2, 1, 16], [17, 17, 5, 0, 23]),
    case("chunk in the middle", [3, 1, 7], [4, 21, 13, 9, 31]),
    case("group of three", [2, 3, 5], [3, 3, 17, 11, 29]),
    case("prefix longer than the sink", [1, 7, 6], [2, 11, 37, 0, 53]),
    case("more rows than a block", [4, 2, 8], [1, 1, 64, 3, 97]),
];

struct Random {
    q: Vec<f64>,
    k: Vec<f64>,
    rows: Vec<f64>,
    columns: Vec<f64>,
}

/// Numbers that f32 holds exactly, so that the reference sees the same inputs.
fn numbers(rng: &mut Rng, n: usize, low: f32, high: f32) -> Vec<f64> {
    (0..n).map(|_| f64::from(rng.random_range(low..high))).collect()
}

fn tensor(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values).view(shape).to_kind(Kind::Float).to_device(device())
}

/// 1/sqrt(head_dim) of none of the cases.
const SCALE: f64 = 0.3;

impl Case {
    fn positions(&self) -> usize {
        self.before + self.chunk + self.after + self.rows
    }

    fn chunk(&self) -> Range<usize> {
        self.before..self.before + self.chunk
    }

    fn random(&self, index: u64) -> Random {
        let rng = &mut Seed(3).stream("score naive", index);
        let query_heads = self.heads * self.group;
        Random {
            q: numbers(rng, query_heads * self.rows * self.head_dim, -3.0, 3.0),
            k: numbers(rng, self.heads * self.positions() * self.head_dim, -3.0, 3.0),
            rows: numbers(rng, self.rows, 0.1, 3.0),
            columns: numbers(rng, query_heads * self.chunk, 0.0, 5.0),
        }
    }

    /// Maximum and mean per (KV head, chunk position), by the definition.
    fn naive(&self, random: &Random, weighted: bool) -> (Vec<f64>, Vec<f64>) {
        let (d, start) = (self.head_dim, self.positions() - self.rows);
        let mut max = vec![0.0; self.heads * self.chunk];
        let mut mean = max.clone();
        for q in 0..self.heads * self.group {
            let h = q / self.group;
            for r in 0..self.rows {
                let keys: Vec<usize> =
                    (0..self.sink).chain(self.chunk()).chain(start..start + r + 1).collect();
                let dot = |k: usize| -> f64 {
                    let query = &random.q[(q * self.rows + r) * d..][..d];
                    let key = &random.k[(h * self.positions() + k) * d..][..d];
                    query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * SCALE
                };
                let logits: Vec<f64> = keys.iter().map(|&k| dot(k)).collect();
                let top = logits.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = logits.iter().map(|x| (x - top).exp()).sum();
                for t in 0..self.chunk {
                    let mut weight = (logits[self.sink + t] - top).exp() / total;
                    if weighted {
                        weight *= random.rows[r] * random.columns[q * self.chunk + t];
                    }
                    let at = h * self.chunk + t;
                    max[at] = f64::max(max[at], weight);
                    mean[at] += weight / (self.rows * self.group) as f64;
                }
            }
        }
        (max, mean)
    }

    fn scores(&self, random: &Random, weighted: bool, kind: Kind, block: usize) -> (Vec<f64>, Vec<f64>) {
        let shape = |a: usize, b: usize, c: usize| [a as i64, b as i64, c as i64];
        let query_heads = self.heads * self.group;
        let q_qsd = tensor(&random.q, &shape(query_heads, self.rows, self.head_dim)).to_kind(kind);
        let k_hkd = tensor(&random.k, &shape(self.heads, self.positions(), self.head_dim)).to_kind(kind);
        let attention = ChunkAttention {
            q_qsd: &q_qsd,
            k_hkd: &k_hkd,
            scale: SCALE,
            sink: self.sink,
            chunk: self.chunk(),
        };
        let weighting = weighted.then(|| Weighting {
            rows_s: tensor(&random.rows, &[self.rows as i64]),
            columns_qt: tensor(&random.columns, &[query_heads as i64, self.chunk as i64]),
        });
        let scores = chunk_scores(&attention, weighting.as_ref(), block).unwrap();
        assert_eq!(scores.max_ht.size(), [self.heads as i64, self.chunk as i64]);
        assert_eq!(scores.max_ht.kind(), Kind::Float);
        let flat = |t: &Tensor| Vec::try_from(t.flatten(0, -1).to_kind(Kind::Double)).unwrap();
        (flat(&scores.max_ht), flat(&scores.mean_ht))
    }
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

#[test]
fn scores_match_loops_in_f64() {
    for (index, case) in CASES.iter().enumerate() {
        let random = case.random(index as u64);
        for weighted in [false, true] {
            let (max, mean) = case.naive(&random, weighted);
            // One row per block, a few, and all at once.
            for block in [1, 1000, WHOLE] {
                let found = case.scores(&random, weighted, Kind::Float, block);
                let off = (difference(&max, &found.0), difference(&mean, &found.1));
                // Weighted scores exceed 1, and f32 is exact relative to size.
                let tolerance = 2e-6 * max.iter().copied().fold(1.0, f64::max);
                assert!(
                    off.0 < tolerance && off.1 < tolerance,
                    "{}, weighted {weighted}, blocks of {block}: off by {off:?}",
                    case.name
                );
            }
        }
    }
}

/// The softmax is f32 even if the model is not: on operands that bf16 holds exactly, nothing is lost.
#[test]
fn bf16_operands_lose_nothing() {
    let case = &CASES[5];
    let mut random = case.random(100);
    for x in random.q.iter_mut().chain(&mut random.k) {
        *x = (*x * 8.0).round() / 8.0;
    }
    let (max, _) = case.naive(&random, false);
    let (found, _) = case.scores(&random, false, Kind::BFloat16, WHOLE);
    assert!(difference(&max, &found) < 2e-6);
}

#[test]
fn kvzip_plus_factors_match_loops_in_f64() {
    let (heads, group, head_dim, hidden, positions, rows) = (2, 3, 5, 11, 7, 4);
    let rng = &mut Seed(4).stream("plus naive", 0);
    let v = numbers(rng, heads * positions * head_dim, -2.0, 2.0);
    let w = numbers(rng, hidden * heads * group * head_dim, -2.0, 2.0);
    let x = numbers(rng, rows * hidden, -2.0, 2.0);
    let size = |a: usize, b: usize| [a as i64, b as i64];
    let weighting = Weighting::kvzip_plus(
        &tensor(&x, &size(rows, hidden)),
        &tensor(&v, &[heads as i64, positions as i64, head_dim as i64]),
        &tensor(&w, &size(hidden, heads * group * head_dim)),
    )
    .unwrap();
    let width = heads * group * head_dim;
    let mut columns = Vec::new();
    for q in 0..heads * group {
        for t in 0..positions {
            let value = &v[(q / group * positions + t) * head_dim..][..head_dim];
            let row = |m: usize| -> f64 {
                let weights = &w[m * width + q * head_dim..][..head_dim];
                value.iter().zip(weights).map(|(a, b)| a * b).sum()
            };
            columns.push((0..hidden).map(|m| row(m).powi(2)).sum::<f64>().sqrt());
        }
    }
    let norms: Vec<f64> =
        x.chunks(hidden).map(|r| 1.0 / r.iter().map(|a| a * a).sum::<f64>().sqrt()).collect();
    let flat = |t: &Tensor| Vec::<f64>::try_from(t.flatten(0, -1).to_kind(Kind::Double)).unwrap();
    assert!(difference(&columns, &flat(&weighting.columns_qt)) < 1e-4);
    assert!(difference(&norms, &flat(&weighting.rows_s)) < 1e-6);
}

#[test]
fn shapes_that_disagree_are_errors() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device()));
    let run = |q: &[i64], k: &[i64], sink, chunk| {
        let (q_qsd, k_hkd) = (zeros(q), zeros(k));
        let attention = ChunkAttention { q_qsd: &q_qsd, k_hkd: &k_hkd, scale: SCALE, sink, chunk };
        chunk_scores(&attention, None, WHOLE).map(drop)
    };
    run(&[4, 3, 8], &[2, 10, 8], 2, 2..7).unwrap();
    let said = |result: anyhow::Result<()>| result.unwrap_err().to_string();
    assert!(said(run(&[3, 3, 8], &[2, 10, 8], 2, 2..7)).contains("[3, 3, 8]"), "heads");
    assert!(said(run(&[4, 3, 7], &[2, 10, 8], 2, 2..7)).contains("[4, 3, 7]"), "head_dim");
    assert!(
        said(run(&[4, 11, 8], &[2, 10, 8], 2, 2..7)).contains("11 new tokens"),
        "more rows than positions"
    );
    assert!(said(run(&[4, 3, 8], &[2, 10, 8], 3, 2..7)).contains("2..7"), "chunk inside the sink");
    assert!(said(run(&[4, 3, 8], &[2, 10, 8], 2, 2..8)).contains("2..8"), "chunk among the new tokens");
    assert!(said(run(&[4, 3, 8], &[2, 10, 8], 2, 4..4)).contains("4..4"), "empty chunk");
}

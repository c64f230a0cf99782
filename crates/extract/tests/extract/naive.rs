//! The attention channels against loops in f64, on random queries and keys of odd sizes.

use pkv_core::{Channel, Rng, Seed};
use pkv_extract::QueryStatistics;
use pkv_gpu::Products;
use pkv_recipe::ExtractSection;
use pkv_test_pair::device;
use pkv_test_support::loops::difference;
use pkv_test_support::tensors::flat;
use rand::Rng as _;
use tch::{Kind, Tensor};

use crate::reference::Reference;

/// Out of the recipe's order on purpose, with channels between that the statistics must leave alone.
const CHANNELS: [Channel; 9] = [
    Channel::MeanLast,
    Channel::KeyNorm,
    Channel::MaxAll,
    Channel::MaxWindow,
    Channel::MeanAll,
    Channel::ReconLog,
    Channel::MaxLast,
    Channel::MeanWindow,
    Channel::MeanLastLayer,
];

struct Case {
    name: &'static str,
    sizes: Reference,
}

const fn case(name: &'static str, heads_group_dim: [usize; 3], sizes: [usize; 6]) -> Case {
    let [heads, group, head_dim] = heads_group_dim;
    let [prefix, context, min_distance, window, last, stride] = sizes;
    let scale = 0.3;
    let sizes =
        Reference { heads, group, head_dim, scale, prefix, context, min_distance, window, last, stride };
    Case { name, sizes }
}

/// Heads, group and head_dim; prefix, context, minimum distance, window, last queries and stride.
const CASES: [Case; 9] = [
    case("one token, no prefix", [1, 1, 4], [0, 1, 4, 256, 64, 1]),
    case("one token behind a prefix", [2, 3, 5], [7, 1, 4, 256, 64, 4]),
    case("shorter than the distance", [2, 2, 8], [3, 3, 4, 256, 64, 1]),
    case("one query far enough", [2, 1, 8], [3, 5, 4, 256, 64, 2]),
    case("shorter than the window", [1, 2, 6], [0, 37, 4, 256, 64, 4]),
    case("longer than the window", [2, 3, 8], [11, 97, 4, 16, 9, 3]),
    case("window one wider than the distance", [1, 1, 7], [1, 53, 3, 4, 1, 1]),
    case("distance 0: a query sees itself", [2, 2, 5], [5, 41, 0, 6, 7, 5]),
    case("last queries fewer than the distance", [3, 1, 8], [2, 29, 6, 8, 4, 2]),
];

/// Numbers that f32 holds exactly, so that the reference sees the same inputs.
fn numbers(rng: &mut Rng, n: usize) -> Vec<f64> {
    (0..n).map(|_| f64::from(rng.random_range(-2.5f32..2.5))).collect()
}

impl Case {
    fn naive(&self, qs: &[f64], ks: &[f64]) -> Vec<f64> {
        self.sizes.channels(&CHANNELS, qs, ks)
    }

    fn random(&self, index: u64) -> (Vec<f64>, Vec<f64>) {
        let rng = &mut Seed(5).stream("extract naive", index);
        let q =
            numbers(rng, self.sizes.heads * self.sizes.group * self.sizes.positions() * self.sizes.head_dim);
        let k = numbers(rng, self.sizes.heads * self.sizes.positions() * self.sizes.head_dim);
        (q, k)
    }

    fn section(&self, block_tokens: usize) -> ExtractSection {
        ExtractSection {
            channels: CHANNELS.to_vec(),
            window_tokens: self.sizes.window,
            min_distance: self.sizes.min_distance,
            last_queries: self.sizes.last,
            whole_range_stride: self.sizes.stride,
            block_tokens,
            ..ExtractSection::default()
        }
    }

    /// The same through `QueryStatistics`, the queries coming in pieces of `piece` positions.
    fn found(&self, qs: &[f64], ks: &[f64], extract: &ExtractSection, piece: usize) -> Vec<f64> {
        let tensor = |values: &[f64], heads: usize| {
            let size = [heads as i64, self.sizes.positions() as i64, self.sizes.head_dim as i64];
            Tensor::from_slice(values).view(size).to_kind(Kind::Float).to_device(device())
        };
        let (q, k) = (tensor(qs, self.sizes.heads * self.sizes.group), tensor(ks, self.sizes.heads));
        let statistics = QueryStatistics::new(extract, self.sizes.prefix, self.sizes.context);
        let gathered = statistics.zeros(self.sizes.heads, device());
        for start in (0..self.sizes.positions()).step_by(piece) {
            let end = self.sizes.positions().min(start + piece);
            let q_rqd = &q.narrow(1, start as i64, (end - start) as i64).transpose(0, 1);
            let of = Products { q_rqd, k_hkd: &k.narrow(1, 0, end as i64), scale: self.sizes.scale };
            statistics.add(of, None, start, &gathered).unwrap();
        }
        statistics.finish(&gathered, self.sizes.heads, self.sizes.group).unwrap();
        flat(&gathered)
    }
}

#[test]
fn statistics_match_loops_in_f64() {
    for (index, case) in CASES.iter().enumerate() {
        let (qs, ks) = case.random(index as u64);
        let expected = case.naive(&qs, &ks);
        assert!(expected.iter().all(|x| x.is_finite()));
        for block_tokens in [1, 3, 16, 512] {
            for piece in [1, 5, 1000] {
                let found = case.found(&qs, &ks, &case.section(block_tokens), piece);
                let off = difference(&expected, &found);
                assert!(off < 1e-5, "{}, blocks of {block_tokens}, pieces of {piece}: {off}", case.name);
            }
        }
    }
}

#[test]
fn a_choice_of_channels_changes_no_channel() {
    let case = &CASES[5];
    let (qs, ks) = case.random(5);
    let all = case.naive(&qs, &ks);
    for chosen in [
        vec![Channel::MaxWindow],
        vec![Channel::MeanWindow, Channel::MaxLast],
        vec![Channel::MeanAll],
        vec![Channel::ValueNorm],
        vec![Channel::MeanLastLayer],
        vec![Channel::MaxLast, Channel::MeanLastLayer, Channel::MeanLast],
    ] {
        let extract = ExtractSection { channels: chosen.clone(), ..case.section(10) };
        let found = case.found(&qs, &ks, &extract, 31);
        for h in 0..case.sizes.heads {
            for (c, channel) in chosen.iter().enumerate() {
                let found = &found[(h * chosen.len() + c) * case.sizes.context..][..case.sizes.context];
                match CHANNELS.iter().position(|x| x == channel) {
                    Some(at) => {
                        let expected =
                            &all[(h * CHANNELS.len() + at) * case.sizes.context..][..case.sizes.context];
                        assert!(difference(expected, found) < 1e-5, "{channel:?}");
                    }
                    None => assert!(found.iter().all(|x| *x == 0.0), "{channel:?} is not the statistics'"),
                }
            }
        }
    }
}

#[test]
fn pieces_that_do_not_fit_are_errors() {
    let case = &CASES[5];
    let statistics = QueryStatistics::new(&case.section(16), case.sizes.prefix, case.sizes.context);
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device()));
    let room = statistics.zeros(2, device());
    let say = |q: &[i64], k: &[i64], start, room: &Tensor| {
        let (q_rqd, k_hkd) = (zeros(q).transpose(0, 1), zeros(k));
        let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: 1.0 };
        statistics.add(of, None, start, room).unwrap_err().to_string()
    };
    assert!(say(&[5, 4, 8], &[2, 4, 8], 0, &room).contains("[5, 4, 8]"));
    assert!(say(&[6, 4, 8], &[2, 9, 8], 4, &room).contains("9 keys"));
    assert!(say(&[6, 9, 8], &[2, 109, 8], 100, &room).contains("a context of 97"));
    assert!(say(&[6, 4, 8], &[2, 4, 8], 0, &room.narrow(1, 0, 3)).contains("room for features"));
}

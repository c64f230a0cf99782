//! What must hold for any mapper: batches, lengths, windows, starts, seeds.

use pkv_core::Seed;
use pkv_mapper::{
    ForwardOptions, Mapper, MapperDims, Standardization, StandardizationAccumulator, StitchedScores,
};
use pkv_recipe::{MapperSection, Variant};
use tch::{Device, Kind, Tensor};

use crate::fixtures::{device, max_difference, random, small};

const VARIANTS: [(&str, &[usize]); 5] =
    [("hybrid-axial", &[]), ("hybrid-axial", &[0, 1]), ("conv", &[]), ("mlp", &[]), ("linear", &[])];
/// Order of additions in f32; scores are of the order 1 to 10.
const NOISE: f64 = 2e-5;

fn features(seed: u64, b: i64, t: i64) -> (Tensor, Tensor) {
    (random(seed, &[b, 3, 2, t]), random(seed + 1, &[b, 2, t]))
}

#[test]
fn a_batch_of_three_is_three_batches_of_one() {
    for (variant, attention) in VARIANTS {
        let mapper = small(variant, attention, device());
        let (heads, globals) = features(1, 3, 29);
        let together = mapper.forward(&heads, &globals);
        for i in 0..3 {
            let alone = mapper.forward(&heads.narrow(0, i, 1), &globals.narrow(0, i, 1));
            let difference = max_difference(&alone, &together.narrow(0, i, 1));
            assert!(difference < NOISE, "{variant} {attention:?} context {i}: {difference:e}");
        }
    }
}

#[test]
fn windows_with_halo_give_the_one_shot_result() {
    for (variant, attention) in VARIANTS {
        let mapper = small(variant, attention, device());
        for t in [1, 2, 5, 101] {
            let (heads, globals) = features(2, 2, t);
            let whole = mapper.forward(&heads, &globals);
            assert_eq!(whole.size(), [2, 5, t]);
            for window in [1, 7, 16, 100, 101, 5000] {
                let windowed = mapper.forward_long(&heads, &globals, window);
                let difference = max_difference(&windowed, &whole);
                assert!(difference < NOISE, "{variant} {attention:?} {t} by {window}: {difference:e}");
            }
        }
    }
}

/// Windows scored as their features come equal one forward, and none is scored too early: what is not
/// final yet holds numbers that would show.
#[test]
fn windows_scored_on_the_way_equal_the_whole() {
    for (variant, attention) in VARIANTS {
        let mapper = small(variant, attention, Device::Cpu);
        let reach = mapper.reach();
        let (heads, globals) = features(4, 1, 203);
        let whole = mapper.forward(&heads, &globals);
        for (window, step) in [(16, 10), (40, 64), (203, 50), (7, 203)] {
            let (early_heads, early_globals) = (heads.full_like(1e3), globals.full_like(-1e3));
            let mut stitched = StitchedScores::new(&mapper, &early_heads, &early_globals, window);
            let mut settled = 0;
            while settled < 203 {
                let n = step.min(203 - settled);
                for (early, last) in [(&early_heads, &heads), (&early_globals, &globals)] {
                    let part = |x: &Tensor| x.narrow(-1, settled as i64, n as i64);
                    part(early).copy_(&part(last));
                }
                settled += n;
                let done = stitched.advance(settled);
                // As far as whole windows with their reach allow, and no further.
                let expected =
                    if settled == 203 { 203 } else { settled.saturating_sub(reach) / window * window };
                assert_eq!(done, expected, "{variant}, window {window}, {settled} of 203");
            }
            let difference = max_difference(&stitched.finish(), &whole);
            assert!(difference < NOISE, "{variant} {attention:?} by {window}: {difference:e}");
        }
    }
}

/// An output depends on `reach` positions on either side: on the last of them, and on none beyond.
#[test]
fn the_reach_is_exact() {
    for (variant, attention) in VARIANTS {
        let mapper = small(variant, attention, Device::Cpu);
        let reach = mapper.reach() as i64;
        let t = 2 * reach + 41;
        let middle = t / 2;
        let (heads, globals) = features(3, 1, t);
        let before = mapper.forward(&heads, &globals);
        let moved_by_change_at = |position: i64| {
            let heads = heads.copy();
            let _ = heads.narrow(-1, position, 1).g_add_scalar_(1.0);
            max_difference(
                &mapper.forward(&heads, &globals).narrow(-1, middle, 1),
                &before.narrow(-1, middle, 1),
            )
        };
        for sign in [-1, 1] {
            assert!(
                moved_by_change_at(middle + sign * reach) > 0.0,
                "{variant} {attention:?} does not reach {reach}"
            );
            assert_eq!(
                moved_by_change_at(middle + sign * (reach + 1)),
                0.0,
                "{variant} {attention:?} reaches beyond {reach}"
            );
        }
    }
}

#[test]
fn training_starts_at_the_linear_map_and_all_parts_learn() {
    for (variant, _) in VARIANTS {
        let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
        let section = MapperSection {
            variant: serde_json::from_value::<Variant>(variant.into()).unwrap(),
            head_width: 4,
            width: 16,
            ..MapperSection::default()
        };
        let stats = Standardization::identity(&dims);
        let mut mapper = Mapper::new(&section, dims, stats, Seed(3), Device::Cpu).unwrap();
        let (weight_of, bias_o) = (random(7, &[5, 8]), random(8, &[5]));
        mapper.set_linear(&weight_of.to_kind(Kind::Double), &bias_o).unwrap();
        let (heads, globals) = features(4, 2, 33);
        let x_bft = Tensor::cat(&[&heads.flatten(1, 2), &globals], 1);
        let linear = weight_of.matmul(&x_bft) + bias_o.unsqueeze(-1);
        assert!(max_difference(&mapper.forward(&heads, &globals), &linear) < NOISE);

        // Zero outputs hide what lies below for one step, not for two.
        let y_bot = random(9, &[2, 5, 33]) * 2.0;
        let mut optimizer =
            pkv_gpu::AdamW::new(mapper.parameters().iter().map(|(_, x)| x.shallow_clone()).collect())
                .unwrap();
        let options =
            pkv_gpu::AdamWOptions { lr: 1e-2, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.0 };
        let start: Vec<Tensor> = mapper.parameters().iter().map(|(_, x)| x.detach().copy()).collect();
        for _ in 0..3 {
            mapper.parameters().iter().for_each(|(_, x)| x.shallow_clone().zero_grad());
            let scores = mapper.forward(&heads, &globals);
            (scores - &y_bot).square().mean(None).backward();
            optimizer.step(options).unwrap();
        }
        for ((name, now), then) in mapper.parameters().iter().zip(&start) {
            assert!(max_difference(now, then) > 1e-4, "{variant}: `{name}` has not moved");
        }
    }
}

#[test]
fn one_seed_is_one_mapper_and_names_are_unique() {
    let new = |seed| {
        let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
        let section = MapperSection { attention_blocks: vec![1], ..MapperSection::default() };
        let stats = Standardization::identity(&dims);
        Mapper::new(&section, dims, stats, Seed(seed), Device::Cpu).unwrap()
    };
    let (a, again, b) = (new(1), new(1), new(2));
    let query = |m: &Mapper| m.parameters().iter().find(|(n, _)| n == "stage3.query").unwrap().1.detach();
    assert_eq!(query(&a), query(&again));
    assert!(max_difference(&query(&a), &query(&b)) > 0.1);
    let first: Vec<f32> = Vec::try_from(query(&a).flatten(0, -1).narrow(0, 0, 3)).unwrap();
    assert_eq!(first, FIRST_DRAWS);
    let mut names: Vec<&str> = a.parameters().iter().map(|(n, _)| n.as_str()).collect();
    assert!(names.contains(&"stage1.conv0.weight") && names.contains(&"stage2.block3.conv.weight"));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), a.parameters().len());
    let (heads, globals) = features(5, 2, 50);
    assert_eq!(a.forward(&heads, &globals), again.forward(&heads, &globals), "bit for bit");
}

/// `stage3.query` of seed 1 starts so on every machine; from `chacha8` of goldens/make_goldens.py.
const FIRST_DRAWS: [f32; 3] = [0.859_098_3, -0.933_824_84, -0.234_675_7];

#[test]
fn half_precision_features_are_read_as_they_are() {
    let mapper = small("hybrid-axial", &[], device());
    let (heads, globals) = features(6, 1, 20);
    let (heads, globals) = (heads.to_kind(Kind::Half), globals.to_kind(Kind::Half));
    let wide = mapper.forward(&heads.to_kind(Kind::Float), &globals.to_kind(Kind::Float));
    assert_eq!(max_difference(&mapper.forward(&heads, &globals), &wide), 0.0);
}

#[test]
fn parameters_and_statistics_survive_being_saved() {
    let mapper = small("hybrid-axial", &[1], Device::Cpu);
    let saved: Vec<(String, Tensor)> = mapper
        .parameters()
        .iter()
        .map(|(n, x)| (n.clone(), x.detach().copy()))
        .chain(mapper.buffers())
        .collect();
    let stats = Standardization::from_buffers(&saved).unwrap();
    let other = Mapper::new(mapper.section(), *mapper.dims(), stats, Seed(99), Device::Cpu).unwrap();
    other.load_parameters(&saved).unwrap();
    let (heads, globals) = features(7, 1, 20);
    assert_eq!(mapper.forward(&heads, &globals), other.forward(&heads, &globals));

    let error = other.load_parameters(&saved[1..]).unwrap_err();
    assert!(error.to_string().contains("parameter `skip.weight` is missing"), "{error}");
    let mut wrong = saved;
    wrong[0].1 = Tensor::zeros([5, 9], (Kind::Float, Device::Cpu));
    let error = other.load_parameters(&wrong).unwrap_err();
    assert_eq!(error.to_string(), "parameter `skip.weight` has shape [5, 9], expected [5, 8]");
    assert!(Standardization::from_buffers(&wrong[..3]).is_err());
}

#[test]
fn statistics_are_those_of_all_positions_together() {
    let dims = MapperDims { proxy_heads: 3, channels: 2, globals: 2, outputs: 5 };
    let mut all = StandardizationAccumulator::new(dims);
    assert!(all.finish().is_err(), "nothing added");
    let parts: Vec<(Tensor, Tensor, Tensor)> = [(1, 7), (2, 30), (1, 1)]
        .iter()
        .map(|&(b, t)| {
            (features(t as u64, b, t).0 * 3.0 + 2.0, features(40, b, t).1, random(8, &[b, 5, t]) - 4.0)
        })
        .collect();
    for (heads, globals, y) in &parts {
        all.add(heads, globals, y).unwrap();
    }
    let stats = all.finish().unwrap();
    let side_by_side = |pick: fn(&(Tensor, Tensor, Tensor)) -> Tensor| {
        let rows: Vec<Tensor> = parts.iter().map(pick).collect();
        Tensor::cat(&rows, 1).to_kind(Kind::Double)
    };
    let heads = side_by_side(|(h, _, _)| h.permute([1, 2, 0, 3]).flatten(0, 1).flatten(1, 2));
    let flat = |x: &Tensor| x.flatten(0, 1);
    assert!(max_difference(&flat(&stats.heads_mean_pc), &heads.mean_dim(1, false, None)) < 1e-5);
    assert!(max_difference(&flat(&stats.heads_std_pc), &heads.std_dim(1, false, false)) < 1e-5);
    let y = side_by_side(|(_, _, y)| y.permute([1, 0, 2]).flatten(1, 2));
    assert!((f64::from(stats.label_mean) - y.mean(None).double_value(&[])).abs() < 1e-5);
    assert!((f64::from(stats.label_std) - y.std(false).double_value(&[])).abs() < 1e-5);

    let wrong = features(1, 1, 7).0.narrow(1, 0, 2);
    let error = all.add(&wrong, &parts[0].1, &parts[0].2).unwrap_err().to_string();
    assert!(
        error.contains("[1, 2, 2, 7], expected [batch, 3 proxy heads, 2 channels, positions]"),
        "{error}"
    );
    all.add(&(&parts[0].0 * f64::INFINITY), &parts[0].1, &parts[0].2).unwrap();
    assert!(all.finish().unwrap_err().to_string().contains("not finite"));
}

/// bf16 has 8 bits: scores of order 1 to 10 through a dozen layers agree to some percent, and so do
/// gradients.
#[test]
fn bf16_stages_are_close_to_f32_and_hand_their_gradients_to_f32_parameters() {
    for (variant, attention) in VARIANTS {
        let mapper = small(variant, attention, device());
        let (heads, globals) = features(11, 2, 40);
        let gradients = |options: &ForwardOptions| {
            mapper.parameters().iter().for_each(|(_, x)| x.shallow_clone().zero_grad());
            let scores = mapper.forward_training(&heads, &globals, options);
            assert_eq!(scores.kind(), Kind::Float);
            (&scores * random(12, &scores.size()).to_device(scores.device())).sum(Kind::Float).backward();
            let of: Vec<(String, Tensor)> =
                mapper.parameters().iter().map(|(n, x)| (n.clone(), x.grad().copy())).collect();
            (scores.detach(), of)
        };
        let (exact, exact_of) = gradients(&ForwardOptions::default());
        let (narrow, narrow_of) =
            gradients(&ForwardOptions { kind: Kind::BFloat16, ..ForwardOptions::default() });
        let relative = |a: &Tensor, b: &Tensor| ((a - b).norm() / b.norm().clamp_min(1e-3)).double_value(&[]);
        assert!(relative(&narrow, &exact) < 0.03, "{variant} {attention:?}: {}", relative(&narrow, &exact));
        assert_eq!(variant == "linear", max_difference(&narrow, &exact) == 0.0, "{variant}: bf16 was used");
        for ((name, a), (_, b)) in narrow_of.iter().zip(&exact_of) {
            assert_eq!(a.kind(), Kind::Float);
            assert!(relative(a, b) < 0.15, "{variant} {attention:?} `{name}`: {}", relative(a, b));
        }
    }
}

#[test]
fn what_is_random_repeats_with_its_seed_and_spares_the_skip() {
    let (heads, globals) = features(13, 3, 30);
    let off = ForwardOptions::default();
    for options in [
        ForwardOptions { noise: 0.3, ..off },
        ForwardOptions { drop_rows: 0.4, ..off },
        ForwardOptions { dropout: 0.4, ..off },
        ForwardOptions { noise: 0.1, drop_rows: 0.1, dropout: 0.1, kind: Kind::BFloat16 },
    ] {
        assert!(options.is_random());
        let run = |variant: &str, seed| {
            let mapper = small(variant, &[], device());
            tch::manual_seed(seed);
            let exact = mapper.forward(&heads, &globals);
            (mapper.forward_training(&heads, &globals, &options), exact)
        };
        let ((a, exact), (again, _), (b, _)) =
            (run("hybrid-axial", 1), run("hybrid-axial", 1), run("hybrid-axial", 2));
        assert_eq!(a, again, "{options:?}");
        assert!(max_difference(&a, &b) > 0.01 && max_difference(&a, &exact) > 0.01, "{options:?}");
        let (linear, exact) = run("linear", 1);
        assert_eq!(max_difference(&linear, &exact), 0.0);
    }
}

/// A dropped row is dropped for the whole context, and the others make up for it.
#[test]
fn rows_are_dropped_whole() {
    let mapper = small("mlp", &[], device());
    let (heads, globals) = (Tensor::ones([64, 3, 2, 9], (Kind::Float, device())), random(1, &[64, 2, 9]));
    tch::manual_seed(3);
    let options = ForwardOptions { drop_rows: 0.25, ..ForwardOptions::default() };
    let scores = mapper.forward_training(&heads, &(globals * 0.0), &options);
    // Constant features of a network without time: constant scores, of at most 2^6 kinds.
    let per_context = scores.flatten(0, 0).std_dim(-1, false, false).max().double_value(&[]);
    assert!(per_context < 1e-5, "{per_context}");
    let firsts: Vec<f32> = Vec::try_from(scores.select(1, 0).select(1, 0)).unwrap();
    let kinds: std::collections::BTreeSet<i64> = firsts.iter().map(|x| (x * 1e4).round() as i64).collect();
    assert!((8..=64).contains(&kinds.len()), "{}", kinds.len());
}

//! Ragged caches: compaction must equal masking, keeping all the full cache, a batch its sequences.

use pkv_lm::{Branches, KvCache, LanguageModel, NoTap, RaggedCache};
use rand::Rng;
use tch::{Device, Kind, Tensor};

use crate::support::*;

fn models() -> impl Iterator<Item = &'static str> {
    architectures().chain(["nano-llama-target"])
}

fn ids(model: &LanguageModel, n: usize, seed: u64) -> Vec<u32> {
    let mut rng = pkv_core::Seed(seed).stream("ragged ids", 0);
    (0..n).map(|_| rng.random_range(0..model.shape().vocab as u32)).collect()
}

fn prefilled(model: &LanguageModel, context: &[u32], spare: usize) -> KvCache {
    let mut cache = model.new_cache(context.len() + spare);
    let _ = model.prefill(context, &mut cache, 64, &mut NoTap).unwrap();
    cache
}

/// Each head keeps a share of its own between nothing and everything; the first head of the first
/// layer nothing at all, the last of the last everything.
fn random_mask(model: &LanguageModel, len: usize, seed: u64) -> Tensor {
    let shape = model.shape();
    let mut rng = pkv_core::Seed(seed).stream("ragged mask", 0);
    let heads = shape.total_kv_heads();
    let mut keep = Vec::with_capacity(heads * len);
    for head in 0..heads {
        let share = match head {
            0 => 0.0,
            h if h + 1 == heads => 1.0,
            _ => rng.random_range(0.0..1.0f64).powi(2),
        };
        keep.extend((0..len).map(|_| rng.random_bool(share)));
    }
    Tensor::from_slice(&keep).view([shape.layers as i64, shape.kv_heads as i64, len as i64])
}

fn one(model: &LanguageModel, ids: &[u32]) -> Tensor {
    model.ids(ids).unsqueeze(0)
}

#[test]
fn keeping_everything_equals_the_full_cache() {
    for name in models() {
        let model = load(&checkpoint(name).unwrap());
        let all = ids(&model, 140, 1);
        let mut full = prefilled(&model, &all[..120], 20);
        let question = model.forward(&model.ids(&all[120..133]), &mut full, &mut NoTap).unwrap();
        let step = model.forward(&model.ids(&all[133..134]), &mut full, &mut NoTap).unwrap();
        let keep = Tensor::ones(
            [model.shape().layers as i64, model.shape().kv_heads as i64, 120],
            (Kind::Bool, device()),
        );
        for pruned in [
            RaggedCache::whole(prefilled(&model, &all[..120], 0), 20),
            RaggedCache::prune(prefilled(&model, &all[..120], 7), &keep, 20),
        ] {
            let mut pruned = pruned.unwrap();
            assert_eq!((pruned.kept(0)[0], pruned.next_position(0)), (120, 120));
            let hidden = model.forward_ragged(&one(&model, &all[120..133]), &mut pruned).unwrap();
            assert_close(
                &format!("{name}, question"),
                &model.logits(&hidden.squeeze_dim(0)),
                &model.logits(&question),
                1e-4,
            );
            let hidden = model.forward_ragged(&one(&model, &all[133..134]), &mut pruned).unwrap();
            assert_close(
                &format!("{name}, step"),
                &model.logits(&hidden.squeeze_dim(0)),
                &model.logits(&step),
                1e-4,
            );
            assert_eq!(pruned.next_position(0), 134);
        }
    }
}

#[test]
fn compaction_equals_a_mask_on_the_full_cache() {
    for (seed, name) in models().enumerate() {
        let model = load(&checkpoint(name).unwrap());
        for (context, seed) in [(1, 10), (5, 20), (117, 30), (200, 40)].map(|(n, s)| (n, s + seed as u64)) {
            let all = ids(&model, context + 12, seed);
            let keep = random_mask(&model, context, seed);
            let full = prefilled(&model, &all[..context], 0);
            let mut branches = Branches::new(&full, Some(&keep.unsqueeze(0)), 1, 12).unwrap();
            let mut pruned = RaggedCache::prune(prefilled(&model, &all[..context], 3), &keep, 1).unwrap();
            let kept = keep.sum(Kind::Int64).int64_value(&[]) as usize;
            assert_eq!(pruned.kept_pairs(), kept);
            assert_eq!(pruned.kept(0)[0], 0, "a head that keeps nothing is part of the test");
            // A question, its second part, and two steps: each sees the own tokens of those before.
            let mut at = context;
            for n in [6, 4, 1, 1] {
                let new = one(&model, &all[at..at + n]);
                let masked = model.forward_branches(&new, &mut branches).unwrap();
                let compact = model.forward_ragged(&new, &mut pruned).unwrap();
                assert_close(
                    &format!("{name}, context {context}, {n} tokens at {at}"),
                    &model.logits(&compact),
                    &model.logits(&masked),
                    1e-4,
                );
                at += n;
            }
        }
    }
}

#[test]
fn a_batch_equals_its_sequences() {
    let model = load(&nano("target"));
    let make = |n: usize, seed: u64| {
        let context = ids(&model, n, seed);
        let keep = random_mask(&model, n, seed);
        RaggedCache::prune(prefilled(&model, &context, 0), &keep, 1).unwrap()
    };
    let lengths = [40, 93, 7];
    let mut singles: Vec<RaggedCache> = (0..3).map(|i| make(lengths[i], i as u64)).collect();
    let mut batch: Vec<RaggedCache> = (0..3).map(|i| make(lengths[i], i as u64)).collect();
    // One of them has read something before they come together.
    let early = one(&model, &ids(&model, 5, 9));
    for caches in [&mut singles, &mut batch] {
        let _ = model.forward_ragged(&early, &mut caches[1]).unwrap();
    }
    let mut batch = RaggedCache::join(batch).unwrap();
    assert_eq!(batch.sequences(), 3);
    assert_eq!([0, 1, 2].map(|b| batch.next_position(b)), [40, 98, 7]);
    for n in [4usize, 1, 1] {
        let new = Tensor::stack(&[0, 1, 2].map(|b| model.ids(&ids(&model, n, 50 + b))), 0);
        let together = model.forward_ragged(&new, &mut batch).unwrap();
        for (b, single) in singles.iter_mut().enumerate() {
            let alone = model.forward_ragged(&new.narrow(0, b as i64, 1), single).unwrap();
            assert_close(&format!("sequence {b}"), &together.narrow(0, b as i64, 1), &alone, 1e-4);
        }
    }
}

#[test]
fn rooms_grow_and_rewinding_forgets() {
    let model = load(&nano("target"));
    let (context, rest) = (ids(&model, 60, 1), ids(&model, 640, 2));
    let keep = random_mask(&model, 60, 3);
    let d = model.shape().head_dim;
    let heads = model.shape().total_kv_heads();
    let mut pruned = RaggedCache::prune(prefilled(&model, &context, 0), &keep, 1).unwrap();
    let element = model.kind().elt_size_in_bytes();
    let bytes = |kept: usize, room: usize| 2 * (kept + heads * room) * d * element;
    assert_eq!(pruned.bytes(), bytes(pruned.kept_pairs(), 256));
    let first = model.forward_ragged(&one(&model, &rest[..10]), &mut pruned).unwrap();
    for chunk in rest[10..].chunks(90) {
        let _ = model.forward_ragged(&one(&model, chunk), &mut pruned).unwrap();
    }
    assert_eq!(pruned.next_position(0), 700);
    assert_eq!(pruned.bytes(), bytes(pruned.kept_pairs(), 768), "three blocks of 256 hold 640 tokens");
    let grown = model.forward_ragged(&one(&model, &[1]), &mut pruned).unwrap();

    let mut roomy = RaggedCache::prune(prefilled(&model, &context, 0), &keep, 700).unwrap();
    let _ = model.forward_ragged(&one(&model, &rest), &mut roomy).unwrap();
    let expected = model.forward_ragged(&one(&model, &[1]), &mut roomy).unwrap();
    assert_close("growing", &grown, &expected, 1e-4);

    pruned.rewind();
    assert_eq!(pruned.next_position(0), 60);
    let again = model.forward_ragged(&one(&model, &rest[..10]), &mut pruned).unwrap();
    assert_close("the first question, asked again", &again, &first, 1e-5);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = load(&nano("target"));
    let other = load(&nano("proxy"));
    let context = ids(&model, 9, 1);
    let cache = || prefilled(&model, &context, 0);
    let wrong = Tensor::ones([6, 2, 8], (Kind::Bool, Device::Cpu));
    assert_error_text(RaggedCache::prune(cache(), &wrong, 1), "[6, 2, 9]");
    let wrong = Tensor::ones([6, 2, 9], (Kind::Float, Device::Cpu));
    assert_error_text(RaggedCache::prune(cache(), &wrong, 1), "bool keep mask");
    assert_error_text(RaggedCache::whole(model.new_cache(4), 1), "nothing to keep");
    assert_error_text(RaggedCache::join(Vec::new()), "no cache to join");
    let mut pruned = RaggedCache::whole(cache(), 1).unwrap();
    assert_error_text(other.forward_ragged(&one(&model, &[1]), &mut pruned), "another model");
    assert_error_text(model.forward_ragged(&model.ids(&[1]), &mut pruned), "[1, tokens]");
    assert_error(
        model.forward_ragged(&one(&model, &[4096]), &mut pruned),
        &["outside the model's vocabulary"],
    );
    assert_eq!(pruned.next_position(0), 9);
}

/// Half precision takes other kernels on a GPU, one for questions and one for single tokens; it must follow
/// f32 as closely as the full cache does.
#[test]
fn half_precision_follows_f32() {
    for name in models() {
        let folder = checkpoint(name).unwrap();
        let log_probabilities = |kind| {
            let model = LanguageModel::load(&folder, device(), kind).unwrap();
            let all = ids(&model, 164, 7);
            let keep = random_mask(&model, 150, 7);
            let mut pruned = RaggedCache::prune(prefilled(&model, &all[..150], 0), &keep, 1).unwrap();
            let mut read = |range: std::ops::Range<usize>| {
                model.forward_ragged(&one(&model, &all[range]), &mut pruned).unwrap()
            };
            let hidden = [read(150..162), read(162..163), read(163..164)];
            model.logits(&Tensor::cat(&hidden, 1)).log_softmax(-1, Kind::Float)
        };
        let (reference, half) = (log_probabilities(Kind::Float), log_probabilities(Kind::BFloat16));
        let kl = (reference.exp() * (&reference - &half)).sum_dim_intlist(-1, false, Kind::Float);
        let worst = kl.max().double_value(&[]);
        assert!(worst < 2e-2, "{name}: KL(f32 || bf16) of a token is {worst:.2e}");
    }
}

/// The kernel for single tokens has head_dims from 64 on, which no checkpoint here has: random models in half
/// precision. Two sequences of different lengths decode together, and each as after a mask on its full
/// cache.
#[test]
fn single_tokens_decode_as_behind_a_mask() {
    for (name, head_dim, query_heads) in
        [("nano-llama-target", 64, 4), ("nano-llama-target", 128, 8), ("arch-qwen3-qknorm", 128, 4)]
    {
        let mut config = load(&checkpoint(name).unwrap()).config().clone();
        (config.shape.head_dim, config.shape.query_heads) = (head_dim, query_heads);
        config.architecture.score_scale = 1.0 / (head_dim as f64).sqrt();
        let model = LanguageModel::random(config, device(), Kind::BFloat16, 3);
        let all = ids(&model, 330, 8);
        let lengths = [150, 310];
        let keep = |n: usize| random_mask(&model, n, n as u64);
        let pruned = |n: usize| RaggedCache::prune(prefilled(&model, &all[..n], 0), &keep(n), 1).unwrap();
        let mut together = RaggedCache::join(lengths.map(pruned).into()).unwrap();
        let mut apart = lengths.map(|n| {
            let full = prefilled(&model, &all[..n], 0);
            Branches::new(&full, Some(&keep(n).unsqueeze(0)), 1, 10).unwrap()
        });
        for at in 310..320 {
            let new = [0, 10].map(|after| one(&model, &all[at + after..=at + after]));
            let got = model.forward_ragged(&Tensor::cat(&new, 0), &mut together).unwrap();
            for (i, branches) in apart.iter_mut().enumerate() {
                let expected = model.forward_branches(&new[i], branches).unwrap();
                let off = (got.narrow(0, i as i64, 1) - &expected).abs().mean(Kind::Float).double_value(&[]);
                let std = expected.to_kind(Kind::Float).std(false).double_value(&[]);
                assert!(
                    off < 0.02 * std,
                    "{name}, head_dim {head_dim}, sequence {i}, token {at}: off by {off:.2e} of {std:.2e} on average"
                );
            }
        }
    }
}

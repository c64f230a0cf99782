//! Branches of a context: masking must equal eviction, and batches single sequences.

use pkv_lm::{Branches, LanguageModel, NoTap, Storage};
use pkv_text::TextTokenizer;
use rand::Rng;
use tch::{Device, Kind, Tensor};

use crate::support::*;

const CONTEXT: usize = 150;
const BOTH: [Storage; 2] = [Storage::Shared, Storage::Packed];

fn prefilled(name: &str) -> (LanguageModel, pkv_lm::KvCache, Vec<u32>) {
    let model = load(&checkpoint(name).unwrap());
    let ids = golden_ids(name);
    let mut cache = model.new_cache(CONTEXT + 40);
    let _ = model.prefill(&ids[..CONTEXT], &mut cache, 64, &mut NoTap).unwrap();
    (model, cache, ids[CONTEXT..].to_vec())
}

/// For each (layer, KV head) another random choice of `kept` positions, ascending: i64 `[l, h, kept]`.
fn random_choice(model: &LanguageModel, kept: usize, seed: u64) -> Tensor {
    let shape = model.shape();
    let mut rng = pkv_core::Seed(seed).stream("choice", 0);
    let noise: Vec<f64> = (0..shape.total_kv_heads() * CONTEXT).map(|_| rng.random_range(0.0..1.0)).collect();
    let noise = Tensor::from_slice(&noise).view([shape.layers as i64, shape.kv_heads as i64, CONTEXT as i64]);
    noise.topk(kept as i64, -1, true, true).1.sort(-1, false).0
}

fn mask_of(choice_lhk: &Tensor) -> Tensor {
    let size = choice_lhk.size();
    Tensor::zeros([size[0], size[1], CONTEXT as i64], (Kind::Bool, Device::Cpu))
        .scatter_value(2, choice_lhk, 1)
}

#[test]
fn hiding_pairs_equals_evicting_them() {
    for name in architectures().chain(["nano-llama-target"]) {
        let (model, cache, rest) = prefilled(name);
        // Few pairs kept and many: on a CPU the former are gathered, the latter hide the others.
        let counts = [[1, 20, CONTEXT - 1], [90, 100, CONTEXT - 1]];
        for (counts, storage) in counts.into_iter().flat_map(|counts| BOTH.map(|storage| (counts, storage))) {
            let choices: Vec<Tensor> = counts.iter().map(|kept| random_choice(&model, *kept, 3)).collect();
            let keep = Tensor::stack(&choices.iter().map(mask_of).collect::<Vec<_>>(), 0);
            let questions = [&rest[..9], &rest[9..18]];
            let mut branches = Branches::with_storage(&cache, Some(&keep), 2, 12, storage).unwrap();
            assert_eq!(branches.rows(), 6);
            let rows: Vec<Tensor> = (0..6).map(|row| model.ids(questions[row % 2])).collect();
            let all = Tensor::stack(&rows, 0);
            // In two forwards, so that own tokens of an earlier one are looked at too.
            let first = model.forward_branches(&all.narrow(1, 0, 5), &mut branches).unwrap();
            let second = model.forward_branches(&all.narrow(1, 5, 4), &mut branches).unwrap();
            let hidden = Tensor::cat(&[first, second], 1);
            for row in 0..6 {
                let mut evicted = cache.evict(&choices[row / 2].to_device(device()), 12).unwrap();
                assert_eq!(evicted.next_position(), CONTEXT);
                let expected =
                    model.forward(&model.ids(questions[row % 2]), &mut evicted, &mut NoTap).unwrap();
                assert_close(
                    &format!("{name}, {counts:?}, {storage:?}, row {row}"),
                    &hidden.get(row as i64),
                    &expected,
                    1e-4,
                );
            }
        }
    }
}

#[test]
fn half_precision_branches_follow_f32() {
    let folder = nano("target");
    let ids = &golden_ids("nano-llama-target")[..CONTEXT + 20];
    let log_probabilities = |kind| {
        let model = LanguageModel::load(&folder, device(), kind).unwrap();
        let mut cache = model.new_cache(CONTEXT);
        let _ = model.prefill(&ids[..CONTEXT], &mut cache, CONTEXT, &mut NoTap).unwrap();
        let keep = mask_of(&random_choice(&model, 100, 5)).unsqueeze(0);
        let mut branches = Branches::new(&cache, Some(&keep), 1, 20).unwrap();
        let hidden = model.forward_branches(&model.ids(&ids[CONTEXT..]).unsqueeze(0), &mut branches).unwrap();
        model.logits(&hidden).log_softmax(-1, Kind::Float)
    };
    let (reference, half) = (log_probabilities(Kind::Float), log_probabilities(Kind::BFloat16));
    let divergence = (reference.exp() * (&reference - &half)).sum_dim_intlist(-1, false, Kind::Float);
    let worst = divergence.max().double_value(&[]);
    assert!(worst < 0.02, "KL divergence of bf16 from f32: {worst}");
}

#[test]
fn a_head_may_lose_all_its_pairs() {
    let (model, cache, rest) = prefilled("nano-llama-target");
    let keep = Tensor::zeros([1, 6, 2, CONTEXT as i64], (Kind::Bool, Device::Cpu));
    let none = Tensor::zeros([6, 2, 0], (Kind::Int64, Device::Cpu));
    let mut evicted = cache.evict(&none.to_device(device()), 8).unwrap();
    let expected = model.forward(&model.ids(&rest[..8]), &mut evicted, &mut NoTap).unwrap();
    for storage in BOTH {
        let mut branches = Branches::with_storage(&cache, Some(&keep), 1, 8, storage).unwrap();
        let hidden = model.forward_branches(&model.ids(&rest[..8]).unsqueeze(0), &mut branches).unwrap();
        assert_close(&format!("empty heads, {storage:?}"), &hidden.get(0), &expected, 1e-4);
    }
}

#[test]
fn without_a_mask_branches_equal_the_cache() {
    for (name, storage) in architectures().flat_map(|name| BOTH.map(|storage| (name, storage))) {
        let (model, mut cache, rest) = prefilled(name);
        let mut branches = Branches::with_storage(&cache, None, 3, 10, storage).unwrap();
        let questions: Vec<&[u32]> = vec![&rest[..10], &rest[10..14], &rest[30..37]];
        let mut padded = Vec::new();
        for ids in &questions {
            padded.extend(ids.iter().map(|id| i64::from(*id)));
            padded.extend(vec![0; 10 - ids.len()]);
        }
        let hidden =
            model.forward_branches(&Tensor::from_slice(&padded).view([3, 10]), &mut branches).unwrap();
        for (row, ids) in questions.iter().enumerate() {
            let expected = model.forward(&model.ids(ids), &mut cache, &mut NoTap).unwrap();
            cache.truncate(CONTEXT);
            let found = hidden.get(row as i64).narrow(0, 0, ids.len() as i64);
            assert_close(&format!("{name}, {storage:?}, row {row}"), &found, &expected, 1e-4);
        }
        // With the padding dropped, each row continues at its own position.
        branches.truncate(&[10, 4, 7]).unwrap();
        branches.truncate(&[9, 4, 7]).unwrap();
        let more = Tensor::from_slice(&[11i64, 12, 13]).view([3, 1]);
        let hidden = model.forward_branches(&more, &mut branches).unwrap();
        for (row, ids) in questions.iter().enumerate() {
            let mut ids = ids[..[9, 4, 7][row]].to_vec();
            ids.push(11 + row as u32);
            let expected = model.forward(&model.ids(&ids), &mut cache, &mut NoTap).unwrap();
            cache.truncate(CONTEXT);
            assert_close(
                &format!("{name}, {storage:?}, row {row}, next"),
                &hidden.get(row as i64).get(0),
                &expected.get(-1),
                1e-4,
            );
        }
    }
}

#[test]
fn answers_of_branches_equal_answers_of_evicted_caches() {
    let (model, cache, rest) = prefilled("nano-llama-target");
    let tokenizer = TextTokenizer::open(&nano("target")).unwrap();
    let stop = tokenizer.stop_tokens();
    let question = |text: &str| {
        let mut ids = tokenizer.encode(&format!("\n\n{text}")).unwrap();
        ids.extend(tokenizer.switch());
        ids
    };
    let questions = [question("What is the access code for the silver harbour?"), rest[..5].to_vec()];
    let choices = [random_choice(&model, 140, 1), random_choice(&model, 15, 2)];
    let keep = Tensor::stack(&choices.iter().map(mask_of).collect::<Vec<_>>(), 0);
    let rows: Vec<&[u32]> = (0..4).map(|row| questions[row % 2].as_slice()).collect();
    for storage in BOTH {
        let mut branches = Branches::with_storage(&cache, Some(&keep), 2, 80, storage).unwrap();
        let answers = model.generate_branches(&rows, &mut branches, 12, stop).unwrap();
        for (row, answer) in answers.iter().enumerate() {
            let mut evicted = cache.evict(&choices[row / 2].to_device(device()), 80).unwrap();
            let expected = model.generate(rows[row], &mut evicted, 12, stop).unwrap();
            assert_eq!(*answer, expected, "{storage:?}, row {row}");
        }
        let text = tokenizer.decode(&answers[0]).unwrap();
        assert!(answers[0].len() < 12, "an answer to a question is short: {text}");
    }
}

/// Any token may stop an answer, so that rows end at different times and leave while others go on.
#[test]
fn rows_that_leave_change_no_answer_of_others() {
    for name in ["nano-llama-target", "arch-qwen2-bias", "arch-qwen3-qknorm"] {
        let (model, cache, rest) = prefilled(name);
        let questions: Vec<&[u32]> = vec![&rest[..6], &rest[6..9], &rest[9..20]];
        let kept = [2, 15, 60, 149];
        let masks: Vec<Tensor> =
            kept.iter().map(|&kept| mask_of(&random_choice(&model, kept, kept as u64))).collect();
        // One by one: what an answer is, without a batch; every token of one class ends it.
        let stop: Vec<u32> = (0..model.shape().vocab as u32).filter(|id| id % 11 == 7).collect();
        let alone = |mask: &Tensor, question: &[u32], new| {
            let keep = mask.unsqueeze(0);
            let mut branches = Branches::with_storage(&cache, Some(&keep), 1, 60, Storage::Shared).unwrap();
            model.generate_branches(&[question], &mut branches, new, &stop).unwrap().remove(0)
        };
        let rows: Vec<&[u32]> = (0..12).map(|row| questions[row % 3]).collect();
        let expected: Vec<Vec<u32>> = (0..12).map(|row| alone(&masks[row / 3], rows[row], 24)).collect();
        let mut lengths: Vec<usize> = expected.iter().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        // Random weights repeat one token, those that were trained do not.
        assert!(lengths.len() > 2 || name.starts_with("arch"), "answers end at different times: {lengths:?}");
        let keep = Tensor::stack(&masks, 0);
        for storage in BOTH {
            let mut branches = Branches::with_storage(&cache, Some(&keep), 3, 60, storage).unwrap();
            let together = model.generate_branches(&rows, &mut branches, 24, &stop).unwrap();
            assert_eq!(together, expected, "{name}, {storage:?}");

            // A question and a known beginning are read, tried tokens are dropped, some rows leave, the
            // others go on.
            let open: Vec<usize> = (0..12).filter(|&row| expected[row].len() > 2 && row != 4).collect();
            let mut branches = Branches::with_storage(&cache, Some(&keep), 3, 60, storage).unwrap();
            let mut padded = vec![0i64; 12 * 15];
            for (row, to) in padded.chunks_mut(15).enumerate() {
                let read = rows[row].iter().chain(&expected[row]).chain(&[1, 2]).map(|id| i64::from(*id));
                to.iter_mut().zip(read).for_each(|(to, id)| *to = id);
            }
            let padded = Tensor::from_slice(&padded).view([12, 15]);
            let _ = model.forward_branches(&padded, &mut branches).unwrap();
            branches.truncate(&(0..12).map(|row| rows[row].len() + 1).collect::<Vec<_>>()).unwrap();
            branches.retain(&open).unwrap();
            let next: Vec<u32> = open.iter().map(|&row| expected[row][1]).collect();
            let limits: Vec<usize> = open.iter().map(|&row| row + 1).collect();
            let found = model.continue_branches(&next, &mut branches, &limits, &stop).unwrap();
            for (i, &row) in open.iter().enumerate() {
                let wanted = &expected[row][2..expected[row].len().min(row + 3)];
                assert_eq!(found[i], wanted, "{name}, {storage:?}, row {row}");
            }
        }
    }
}

#[test]
fn misshapen_branches_are_refused() {
    let (model, cache, _) = prefilled("nano-llama-proxy");
    let keep = |size: [i64; 4], kind| Tensor::ones(size, (kind, Device::Cpu));
    let t = CONTEXT as i64;
    let new = |keep: &Tensor| Branches::new(&cache, Some(keep), 1, 4).err().unwrap().to_string();
    assert_eq!(
        new(&keep([2, 3, 1, t - 1], Kind::Bool)),
        "expected a keep mask of shape [masks, 3, 1, 150], found [2, 3, 1, 149]"
    );
    assert_eq!(new(&keep([2, 3, 1, t], Kind::Float)), "a keep mask must be bool, not Float");
    let mut branches = Branches::new(&cache, None, 2, 4).unwrap();
    let ids = |rows, s| Tensor::full([rows, s], 7, (Kind::Int64, Device::Cpu));
    assert_error_text(model.forward_branches(&ids(3, 1), &mut branches), "expected ids of shape [2, tokens]");
    assert_error(
        model.forward_branches(&ids(2, 5), &mut branches),
        &["a branch holds 0 of 4 own tokens; 5 more"],
    );
    assert_error_text(branches.truncate(&[1, 0]), "row 0 holds 0 tokens, it cannot be cut to 1");
    assert_error_text(branches.retain(&[1, 0]), "cannot keep rows [1, 0] of 2");
    assert_error_text(branches.retain(&[]), "cannot keep rows [] of 2");
    assert_error_text(branches.retain(&[0, 2]), "cannot keep rows [0, 2] of 2");
    assert_error_text(
        Branches::with_storage(&cache, Some(&keep([2, 3, 1, t - 1], Kind::Bool)), 1, 4, Storage::Packed),
        "expected bool keep masks of shape [masks, 3, 1, 150]",
    );
}

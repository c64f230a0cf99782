//! A model whose layers are over several devices is the same model: on a CPU to the bit, where its parts
//! share the device and the same code runs; on two GPUs, where there are, to their rounding.

use std::ops::ControlFlow;

use pkv_core::{LayerSplit, Seed};
use pkv_lm::{
    Branches, KvCache, LanguageModel, LayerView, NoTap, Placement, RaggedCache, RepeatTap, RepeatView,
    Storage, Tap,
};
use pkv_test_support::files::architectures;
use pkv_test_support::tensors::device_groups;
use rand::Rng;
use tch::{Device, Kind, Tensor};

use crate::support::*;

const CONTEXT: usize = 150;

fn models() -> impl Iterator<Item = &'static str> {
    ["nano-llama-target", "nano-llama-proxy"].into_iter().chain(architectures())
}

/// The model on one device, and over `devices`; nothing if it has too few layers.
fn pair(name: &str, devices: &[Device]) -> Option<(LanguageModel, LanguageModel)> {
    tch::set_num_threads(1);
    let folder = checkpoint(name).unwrap();
    let whole = LanguageModel::load(&folder, devices[0], Kind::Float).unwrap();
    let split = LayerSplit::even(whole.shape().layers, devices.len()).ok()?;
    let split = LanguageModel::load_over(&folder, Kind::Float, |_| Placement::over(devices, &split)).unwrap();
    assert_eq!(split.placement().parts().len(), devices.len());
    assert_eq!((split.placement().first(), split.device()), (devices[0], devices[devices.len() - 1]));
    Some((whole, split))
}

#[track_caller]
fn same(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let (a, b) = (a.to_device(Device::Cpu), b.to_device(Device::Cpu));
    match tolerance {
        0.0 => assert!(a.equal(&b), "{what}: off by {:e}", difference(&a, &b)),
        _ => assert_close(what, &a, &b, tolerance),
    }
}

/// Everything that taps see, on the host.
#[derive(Default)]
struct Seen(Vec<Tensor>);

impl Seen {
    fn add(&mut self, all: &[&Tensor]) {
        self.0.extend(all.iter().map(|t| t.to_device(Device::Cpu).copy()));
    }
}

impl Tap for Seen {
    fn wants_lse(&self) -> bool {
        true
    }

    fn layer(&mut self, view: &LayerView) -> anyhow::Result<()> {
        self.add(&[view.q_qsd, view.k_hkd, view.v_hkd, view.hidden_sm, view.normed_sm, view.lse_qs.unwrap()]);
        Ok(())
    }
}

impl RepeatTap for Seen {
    fn wants_lse(&self) -> bool {
        true
    }

    fn layer(&mut self, view: &RepeatView) -> anyhow::Result<()> {
        self.add(&[
            view.q_rqd,
            view.k_rhd,
            view.v_rhd,
            view.k_cache_hkd,
            view.normed_rm,
            view.own_lse_qr.unwrap(),
        ]);
        Ok(())
    }
}

/// What a model says of one context: named tensors and answers.
struct Said {
    tensors: Vec<(&'static str, Tensor)>,
    answers: Vec<Vec<u32>>,
}

fn prefilled(model: &LanguageModel, ids: &[u32]) -> KvCache {
    let mut cache = model.new_cache(CONTEXT + 60);
    let _ = model.prefill(&ids[..CONTEXT], &mut cache, 64, &mut NoTap).unwrap();
    cache
}

fn say(model: &LanguageModel, ids: &[u32]) -> Said {
    let _no_grad = tch::no_grad_guard();
    let (mut tensors, mut answers) = (Vec::new(), Vec::new());
    let mut put = |name: &'static str, t: &Tensor| tensors.push((name, t.to_device(Device::Cpu).copy()));
    let mut seen = Seen::default();
    let mut cache = model.new_cache(CONTEXT + 60);
    let hidden = model.prefill(&ids[..CONTEXT], &mut cache, 64, &mut seen).unwrap();
    assert_eq!(hidden.device(), model.device());
    put("hidden", &hidden);
    put("logits", &model.logits(&hidden));
    model.forward_repeats(&[&ids[3..20], &ids[40..47]], &cache, &mut seen).unwrap();
    seen.0.iter().for_each(|t| put("what taps see", t));

    let (question, shape) = (&ids[CONTEXT..CONTEXT + 9], model.shape());
    answers.push(model.generate(question, &mut prefilled(model, ids), 12, &[]).unwrap());
    // libtorch's generator is that of all threads: another test could draw in between.
    let mut rng = Seed(5).stream("placement", 0);
    let size = [shape.layers as i64, shape.kv_heads as i64, CONTEXT as i64];
    let mut keep = |share: f64| {
        let kept: Vec<bool> = (0..size.iter().product()).map(|_| rng.random_bool(share)).collect();
        Tensor::from_slice(&kept).view(size)
    };
    let (few, many) = (keep(0.3), keep(0.8));

    let mut ragged = RaggedCache::prune(prefilled(model, ids), &few, 300).unwrap();
    put("a pruned cache", &model.forward_ragged(&model.ids(question).unsqueeze(0), &mut ragged).unwrap());
    // Token by token, and past the room.
    let each = &mut |_| Ok(ControlFlow::Continue(()));
    ragged.rewind();
    answers.push(model.generate_ragged(question, &mut ragged, 12, &[], each).unwrap());
    let more: Vec<u32> = ids.iter().copied().cycle().take(520).collect();
    ragged.rewind();
    put("past the room", &model.forward_ragged(&model.ids(&more).unsqueeze(0), &mut ragged).unwrap());
    let other = RaggedCache::prune(prefilled(model, ids), &many, 10).unwrap();
    ragged.rewind();
    let mut both = RaggedCache::join(vec![ragged, other]).unwrap();
    let two = Tensor::stack(&[model.ids(question), model.ids(question)], 0);
    put("two pruned caches", &model.forward_ragged(&two, &mut both).unwrap());

    let masks = Tensor::stack(&[&few, &many], 0);
    for storage in [Storage::Shared, Storage::Packed] {
        let questions = [question, &question[..4]];
        let all: Vec<&[u32]> = questions.iter().cycle().take(4).copied().collect();
        let full = prefilled(model, ids);
        let mut branches = Branches::with_storage(&full, Some(&masks), 2, 40, storage).unwrap();
        answers.extend(model.generate_branches(&all, &mut branches, 9, &[17]).unwrap());
    }
    let kept: Vec<i64> = (0..shape.total_kv_heads() as i64).flat_map(|h| [h % 7, 20 + h, 149]).collect();
    let kept = Tensor::from_slice(&kept).view([shape.layers as i64, shape.kv_heads as i64, 3]);
    let mut evicted = prefilled(model, ids).evict(&kept, 20).unwrap();
    put("evicted", &model.forward(&model.ids(question), &mut evicted, &mut NoTap).unwrap());
    Said { tensors, answers }
}

#[test]
fn a_split_model_says_what_the_whole_one_says() {
    let mut tried = 0;
    for (devices, tolerance) in device_groups(1e-3) {
        for name in models() {
            let Some((whole, split)) = pair(name, &devices) else { continue };
            let ids: Vec<u32> = golden_ids(name).into_iter().cycle().take(CONTEXT + 20).collect();
            let (a, b) = (say(&whole, &ids), say(&split, &ids));
            assert_eq!(a.tensors.len(), b.tensors.len());
            for ((what, a), (_, b)) in a.tensors.iter().zip(&b.tensors) {
                same(&format!("{name} over {devices:?}: {what}"), a, b, tolerance);
            }
            assert_eq!(a.answers, b.answers, "{name} over {devices:?}");
            tried += 1;
        }
    }
    assert!(tried >= 10, "{tried}");
}

#[test]
fn weights_and_cache_are_where_their_layers_are() {
    for name in models() {
        let Some((whole, split)) = pair(name, &[Device::Cpu; 2]) else { continue };
        let shape = whole.shape();
        let one = whole.weight_bytes().iter().sum::<usize>();
        let parts = split.weight_bytes();
        // A tied matrix is on both devices.
        let copied = if whole.config().tied_head { 4 * shape.vocab * shape.hidden } else { 0 };
        assert_eq!((parts.len(), parts.iter().sum::<usize>()), (2, one + copied), "{name}");
        let matrix = 4 * shape.vocab * shape.hidden;
        assert!(parts.iter().all(|part| *part > matrix), "{name}: {parts:?}");
        let cache = split.new_cache(100);
        let layer = 2 * 4 * shape.kv_heads * shape.head_dim * 1024;
        let (first, second) = (shape.layers / 2, shape.layers - shape.layers / 2);
        assert_eq!(cache.bytes(), [first * layer, second * layer], "{name}");
    }
}

#[test]
fn random_weights_do_not_depend_on_their_place() {
    let _drawing = drawing();
    let config = load(&checkpoint("arch-qwen2-bias").unwrap()).config().clone();
    let split = LayerSplit::even(config.shape.layers, 2).unwrap();
    let over = Placement::over(&[Device::Cpu; 2], &split).unwrap();
    let logits = |placement: Placement| {
        let model = LanguageModel::random_over(config.clone(), placement, Kind::Float, 3);
        let hidden = model.prefill(&[5, 6, 7], &mut model.new_cache(3), 3, &mut NoTap).unwrap();
        model.logits(&hidden)
    };
    let whole = Placement::whole(Device::Cpu, config.shape.layers);
    assert!(logits(whole).equal(&logits(over)));
    let error = LanguageModel::load_over(&checkpoint("nano-llama-target").unwrap(), Kind::Float, |_| {
        Ok(Placement::whole(Device::Cpu, 99))
    });
    assert_error_text(error, "the placement is of 99 layers, the model has 6");
}

//! Scores of a target whose layers are over several devices, and the memory that it is planned with.

use pkv_core::LayerSplit;
use pkv_lm::{LanguageModel, LmConfig, Placement};
use pkv_recipe::plan::TargetMemory;
use pkv_recipe::{LabelPreset, LabelSection};
use pkv_score::{Requests, Scorer};
use pkv_test_support::files::{architectures, lm_goldens as goldens, nano};
use pkv_test_support::tensors::device_groups;
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// Every way to score, with means.
fn scores(model: &LanguageModel, label: &LabelSection) -> Vec<Tensor> {
    let requests = Requests::from_ids(vec![3, 4], vec![5], vec![6], label.chunk());
    let scorer = Scorer::with_requests(model, requests, &[1, 2, 3], label);
    let context: Vec<u32> = (0..130).map(|i| 7 + i * 31 % 200).collect();
    let scores = scorer.score(&context).unwrap();
    let mut all = vec![scores.max_lht];
    all.extend(scores.mean_lht);
    assert!(all.iter().all(|t| t.device() == model.device()));
    all.iter().map(|t| t.to_device(Device::Cpu)).collect()
}

#[test]
fn scores_do_not_depend_on_where_layers_are() {
    tch::set_num_threads(1);
    let folders = architectures().map(|name| goldens().join(name)).chain([nano("target"), nano("proxy")]);
    for folder in folders {
        let two = device_groups(1e-4).into_iter().filter(|(devices, _)| devices.len() == 2);
        for (devices, tolerance) in two {
            let whole = LanguageModel::load(&folder, devices[0], Kind::Float).unwrap();
            let split = LayerSplit::even(whole.shape().layers, 2).unwrap();
            let split = LanguageModel::load_over(&folder, Kind::Float, |_| Placement::over(&devices, &split))
                .unwrap();
            let sections = LabelPreset::ALL.map(|preset| LabelSection { preset, ..LabelSection::default() });
            let windowed = LabelSection { scorer: Some("snapkv".to_owned()), ..LabelSection::default() };
            for label in sections.into_iter().chain([windowed]) {
                let label = LabelSection { chunk_tokens: Some(40), prefill_chunk_tokens: 50, ..label };
                let (a, b) = (scores(&whole, &label), scores(&split, &label));
                assert_eq!(a.len(), b.len());
                for (a, b) in a.iter().zip(&b) {
                    let off = (a - b).abs().max().double_value(&[]);
                    assert!(
                        off <= tolerance * a.max().double_value(&[]),
                        "{folder:?}, {label:?}: off by {off:e}"
                    );
                }
            }
        }
    }
}

/// What `plan` counts is what the tensors of each device hold: the cache exactly, weights but for norms and
/// biases, which it leaves out.
#[test]
fn the_planned_memory_is_that_of_the_tensors() {
    let config = |tied: bool| {
        let config = LmConfig::from_json(&json!({
            "model_type": "qwen2", "num_hidden_layers": 5, "num_key_value_heads": 2, "num_attention_heads": 8,
            "head_dim": 32, "hidden_size": 256, "intermediate_size": 700, "vocab_size": 900,
            "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        }));
        config.unwrap()
    };
    for (tied, devices) in [(false, 2), (true, 2), (false, 3)] {
        let config = config(tied);
        let split = LayerSplit::even(config.shape.layers, devices).unwrap();
        let placement = Placement::over(&vec![Device::Cpu; devices], &split).unwrap();
        let model = LanguageModel::random_over(config.clone(), placement, Kind::Float, 1);
        let cache = model.new_cache(1500);
        let planned = TargetMemory::at_rest(config.shape, 4, 1500).devices(&split, None);
        assert_eq!(planned.len(), devices);
        for ((planned, weights), cache) in planned.iter().zip(model.weight_bytes()).zip(cache.bytes()) {
            assert_eq!(planned.cache_bytes, cache as u64);
            let ratio = weights as f64 / planned.weight_bytes as f64;
            assert!((1.0..1.01).contains(&ratio), "{planned:?} and {weights}");
            assert_eq!(planned.peak_bytes, planned.weight_bytes + planned.cache_bytes);
        }
    }
}

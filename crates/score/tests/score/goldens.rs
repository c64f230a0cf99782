//! Scores and request ids against transformers and kvpress; `make_goldens.py` beside the files in
//! `crates/lm/tests/goldens` wrote them.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use pkv_lm::LanguageModel;
use pkv_recipe::{LabelPreset, LabelSection};
use pkv_score::Scorer;
use pkv_test_pair::device;
use pkv_test_support::files::{architectures, golden_ids, lm_goldens as goldens, nano};
use pkv_text::TextTokenizer;
use tch::{Device, Kind, Tensor};

/// Those that goldens of trained models hold.
const PUBLISHED: [LabelPreset; 2] = [LabelPreset::Original, LabelPreset::Kvpress];

/// Scoring chunk of the goldens.
const CHUNK_TOKENS: usize = 160;

/// Compare one model with its golden file.
fn check(name: &str, model_folder: &Path, tokenizer_folder: &Path, presets: &[LabelPreset]) {
    let model = LanguageModel::load(model_folder, device(), Kind::Float).unwrap();
    let tokenizer = TextTokenizer::open(tokenizer_folder).unwrap();
    let file = goldens().join(format!("{name}.safetensors"));
    let golden: HashMap<String, Tensor> = Tensor::read_safetensors(&file).unwrap().into_iter().collect();
    let ids = |key: &str| golden_ids(name, key);
    let input = ids("input_ids").unwrap();
    let (prefix, context) = input.split_at(tokenizer.prefix().len());
    assert_eq!(prefix, tokenizer.prefix(), "{name}: prefix");
    for &preset in presets {
        let key = preset.name();
        let label = LabelSection { preset, chunk_tokens: Some(CHUNK_TOKENS), ..LabelSection::default() };
        let scorer = Scorer::new(&model, &tokenizer, &label).unwrap();
        let chunks: Vec<_> = scorer.requests().chunks(context.len()).collect();
        for (i, chunk) in chunks.iter().enumerate() {
            let expected = ids(&format!("{key}_repeat_ids_{i}")).unwrap();
            assert_eq!(scorer.requests().ids(context, chunk), expected, "{name} {key}: chunk {i}");
        }
        assert!(ids(&format!("{key}_repeat_ids_{}", chunks.len())).is_none(), "{name} {key}: more chunks");

        let expected_lht = &golden[&format!("{key}_scores")];
        let expected_lht = expected_lht.narrow(2, prefix.len() as i64, context.len() as i64);
        let scores = scorer.score(context).unwrap();
        assert_eq!(scores.max_lht.size(), expected_lht.size(), "{name} {key}");
        let found_lht = scores.max_lht.to_device(Device::Cpu);
        let off = (found_lht - &expected_lht).abs().max().double_value(&[]);
        // Weighted scores have no scale of their own.
        let tolerance = match label.scorer() {
            "plain" => 1e-4,
            _ => 1e-3 * expected_lht.max().double_value(&[]),
        };
        println!("{name} {key}: off by {off:.1e}, tolerance {tolerance:.1e}");
        assert!(off <= tolerance, "{name} {key}: off by {off:e}, tolerance {tolerance:e}");
        let excess = (scores.mean_lht.as_ref().unwrap() - &scores.max_lht).max().double_value(&[]);
        assert!(excess <= 1e-6, "{name} {key}: a mean exceeds its maximum by {excess:e}");
    }
}

#[test]
fn nano_target() {
    check("nano-llama-target", &nano("target"), &nano("target"), &LabelPreset::ALL);
}

#[test]
fn nano_proxy() {
    check("nano-llama-proxy", &nano("proxy"), &nano("proxy"), &LabelPreset::ALL);
}

/// Random weights that cover branches of the configuration; they share the nano target's tokenizer.
#[test]
fn every_architecture() {
    for name in architectures() {
        check(name, &goldens().join(name), &nano("target"), &LabelPreset::ALL);
    }
}

/// Models that are too large to ship: `PKV_FAMILY` names the folder that holds them.
fn check_large(name: &str, presets: &[LabelPreset]) {
    let folder = std::env::var_os("PKV_FAMILY").map(|family| Path::new(&family).join(name));
    match folder.filter(|f| f.is_dir()) {
        Some(folder) => check(name, &folder, &folder, presets),
        // Not by a macro: the test harness would hide it.
        None => {
            let note =
                format!("SKIPPED: scores of {name}; set PKV_FAMILY to the folder that holds `{name}/`\n");
            std::io::stderr().write_all(note.as_bytes()).unwrap();
        }
    }
}

#[test]
fn tiny_pair() {
    check_large("tiny-llama-target", &LabelPreset::ALL);
    check_large("tiny-llama-proxy", &LabelPreset::ALL);
}

/// `scripts/real_models.py` makes their folders.
#[test]
fn trained_models() {
    check_large("smollm2-135m", &PUBLISHED);
    check_large("qwen2.5-coder-0.5b", &PUBLISHED);
}

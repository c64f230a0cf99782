//! Checkpoint folders: whole, sharded, damaged, and not ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pkv_core::ModelShape;
use pkv_lm::{LanguageModel, LmConfig, NoTap};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::support::*;

fn try_load(folder: &Path) -> anyhow::Result<LanguageModel> {
    LanguageModel::load(folder, device(), Kind::Float)
}

/// A copy of a checkpoint's `config.json` and weights.
fn copy_of(source: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn arch(name: &str) -> PathBuf {
    goldens().join(name)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = read_json(path);
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn weights(folder: &Path) -> Vec<(String, Tensor)> {
    Tensor::read_safetensors(folder.join("model.safetensors")).unwrap()
}

/// Write the weights of `source` as three shards with an index.
fn shard(source: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut map = BTreeMap::new();
    let mut shards = [const { Vec::new() }; 3];
    for (i, (name, tensor)) in weights(source).into_iter().enumerate() {
        map.insert(name.clone(), format!("model-{:05}-of-00003.safetensors", i % 3 + 1));
        shards[i % 3].push((name, tensor));
    }
    for (i, tensors) in shards.iter().enumerate() {
        let path = folder.path().join(format!("model-{:05}-of-00003.safetensors", i + 1));
        Tensor::write_safetensors(tensors, path).unwrap();
    }
    fs::write(folder.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
        .unwrap();
    folder
}

fn logits(model: &LanguageModel) -> Tensor {
    let ids = &golden_ids("arch-qwen2-bias")[..100];
    let mut cache = model.new_cache(100);
    model.logits(&model.prefill(ids, &mut cache, 100, &mut NoTap).unwrap())
}

#[test]
fn shards_equal_one_file() {
    for name in architectures() {
        let folder = shard(&arch(name));
        assert_eq!(difference(&logits(&load(&arch(name))), &logits(&load(folder.path()))), 0.0, "{name}");
    }
}

#[test]
fn a_shard_that_is_missing_or_lacks_a_weight_is_named() {
    let folder = shard(&arch("arch-qwen2-bias"));
    let index = folder.path().join("model.safetensors.index.json");
    let original = fs::read_to_string(&index).unwrap();
    edit_json(&index, |json| {
        json["weight_map"]["model.norm.weight"] = json!("model-00009-of-00003.safetensors");
    });
    assert_error(
        try_load(folder.path()),
        &["reading weights from", "model-00009-of-00003.safetensors", "No such file"],
    );

    fs::write(&index, &original).unwrap();
    edit_json(&index, |json| {
        let map = json["weight_map"].as_object_mut().unwrap();
        let other = map.values().find(|file| **file != map["model.norm.weight"]).unwrap().clone();
        map["model.norm.weight"] = other;
    });
    assert_error(
        try_load(folder.path()),
        &["lacks weight `model.norm.weight`, which the index places there"],
    );

    fs::write(&index, original.replace("\"model-00001", "\"../model-00001")).unwrap();
    assert_error(try_load(folder.path()), &["which is no plain file name"]);
    fs::write(&index, "{").unwrap();
    assert_error(try_load(folder.path()), &["reading the index of weights"]);
}

#[test]
fn damaged_weights_are_named() {
    let folder = copy_of(&arch("arch-qwen2-bias"));
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();

    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let sizes = format!("its header describes {} bytes, the file has {}", whole.len(), whole.len() - 1);
    assert_error(try_load(folder.path()), &["model.safetensors` is damaged", &sizes]);

    fs::write(&path, &whole[..100]).unwrap();
    assert_error(try_load(folder.path()), &["is damaged: its header claims", "the file has 100"]);
    fs::write(&path, &whole[..5]).unwrap();
    assert_error(try_load(folder.path()), &["is damaged: only 5 bytes long"]);
    fs::write(&path, b"").unwrap();
    assert_error(try_load(folder.path()), &["is damaged: only 0 bytes long"]);

    let mut garbled = whole.clone();
    garbled[20] = b'{';
    fs::write(&path, &garbled).unwrap();
    assert_error(try_load(folder.path()), &["is damaged: its header is no valid safetensors header"]);
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, &huge).unwrap();
    assert_error(try_load(folder.path()), &["its header claims 18446744073709551615 bytes"]);

    // A pointer file, as a clone without large files leaves it.
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n").unwrap();
    assert_error(try_load(folder.path()), &["model.safetensors` is a pointer of Git LFS"]);
    fs::remove_file(&path).unwrap();
    assert_error(try_load(folder.path()), &["reading weights from", "model.safetensors", "No such file"]);
}

#[test]
fn weights_that_do_not_fit_the_configuration_are_named() {
    let rewritten = |edit: fn(&mut Vec<(String, Tensor)>)| {
        let folder = copy_of(&arch("arch-qwen2-bias"));
        let mut tensors = weights(folder.path());
        edit(&mut tensors);
        Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
        try_load(folder.path())
    };
    let missing = rewritten(|tensors| tensors.retain(|(name, _)| !name.contains("layers.2.")));
    assert_error(
        missing,
        &["are incomplete: `model.layers.2.input_layernorm.weight` and 11 more are missing"],
    );
    let surplus = rewritten(|tensors| {
        tensors.push((
            "model.layers.3.mlp.up_proj.weight".to_owned(),
            Tensor::ones([2, 2], (Kind::Float, Device::Cpu)),
        ));
    });
    assert_error(
        surplus,
        &["holds weight `model.layers.3.mlp.up_proj.weight`, which config.json accounts for nowhere"],
    );
    let reshaped = rewritten(|tensors| {
        let norm = tensors.iter_mut().find(|(name, _)| name == "model.norm.weight").unwrap();
        norm.1 = Tensor::ones([65], (Kind::Float, Device::Cpu));
    });
    assert_error(
        reshaped,
        &["reading weight `model.norm.weight`", "expected shape [64] from config.json, found [65]"],
    );
    let integers = rewritten(|tensors| {
        let norm = tensors.iter_mut().find(|(name, _)| name == "model.norm.weight").unwrap();
        norm.1 = norm.1.to_kind(Kind::Int8);
    });
    assert_error(
        integers,
        &["reading weight `model.norm.weight`", "stored as I8; quantized weights are not supported"],
    );
    // What old exports carry without need is passed over.
    let old = rewritten(|tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
        tensors.push((name, Tensor::ones([8], (Kind::Float, Device::Cpu))));
        let embedding =
            tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap().1.copy();
        tensors.push(("lm_head.weight".to_owned(), embedding));
    });
    assert_eq!(difference(&logits(&old.unwrap()), &logits(&load(&arch("arch-qwen2-bias")))), 0.0);
}

#[test]
fn of_two_sets_of_weights_the_single_file_is_read() {
    let folder = shard(&arch("arch-qwen2-bias"));
    fs::copy(arch("arch-qwen2-bias").join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), "{").unwrap();
    for other in ["consolidated.safetensors", "adapter_model.safetensors"] {
        fs::write(folder.path().join(other), "damaged").unwrap();
    }
    assert_eq!(difference(&logits(&load(folder.path())), &logits(&load(&arch("arch-qwen2-bias")))), 0.0);
}

#[test]
fn a_weight_that_two_files_hold_is_refused_unless_both_are_the_same_and_the_index_says_which() {
    let folder = shard(&arch("arch-qwen2-bias"));
    let index = folder.path().join("model.safetensors.index.json");
    let home = read_json(&index)["weight_map"]["model.norm.weight"].as_str().unwrap().to_owned();
    let other =
        (1..=3).map(|i| format!("model-{i:05}-of-00003.safetensors")).find(|name| *name != home).unwrap();
    let path = folder.path().join(other);
    let tensors = Tensor::read_safetensors(&path).unwrap();
    let with = |norm: Tensor| {
        let named = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let all: Vec<_> = named.chain([("model.norm.weight".to_owned(), norm)]).collect();
        Tensor::write_safetensors(&all, &path).unwrap();
    };
    // Which one is meant depends on who reads: transformers takes the last file's.
    with(Tensor::ones([64], (Kind::Float, Device::Cpu)));
    assert_error(
        try_load(folder.path()),
        &["holds another weight `model.norm.weight` than", "where the index places it"],
    );
    let original = weights(&arch("arch-qwen2-bias"));
    with(original.into_iter().find(|(name, _)| name == "model.norm.weight").unwrap().1);
    assert_eq!(difference(&logits(&load(folder.path())), &logits(&load(&arch("arch-qwen2-bias")))), 0.0);
    edit_json(&index, |json| drop(json["weight_map"].as_object_mut().unwrap().remove("model.norm.weight")));
    assert_error(
        try_load(folder.path()),
        &["weight `model.norm.weight`, which another of the files holds too"],
    );
}

#[test]
fn names_that_wrappers_write_are_named() {
    for (prefix, by) in [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("base_model.model.", "PEFT"),
        ("_fsdp_wrapped_module.", "FSDP"),
    ] {
        let folder = copy_of(&arch("arch-qwen2-bias"));
        let named: Vec<(String, Tensor)> = weights(folder.path())
            .into_iter()
            .map(|(name, tensor)| (format!("{prefix}{name}"), tensor))
            .collect();
        Tensor::write_safetensors(&named, folder.path().join("model.safetensors")).unwrap();
        assert_error(try_load(folder.path()), &["it was saved from a model wrapped by", by]);
    }
}

/// Whose output matrix would be missing, or new, is not guessed.
#[test]
fn a_decoder_saved_without_its_class_is_named() {
    for from in [arch("arch-llama3-rope-untied"), nano("target")] {
        let folder = copy_of(&from);
        let bare: Vec<(String, Tensor)> = weights(folder.path())
            .into_iter()
            .map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor))
            .collect();
        Tensor::write_safetensors(&bare, folder.path().join("model.safetensors")).unwrap();
        assert_error(try_load(folder.path()), &["a decoder without the class around it", "lack `model.`"]);
    }
}

#[test]
fn weights_of_another_kind_are_named() {
    let folder = copy_of(&arch("arch-qwen2-bias"));
    let path = folder.path().join("model.safetensors");
    let original = weights(folder.path());
    for (extra, what) in [
        ("model.layers.0.mlp.up_proj.qweight", "quantized weights are not supported"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "quantized weights are not supported"),
        ("model.layers.0.self_attn.k_scale", "quantized weights are not supported"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "wrapped by PEFT"),
        ("lm_head.modules_to_save.default.weight", "config.json accounts for nowhere"),
    ] {
        let mut all: Vec<_> = original.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        let gone = extra.replace("base_layer.", "");
        all.retain(|(name, _)| *name != gone);
        all.push((extra.to_owned(), Tensor::ones([2], (Kind::Float, Device::Cpu))));
        Tensor::write_safetensors(&all, &path).unwrap();
        assert_error(try_load(folder.path()), &[&format!("`{extra}`"), what]);
    }
    // Caches of old exports, computed anew.
    let mut all = original;
    let caches = ["model.rotary_emb.original_inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached"];
    all.extend(caches.map(|name| (name.to_owned(), Tensor::ones([2], (Kind::Float, Device::Cpu)))));
    Tensor::write_safetensors(&all, &path).unwrap();
    try_load(folder.path()).unwrap();

    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").unwrap();
    assert_error(try_load(folder.path()), &["model.safetensors` is a pointer of Git LFS"]);
    fs::write(folder.path().join("config.json"), "<!DOCTYPE html>").unwrap();
    assert_error(try_load(folder.path()), &["config.json` is a web page, not JSON"]);
}

#[test]
fn the_model_type_decides_whatever_a_wrapper_calls_the_class() {
    let folder = copy_of(&arch("arch-qwen2-bias"));
    for class in ["FSDPQwen2ForCausalLM", "OptimizedModule", "Qwen2ForCausalLM"] {
        edit_json(&folder.path().join("config.json"), |json| json["architectures"] = json!([class]));
        try_load(folder.path()).unwrap();
    }
    for class in ["Qwen2Model", "Qwen2ForSequenceClassification", "Qwen2ForRewardModel"] {
        edit_json(&folder.path().join("config.json"), |json| json["architectures"] = json!([class]));
        assert_error(try_load(folder.path()), &[class]);
    }
}

#[test]
fn notes_in_the_header_that_are_no_texts_are_named() {
    let folder = copy_of(&arch("arch-qwen2-bias"));
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for (notes, named) in [
        (json!({"step": 7}), Some("`step`: 7")),
        (json!([1]), Some("[1]")),
        (Value::Null, None),
        (json!({}), None),
    ] {
        let mut header: Value = serde_json::from_slice(&whole[8..8 + len]).unwrap();
        header["__metadata__"] = notes;
        let text = header.to_string();
        let bytes = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &whole[8 + len..]].concat();
        fs::write(&path, bytes).unwrap();
        match named {
            Some(named) => {
                assert_error(try_load(folder.path()), &["`__metadata__` of its header holds", named])
            }
            None => drop(try_load(folder.path()).unwrap()),
        }
    }
}

#[test]
fn both_spellings_of_rotary_embedding_are_one() {
    for name in architectures() {
        let new = LmConfig::from_folder(&arch(name)).unwrap();
        for type_key in ["rope_type", "type"] {
            let mut json = read_json(&arch(name).join("config.json"));
            let mut scaling = json["rope_parameters"].take();
            json["rope_theta"] = scaling.as_object_mut().unwrap().remove("rope_theta").unwrap();
            let kind = scaling.as_object_mut().unwrap().remove("rope_type").unwrap();
            let plain = kind == "default";
            scaling[type_key] = kind;
            json["rope_scaling"] = if plain { Value::Null } else { scaling };
            let dtype = json["dtype"].take();
            json["torch_dtype"] = dtype;
            assert_eq!(LmConfig::from_json(&json).unwrap(), new, "{name} with `{type_key}`");
        }
    }
}

#[test]
fn configurations_are_read() {
    let config = |name| LmConfig::from_folder(&arch(name)).unwrap();
    let qwen3 = config("arch-qwen3-qknorm");
    assert_eq!(
        (qwen3.shape().head_dim, qwen3.architecture.qk_norm, qwen3.architecture.qkv_bias, qwen3.tied_head),
        (32, true, false, true)
    );
    assert_eq!(qwen3.stored_kind, Some(Kind::BFloat16));
    let llama = config("arch-llama3-rope-untied");
    assert_eq!((llama.shape().head_dim, llama.tied_head), (16, false));
    assert_eq!(llama.max_positions, 4096);
    assert!(config("arch-qwen2-bias").architecture.qkv_bias);
    let granite = config("arch-granite-multipliers").architecture;
    assert_eq!(
        [granite.score_scale, granite.embedding_scale, granite.residual_scale, granite.logits_divisor],
        [0.7, 12.0, 0.22, 3.0]
    );
    // In every other family products are scaled by 1/sqrt(head_dim), in this one by its key alone.
    assert_eq!(llama.architecture.score_scale, 0.25);
    let mut json = read_json(&arch("arch-granite-multipliers").join("config.json"));
    json["attention_multiplier"] = Value::Null;
    assert_eq!(LmConfig::from_json(&json).unwrap().architecture.score_scale, 1.0);
    // head_dim that is not written down
    assert_eq!(config("arch-qwen2-yarn").shape().head_dim, 16);
}

#[test]
fn shapes_are_compared_with_the_recipe() {
    let config = LmConfig::from_folder(&nano("target")).unwrap();
    config.check_shape(&config.shape(), "target").unwrap();
    let other = ModelShape { layers: 7, head_dim: 64, ..config.shape() };
    assert_error(
        config.check_shape(&other, "target"),
        &["`layers` 7 in the recipe, 6 in config.json, `head_dim` 64 in the recipe, 32 in config.json"],
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let refused = |base: &str, edit: &dyn Fn(&mut Value), parts: &[&str]| {
        let folder = copy_of(&arch(base));
        edit_json(&folder.path().join("config.json"), edit);
        assert_error(try_load(folder.path()), parts);
    };
    let qwen2 = "arch-qwen2-bias";
    let set = |key: &'static str, value: Value| move |json: &mut Value| json[key] = value.clone();
    refused(
        qwen2,
        &set("model_type", json!("qwen3_moe")),
        &["mixture of experts (`model_type` `qwen3_moe`)"],
    );
    refused(qwen2, &set("model_type", json!("mixtral")), &["mixture of experts"]);
    refused(qwen2, &set("num_experts", json!(64)), &["mixture of experts (`num_experts` is 64)"]);
    refused(
        qwen2,
        &set("model_type", json!("gemma3_text")),
        &["architecture `gemma3_text` is not supported"],
    );
    refused(qwen2, &set("model_type", Value::Null), &["without `model_type`"]);
    refused(
        qwen2,
        &set("architectures", json!(["Qwen2ForSequenceClassification"])),
        &["architecture `Qwen2ForSequenceClassification` of `qwen2` is not supported"],
    );
    refused(
        qwen2,
        &set("quantization_config", json!({"quant_method": "awq", "bits": 4})),
        &["quantized weights (`quantization_config`, awq) are not supported"],
    );
    refused(
        qwen2,
        &set("layer_types", json!(["full_attention", "sliding_attention", "sliding_attention"])),
        &["`sliding_attention` in 2 of 3 layers (`layer_types`) is not supported"],
    );
    let windowed = |first: i64| {
        move |json: &mut Value| {
            json["layer_types"] = Value::Null;
            json["use_sliding_window"] = json!(true);
            json["sliding_window"] = json!(4096);
            json["max_window_layers"] = json!(first);
        }
    };
    let without = |key: &'static str| {
        move |json: &mut Value| {
            windowed(1)(json);
            json.as_object_mut().unwrap().remove(key);
        }
    };
    // transformers' own default is a window of 4,096 tokens.
    refused(qwen2, &without("sliding_window"), &["sliding-window attention in 2 of 3 layers"]);
    refused(qwen2, &windowed(0), &["sliding-window attention in 3 of 3 layers"]);
    let deep = |json: &mut Value| {
        without("max_window_layers")(json);
        json["num_hidden_layers"] = json!(30);
    };
    refused(qwen2, &deep, &["sliding-window attention in 2 of 30 layers"]);
    refused(qwen2, &set("is_causal", json!(false)), &["attention to later tokens (`is_causal` is false)"]);
    refused(qwen2, &set("hidden_act", json!(1)), &["activation `1`"]);
    refused(qwen2, &windowed(1), &["sliding-window attention in 2 of 3 layers (`use_sliding_window`)"]);
    refused(qwen2, &set("hidden_act", json!("gelu")), &["activation `gelu`"]);
    refused(qwen2, &set("partial_rotary_factor", json!(0.5)), &["partial rotary embedding"]);
    refused("arch-llama3-rope-untied", &set("mlp_bias", json!(true)), &["`mlp_bias`"]);
    for kind in ["longrope", "dynamic", "linear", "mrope"] {
        let edit = |json: &mut Value| json["rope_parameters"]["rope_type"] = json!(kind);
        refused(qwen2, &edit, &[&format!("rotary scaling `{kind}` is not supported (`rope_parameters`)")]);
    }
    let by_layer = json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6}});
    refused(qwen2, &set("rope_parameters", by_layer), &["rotary embeddings that differ by layer"]);
    let partial = json!({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5});
    refused(qwen2, &set("rope_parameters", partial), &["`rope_parameters.partial_rotary_factor` is 0.5"]);
    // A number or name of another type is no default.
    for (key, value, said) in [
        ("rope_parameters", json!("linear"), "`rope_parameters` is \"linear\"; expected an object"),
        ("rope_parameters", json!({"rope_theta": "1e6"}), "`rope_theta` is \"1e6\"; expected a number"),
        ("rope_parameters", json!({"rope_type": 4}), "`rope_parameters.rope_type` is 4; expected text"),
    ] {
        refused(qwen2, &set(key, value), &[said]);
    }

    // A window that no layer uses has no effect.
    let folder = copy_of(&arch(qwen2));
    edit_json(&folder.path().join("config.json"), windowed(28));
    try_load(folder.path()).unwrap();
}

/// As `AutoConfig` of transformers 5.24 reads them.
#[test]
fn heads_that_are_left_out_are_those_of_the_family() {
    let base = json!({"hidden_size": 1024, "num_attention_heads": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 9});
    for (family, kv_heads, head_dim) in
        [("llama", 64, 16), ("granite", 64, 16), ("qwen2", 32, 16), ("qwen3", 32, 128)]
    {
        let mut json = base.clone();
        json["model_type"] = json!(family);
        let shape = LmConfig::from_json(&json).unwrap().shape;
        assert_eq!((shape.kv_heads, shape.head_dim), (kv_heads, head_dim), "{family}");
        (json["num_key_value_heads"], json["head_dim"]) = (Value::Null, Value::Null);
        let shape = LmConfig::from_json(&json).unwrap().shape;
        assert_eq!((shape.kv_heads, shape.head_dim), (64, 16), "{family}, null");
    }
}

#[test]
fn a_configuration_that_makes_no_sense_is_an_error() {
    for (value, message) in [
        (json!(0), "`logits_scaling` is 0; expected a number above 0"),
        (json!(-3.5), "`logits_scaling` is -3.5"),
        (json!("8"), "`logits_scaling` is \"8\"; expected a number"),
    ] {
        let mut json = read_json(&arch("arch-granite-multipliers").join("config.json"));
        json["logits_scaling"] = value;
        assert_error_text(LmConfig::from_json(&json), message);
    }
    let folder = copy_of(&arch("arch-qwen2-bias"));
    let path = folder.path().join("config.json");
    let original = fs::read_to_string(&path).unwrap();
    for (key, value, message) in [
        ("hidden_size", json!(0), "`hidden_size` is 0; expected a whole number above 0"),
        ("hidden_size", json!(-64), "`hidden_size` is -64"),
        ("hidden_size", json!("64"), "`hidden_size` is \"64\""),
        ("hidden_size", Value::Null, "`hidden_size` is missing"),
        ("num_key_value_heads", json!(3), "no multiple of `num_key_value_heads` 3"),
        ("num_hidden_layers", json!(1u64 << 40), "`num_hidden_layers` is 1099511627776"),
        ("head_dim", json!(15), "`head_dim` is 15; rotary needs an even number"),
        ("tie_word_embeddings", json!("yes"), "expected true or false"),
        ("rms_norm_eps", json!(-1e-6), "`rms_norm_eps` is -0.000001; expected 0 or more"),
        ("layer_types", json!(["full_attention"]), "`layer_types` has 1 entries, `num_hidden_layers` is 3"),
        ("layer_types", json!("full_attention"), "expected a list of names"),
        ("layer_types", json!([null, null, null]), "expected a list of names"),
    ] {
        fs::write(&path, &original).unwrap();
        edit_json(&path, |json| json[key] = value);
        assert_error_text(try_load(folder.path()), message);
    }
    fs::write(&path, "{\"hidden_size\": 64").unwrap();
    assert_error_text(try_load(folder.path()), "parsing");
    fs::write(&path, "[]").unwrap();
    assert_error_text(try_load(folder.path()), "expected a JSON object");
    fs::remove_file(&path).unwrap();
    assert_error(
        try_load(folder.path()),
        &["reading a model's configuration", "config.json", "No such file"],
    );
}

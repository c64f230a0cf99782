//! Model folders as they are in the wild, against what transformers 5.24.0 makes of them.
//!
//! `tests/goldens/make_folders.py` made the numbers; the folders are written here as it writes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pkv_lm::{LanguageModel, NoTap};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::support::*;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The nano proxy with its one matrix under these names, an index, and `tie_word_embeddings`.
fn tie_folder(held: &str, index: &str, tie: Option<bool>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut config = read_json(&nano("proxy").join("config.json"));
    config.as_object_mut().unwrap().remove("tie_word_embeddings");
    if let Some(tie) = tie {
        config["tie_word_embeddings"] = json!(tie);
    }
    fs::write(at("config.json"), config.to_string()).unwrap();

    let tensors = Tensor::read_safetensors(nano("proxy").join("model.safetensors")).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
    let matrix = tensors.remove(EMBEDDING).unwrap();
    if held != "head" {
        tensors.insert(EMBEDDING.to_owned(), matrix.shallow_clone());
    }
    match held {
        "embed" => {}
        "different" => drop(tensors.insert(HEAD.to_owned(), matrix.roll([7], [0]))),
        _ => drop(tensors.insert(HEAD.to_owned(), matrix.copy())),
    }
    let file = if index == "none" { "model.safetensors" } else { "model-00001-of-00001.safetensors" };
    let list: Vec<(&String, &Tensor)> = tensors.iter().collect();
    Tensor::write_safetensors(&list, at(file)).unwrap();
    if index != "none" {
        let mut map: Map<String, Value> = tensors.keys().map(|name| (name.clone(), json!(file))).collect();
        match index {
            "both" => drop(map.insert(HEAD.to_owned(), json!(file))),
            "no head" => drop(map.remove(HEAD)),
            _ => {}
        }
        fs::write(at("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    }
    folder
}

#[test]
fn heads_are_tied_as_transformers_ties_them() {
    let golden = read_json(&goldens().join("ties.json"));
    let ids: Vec<u32> = numbers(&golden["ids"]);
    let columns = Tensor::from_slice(&numbers::<i64>(&golden["logit_ids"]));
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 48);
    for case in cases {
        let (held, index) = (case["held"].as_str().unwrap(), case["index"].as_str().unwrap());
        let tie = case["tie"].as_bool();
        let what = format!("{held} in the file, index {index}, tie_word_embeddings {tie:?}");
        let folder = tie_folder(held, index, tie);
        let missing: Vec<String> = numbers(&case["missing"]);
        if let Some(missing) = missing.first() {
            // transformers invents the matrix and warns; here it is an error.
            let expected = match index == "both" && missing == HEAD {
                true => format!("lacks weight `{missing}`"),
                false => format!("are incomplete: `{missing}` is missing"),
            };
            assert_error(LanguageModel::load(folder.path(), device(), Kind::Float), &[&expected]);
            continue;
        }
        let model = load(folder.path());
        let mut cache = model.new_cache(ids.len());
        let hidden = model.prefill(&ids, &mut cache, ids.len(), &mut NoTap).unwrap();
        let last = model.logits(&hidden.narrow(0, ids.len() as i64 - 1, 1)).squeeze_dim(0);
        let found = last.index_select(0, &columns.to_device(last.device()));
        let expected = Tensor::from_slice(&numbers::<f32>(&case["logits"])).to_device(last.device());
        assert_close(&what, &found, &expected, 1e-3);
        assert_eq!(model.config().tied_head, tie == Some(true) && held != "different", "{what}");
    }
}

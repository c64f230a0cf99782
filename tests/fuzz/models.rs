//! A language model's folder.

use std::fs;
use std::path::{Path, PathBuf};

use pkv_lm::{LanguageModel, LmConfig};
use pkv_test_support::files::copy_folder;
use pkv_text::TextTokenizer;
use tch::{Device, Kind};

use crate::folder;
use crate::harness::Target;
use crate::sandbox::root;

const TEMPLATE: &str = "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% endif %}\
    {{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] | trim + '<|end|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}";

fn proxy(name: &str) -> PathBuf {
    let dir = folder(name);
    copy_folder(&root().join("recipes/nano-llama/proxy"), &dir);
    dir
}

fn config(dir: &Path) -> anyhow::Result<()> {
    LmConfig::from_folder(dir).map(drop)
}

#[test]
fn configs() {
    let dir = proxy("config");
    Target { name: "config", folder: &dir, files: &["config.json"], repair: None, read: &config }.fuzz();
}

/// Text that spells out tokens of all kinds.
fn tokenizer(dir: &Path) -> anyhow::Result<()> {
    let tokenizer = TextTokenizer::open(dir)?;
    let ids = tokenizer.encode("The lantern is in 3 harbours.\n\n<|eot_id|> ü \u{1f980} ")?;
    tokenizer.decode(&ids).map(drop)
}

#[test]
fn tokenizers() {
    let dir = proxy("tokenizer");
    let files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];
    fs::write(
        dir.join(files[2]),
        "{\"bos_token\": \"<|begin_of_text|>\", \"additional_special_tokens\": [\"<|eot_id|>\"]}",
    )
    .unwrap();
    fs::write(dir.join(files[3]), "{\"<|eot_id|>\": 4}").unwrap();
    Target { name: "tokenizer", folder: &dir, files: &files, repair: None, read: &tokenizer }.fuzz();
}

#[test]
fn templates() {
    let dir = proxy("template");
    fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
    let files = ["chat_template.jinja"];
    Target { name: "template", folder: &dir, files: &files, repair: None, read: &tokenizer }.fuzz();
}

#[test]
fn weights() {
    let dir = proxy("weights");
    let files = ["model.safetensors", "config.json"];
    let load = |dir: &Path| LanguageModel::load(dir, Device::Cpu, Kind::Float).map(drop);
    Target { name: "weights", folder: &dir, files: &files, repair: None, read: &load }.fuzz();
}

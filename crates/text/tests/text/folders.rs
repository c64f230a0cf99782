//! Tokenizer folders as they are in the wild, against what transformers 5.24.0 makes of them.
//!
//! `tests/goldens/make_tokenizers.py` made the numbers; the folders are written here as it writes them.

use std::fs;
use std::path::Path;

use pkv_test_support::errors::assert_error;
use pkv_test_support::files::nano;
use pkv_text::TextTokenizer;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn golden() -> Value {
    read_json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizers.json"))
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A folder of the goldens: nano-llama's tokenizer without its last `cut` tokens, and these files.
fn tokenizer_folder(cut: u64, files: &Map<String, Value>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut json = read_json(&nano("target").join("tokenizer.json"));
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let gone: Vec<String> = vocab
        .iter()
        .filter(|(_, id)| id.as_u64().unwrap() >= 4096 - cut)
        .map(|(token, _)| token.clone())
        .collect();
    vocab.retain(|token, _| !gone.contains(token));
    json["model"]["merges"].as_array_mut().unwrap().retain(|merge| {
        let [a, b] = [merge[0].as_str().unwrap(), merge[1].as_str().unwrap()];
        ![a, b, &format!("{a}{b}")].iter().any(|token| gone.iter().any(|g| g == token))
    });
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    for (name, what) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, what.as_str().map_or_else(|| what.to_string(), str::to_owned)).unwrap();
    }
    folder
}

#[test]
fn tokens_and_templates_come_from_the_files_that_transformers_reads() {
    let golden = golden();
    let texts: Vec<String> = numbers(&golden["texts"]);
    let folders = golden["folders"].as_array().unwrap();
    assert!(folders.len() >= 29, "{}", folders.len());
    for case in folders {
        let name = case["name"].as_str().unwrap();
        let folder = tokenizer_folder(case["cut"].as_u64().unwrap(), case["files"].as_object().unwrap());
        if let Some(refused) = case.get("refused") {
            assert!(refused.as_str().unwrap().contains("no default specified"));
            assert_error(
                TextTokenizer::open(folder.path()),
                &["none of the chat templates is called `default`"],
            );
            continue;
        }
        let tokenizer = TextTokenizer::open(folder.path()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_eq!(tokenizer.vocab_size() as u64, case["vocab"].as_u64().unwrap(), "{name}");
        for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
            assert_eq!(tokenizer.encode(text).unwrap(), numbers::<u32>(ids), "{name}: {text:?}");
        }
        assert_eq!(tokenizer.prefix(), numbers::<u32>(&case["prefix"]), "{name}: {}", case["frame"]);
        assert_eq!(tokenizer.switch(), numbers::<u32>(&case["switch"]), "{name}: {}", case["frame"]);
        if let Some(eos) = case["eos"].as_str() {
            let id = tokenizer.encode(eos).unwrap();
            assert!(
                id.len() == 1 && tokenizer.stop_tokens().contains(&id[0]),
                "{name}: {eos} ends no answer"
            );
        }
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden = golden();
    let features = golden["features"].as_array().unwrap();
    assert!(features.len() >= 15, "{}", features.len());
    let mut wrong = Vec::new();
    for case in features {
        let files = json!({"tokenizer_config.json": {}, "chat_template.jinja": case["template"]});
        let folder = tokenizer_folder(0, files.as_object().unwrap());
        let frame: Vec<String> = numbers(&case["frame"]);
        let text = |ids: &[u32], tokenizer: &TextTokenizer| tokenizer.decode(ids).unwrap();
        match TextTokenizer::open(folder.path()) {
            Ok(t) if text(t.prefix(), &t) == frame[0] && text(t.switch(), &t) == frame[1] => {}
            Ok(t) => wrong.push(format!(
                "{}\n  is      {:?}\n  should  {:?}",
                case["template"],
                text(t.prefix(), &t),
                frame[0]
            )),
            Err(e) => wrong.push(format!("{}\n  {e:#}", case["template"])),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The error of a folder whose template is this one.
fn refused_template(template: &str) -> String {
    let files = json!({"tokenizer_config.json": {"chat_template": template}});
    let folder = tokenizer_folder(0, files.as_object().unwrap());
    match TextTokenizer::open(folder.path()) {
        Ok(_) => panic!("accepted: {}", &template[..template.len().min(200)]),
        Err(e) => format!("{e:#}"),
    }
}

#[test]
fn a_template_without_end_is_stopped_and_named() {
    let long = |piece: &str, n: usize| piece.repeat(n);
    let loops = "{% for a in range(9000) %}{% for b in range(9000) %}{% for c in range(9000) %}{% endfor %}{% endfor %}{% endfor %}";
    let doubled = |step: &str| {
        format!(
            "{{% set ns = namespace(s='x' * 1000, l=[1, 2]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}"
        )
    };
    for template in [
        loops.to_owned(),
        doubled("{% set ns.s = ns.s ~ ns.s %}"),
        doubled("{% set ns.s = ns.s + ns.s %}"),
        doubled("{% set ns.s = ns.s * 2 %}"),
        doubled("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        doubled("{% set ns.s = ns.s.replace('x', 'xx') %}"),
        doubled("{% set ns.s = ns.s | replace('x', 'xx') %}"),
        doubled("{% set ns.s = [ns.s, ns.s] | join %}"),
        doubled("{% set ns.s = ns.s.join(['a', 'b', 'c']) %}"),
        doubled("{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
        doubled("{% set ns.s = '{0}{0}'.format(ns.s) %}"),
        doubled("{% set ns.s = [ns.s, ns.s] | string %}"),
        doubled("{% set ns.s = [ns.s, ns.s] | tojson %}"),
        doubled("{% set ns.s = [ns.s, ns.s] | map('join') | join %}"),
        doubled("{% set ns.l = ns.l + ns.l %}"),
        doubled("{% set ns.l = ns.l * 2 %}"),
        doubled("{% set ns.l = (ns.l | map('int')) + (ns.l | map('int')) %}"),
        doubled("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}",
        doubled("{% set ns.l = [ns.l, ns.l] %}") + "{{ [ns.l, ns.l] | sort }}",
        doubled("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('x' * 1000) }}".to_owned(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        format!("{{% set b %}}{{% for i in range(90000) %}}{}{{% endfor %}}{{% endset %}}", long("raw ", 30000)),
        "{{ 'x' * 20000000000 }}".to_owned(),
        "{{ 'x' * 90000000 ~ 'x' * 90000000 }}".to_owned(),
        "{{ ('x' * 10000) * 10000 }}".to_owned(),
        "{{ 'x' * 10 ** 8 }}".to_owned(),
        "{{ 9 ** 9 ** 9 }}".to_owned(),
        "{{ '%0999999999d' % 1 }}".to_owned(),
        "{{ 'a' | indent(999999999, true) }}{{ 'a'.center(999999999) }}".to_owned(),
        "{{ [1] | batch(9999999999, 0) | list }}".to_owned(),
        format!("{{# {} #}}", long("x", 50 << 20)),
    ] {
        let begun = std::time::Instant::now();
        let text = refused_template(&(template.clone() + "{{ messages[0].content }}"));
        assert!(text.contains("rendering the chat template, `chat_template` of `tokenizer_config.json`"), "{text}");
        assert!(begun.elapsed().as_secs() < 60, "{:?}: {text}", begun.elapsed());
    }
    // Chains as long as a template may be: rendered or refused, the stack holds.
    for chain in [
        long("{{ 'a' ~ 1", 1) + &long(" ~ 'a'", 30_000) + " }}",
        long("{{ a", 1) + &long("|e", 100_000) + " }}",
    ] {
        let files = json!({"tokenizer_config.json": {"chat_template": chain + "{{ messages[0].content }}"}});
        let _ = TextTokenizer::open(tokenizer_folder(0, files.as_object().unwrap()).path());
    }
}

/// nano-llama's folder whose tokenizer.json went through `edit`.
fn edited_tokenizer(edit: impl FnOnce(&mut Value)) -> anyhow::Result<TextTokenizer> {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer_config.json"] {
        fs::copy(nano("target").join(name), folder.path().join(name)).unwrap();
    }
    let mut json = read_json(&nano("target").join("tokenizer.json"));
    edit(&mut json);
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    TextTokenizer::open(folder.path())
}

#[test]
fn a_tokenizer_that_would_be_misread_is_refused_by_name() {
    let token = json!({"id": 4096, "content": "[PAD]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    assert_error(
        edited_tokenizer(|json| json["added_tokens"].as_array_mut().unwrap().push(token)),
        &["1 tokens beyond the embedding: \"[PAD]\" is id 4096, `vocab_size` in config.json is 4096"],
    );
    assert_error(
        edited_tokenizer(|json| json["model"]["merges"] = json!([{"left": "a", "right": "b"}])),
        &["reading the tokenizer", "tokenizer.json"],
    );
    let with_rule = |rule: Value, key: &'static str| edited_tokenizer(move |json| json[key] = rule);
    let strip = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    assert_error(
        with_rule(strip, "normalizer"),
        &["the tokenizer `", "it reads a text as another one than its parts"],
    );
    let replace =
        |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    for pattern in [json!({"String": ""}), json!({"Regex": ""}), json!({"Regex": "x*"})] {
        assert_error(with_rule(replace(pattern, "y"), "normalizer"), &["matches the empty text"]);
    }
    let large = replace(json!({"String": " "}), &"y".repeat(1 << 20));
    assert_error(with_rule(large, "normalizer"), &["the `normalizer` of", "1048576 times longer"]);
    let twice = vec![replace(json!({"String": "a"}), "aa"); 40];
    let chain = json!({"type": "Sequence", "normalizers": twice});
    assert_error(with_rule(chain, "normalizer"), &["times longer"]);
    assert_error(
        edited_tokenizer(|json| {
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            vocab.extend((4096..1_100_000).map(|id| (format!("word{id}"), json!(id))));
        }),
        &["has 1100000 tokens, at most 1048576 are read"],
    );
    assert_error(
        edited_tokenizer(|json| json["model"]["dropout"] = json!(0.1)),
        &["leaves out merges at random (`model.dropout`)"],
    );
    edited_tokenizer(|json| json["model"]["dropout"] = json!(0.0)).unwrap();
    // The tokenizers crate panics on this one.
    assert_error(
        edited_tokenizer(|json| json["model"]["continuing_subword_prefix"] = json!("##")),
        &["reading the tokenizer"],
    );
    // What known tokenizers do stays allowed.
    let known =
        json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, replace(json!({"Regex": " +$"}), " ")]});
    with_rule(known, "normalizer").unwrap();
}

#[test]
fn a_file_that_is_something_else_is_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for (name, content, what) in [
        ("tokenizer.json", pointer, "is a pointer of Git LFS"),
        ("tokenizer_config.json", pointer, "is a pointer of Git LFS"),
        ("tokenizer_config.json", "[]", "holds a list, expected an object"),
        ("tokenizer_config.json", "null", "holds null, expected an object"),
        ("added_tokens.json", "[{\"id\": 4096, \"content\": \"<x>\"}]", "holds a list, expected an object"),
        ("special_tokens_map.json", "[]", "holds a list, expected an object"),
        ("generation_config.json", "<html>", "is a web page, not JSON"),
    ] {
        let files = json!({"tokenizer_config.json": {}, "config.json": {}});
        let folder = tokenizer_folder(0, files.as_object().unwrap());
        fs::write(folder.path().join(name), content).unwrap();
        assert_error(TextTokenizer::open(folder.path()), &[name, what]);
    }
    let folder = tokenizer_folder(0, json!({"tokenizer_config.json": {}}).as_object().unwrap());
    let wide: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    fs::write(folder.path().join("tokenizer_config.json"), wide).unwrap();
    assert_error(TextTokenizer::open(folder.path()), &["tokenizer_config.json` is UTF-16 text, not UTF-8"]);
}

#[test]
fn the_pieces_of_a_prompt_get_no_blank_of_their_own() {
    let plain = TextTokenizer::open(&nano("target")).unwrap();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    for (key, rule) in [
        ("normalizer", json!({"type": "Prepend", "prepend": "\u{2581}"})),
        ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [digits, byte_level]})),
    ] {
        let other = edited_tokenizer(|json| json[key] = rule).unwrap();
        for text in ["The king", " and he", "is\n\ngoing", "?", "", "é 北京"] {
            assert_eq!(other.encode(text).unwrap(), plain.encode(text).unwrap(), "{key}: {text:?}");
        }
    }

    // As Llama 2's: texts with a blank before them, unknown characters fused into one token.
    let letters: Vec<String> = (33u8..127).map(|c| char::from(c).to_string()).collect();
    let words = ["<unk>", "<s>", "</s>", "\u{2581}", "\n"].into_iter().map(str::to_owned).chain(letters);
    let vocab: Map<String, Value> = words.zip(0..).map(|(word, id)| (word, json!(id))).collect();
    let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let special = |(id, content): (usize, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let special: Vec<Value> = ["<unk>", "<s>", "</s>"].iter().enumerate().map(special).collect();
    let llama2 = json!({
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, blank]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "vocab": vocab, "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, llama2.to_string()).unwrap();
    let template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]</s>z";
    let config = json!({"bos_token": "<s>", "chat_template": template});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = TextTokenizer::open(folder.path()).unwrap();
    let found = [tokenizer.prefix(), &tokenizer.encode("x y</s>z").unwrap(), tokenizer.switch()].concat();
    let whole = tokenizers::Tokenizer::from_file(path).unwrap();
    let expected = whole.encode_fast("<s>[INST] x y</s>z [/INST]</s>z", false).unwrap();
    assert_eq!(found, expected.get_ids());
    assert_eq!(tokenizer.encode("ü").unwrap(), [0]);
}

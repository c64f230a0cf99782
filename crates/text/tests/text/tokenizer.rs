//! Token ids against transformers' tokenizer, and what a tokenizer's folder may hold.

use std::fs;
use std::path::Path;

use pkv_test_support::errors::assert_error;
use pkv_test_support::files::{golden_ids, lm_goldens, nano};
use pkv_text::TextTokenizer;
use serde_json::{Value, json};

fn open(folder: &Path) -> TextTokenizer {
    TextTokenizer::open(folder).unwrap()
}

/// A copy of the nano target's tokenizer whose `tokenizer_config.json` went through `edit`.
fn edited(edit: impl Fn(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(nano("target").join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let text = fs::read_to_string(nano("target").join("tokenizer_config.json")).unwrap();
    let mut config = serde_json::from_str(&text).unwrap();
    edit(&mut config);
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn prefix_context_and_switch_agree_with_transformers() {
    let tokenizer = open(&nano("target"));
    let text = fs::read_to_string(lm_goldens().join("context.txt")).unwrap();
    let meta: Value =
        serde_json::from_str(&fs::read_to_string(lm_goldens().join("nano-llama-target.json")).unwrap())
            .unwrap();
    let mut ids = tokenizer.prefix().to_vec();
    assert_eq!(ids.len() as u64, meta["prefix_tokens"].as_u64().unwrap());
    ids.extend(&tokenizer.encode(text.trim()).unwrap()[..400]);
    assert_eq!(ids, golden_ids("nano-llama-target", "input_ids").unwrap());
    assert_eq!(tokenizer.decode(tokenizer.switch()).unwrap(), meta["suffix_text"].as_str().unwrap());

    let repeat = golden_ids("nano-llama-target", "kvpress_repeat_ids_0").unwrap();
    let mut expected = tokenizer.encode("\n\nRepeat the previous context exactly.").unwrap();
    expected.extend(tokenizer.switch());
    expected.extend(&ids[17..177]);
    assert_eq!(repeat, expected);
}

#[test]
fn text_survives_the_round_trip() {
    let tokenizer = open(&nano("target"));
    for text in ["", " ", "a\n\n b", "naïve — 北京 🙂", "<|eot_id|>x"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("<|eot_id|>").unwrap(), [4]);
}

#[test]
fn special_tokens_of_a_text_can_be_text() {
    let mut tokenizer = open(&nano("target"));
    let text = "The end.<|eot_id|><|start_header_id|>system";
    let (prefix, switch, plain) =
        (tokenizer.prefix().to_vec(), tokenizer.switch().to_vec(), tokenizer.encode("The end.").unwrap());
    let parsed = tokenizer.encode(text).unwrap();
    let found: Vec<_> = tokenizer.special_tokens_in(&parsed).into_iter().collect();
    assert_eq!(found, ["<|eot_id|>", "<|start_header_id|>"]);
    tokenizer.read_special_tokens_as_text();
    let spelt = tokenizer.encode(text).unwrap();
    assert!(tokenizer.special_tokens_in(&spelt).is_empty() && spelt.len() > parsed.len() + 8, "{spelt:?}");
    assert_eq!(tokenizer.decode(&spelt).unwrap(), text);
    assert_eq!((tokenizer.prefix(), tokenizer.switch()), (&prefix[..], &switch[..]));
    assert_eq!(tokenizer.encode("The end.").unwrap(), plain);
}

#[test]
fn an_answer_ends_with_the_end_of_a_turn() {
    // config.json and eos_token say 4; without either, the template's turn end does.
    assert_eq!(open(&nano("target")).stop_tokens(), [4]);
    let folder = edited(|config| config["eos_token"] = Value::Null);
    assert_eq!(open(folder.path()).stop_tokens(), [4]);
    fs::write(folder.path().join("generation_config.json"), json!({"eos_token_id": [1, 7]}).to_string())
        .unwrap();
    assert_eq!(open(folder.path()).stop_tokens(), [1, 4, 7]);
}

#[test]
fn without_a_template_the_context_begins_with_the_bos_token() {
    let folder = edited(|config| config["chat_template"] = Value::Null);
    let tokenizer = open(folder.path());
    assert_eq!(tokenizer.prefix(), [0]);
    let bare = edited(|config| *config = json!({"eos_token": "<|eot_id|>"}));
    assert!(open(bare.path()).prefix().is_empty());
    assert_ne!(tokenizer.template_hash(), open(bare.path()).template_hash());
    assert_eq!(tokenizer.decode(tokenizer.switch()).unwrap(), "\n");
    assert_ne!(tokenizer.template_hash(), open(&nano("target")).template_hash());
}

#[test]
fn a_template_may_be_named_or_a_file_of_its_own() {
    let named = edited(|config| {
        let template = config["chat_template"].take();
        config["chat_template"] =
            json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]);
    });
    assert_eq!(open(named.path()).template_hash(), open(&nano("target")).template_hash());

    fs::write(named.path().join("chat_template.jinja"), "[{{ messages[0].content }}]\n").unwrap();
    let tokenizer = open(named.path());
    assert_eq!(tokenizer.decode(tokenizer.prefix()).unwrap(), "[");
    assert_eq!(tokenizer.decode(tokenizer.switch()).unwrap(), "]");
}

#[test]
fn a_template_that_cannot_be_used_is_named() {
    let folder = edited(|config| config["chat_template"] = json!("{% for m in messages %}"));
    assert_error(TextTokenizer::open(folder.path()), &["rendering the chat template", "unexpected end"]);
    let folder = edited(|config| config["chat_template"] = json!("{{ bos_token }}"));
    assert_error(TextTokenizer::open(folder.path()), &["leaves out the user's message"]);
}

#[test]
fn a_missing_or_damaged_tokenizer_is_named() {
    let folder = tempfile::tempdir().unwrap();
    assert_error(
        TextTokenizer::open(folder.path()),
        &["reading the tokenizer", "tokenizer.json", "No such file"],
    );
    fs::write(folder.path().join("tokenizer.json"), "{\"model\": ").unwrap();
    assert_error(TextTokenizer::open(folder.path()), &["reading the tokenizer", "EOF"]);
}

/// Searching a text for a token of 200,000 letters took minutes.
#[test]
fn tokens_of_endless_length_are_refused_in_every_file_that_names_them() {
    let long = "x".repeat(200_000);
    let folder = edited(|_| ());
    let path = folder.path().join("tokenizer.json");
    let mut whole: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    whole["added_tokens"][0]["content"] = long.as_str().into();
    fs::write(&path, whole.to_string()).unwrap();
    assert!(refused(folder.path()).contains("has 200000 bytes"));
    for (name, content) in [
        ("special_tokens_map.json", json!({"bos_token": long})),
        ("special_tokens_map.json", json!({"additional_special_tokens": ["<|eot_id|>", long]})),
        ("added_tokens.json", json!({ (long.clone()): 7 })),
    ] {
        let folder = edited(|config| drop(config.as_object_mut().unwrap().remove("added_tokens_decoder")));
        fs::write(folder.path().join(name), content.to_string()).unwrap();
        assert!(refused(folder.path()).contains("has 200000 bytes"), "{name}");
    }
}

fn refused(folder: &Path) -> String {
    format!("{:#}", TextTokenizer::open(folder).err().expect("it is refused"))
}

#[test]
fn an_end_token_of_another_type_is_no_default() {
    for (value, said) in [("\"4\"", "is \"4\"; expected a token id"), ("[4, 1.5]", "is [4,1.5]; expected")] {
        let folder = edited(|_| ());
        fs::write(folder.path().join("generation_config.json"), format!("{{\"eos_token_id\": {value}}}"))
            .unwrap();
        let text = refused(folder.path());
        assert!(text.contains(&format!("`eos_token_id` {said}")), "{text}");
        assert!(text.contains("generation_config.json"), "{text}");
    }
}

#[test]
fn special_tokens_that_are_split_are_refused() {
    let folder = edited(|config| config["split_special_tokens"] = json!(true));
    assert!(refused(folder.path()).contains("`split_special_tokens`"));
    let folder = edited(|config| config["split_special_tokens"] = json!(false));
    TextTokenizer::open(folder.path()).unwrap();
}

#[test]
fn a_pattern_that_gives_up_is_an_error() {
    let folder = edited(|_| ());
    let path = folder.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let pattern = json!({"Regex": "(a|a)*$|(([a-z ])+.)+[A-Z]([a-z ])+$"});
    json["pre_tokenizer"] =
        json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
    fs::write(&path, json.to_string()).unwrap();
    let text = "the lantern is in the harbour and the kettle is on the shelf ".repeat(20);
    let result = TextTokenizer::open(folder.path()).and_then(|t| t.encode(&text));
    assert_error(result, &["encoding a text of", "retry-limit-in-match over"]);
}

#[test]
fn vocabularies_are_compared_token_by_token() {
    let (target, proxy) = (open(&nano("target")), open(&nano("proxy")));
    target.same_vocab(&proxy).unwrap();
    assert_eq!(target.vocab_hash(), proxy.vocab_hash());
    assert_eq!(target.vocab_size(), 4096);

    let folder = edited(|_| ());
    let path = folder.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    // The last token is part of no merge that another token needs.
    let last = vocab.iter().max_by_key(|(_, id)| id.as_u64()).unwrap().0.clone();
    vocab.remove(&last);
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.pop();
    fs::write(&path, json.to_string()).unwrap();
    let other = open(folder.path());
    assert_error(
        target.same_vocab(&other),
        &["4096 tokens against 4095", "1 only in the first and 0 only in the second", "as id 4095"],
    );
    assert_error(other.same_vocab(&target), &["4095 tokens against 4096"]);
}

//! Wrong recipes, models, data and disks: each a clear error with a hint.

use std::fs;
use std::path::Path;

use pkv_core::FailureKind;

use crate::sandbox::{Sandbox, root};

/// A copy of a model's folder inside the sandbox, for damaging it.
fn copy_model(s: &Sandbox, role: &str) {
    let from = root().join("recipes/nano-llama").join(role);
    let to = s.path(role);
    fs::create_dir_all(&to).unwrap();
    for file in fs::read_dir(&from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    s.edit("recipe.toml", &from.display().to_string(), &to.display().to_string());
}

fn shards(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "parquet"))
        .collect();
    all.sort();
    all
}

#[test]
fn unknown_recipe_key_is_named() {
    let s = Sandbox::new();
    s.edit("recipe.toml", "steps = 24", "stepz = 24");
    s.run(&["plan"]).fails_with(&["invalid recipe `recipe.toml`", "stepz"]);
}

#[test]
fn misspelt_override_is_named() {
    let s = Sandbox::new();
    s.run(&["plan", "--set", "train.stepz=3"]).fails_with(&["stepz", "did you mean `steps`?"]);
    s.run(&["plan", "--set", "train"]).fails_with(&["cannot apply `--set train`"]);
    s.run(&["plan", "--set", "=3"]).fails_with(&["the key is empty"]);
    s.run(&["plan", "--set", "eval.methods=mapper"])
        .fails_with(&["cannot apply `--set eval.methods=mapper`", r#"'eval.methods=["mapper"]'"#]);
    s.run(&["plan", "--set", "train.lr=-1"]).fails_with(&["`train.lr` is -1"]);
    let threads = s.run(&["plan", "--threads", "0"]);
    assert!(threads.stderr.contains("invalid value '0' for '--threads <N>'"), "{}", threads.stderr);
}

#[test]
fn a_home_folder_that_no_shell_replaced_is_not_made() {
    let s = Sandbox::new();
    s.run(&["prepare", "--runs=~/runs"]).fails_with(&["`--runs` is `~/runs`", "write `--runs ~/runs`"]);
    assert!(!s.path("~").exists());
}

#[test]
fn broken_toml_has_file_line_and_hint() {
    for (file, from, to, line) in [
        ("recipe.toml", "name = \"small\"", "name = small", "line 2"),
        ("recipe.toml", "steps = 24", "steps = \"24\"", "line "),
        ("recipe.toml", "[eval]", "[eval", "line "),
        ("manifest.toml", "format = \"txt\"", "format = txt", "line 6"),
        ("manifest.toml", "max = 3", "max = -3", "line "),
        ("manifest.toml", "max = 3", "maxx = 3", "did you mean `max`?"),
    ] {
        let s = Sandbox::new();
        s.edit(file, from, to);
        s.run(&["plan"]).fails_with(&[&format!("`{file}`"), line]);
    }
    let s = Sandbox::new();
    s.write("recipe.lock.toml", "version = 1\nmodels = [\n");
    s.run(&["prepare"]).fails_with(&["recipe.lock.toml", "line ", "fetch"]);
}

#[test]
fn ratio_15_suggests_0_15() {
    let s = Sandbox::new();
    s.edit("recipe.toml", "\nratios = [0.2, 0.05]", "\nratios = [0.2, 15]");
    s.run(&["plan"]).fails_with(&["eval.ratios[1]", "15", "`0.15`"]);
}

#[test]
fn an_unknown_task_is_named_before_any_work() {
    let s = Sandbox::new();
    for (given, wrong, hint) in [
        ("rulr", "`rulr`, which is no task", "did you mean `ruler`?"),
        ("", "``, which is no task", "tasks are facts, perplexity, ruler, longbench, scbench"),
        ("ruler/vtt", "`vtt` is no task of ruler", "its tasks are niah_single_1"),
        ("facts/one", "`facts` has no single tasks", "single tasks are of ruler"),
    ] {
        for command in ["plan", "prepare"] {
            let set = format!("eval.tasks=[\"facts\", \"{given}\"]");
            s.run(&[command, "--set", &set]).fails_with(&["invalid recipe `recipe.toml`", wrong, hint]);
        }
        s.run(&["eval", "--tasks", given]).fails_with(&["invalid recipe `recipe.toml`", wrong, hint]);
    }
}

#[test]
fn an_unknown_method_is_named_before_any_work() {
    let s = Sandbox::new();
    for (given, meant) in [("snapvk", "snapkv"), ("Head_Prior", "head-prior")] {
        let set = format!("eval.methods=[\"mapper\", \"{given}\"]");
        for command in ["plan", "prepare", "eval"] {
            s.run(&[command, "--set", &set]).fails_with(&[
                "invalid recipe `recipe.toml`",
                &format!("`{given}`, which is no method"),
                &format!("did you mean `{meant}`?"),
                "expected-attention, keydiff",
            ]);
        }
    }
    s.run(&["plan", "--set", "eval.methods=[\"a b\"]"])
        .fails_with(&["invalid recipe", "`a b`, which is no method"]);
    s.run(&["plan", "--set", "eval.methods=[\"iam\", \"iam\"]"]).fails_with(&["names `iam` twice"]);
    s.run(&["plan", "--set", "prune.budget_contexts=0"]).fails_with(&["`prune.budget_contexts` is 0"]);
    let twice = "eval.answer_policies=[\"pair\", \"pair\"]";
    s.run(&["plan", "--set", twice]).fails_with(&["`eval.answer_policies` names `pair` twice"]);
}

#[test]
fn absent_recipe_manifest_and_document() {
    let s = Sandbox::new();
    crate::sandbox::Ran::new(s.command(&["plan", "--recipe", "nowhere.toml"]).output().unwrap())
        .fails_with(&["cannot read recipe `nowhere.toml`"]);
    fs::remove_file(s.path("documents.txt")).unwrap();
    s.run(&["prepare"]).fails_with(&["documents.txt"]);
    fs::remove_file(s.path("manifest.toml")).unwrap();
    s.run(&["prepare"]).fails_with(&["in none of three places: `manifest.toml`, ", "manifests live in"]);
    // Beside the recipe it is found.
    s.write("own/pair.toml", &fs::read_to_string(s.path("recipe.toml")).unwrap());
    s.write(
        "own/manifest.toml",
        "description = \"d\"\n[[source]]\nname = \"a\"\nfiles = [\"a.txt\"]\nformat = \"txt\"\nlicence = \"CC0-1.0\"\n",
    );
    let plan = s.command(&["plan", "--recipe", "own/pair.toml"]).output().unwrap();
    crate::sandbox::Ran::new(plan).ok();
}

#[test]
fn missing_model_file_and_folder() {
    let s = Sandbox::new();
    copy_model(&s, "target");
    s.run(&["prepare"]).ok();
    // What parsers say of it comes with a hint.
    for text in ["{\"a\": NaN}", "\u{feff}{}", "[]", "{\"model_type\": \"llama\", \"hidden_size\": -1}"] {
        s.write("target/config.json", text);
        s.run(&["label"]).fails_with(&["config.json`"]);
    }
    fs::copy(root().join("recipes/nano-llama/target/config.json"), s.path("target/config.json")).unwrap();
    fs::remove_file(s.path("target/model.safetensors")).unwrap();
    s.run(&["label"]).fails_with(&["target", "safetensors"]);
    fs::remove_file(s.path("target/config.json")).unwrap();
    s.run(&["label"]).fails_with(&["config.json"]);
    fs::remove_dir_all(s.path("target")).unwrap();
    s.run(&["label"]).fails_with(&["cannot open the target"]);
}

#[test]
fn truncated_safetensors() {
    let s = Sandbox::new();
    copy_model(&s, "target");
    s.run(&["prepare"]).ok();
    let path = s.path("target/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for keep in [bytes.len() - 1000, 100, 4] {
        fs::write(&path, &bytes[..keep]).unwrap();
        s.run(&["label"]).fails_with(&["model.safetensors"]);
    }
}

#[test]
fn shape_that_the_recipe_does_not_expect() {
    let s = Sandbox::new();
    s.edit("recipe.toml", "layers = 6", "layers = 8");
    s.run(&["prepare"]).fails_with(&["target", "8", "6"]);
}

#[test]
fn tokenizer_of_another_family() {
    let s = Sandbox::new();
    copy_model(&s, "proxy");
    let path = s.path("proxy/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let names: Vec<String> = vocab
        .iter()
        .filter(|(_, id)| [500, 501].contains(&id.as_u64().unwrap()))
        .map(|(n, _)| n.clone())
        .collect();
    let (a, b) = (vocab[&names[0]].clone(), vocab[&names[1]].clone());
    vocab[&names[0]] = b;
    vocab[&names[1]] = a;
    fs::write(&path, json.to_string()).unwrap();
    s.run(&["prepare"]).fails_with(&["does not share the vocabulary"]);
}

#[test]
fn labels_of_another_model() {
    let s = Sandbox::new();
    s.run(&["prepare"]).ok();
    s.run(&["label"]).ok();
    s.run(&["extract"]).ok();
    let before = fs::read(s.path("runs/small/labels/index.json")).unwrap();
    // The same folder name, other weights: the revision differs.
    copy_model(&s, "target");
    let mut bytes = fs::read(s.path("target/model.safetensors")).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(s.path("target/model.safetensors"), bytes).unwrap();
    s.run(&["train"]).fails_with(&["labels", "target"]);
    s.run(&["label"]).fails_with(&["labels", "target"]);
    assert_eq!(before, fs::read(s.path("runs/small/labels/index.json")).unwrap(), "the labels were touched");
}

#[test]
fn shard_with_a_flipped_byte() {
    let s = Sandbox::new();
    for stage in ["prepare", "label", "extract"] {
        s.run(&[stage]).ok();
    }
    let shard = shards(&s.path("runs/small/labels")).remove(0);
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&shard, bytes).unwrap();
    s.run(&["train"]).fails_with(&[shard.file_name().unwrap().to_str().unwrap(), "--redo label"]);
    s.run(&["label", "--redo", "label"]).ok();
    s.run(&["train"]).ok();
}

#[test]
fn empty_and_tiny_documents() {
    let s = Sandbox::new();
    s.write("documents.txt", &format!("\0 \n\0a\0{}", crate::sandbox::documents()));
    let ran = s.run(&["prepare"]).ok();
    assert!(ran.stderr.contains("skipped 2 documents without text"), "{}", ran.stderr);
    let s = Sandbox::new();
    s.write("documents.txt", "");
    s.run(&["prepare"]).fails_with(&["documents.txt"]);
    let s = Sandbox::new();
    s.write("documents.txt", "a");
    s.run(&["prepare"]).fails_with(&["min_tokens"]);
}

/// Bytes as another program compresses them.
fn compressed(program: &str, text: &str) -> Option<Vec<u8>> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child =
        Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    let mut stdin = child.stdin.take().unwrap();
    let text = text.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let out = child.wait_with_output().unwrap().stdout;
    writer.join().unwrap().unwrap();
    Some(out)
}

#[test]
fn json_lines_as_others_write_them() {
    let lines: Vec<String> = crate::sandbox::documents()
        .split('\0')
        .map(|d| serde_json::json!({ "text": d }).to_string())
        .collect();
    let s = Sandbox::new();
    s.edit("manifest.toml", "separator = \"\\u0000\"\n", "");
    s.edit("manifest.toml", "\"txt\"", "\"jsonl\"");
    let all = lines.join("\r\n");
    for text in [all.clone(), format!("\u{feff}{all}\r\n\r\n")] {
        s.write("documents.txt", &text);
        s.run(&["prepare", "--redo", "prepare"]).ok();
    }
    fs::write(s.path("documents.txt"), compressed("gzip", &all).unwrap()).unwrap();
    s.run(&["prepare", "--redo", "prepare"]).ok();
    for (program, what) in [("bzip2", "bzip2"), ("xz", "xz")] {
        if let Some(bytes) = compressed(program, &all) {
            fs::write(s.path("documents.txt"), bytes).unwrap();
            s.run(&["prepare", "--redo", "prepare"]).fails_with(&["documents.txt` is compressed with", what]);
        }
    }
    for (text, expected) in [
        (format!("[{}]", lines.join(",")), "begins a JSON array"),
        (format!("[\n{}\n]", lines.join(",\n")), "begins a JSON array"),
        (all.replacen("Notes", "Notes \\ud83d", 1), "lone surrogate"),
        (all.replacen("{\"text\"", "{\"body\"", 1), "no key `text`"),
        (all[..all.len() - 10].to_owned(), "line 40"),
        ("3\n".to_owned(), "a number, not an object"),
    ] {
        s.write("documents.txt", &text);
        s.run(&["prepare", "--redo", "prepare"]).fails_with(&["documents.txt", "line ", expected]);
    }
}

#[test]
fn facts_placed_otherwise_are_other_examples() {
    let s = Sandbox::new();
    let anywhere = ["prepare", "--set", "facts.place=anywhere"];
    s.run(&anywhere).ok();
    // As fingerprints were before there was a choice.
    let index = fs::read_to_string(s.path("runs/small/examples/index.json")).unwrap();
    assert!(index.contains("vocab") && !index.contains("place"), "{index}");
    s.run(&["prepare"]).fails_with(&["facts.place", "sentence", "--redo prepare"]);
    s.run(&["prepare", "--redo", "prepare"]).ok();
    s.run(&anywhere).fails_with(&["facts.place", "--redo prepare"]);
    // Without facts there is nothing to place.
    s.edit("manifest.toml", "[facts]\nmin = 0\nmax = 3\n", "");
    s.run(&["prepare", "--redo", "prepare"]).ok();
    let ran = s.run(&anywhere).ok();
    assert!(ran.stderr.contains("skipped"), "{}", ran.stderr);
    s.run(&["prepare", "--set", "facts.place=middle"]).fails_with(&["unknown variant `middle`"]);
}

#[test]
fn benchmark_rows_that_do_not_fit_are_named() {
    let s = crate::trained::finished();
    s.write(
        "bench.toml",
        "description = \"b\"\n[[source]]\nname = \"longbench\"\nfiles = [\"lb/*\"]\nformat = \"jsonl\"\nlicence = \"CC0-1.0\"\n\
         [[source]]\nname = \"scbench\"\nfiles = [\"sc/*\"]\nformat = \"jsonl\"\nlicence = \"CC0-1.0\"\n",
    );
    let eval = |tasks: &str, file: &str, text: &str| {
        for folder in ["lb", "sc"] {
            let _ = fs::remove_dir_all(s.path(folder));
            fs::create_dir(s.path(folder)).unwrap();
        }
        s.write(file, text);
        s.run(&["eval", "--tasks", tasks, "--set", "eval.benchmark.manifest=bench.toml"])
    };
    let row = r#"{"input": "Q?", "context": "C", "answers": ["x"], "all_classes": null, "_id": "a"}"#;
    for (from, to, column) in [
        (r#"["x"]"#, "null", "`answers`"),
        (r#"["x"]"#, r#""x""#, "`answers`"),
        (r#""C""#, r#""""#, "`context`"),
        ("input", "question", "`input`"),
    ] {
        let text = format!("{row}\n{}\n", row.replace(from, to));
        eval("longbench", "lb/qasper.jsonl", &text).fails_with(&[
            "row 2 of `",
            "qasper.jsonl`",
            column,
            "THUDM/LongBench",
        ]);
    }
    eval("longbench", "lb/trec.jsonl", row).fails_with(&["row 1 of `", "`all_classes`"]);
    eval("longbench", "lb/qasper.jsonl", "").fails_with(&["qasper.jsonl", "holds no row"]);
    eval("longbench", "lb/qasper.jsonl.gz", "x").fails_with(&["qasper.jsonl.gz", "decompress"]);
    eval("longbench", "lb/scbench_kv.jsonl", row)
        .fails_with(&["scbench_kv.jsonl", "named as one of its tasks"]);
    eval("longbench/qasperr", "lb/qasper.jsonl", row).fails_with(&["`qasperr` is no task of longbench"]);
    let row = r#"{"id": 1, "context": "C", "multi_turns": [{"input": "Q?", "answer": "x"}]}"#;
    for (from, to, column) in [
        (r#""x""#, "null", "`answer`"),
        (r#""x""#, "[]", "`answer`"),
        (r#""C""#, "null", "`context`"),
        ("multi_turns", "turns", "`multi_turns`"),
    ] {
        let text = format!("{row}\n{}\n", row.replace(from, to));
        eval("scbench", "sc/scbench_kv.jsonl", &text).fails_with(&[
            "row 2 of `",
            "scbench_kv.jsonl`",
            column,
            "microsoft/SCBench",
        ]);
    }
}

#[test]
fn text_that_is_not_utf8() {
    let s = Sandbox::new();
    let mut bytes = crate::sandbox::documents().into_bytes();
    bytes[1000] = 0xff;
    fs::write(s.path("documents.txt"), bytes).unwrap();
    s.run(&["prepare"]).fails_with(&["documents.txt", "UTF-8", "1000"]);
}

#[test]
fn full_disk_loses_nothing_written_before() {
    let s = Sandbox::new();
    s.run(&["prepare"]).ok();
    // Enough for the first shard of labels, not for all.
    let mut command = s.command(&["label", "--recipe", "recipe.toml"]);
    let ran = crate::sandbox::Ran::new(command.env("PKV_FAIL_WRITES_AFTER_BYTES", "20000").output().unwrap());
    ran.fails_with(&["labels"]);
    let whole = shards(&s.path("runs/small/labels"));
    let kept: Vec<Vec<u8>> = whole.iter().map(|p| fs::read(p).unwrap()).collect();
    let ran = s.run(&["label"]).ok();
    assert!(!ran.stderr.contains("error"), "{}", ran.stderr);
    for (path, bytes) in whole.iter().zip(kept) {
        assert_eq!(fs::read(path).unwrap(), bytes, "{} was written again", path.display());
    }
}

#[test]
fn recipe_changed_between_stages() {
    let s = Sandbox::new();
    s.run(&["prepare"]).ok();
    s.run(&["label"]).ok();
    s.edit("recipe.toml", "[data]", "[label]\nchunk_tokens = 64\n[data]");
    s.run(&["label"]).fails_with(&["label.chunk_tokens", "64", "--redo label"]);
    s.run(&["label", "--redo", "label"]).ok();
    s.edit("recipe.toml", "seed = 3", "seed = 4");
    s.run(&["label"]).fails_with(&["seed", "--redo prepare"]);
}

#[test]
fn stages_out_of_order() {
    let s = Sandbox::new();
    // Where nothing was made, no run is left.
    s.run(&["label"]).fails_with(&["prepare"]);
    s.run(&["prepare", "--set", "data.train=100000"]).fails_with(&["too few documents"]);
    assert!(!s.path("runs/small").exists());
    s.run(&["prepare"]).ok();
    s.run(&["train"]).fails_with(&["label"]);
    assert!(s.path("runs/small/examples").exists());
}

#[test]
fn cuda_is_never_replaced_in_silence() {
    let s = Sandbox::new();
    let mut command = s.command(&["label", "--recipe", "recipe.toml"]);
    command.args(["--device", "cuda"]).env("PKV_CUDA", "0");
    // `--device cpu` comes first in the sandbox's command; clap takes the last.
    let ran = crate::sandbox::Ran::new(command.output().unwrap());
    ran.fails_as(FailureKind::Environment, &["CUDA was asked for"]);
}

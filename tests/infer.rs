//! `infer`: a context, questions, answers from a pruned cache.
//!
//! `PKV_RUN` names a finished run folder and `PKV_RECIPE` its recipe (with the same `--set`s there were):
//! its answers are then compared too, of `PKV_CONTEXTS` contexts (2 if absent).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, UInt32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::Split;
use pkv_shard::{Example, StageReader};
use serde_json::{Value, json};

use crate::sandbox::{Ran, Running, Sandbox, root};
use crate::trained::trained;

const QUESTIONS: [&str; 2] = ["What opens the harbour?", "What does the river need?"];

fn infer(s: &Sandbox, args: &[&str]) -> Ran {
    let mut all = vec!["infer", "--mapper", "runs/small/export"];
    all.extend(args);
    Ran::new(s.command(&all).output().unwrap())
}

fn on_context<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["--context", "context.txt", "--question", QUESTIONS[0], "--question", QUESTIONS[1]], args].concat()
}

fn events(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

fn of<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|e| e["event"] == kind).collect()
}

fn texts(events: &[Value]) -> Vec<String> {
    of(events, "answer").iter().map(|a| a["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_is_said_beside_answers_fits_80_columns() {
    let ran = infer(trained(), &on_context(&["--compare-full", "--max-new-tokens", "2"])).ok();
    // Log lines name files, and are as long as they are.
    let is_log = |line: &str| line.starts_with(" INFO ") || line.starts_with(" WARN ");
    let wide = |line: &&str| line.chars().count() > 80 && !is_log(line);
    assert!(ran.stderr.contains("\nroom for new tokens "), "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().find(wide), None);
}

#[test]
fn answers_are_streamed_and_the_rest_is_said() {
    let s = trained();
    let ran = infer(s, &on_context(&["--json", "--retain", "0.25", "--max-new-tokens", "9"])).ok();
    let all = events(&ran.stdout);
    assert_eq!(all[0]["event"], "pruned");
    let summary = all.last().unwrap();
    assert_eq!(summary["event"], "summary");
    assert_eq!((&summary["questions"], &summary["refused"]), (&json!(2), &json!(0)));
    assert!((summary["kept"]["ratio"].as_f64().unwrap() - 0.25).abs() < 0.01, "{summary}");
    let bytes = |name: &str| summary["kept"][name].as_u64().unwrap();
    // Keys and values of 32 dimensions in f32.
    assert_eq!(bytes("kept_bytes"), (bytes("pairs") + bytes("prefix_pairs")) * 256, "{summary}");
    assert_eq!(bytes("full_cache_bytes"), (bytes("of_pairs") + bytes("prefix_pairs")) * 256, "{summary}");
    assert!(bytes("room_bytes") > 0);
    assert_eq!(bytes("cache_bytes"), bytes("kept_bytes") + bytes("room_bytes"));
    assert!(summary["dual_critical_secs"].as_f64().unwrap() > 0.0);
    let phases: Vec<_> =
        summary["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["features", "scores", "prefill", "prune"]);
    for (q, answer) in of(&all, "answer").into_iter().enumerate() {
        assert_eq!(answer["question_text"], QUESTIONS[q]);
        assert!(answer["answer_tokens"].as_u64().unwrap() <= 9);
        let pieces: String = of(&all, "token")
            .iter()
            .filter(|t| t["question"] == q)
            .map(|t| t["text"].as_str().unwrap())
            .collect();
        assert_eq!(answer["text"], pieces.as_str());
    }

    // As text: the same answers on stdout, what was kept and how long it took on stderr.
    let plain = infer(s, &on_context(&["--retain", "0.25", "--max-new-tokens", "9"])).ok();
    let expected: String =
        QUESTIONS.iter().zip(texts(&all)).map(|(q, a)| format!("> {q}\n{a}\n\n")).collect();
    assert_eq!(plain.stdout, expected);
    for part in ["KV pairs (25.0%)", "prefill", "features", "tokens/s"] {
        assert!(plain.stderr.contains(part), "`{part}` is missing\n{}", plain.stderr);
    }
    assert!(!plain.stderr.contains("with a GPU"), "a CPU's phases are no forecast\n{}", plain.stderr);

    // The same from other ways in: stdin for the context, JSON lines for the questions.
    s.write(
        "questions.jsonl",
        &format!("{}\n\n{}\n", json!({"question": QUESTIONS[0]}), json!(QUESTIONS[1])),
    );
    let mut command = s.command(&[
        "infer",
        "--mapper",
        "runs/small/export",
        "--context",
        "-",
        "--questions",
        "questions.jsonl",
        "--retain",
        "0.25",
        "--max-new-tokens",
        "9",
    ]);
    let context = File::open(s.path("context.txt")).unwrap();
    assert_eq!(Ran::new(command.stdin(context).output().unwrap()).ok().stdout, expected);
    // A pipe of the shell's, as `--context <(cat context.txt)`.
    let pipe = s.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut piped = on_context(&["--retain", "0.25", "--max-new-tokens", "9"]);
    let at = piped.iter().position(|arg| *arg == "context.txt").unwrap();
    piped[at] = "pipe";
    let (from, to) = (s.path("context.txt"), pipe.clone());
    let writer = std::thread::spawn(move || std::fs::write(to, std::fs::read(from).unwrap()).unwrap());
    assert_eq!(infer(s, &piped).ok().stdout, expected);
    writer.join().unwrap();
    std::fs::remove_file(pipe).unwrap();
}

#[test]
fn regimes_and_overlap_answer_alike_and_leave_a_trace() {
    let s = trained();
    let run = |args: &[&str]| {
        let ran =
            infer(s, &on_context(&[&["--json", "--max-new-tokens", "8", "--retain", "0.3"], args].concat()))
                .ok();
        let all = events(&ran.stdout);
        (texts(&all), all.last().unwrap().clone())
    };
    let (expected, summary) = run(&[]);
    assert_eq!(summary["regime"], "sequential");
    for args in [
        &["--regime", "streams"][..],
        &["--regime", "streams", "--overlap", "--window-tokens", "32"],
        &["--regime", "dual", "--trace", "trace.json"],
    ] {
        let (answers, summary) = run(args);
        assert_eq!(answers, expected, "{args:?}");
        assert_eq!(summary["regime"], args[1]);
        assert!(summary["dual_critical_secs"].is_null(), "parallel phases are no forecast");
    }
    let dual = infer(s, &on_context(&["--regime", "dual", "--max-new-tokens", "1"])).ok();
    assert!(dual.stderr.contains("is made for two GPUs"), "{}", dual.stderr);
    let trace: Value = serde_json::from_str(&fs::read_to_string(s.path("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().any(|e| e["ph"] == "X" && e["name"] == "prefill"));
    // All is all, whatever room there is beside it.
    let all = infer(s, &on_context(&["--json", "--retain", "100%", "--max-new-tokens", "3"])).ok();
    let summary: Value = serde_json::from_str(all.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(summary["kept"]["kept_bytes"], summary["kept"]["full_cache_bytes"]);
    // A budget of tokens, and one beyond the context, which then stays whole.
    let (_, summary) = run_budget(s, "10", "pair-uniform");
    assert_eq!(summary["kept"]["most_in_head"], 10);
    assert_eq!(summary["kept"]["fewest_in_head"], 10);
    // As many pairs in all, spread by the export's budgets.
    let uniform = summary["kept"]["pairs"].clone();
    let (_, summary) = run_budget(s, "10", "pair-budget");
    assert_eq!(summary["kept"]["pairs"], uniform);
    assert_ne!(summary["kept"]["most_in_head"], summary["kept"]["fewest_in_head"]);
    let (_, summary) = run_budget(s, "100000", "token");
    assert_eq!(summary["kept"]["pairs"], summary["kept"]["of_pairs"]);
}

fn run_budget(s: &Sandbox, budget: &str, policy: &str) -> (Vec<String>, Value) {
    let ran =
        infer(s, &on_context(&["--json", "--budget", budget, "--policy", policy, "--max-new-tokens", "3"]))
            .ok();
    let all = events(&ran.stdout);
    (texts(&all), all.last().unwrap().clone())
}

/// Answers of `eval` by context, question and cell, those of the mapper.
fn evaluated(path: &Path) -> BTreeMap<(usize, usize, String, String), (String, String)> {
    let file = File::open(path).unwrap();
    let mut all = BTreeMap::new();
    for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
        let batch = batch.unwrap();
        let column = |name: &str| batch.column_by_name(name).unwrap().clone();
        let text = |name: &str| column(name).as_string::<i32>().clone();
        let number = |name: &str| column(name).as_primitive::<UInt32Type>().clone();
        let ratio = column("ratio").as_primitive::<Float64Type>().clone();
        for row in 0..batch.num_rows() {
            if text("method").value(row) == "mapper" {
                let key = (
                    number("context").value(row) as usize,
                    number("question").value(row) as usize,
                    text("policy").value(row).to_owned(),
                    ratio.value(row).to_string(),
                );
                all.insert(
                    key,
                    (text("question_text").value(row).to_owned(), text("answer").value(row).to_owned()),
                );
            }
        }
    }
    all
}

/// Every answer of a finished run's evaluation, asked again through `infer` with the run's export.
fn compare_with_eval(recipe: &Path, run: &Path, most_contexts: usize, command: impl Fn(&[&str]) -> Command) {
    let recipe = pkv_recipe::load(recipe, &[]).unwrap();
    let beside = recipe.path.parent().unwrap().join(&recipe.data.manifest);
    let above = recipe.path.parent().unwrap().join("..").join(&recipe.data.manifest);
    let manifest = [beside, above].into_iter().find(|p| p.exists()).unwrap();
    let words = pkv_data::word_lists(&pkv_recipe::load_manifest(&manifest).unwrap()).unwrap();
    let folder = recipe.path.parent().unwrap().join("..").join(&recipe.target.model);
    let folder = if folder.exists() { folder } else { PathBuf::from(&recipe.target.model) };
    let tokenizer = pkv_text::TextTokenizer::open(&folder).unwrap();
    let examples = StageReader::<Example>::open(&run.join("examples")).unwrap();
    let test: Vec<Example> = examples.iter().map(Result::unwrap).filter(|e| e.split == Split::Test).collect();
    let contexts =
        pkv_data::fact_contexts(&test, &words, &recipe.eval, recipe.facts.place, &tokenizer, recipe.seed)
            .unwrap();
    let expected = evaluated(&run.join("eval/answers.parquet"));
    assert!(!expected.is_empty());
    let scratch = tempfile::tempdir().unwrap();
    let (ids, questions) = (scratch.path().join("ids.json"), scratch.path().join("questions.jsonl"));
    let mut compared = 0;
    for (c, context) in contexts.iter().enumerate().take(most_contexts) {
        fs::write(&ids, serde_json::to_string(&context.tokens).unwrap()).unwrap();
        let lines: String =
            context.questions.iter().map(|q| format!("{}\n", json!(q.question_text))).collect();
        fs::write(&questions, lines).unwrap();
        let cells: std::collections::BTreeSet<_> =
            expected.keys().filter(|k| k.0 == c).map(|k| (k.2.clone(), k.3.clone())).collect();
        for (policy, ratio) in cells {
            let ran = Ran::new(
                command(&[
                    "infer",
                    "--json",
                    "--mapper",
                    run.join("export").to_str().unwrap(),
                    "--context-ids",
                    ids.to_str().unwrap(),
                    "--questions",
                    questions.to_str().unwrap(),
                    "--retain",
                    &ratio,
                    "--policy",
                    &policy,
                    "--max-new-tokens",
                    &recipe.eval.max_answer_tokens.to_string(),
                ])
                .output()
                .unwrap(),
            )
            .ok();
            let got = texts(&events(&ran.stdout));
            for (q, asked) in context.questions.iter().enumerate() {
                let (question, answer) = &expected[&(c, q, policy.clone(), ratio.clone())];
                assert_eq!(*question, asked.question_text);
                assert_eq!(got[q], *answer, "context {c}, question {q}, {policy} {ratio}");
                compared += 1;
            }
        }
    }
    println!("{compared} answers are those of the evaluation");
    assert!(compared > 0);
}

#[test]
fn answers_are_those_of_the_evaluation() {
    let s = trained();
    compare_with_eval(&s.path("recipe.toml"), &s.path("runs/small"), 2, |args| s.command(args));
    if let (Some(run), Some(recipe)) = (std::env::var_os("PKV_RUN"), std::env::var_os("PKV_RECIPE")) {
        let most = std::env::var("PKV_CONTEXTS").map_or(2, |n| n.parse().unwrap());
        let here = root();
        compare_with_eval(&here.join(recipe), &here.join(run), most, |args| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_proxykv-train"));
            command.current_dir(&here).args(args);
            command
        });
    }
}

#[test]
fn what_cannot_be_used_is_refused_before_any_work() {
    let s = trained();
    let fails = |args: &[&str], parts: &[&str]| {
        let ran = infer(s, args).fails_with(parts);
        assert!(!ran.stderr.contains("loading the"), "a model was loaded first:\n{}", ran.stderr);
    };
    let nano = |role: &str| root().join("recipes/nano-llama").join(role).display().to_string();
    fails(&on_context(&["--retain", "20"]), &["`--retain 20`", "`0.2`"]);
    fails(&on_context(&["--budget", "0"]), &["`--budget` is 0"]);
    fails(&["--context", "absent.txt"], &["reading the context `absent.txt`"]);
    fails(&["--context", "empty.txt"], &["the context is empty"]);
    fails(
        &["--context", "context.txt", "--questions", "absent.jsonl"],
        &["opening the questions `absent.jsonl`"],
    );
    fails(&["--context", "-", "--questions", "-"], &["from stdin"]);
    fails(&["--context", "context.txt"], &["there is no question", "--questions"]);
    fails(&["--context", "context.txt", "--question", " "], &["`--question` is empty"]);
    fails(&["--context", "context.txt", "--questions", "."], &["opening the questions `.`"]);
    fails(&on_context(&["--target", "nowhere/at-all"]), &["cannot open the target `nowhere/at-all`"]);
    // A proxy as target: the shape tells.
    fails(&on_context(&["--target", &nano("proxy")]), &["the shape of the target", "made for", "found"]);
    fails(&on_context(&["--proxy", &nano("target")]), &["the shape of the proxy"]);
    s.write("ids.json", "[1, \"two\"]");
    fails(&["--context-ids", "ids.json"], &["reading token ids from `ids.json`"]);

    // An export of another version, and one with a flipped byte.
    let copy = |name: &str| {
        fs::create_dir_all(s.path(name)).unwrap();
        for file in fs::read_dir(s.path("runs/small/export")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), s.path(name).join(file.file_name())).unwrap();
        }
    };
    copy("newer");
    s.edit("newer/config.json", "\"schema_version\": 3", "\"schema_version\": 9");
    copy("damaged");
    let weights = s.path("damaged/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    for (folder, part) in
        [("newer", "export version"), ("damaged", "damaged"), ("runs/smol", "there is `runs/small`; ")]
    {
        let args = [&["infer", "--mapper", folder][..], &on_context(&[])].concat();
        Ran::new(s.command(&args).output().unwrap()).fails_with(&[part]);
    }
    // An export from before there were head budgets serves the other policies.
    copy("older");
    fs::remove_file(s.path("older/budgets.json")).unwrap();
    let older = |policy| {
        let asked = on_context(&["--policy", policy, "--max-new-tokens", "1"]);
        Ran::new(s.command(&[&["infer", "--mapper", "older"][..], &asked].concat()).output().unwrap())
    };
    older("pair-uniform").ok();
    let refused =
        older("pair-budget").fails_with(&["has no head budgets", "`pair-budget`", "proxykv-train export"]);
    assert_eq!(refused.stdout, "");
    // Unknown policies, regimes and devices are refused by the command line.
    for args in [["--policy", "pairs"], ["--regime", "both"]] {
        assert_eq!(infer(s, &on_context(&args)).code, 2);
    }
}

#[test]
fn a_broken_proxy_costs_the_pruning_only() {
    let s = trained();
    let from = root().join("recipes/nano-llama/proxy");
    fs::create_dir_all(s.path("broken")).unwrap();
    for file in fs::read_dir(&from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), s.path("broken").join(file.file_name())).unwrap();
    }
    let weights = s.path("broken/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    // Not a number, read as bf16 or as f32.
    bytes[end - 4..].copy_from_slice(&[0xc0, 0x7f, 0xc0, 0x7f]);
    fs::write(&weights, bytes).unwrap();
    let full = infer(s, &on_context(&["--json", "--retain", "1", "--max-new-tokens", "8"])).ok();
    let expected = texts(&events(&full.stdout));
    for regime in ["sequential", "streams", "dual"] {
        let args = on_context(&["--json", "--proxy", "broken", "--regime", regime, "--max-new-tokens", "8"]);
        let ran = infer(s, &args);
        assert_eq!(ran.code, 3, "{}", ran.stderr);
        let all = events(&ran.stdout);
        assert_eq!(texts(&all), expected, "the full cache answers");
        let summary = all.last().unwrap();
        assert!(summary["fallback"].as_str().unwrap().contains("no finite numbers"), "{summary}");
        assert_eq!(summary["kept"]["pairs"], summary["kept"]["of_pairs"]);
        assert!(ran.stderr.contains("is revision local:"), "other weights are said\n{}", ran.stderr);
    }
    let ran = infer(s, &on_context(&["--proxy", "broken", "--max-new-tokens", "8"]));
    assert_eq!(ran.code, 3);
    assert!(ran.stderr.contains("nothing was pruned, answers come from the full cache"), "{}", ran.stderr);
}

#[test]
fn a_question_too_long_leaves_the_others_alone() {
    let s = trained();
    let long = "harbour ".repeat(5000);
    s.write("long.jsonl", &format!("{}\n{}\n{}\n", json!(QUESTIONS[0]), json!(long), json!(QUESTIONS[1])));
    let args = ["--context", "context.txt", "--questions", "long.jsonl", "--json", "--max-new-tokens", "5"];
    let ran = infer(s, &args);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let all = events(&ran.stdout);
    assert_eq!(texts(&all).len(), 2);
    let refused = of(&all, "refused");
    assert_eq!(refused[0]["question"], 1);
    assert!(refused[0]["error"].as_str().unwrap().contains("of 4096"), "{}", refused[0]["error"]);
    assert_eq!(all.last().unwrap()["refused"], 1);
    // A line that is no question, alone.
    s.write("bad.jsonl", "{\"q\": 1}\n");
    infer(s, &["--context", "context.txt", "--questions", "bad.jsonl"])
        .fails_with(&["reading line 1 of the questions `bad.jsonl`"]);
    // A context beyond the position range.
    s.write("long.txt", &long);
    infer(s, &["--context", "long.txt"]).fails_with(&["the target was made for 4096"]);
}

/// Bad JSON, wrong types, what is no text and nothing at all: each has its error, and the next line its
/// answer.
#[test]
fn a_line_that_is_no_question_leaves_the_others_alone() {
    let s = trained();
    let bad: [&[u8]; 7] =
        [b"{\"question\": ", b"", b"17", b"{\"q\": \"Who?\"}", b"{\"question\": 5}", b"\"caf\xe9\"", b"[]"];
    let mut lines = b"\xef\xbb\xbf".to_vec();
    for line in bad {
        lines.extend_from_slice(line);
        lines.extend_from_slice(b"\r\n");
    }
    lines.extend_from_slice(json!({"question": QUESTIONS[0]}).to_string().as_bytes());
    fs::write(s.path("mixed.jsonl"), lines).unwrap();
    let run = |args: &[&str]| {
        let args = [
            &["infer", "--mapper", "runs/small/export", "--context", "context.txt", "--max-new-tokens", "5"]
                [..],
            &["--questions", "-"],
            args,
        ]
        .concat();
        let mut command = s.command(&args);
        Ran::new(command.stdin(File::open(s.path("mixed.jsonl")).unwrap()).output().unwrap())
    };
    let ran = run(&["--json"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let all = events(&ran.stdout);
    let errors = of(&all, "error");
    let numbers: Vec<_> = errors.iter().map(|e| e["line"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7]);
    for error in errors {
        let text = error["error"].as_str().unwrap();
        assert!(text.contains(&format!("line {}", error["line"])), "{text}");
        assert!(error["hint"].as_str().unwrap().contains("one question per line"), "{error}");
    }
    let answer = of(&all, "answer")[0];
    assert_eq!((&answer["question"], &answer["question_text"]), (&json!(0), &json!(QUESTIONS[0])));
    let summary = all.last().unwrap();
    assert_eq!((&summary["questions"], &summary["refused"]), (&json!(1), &json!(7)));

    // As text: errors on stderr, answers on stdout.
    let plain = run(&[]);
    assert_eq!(plain.code, 1);
    assert_eq!(plain.stderr.matches("error: reading line").count(), 7, "{}", plain.stderr);
    assert!(plain.stdout.starts_with(&format!("> {}\n", QUESTIONS[0])), "{}", plain.stdout);
}

#[test]
fn a_byte_order_mark_is_no_text_and_a_run_folder_names_its_export() {
    let s = trained();
    let text = fs::read_to_string(s.path("context.txt")).unwrap();
    s.write("marked.txt", &format!("\u{feff}{text}"));
    let run = |args: &[&str]| {
        let args = [args, &["--question", QUESTIONS[0], "--json", "--max-new-tokens", "3"]].concat();
        let ran = Ran::new(s.command(&[&["infer"], &args[..]].concat()).output().unwrap()).ok();
        let tokens = events(&ran.stdout)[0]["context_tokens"].clone();
        (tokens, texts(&events(&ran.stdout)), ran.stderr)
    };
    let plain = run(&["--mapper", "runs/small/export", "--context", "context.txt"]);
    assert_eq!(plain.0, run(&["--mapper", "runs/small", "--context", "marked.txt"]).0);
    assert_eq!(plain.1, run(&["--mapper", "runs/small", "--context", "context.txt"]).1);
    // The recipe's longest window has 128 tokens; what is longer is said once.
    let said = |stderr: &str| stderr.matches("trained on contexts of at most 128").count();
    assert!(plain.0.as_u64().unwrap() > 128, "{}", plain.0);
    assert_eq!(said(&plain.2), 1, "{}", plain.2);
    s.write("short.txt", "The tower stores what the harbour needs.");
    assert_eq!(said(&run(&["--mapper", "runs/small", "--context", "short.txt"]).2), 0);
}

#[test]
fn the_full_cache_answers_beside_the_pruned_one() {
    let s = trained();
    let args = ["--compare-full", "--retain", "0.25", "--max-new-tokens", "9"];
    let all = events(&infer(s, &on_context(&[&args[..], &["--json"]].concat())).ok().stdout);
    let (pruned, full) = (of(&all, "answer"), of(&all, "full_answer"));
    let alone =
        events(&infer(s, &on_context(&["--retain", "0.25", "--max-new-tokens", "9", "--json"])).ok().stdout);
    assert_eq!(texts(&all), texts(&alone), "the comparison changes nothing");
    let whole =
        events(&infer(s, &on_context(&["--retain", "1", "--max-new-tokens", "9", "--json"])).ok().stdout);
    let same = |a: &Value, b: &Value| a["text"] == b["text"];
    for i in 0..2 {
        assert_eq!(full[i]["text"], texts(&whole)[i], "the full cache's answer");
        assert_eq!(full[i]["question"], i);
        assert!(full[i]["same"] != json!(true) || same(pruned[i], full[i]));
    }
    let summary = &all.last().unwrap()["full"];
    assert_eq!(summary["questions"], 2);
    assert_eq!(
        summary["same"].as_u64().unwrap() as usize,
        full.iter().filter(|f| f["same"] == json!(true)).count()
    );
    let bytes = |v: &Value| v["cache_bytes"].as_u64().unwrap();
    assert!(bytes(summary) > bytes(&all.last().unwrap()["kept"]), "{summary}");
    let text = infer(s, &on_context(&args)).ok();
    assert_eq!(
        (text.stdout.matches("\npruned: ").count(), text.stdout.matches("\nfull:   ").count()),
        (2, 2),
        "{}",
        text.stdout
    );
    assert!(
        text.stdout.contains(" tokens\n\n") && text.stderr.contains("of 2 answers are the same"),
        "{}",
        text.stderr
    );
    assert!(alone.last().unwrap().get("full").is_none());
}

#[test]
fn the_newest_tokens_stay_where_that_is_asked() {
    let s = trained();
    let kept = |args: &[&str]| {
        let ran = infer(s, &on_context(&[&["--json", "--retain", "0.25"], args].concat())).ok();
        // Where the budget is theirs alone.
        let is_warned = ran.stderr.contains("the mapper's scores choose nothing");
        assert_eq!(is_warned, args.contains(&"100000"), "{}", ran.stderr);
        let all = events(&ran.stdout);
        let summary = all.last().unwrap().clone();
        (summary["kept"].clone(), summary["keep"].as_str().unwrap().to_owned(), texts(&all))
    };
    let plain = kept(&[]);
    assert_eq!(plain, kept(&["--keep-recent", "0"]));
    let recent = kept(&["--keep-recent", "30"]);
    assert_eq!(plain.0["pairs"], recent.0["pairs"], "they count as kept");
    assert!(recent.0["fewest_in_head"].as_u64().unwrap() >= 30, "{}", recent.0);
    assert!(recent.1.ends_with("the newest 30 tokens first"), "{}", recent.1);
    // As many as there is budget for: the same in every head.
    let budget = kept(&["--keep-recent", "100000"]);
    assert!(
        budget.0["most_in_head"].as_u64().unwrap() - budget.0["fewest_in_head"].as_u64().unwrap() <= 1,
        "{}",
        budget.0
    );
}

#[test]
fn a_mapper_may_be_a_repository_of_the_hub() {
    let (s, server) = (trained(), pkv_test_support::hub::pull::Server::start());
    for file in fs::read_dir(s.path("runs/small/export")).unwrap().flatten() {
        let name = file.file_name().into_string().unwrap();
        server.put("models/somebody/small-mapper", &name, &fs::read(file.path()).unwrap());
    }
    let run = |mapper: &str, offline: bool| {
        let args = [
            "infer",
            "--mapper",
            mapper,
            "--context",
            "context.txt",
            "--question",
            QUESTIONS[0],
            "--policy",
            "pair-budget",
        ];
        let mut command = s.command(&args);
        command
            .env("HF_ENDPOINT", &server.endpoint)
            .env("HF_HOME", s.path("hf"))
            .env("HF_HUB_DOWNLOAD_TIMEOUT", "60");
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        Ran::new(command.output().unwrap())
    };
    let local = run("runs/small", false).ok().stdout;
    assert_eq!(run("somebody/small-mapper", false).ok().stdout, local, "with its head budgets");
    assert_eq!(run("somebody/small-mapper", true).ok().stdout, local, "from the cache");
    run("somebody/no-such", false).fails_with(&["cannot find the mapper `somebody/no-such`"]);
    run("runs/no-such", false)
        .fails_with(&["`runs/no-such`: there is no such folder", "there is `runs/small`"]);
    run("./no-such", false).fails_with(&["./no-such"]);
}

/// Interrupted while it waits for a context that does not come.
#[test]
fn an_interruption_before_the_context_ends_it() {
    let s = trained();
    let mut child = s
        .command(&["infer", "--mapper", "runs/small/export", "--context", "-", "--question", QUESTIONS[0]])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    // The handler is there once the command reads: its threads tell, however busy the machine is.
    let status = format!("/proc/{}/status", child.id());
    let catches = || {
        let text = fs::read_to_string(&status).unwrap();
        let mask = text.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << (libc::SIGINT - 1)) != 0
    };
    let mut infer = Running(child);
    assert!(infer.wait_until(catches), "it ended by itself");
    infer.signal(libc::SIGINT);
    let ran = infer.end();
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    drop(stdin);
}

/// Interrupted while it waits for the next question: a clean end, with the summary.
#[test]
fn an_interruption_ends_cleanly() {
    let s = trained();
    let mut child = s
        .command(&[
            "infer",
            "--mapper",
            "runs/small/export",
            "--context",
            "context.txt",
            "--questions",
            "-",
            "--json",
            "--max-new-tokens",
            "5",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{}", json!(QUESTIONS[0])).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut seen = Vec::new();
    for line in lines.by_ref() {
        seen.push(serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        if seen.last().unwrap()["event"] == "answer" {
            break;
        }
    }
    let mut infer = Running(child);
    infer.signal(libc::SIGINT);
    seen.extend(lines.map(|l| serde_json::from_str::<Value>(&l.unwrap()).unwrap()));
    assert_eq!(infer.0.wait().unwrap().code(), Some(130));
    let summary = seen.last().unwrap();
    assert_eq!((&summary["event"], &summary["interrupted"]), (&json!("summary"), &json!(true)));
    drop(stdin);
}

/// A question at a terminal is plain text, prompted for and not repeated.
#[test]
fn questions_are_typed_as_they_are() {
    let s = trained();
    let line = format!(
        "'{}' --threads 1 infer --mapper runs/small --context context.txt --max-new-tokens 3 --questions -",
        env!("CARGO_BIN_EXE_proxykv-train")
    );
    let ask = |typed: &str| {
        let mut script = Command::new("script");
        script.args(["-qec", &line, "/dev/null"]).current_dir(s.path("")).env_remove("RUST_LOG");
        let mut child =
            script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("`script` is of util-linux");
        child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    };
    // The terminal's end of input.
    let shown = ask(&format!("{}\n\n{{\n\u{4}", QUESTIONS[0]));
    assert!(shown.contains("Type a question; Ctrl-D ends.") && shown.contains("\n> "), "{shown}");
    assert!(shown.contains("reading line 3 of the questions `-`") && shown.contains("KV pairs ("), "{shown}");
    assert!(!shown.contains(&format!("> {}", QUESTIONS[0])), "{shown}");
}

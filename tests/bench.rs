//! Benchmarks of tiny models: that they run and add up; what they measure here means nothing.

use pkv_core::FailureKind;
use serde_json::Value;

use crate::sandbox::Sandbox;

/// A sandbox whose recipe names models that do not exist.
fn without_models() -> Sandbox {
    let s = Sandbox::new();
    s.edit("recipe.toml", "/target\"", "/no-such-target\"");
    s.edit("recipe.toml", "/proxy\"", "/no-such-proxy\"");
    s
}

/// The rows of a benchmark as (what, context), after each was checked.
fn rows(json: &str) -> Vec<(String, u64)> {
    let report: Value = serde_json::from_str(json).unwrap();
    let ceiling = report["roofline"]["flops_per_s"].as_f64().unwrap();
    let row = |row: &Value| {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no `{key}` in {row}"));
        assert_eq!(number("repeats"), 2.0);
        assert!(0.0 < number("min_s") && number("min_s") <= number("median_s"), "{row}");
        let share = number("flops") / number("median_s") / ceiling;
        assert!((number("roofline_share") / share - 1.0).abs() < 1e-9, "{row}");
        assert_eq!(row["what"] != "prefill", row["over_prefill"].is_number(), "{row}");
        (row["what"].as_str().unwrap().to_owned(), row["context"].as_u64().unwrap())
    };
    report["rows"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn random_weights_need_no_files_and_leave_none() {
    let s = without_models();
    let bench = |what: &str| {
        let args = ["bench", what, "--random-weights", "--context", "40,97", "--repeats", "2", "--json"];
        rows(&s.run(&args).ok().stdout)
    };
    let each = |names: &[&str]| -> Vec<(String, u64)> {
        [40, 97].iter().flat_map(|&t| names.iter().map(move |&n| (n.to_owned(), t))).collect()
    };
    assert_eq!(bench("label"), each(&["prefill", "label"]));
    assert_eq!(
        bench("extract"),
        each(&["prefill", "windowed", "all prefill", "recipe", "reconstruction", "recon + mean"])
    );
    assert!(!s.path("runs").exists(), "a benchmark makes no run folder");
}

#[test]
fn steps_are_timed_through_the_loader_and_without_it() {
    let s = without_models();
    let line = |ms: f64, positions: u32| {
        format!(
            r#"{{"batch": 4, "proxy_heads": 3, "channels": 8, "target_heads": 12, "positions": {positions},
                "dtype": "f32", "compiled": true, "step_ms": {ms}}}"#
        )
        .replace('\n', " ")
    };
    s.write("peer.jsonl", &[line(9e6, 64), line(8e6, 64), line(1e-6, 65)].join("\n"));
    let args = ["bench", "train", "--context", "64", "--repeats", "1", "--peer", "peer.jsonl"];
    let table = s.run(&args).ok().stdout;
    assert!(table.contains("batch there") && table.contains("8000000.00 ms"), "{table}");
    let json = s.run(&[&args[..], &["--json"]].concat()).ok().stdout;
    let row = serde_json::from_str::<Value>(&json).unwrap()["rows"][0].clone();
    assert_eq!((&row["batch"], &row["target_heads"]), (&4.into(), &12.into()), "{row}");
    assert!(row["step_ms"].as_f64().unwrap() > 0.0 && row["ratio"].as_f64().unwrap() > 0.0, "{row}");
    s.write("peer.jsonl", "{}");
    s.run(&args).fails_with(&["cannot use the peer's figures", "mapper_compile.py"]);
}

#[test]
fn loaded_weights_must_be_there() {
    let args = ["bench", "label", "--context", "40", "--repeats", "1"];
    without_models().run(&args).fails_with(&["cannot open the target", "no-such-target"]);
    Sandbox::new().run(&args).ok();
}

#[test]
fn the_peer_stands_beside_ours_and_must_be_of_the_same_shape() {
    let s = without_models();
    let peer = |layers: u32| {
        format!(
            r#"{{"tool": "kvpress", "versions": {{"kvpress": "0.5.5"}}, "dtype": "float32",
                "shape": {{"layers": {layers}, "kv_heads": 2, "query_heads": 4, "head_dim": 32, "hidden": 128,
                           "intermediate": 352, "vocab": 4096}},
                "rows": [{{"what": "label", "attention": "sdpa", "context": 40, "median_s": 1000.0}}]}}"#
        )
    };
    let args =
        ["bench", "label", "--random-weights", "--context", "40", "--repeats", "1", "--peer", "peer.json"];
    s.write("peer.json", &peer(6));
    let table = s.run(&args).ok().stdout;
    assert!(table.contains("peer: kvpress 0.5.5") && table.contains("1000 s"), "{table}");
    s.write("peer.json", &peer(7));
    s.run(&args).fails_with(&["cannot use the peer's figures", "7 layers", "time_kvpress.py"]);
}

/// Every regime with every feature set, the bare prefill and KVzip, all set beside each other; and a trace.
#[test]
fn prefill_is_measured_in_every_regime() {
    let s = without_models();
    let args = ["bench", "prefill", "--random-weights", "--context", "97,40", "--repeats", "2"];
    let ran = s.run(&[&args[..], &["--json", "--trace", "trace.json"]].concat()).ok();
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let regimes = ["sequential", "streams", "streams, overlap", "dual, computed"];
    for context in [40, 97] {
        let of = |what: &str, features: Value| {
            let found = rows
                .iter()
                .find(|r| r["what"] == what && r["features"] == features && r["context"] == context);
            found.unwrap_or_else(|| panic!("no {what} with {features} at {context}")).clone()
        };
        let bare = of("prefill", Value::Null)["median_s"].as_f64().unwrap();
        let kvzip = of("KVzip", Value::Null);
        let ratio = kvzip["median_s"].as_f64().unwrap() / bare;
        assert!((kvzip["over_prefill"].as_f64().unwrap() - ratio).abs() < 1e-9);
        for features in ["recipe", "window", "reconstruction"] {
            for regime in regimes {
                let row = of(regime, features.into());
                assert!(
                    row["median_s"].as_f64().unwrap() > 0.0 && row["kvzip_over_this"].is_number(),
                    "{row}"
                );
            }
            let sequential = of("sequential", features.into());
            let share = sequential["mapper_share"].as_f64().unwrap();
            assert!(share > 0.0 && share < 1.0, "{sequential}");
            assert_eq!(sequential["phases"].as_array().unwrap().len(), 4);
        }
    }
    assert_eq!(rows.len(), 2 * (2 + 3 * regimes.len()));
    // No two lines of the log are called the same.
    let lines = ran.stderr.lines().filter_map(|line| line.split_once(" at 97: "));
    let mut named: Vec<&str> = lines.map(|(what, _)| what).collect();
    let all = named.len();
    named.sort_unstable();
    named.dedup();
    assert_eq!((named.len(), all), (11, 11), "{}", ran.stderr);
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(s.path("trace.json")).unwrap()).unwrap();
    let processes = trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["name"] == "process_name");
    assert_eq!(processes.count(), 2 * 3 * 3);
    assert!(s.run(&args).ok().stdout.contains("dual, computed"));
}

#[test]
fn decoding_is_measured_by_what_is_kept_and_by_batch() {
    let s = without_models();
    let args =
        ["bench", "decode", "--random-weights", "--context", "700", "--repeats", "2", "--batch", "1,2"];
    let report: Value = serde_json::from_str(&s.run(&[&args[..], &["--json"]].concat()).ok().stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 10 + 9);
    let count = |policy: &str| rows.iter().filter(|r| r["policy"] == policy && r["what"] == "kept").count();
    assert_eq!((count("pair"), count("pair-uniform")), (2 * 5, 2 * 4));
    for row in rows.iter().filter(|r| r["what"] == "kept") {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no `{key}` in {row}"));
        // 6 layers of 2 KV heads of 32 in f32, keys and values, and room for a block of 256 tokens.
        let pairs = number("batch") * 12.0 * ((700.0 * number("retain")) + 256.0);
        assert!((number("cache_bytes") / (pairs * 256.0) - 1.0).abs() < 0.01, "{row}");
        let held = number("batch") * 12.0 * 700.0 * number("retain") * 256.0;
        assert!((number("kept_bytes") / held - 1.0).abs() < 0.001, "{row}");
        assert_eq!(number("cache_bytes"), number("kept_bytes") + number("room_bytes"));
        assert!((number("cache_share") / number("retain") - 1.0).abs() < 0.001, "{row}");
        // Timed apart, so that the part may seem longer than the whole on a busy machine.
        assert!(number("attention_s") > 0.0 && number("step_s") > 0.0, "{row}");
        let tokens = number("batch") / number("step_s");
        assert!((number("tokens_per_s") / tokens - 1.0).abs() < 1e-9);
        assert_eq!(number("retain") == 1.0, number("cache_share") == 1.0);
    }
}

#[test]
fn each_benchmark_takes_the_flags_that_it_uses_and_no_others() {
    let s = without_models();
    for (args, flag) in [
        (["decode", "--batch", "0"], "--batch"),
        (["label", "--context", "0"], "--context"),
        (["extract", "--repeats", "0"], "--repeats"),
        (["train", "--batch", "8"], "--batch"),
        (["train", "--max-seconds", "1"], "--max-seconds"),
        (["label", "--features", "window"], "--features"),
        (["decode", "--peer", "peer.json"], "--peer"),
        (["prefill", "--data", "x.txt"], "--data"),
    ] {
        let ran = s.run(&[&["bench"][..], &args].concat());
        assert_eq!(ran.code, i32::from(FailureKind::Usage.exit_code()), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(flag), "{args:?}: {}", ran.stderr);
    }
}

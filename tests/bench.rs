//! Benchmarks of tiny models: that they run and add up; what they measure here means nothing.

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
    assert_eq!(bench("extract"), each(&["prefill", "windowed", "all prefill", "recipe", "reconstruction"]));
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

//! Features of the target, alone and beside the proxy's.

use std::fs;

use serde_json::Value;

use crate::sandbox::{Ran, Sandbox};

const TARGET: [&str; 4] = [
    "--set",
    "extract.from=[\"target\"]",
    "--set",
    "extract.target_channels=[\"key_norm\", \"mean_window\", \"max_window\", \"hidden_linear\", \"replay_unrun\", \
     \"replay_unrun_mean\", \"key_diff\", \"mean_last_layer\"]",
];

fn infer(s: &Sandbox) -> serde_json::Value {
    s.write(
        "context.txt",
        "The keeper opens the gate of the harbour and counts the ships. ".repeat(12).as_str(),
    );
    let args =
        ["--json", "infer", "--mapper", "runs/small/export", "--context", "context.txt", "--retain", "0.3"];
    let ask = ["--question", "Who opens the gate?", "--max-new-tokens", "4"];
    let ran = Ran::new(s.command(&[&args[..], &ask].concat()).output().unwrap()).ok();
    let mut events = ran.stdout.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    events.next_back().expect("a summary")
}

#[test]
fn a_target_needs_no_proxy() {
    let s = Sandbox::new();
    // Its recipe names one that is not there, which no stage looks for.
    s.edit("recipe.toml", "/proxy\"", "/no-such-proxy\"");
    s.run(&["prepare"]).fails_with(&["cannot open the proxy", "no-such-proxy"]);
    let own = |args: &[&str]| s.run(&[args, &TARGET].concat());
    let doctor = own(&["doctor"]).stdout;
    assert!(doctor.contains("nano-llama/target") && !doctor.contains("proxy`"), "{doctor}");
    assert!(!own(&["plan"]).ok().stdout.contains("  proxy "));
    let fetched: Value = serde_json::from_str(&own(&["fetch", "--json"]).ok().stdout).unwrap();
    assert!(fetched["target"].is_object() && fetched.get("proxy").is_none(), "{fetched}");
    own(&["run"]).ok();
    for file in ["run.json", "export/config.json", "eval/results.json"] {
        let text = fs::read_to_string(s.path("runs/small").join(file)).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        assert!(found["target"].is_object() && found.get("proxy").is_none(), "{file}: {found}");
    }
    let results = fs::read_to_string(s.path("runs/small/eval/results.json")).unwrap();
    // The baselines read the channel that they name where it is.
    for note in ["ridge regression from `max_window`", "heads matched by `max_window`"] {
        assert!(results.contains(note), "`{note}` is missing");
    }
    for what in ["runs/small", "runs/small/export", "runs/small/eval/results.json"] {
        let shown = Ran::new(s.command(&["inspect", what]).output().unwrap()).ok().stdout;
        assert!(!shown.contains("\n  proxy "), "{shown}");
    }
    let page = fs::read_to_string(s.path("runs/small/report.html")).unwrap();
    assert!(page.contains("by its own attention") && !page.contains("proxy <b>"));
    let bench = ["bench", "extract", "--random-weights", "--context", "40", "--repeats", "2"];
    let timed = own(&bench).ok().stdout;
    assert!(timed.contains("recipe") && !timed.contains("recon"), "{timed}");
    let bench = ["bench", "prefill", "--random-weights", "--context", "40", "--repeats", "2"];
    let timed = own(&bench).ok().stdout;
    assert!(timed.contains("own prefill") && !timed.contains("proxy"), "{timed}");
    // Without the section all is as it was.
    let text = fs::read_to_string(s.path("recipe.toml")).unwrap();
    let (before, rest) = text.split_once("[proxy]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    s.write("recipe.toml", &format!("{before}[data]{after}"));
    s.run(&["plan"]).fails_with(&["no section `[proxy]`", "extract.from = [\"target\"]"]);
    own(&["bench", "prefill", "--features", "window", "--random-weights"])
        .fails_with(&["no section `[proxy]`"]);
    assert!(s.path("runs/small/features-target/index.json").is_file());
    assert!(!s.path("runs/small/features").exists());
    let card = fs::read_to_string(s.path("runs/small/export/README.md")).unwrap();
    assert!(card.contains("Per target KV head: `key_norm`"), "{card}");
    let again = own(&["run"]).ok();
    for stage in ["prepare", "label", "extract", "train", "eval", "export"] {
        assert!(again.stderr.contains(&format!("{stage}: skipped")), "{stage}\n{}", again.stderr);
    }
    let summary = infer(&s);
    // Nothing of it could run on a second device.
    assert!(summary["dual_critical_secs"].is_null(), "{summary}");
    assert_eq!(summary["fallback"], serde_json::Value::Null, "{summary}");
    assert!((summary["kept"]["ratio"].as_f64().unwrap() - 0.3).abs() < 0.01, "{summary}");
    let phases = summary["phases"].to_string();
    assert!(!phases.contains("proxy"), "{phases}");
    let dual = [
        "--json",
        "infer",
        "--mapper",
        "runs/small/export",
        "--context",
        "context.txt",
        "--question",
        "Who?",
    ];
    let refused = Ran::new(s.command(&[&dual[..], &["--regime", "streams"]].concat()).output().unwrap());
    refused.fails_with(&["reads the target alone", "leave `--regime` out"]);
    let refused = Ran::new(s.command(&[&dual[..], &["--proxy", "x"]].concat()).output().unwrap());
    refused.fails_with(&["reads the target alone", "leave `--proxy` out"]);
}

#[test]
fn both_sources_share_what_each_has_made() {
    let s = Sandbox::new();
    for stage in ["prepare", "label", "extract"] {
        s.run(&[stage]).ok();
    }
    let proxys = fs::read(s.path("runs/small/features/index.json")).unwrap();
    let mut both = TARGET.map(str::to_owned);
    both[1] = "extract.from=[\"target\", \"proxy\"]".into();
    let both: Vec<&str> = std::iter::once("run").chain(both.iter().map(String::as_str)).collect();
    s.run(&both).ok();
    assert_eq!(fs::read(s.path("runs/small/features/index.json")).unwrap(), proxys);
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(s.path("runs/small/export/config.json")).unwrap()).unwrap();
    // 6 x 2 heads of the target and 3 x 1 of the proxy; the proxy's eight prefill channels, and of the target
    // the fitted one and four more; two surprisals.
    assert_eq!(config["dims"]["proxy_heads"], 15);
    assert_eq!(config["dims"]["channels"], 13);
    assert_eq!(config["dims"]["globals"], 5);
    let summary = infer(&s);
    assert_eq!(summary["fallback"], serde_json::Value::Null, "{summary}");
    // The recipe as it was finds its features complete, and asks for another mapper.
    s.run(&["extract"]).ok();
    s.run(&["eval"]).fails_with(&["trained with other choices"]);
}

#[test]
fn sources_that_cannot_be_are_refused() {
    let s = Sandbox::new();
    for (set, parts) in [
        ("extract.from=[]", &["`extract.from` is empty"][..]),
        ("extract.from=[\"target\", \"target\"]", &["`extract.from[1]` is named twice"]),
        ("extract.target_channels=[\"recon_log\"]", &["makes the target repeat its context"]),
        ("extract.channels=[\"hidden_linear\"]", &["reads hidden states of the target"]),
    ] {
        s.run(&["plan", "--set", set]).fails_with(parts);
    }
}

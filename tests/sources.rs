//! Features of the target, alone and beside the proxy's.

use std::fs;

use crate::sandbox::{Ran, Sandbox};

const TARGET: [&str; 4] = [
    "--set",
    "extract.from=[\"target\"]",
    "--set",
    "extract.target_channels=[\"max_window\", \"mean_window\", \"key_norm\", \"hidden_linear\", \"replay_unrun\", \
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
    // A recipe without a proxy.
    let text = fs::read_to_string(s.path("recipe.toml")).unwrap();
    let (before, rest) = text.split_once("[proxy]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    s.write("recipe.toml", &format!("{before}[data]{after}"));
    let ran = s.run(&[&["run"][..], &TARGET].concat()).ok();
    assert!(!ran.stderr.contains("loading the proxy"), "{}", ran.stderr);
    assert!(s.path("runs/small/features-target/index.json").is_file());
    assert!(!s.path("runs/small/features").exists());
    let card = fs::read_to_string(s.path("runs/small/export/README.md")).unwrap();
    assert!(card.contains("Per target KV head: `max_window`"), "{card}");
    let again = s.run(&[&["run"][..], &TARGET].concat()).ok();
    for stage in ["label", "extract", "train", "eval", "export"] {
        assert!(again.stderr.contains(&format!("{stage}: skipped")), "{stage}\n{}", again.stderr);
    }
    let summary = infer(&s);
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

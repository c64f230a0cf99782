//! `--device cpu+cpu`: a target whose layers are over two devices makes the bytes of one.

use std::fs;

use pkv_core::FailureKind;
use pkv_test_support::files::files;
use serde_json::Value;

use crate::sandbox::{Ran, Sandbox, timeless};
use crate::trained::{finished, trained};

const TWO: [&str; 2] = ["--device", "cpu+cpu"];

/// A finished run without the outputs in `folders`.
fn without(folders: &[&str]) -> Sandbox {
    let s = finished();
    for folder in folders {
        fs::remove_dir_all(s.path("runs/small").join(folder)).unwrap();
    }
    s
}

fn same(s: &Sandbox, folder: &str) {
    let of = |s: &Sandbox| files(&s.path("runs/small").join(folder));
    assert!(of(s) == of(trained()), "{folder}");
}

#[test]
fn labels_features_and_results_are_those_of_one_device() {
    let s = without(&["labels", "features", "eval"]);
    let ran = s.run(&[&["label"][..], &TWO].concat()).ok();
    assert!(ran.stderr.contains("its layers: 0 to 2 on cpu, 3 to 5 on cpu"), "{}", ran.stderr);
    same(&s, "labels");
    s.run(&[&["extract"][..], &TWO].concat()).ok();
    same(&s, "features");
    let policies = "eval.answer_policies=[\"pair\",\"pair-floor\",\"pair-uniform\",\"pair-budget\"]";
    s.run(&[&["eval", "--set", policies][..], &TWO].concat()).ok();
    let results = |s: &Sandbox| timeless(&fs::read(s.path("runs/small/eval/results.json")).unwrap());
    let (split, whole) = (results(&s), results(trained()));
    for part in ["labels", "facts", "perplexity"] {
        assert!(!split[part].is_null() && split[part] == whole[part], "{part}");
    }
}

#[test]
fn workers_may_have_several_devices_each() {
    let s = without(&["labels"]);
    let ran = s.run(&["label", "--devices", "cpu+cpu,cpu+cpu"]).ok();
    assert!(ran.stderr.contains("worker 1 on `cpu+cpu`"), "{}", ran.stderr);
    same(&s, "labels");
}

#[test]
fn answers_are_those_of_one_device() {
    let s = trained();
    let answers = |more: &[&str]| {
        let args = [
            &["infer", "--mapper", "runs/small/export", "--context", "context.txt", "--json"][..],
            &[
                "--question",
                "What opens the harbour?",
                "--retain",
                "0.3",
                "--max-new-tokens",
                "9",
                "--compare-full",
            ],
            more,
        ];
        let ran = Ran::new(s.command(&args.concat()).output().unwrap()).ok();
        let events = ran.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let texts: Vec<Value> = events.filter(|e| e["text"].is_string()).map(|e| e["text"].clone()).collect();
        assert!(texts.len() >= 2, "{}", ran.stdout);
        texts
    };
    let whole = answers(&[]);
    assert_eq!(answers(&TWO), whole);
    assert_eq!(answers(&[&TWO[..], &["--regime", "streams"]].concat()), whole);
}

#[test]
fn what_works_on_one_device_says_so() {
    let s = Sandbox::new();
    for command in [&["doctor"][..], &["bench", "decode", "--recipe", "recipe.toml", "--random-weights"]] {
        let ran = Ran::new(s.command(&[command, &TWO].concat()).output().unwrap());
        let parts = ["works on one device, not on `cpu+cpu`", "label, extract, eval, run, infer, plan"];
        ran.fails_as(FailureKind::Usage, &parts);
    }
    s.run(&["prepare"]).ok();
    s.run(&["label", "--device", "cpu+cpu+cpu+cpu+cpu+cpu+cpu"])
        .fails_with(&["6 layers cannot be laid over 7 devices", "name at most 6 devices"]);
    let ran =
        Ran::new(s.command(&["plan", "--recipe", "recipe.toml", "--device", "cuda:0+cpu"]).output().unwrap());
    ran.fails_as(FailureKind::Usage, &["`cuda:0+cpu` does not name devices of one kind", "cuda:0+cuda:1"]);
}

#[test]
fn the_plan_says_what_each_device_holds() {
    let s = Sandbox::new();
    let plan = |args: &[&str]| {
        let args = [&["plan", "--recipe", "recipe.toml"][..], args].concat();
        Ran::new(s.command(&args).output().unwrap()).ok().stdout
    };
    let text = plan(&TWO);
    assert!(text.contains("layers 0 to 2: ") && text.contains("layers 3 to 5: "), "{text}");
    let json: Value = serde_json::from_str(&plan(&[&TWO[..], &["--json"]].concat())).unwrap();
    let devices = json["split"]["devices"].as_array().unwrap();
    assert_eq!((devices.len(), devices[1]["first_layer"].as_u64()), (2, Some(3)));
    // A GPU of a few megabytes, and two of them.
    let small = |gpus: usize| format!("tflops=1,gb=0.1,gbps=1,gpus={gpus}");
    let one = plan(&["--machine", &small(1)]);
    assert!(!one.contains("layers 0 to"), "{one}");
    let json: Value = serde_json::from_str(&plan(&["--machine", &small(2), "--json"])).unwrap();
    assert_eq!(json["machine"]["gpus"], 2);
}

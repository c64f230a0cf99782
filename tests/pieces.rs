//! A stage in pieces: any number of tasks, in any order, killed or not, ends in the bytes of one process;
//! what is missing is named, and a row that fails is never lost without a word.

use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use pkv_core::FailureKind;
use pkv_shard::{Example, PiecesState, StageReader};
use pkv_test_support::files::copy_folder;
use serde_json::Value;

use crate::sandbox::{Ran, Running, Sandbox, root, timeless};
use crate::trained::{finished, trained};

/// As the finished run was made.
const POLICIES: [&str; 2] =
    ["--set", "eval.answer_policies=[\"pair\",\"pair-floor\",\"pair-uniform\",\"pair-budget\"]"];

/// 16 examples in six shards.
const ROWS: u64 = 16;

/// A sandbox of its own with examples alone.
fn prepared() -> Sandbox {
    static PREPARED: OnceLock<Sandbox> = OnceLock::new();
    let of = PREPARED.get_or_init(|| {
        let s = Sandbox::new();
        s.run(&["prepare"]).ok();
        s
    });
    let s = Sandbox::new();
    copy_folder(&of.path("runs"), &s.path("runs"));
    s
}

/// A finished run without its evaluation.
fn without_eval() -> Sandbox {
    let s = finished();
    fs::remove_dir_all(s.path("runs/small/eval")).unwrap();
    s
}

/// Every file of a stage of a run. No folder is left in it.
fn files(s: &Sandbox, stage: &str) -> BTreeMap<String, Vec<u8>> {
    pkv_test_support::files::files(&s.path("runs/small").join(stage))
}

fn state(s: &Sandbox, stage: &str) -> PiecesState {
    PiecesState::read(&s.path("runs/small").join(stage)).unwrap().expect("the stage is in pieces")
}

/// The numbers of `16 rows = 10 done + 6 skipped + 0 failed`.
fn counted(ran: &Ran) -> [u64; 4] {
    let line = ran.stderr.lines().find(|line| line.contains(" rows = ")).unwrap_or_else(|| {
        panic!("no account of rows:\n{}", ran.stderr);
    });
    let numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
    let all: Vec<u64> = numbers.collect();
    let last: [u64; 4] = all[all.len() - 4..].try_into().unwrap();
    let [rows, done, skipped, failed] = last;
    assert_eq!(rows, done + skipped + failed, "{line}");
    last
}

#[test]
fn labels_and_features_of_any_number_of_tasks_have_the_bytes_of_one_process() {
    let whole = trained();
    for n in [1, 3, 5] {
        let s = prepared();
        for (stage, folder) in [("label", "labels"), ("extract", "features")] {
            let mut rows = 0;
            // The last task first: order does not matter.
            for k in (0..n).rev() {
                let ran = s.run(&[stage, "--task", &format!("{k}/{n}")]).ok();
                let [of_task, done, ..] = counted(&ran);
                assert_eq!(of_task, done);
                rows += done;
                let complete = ran.stderr.contains(&format!("{stage}: done in"));
                assert_eq!(complete, k == 0, "{}", ran.stderr);
                assert!(complete || ran.stderr.contains(&format!("--task {}/{n}`", k - 1)), "{}", ran.stderr);
            }
            assert_eq!(rows, ROWS);
            assert!(files(&s, folder) == files(whole, folder), "{stage} by {n} tasks");
            let again = s.run(&[stage, "--task", &format!("0/{n}")]).ok();
            assert!(again.stderr.contains(&format!("{stage}: skipped")), "{}", again.stderr);
        }
        // Training reads them as those of one process.
        if n == 3 {
            s.run(&["train"]).ok();
        }
    }
}

/// What `eval` measured, without times and dates.
fn measured(s: &Sandbox) -> Value {
    timeless(&fs::read(s.path("runs/small/eval/results.json")).unwrap())
}

#[test]
fn an_evaluation_by_any_number_of_tasks_has_the_results_of_one_process() {
    let whole = measured(trained());
    for n in [1, 3, 5] {
        let s = without_eval();
        for k in 0..n {
            let ran = s.run(&[&["eval", "--task", &format!("{k}/{n}")][..], &POLICIES].concat()).ok();
            let [_, done, skipped, failed] = counted(&ran);
            assert!(done > 0 && (skipped, failed) == (0, 0), "{}", ran.stderr);
            let last = k == n - 1;
            assert_eq!(ran.stdout.is_empty(), !last, "{}", ran.stdout);
            assert_eq!(s.path("runs/small/eval/pieces").exists(), !last);
            assert_eq!(s.path("runs/small/eval/results.json").exists(), last);
            if !last {
                let missing = state(&s, "eval").what_is_missing();
                assert!(missing.command.contains(&format!("eval --task {}/{n}", n - 1)), "{missing:?}");
            }
        }
        assert_eq!(measured(&s), whole, "{n} tasks");
    }
}

#[test]
fn a_killed_task_makes_the_piece_in_its_hands_again_and_no_other() {
    let s = prepared();
    let mut kills = 0;
    for delay in [0, 30, 60, 120] {
        let before = PiecesState::read(&s.path("runs/small/labels")).unwrap();
        let before = before.map_or(0, |state| state.markers.len());
        if before == 3 {
            break;
        }
        let mut child = s.start(&["label", "--task", "0/2"]);
        // Once it is at work; then somewhere in the piece.
        child.wait_until(|| {
            let state = PiecesState::read(&s.path("runs/small/labels")).unwrap();
            state.is_some_and(|state| !state.begun.is_empty() || state.markers.len() > before)
        });
        child.kill_after(Duration::from_millis(delay));
        kills += 1;
    }
    assert!(kills > 0);
    let killed = state(&s, "labels");
    let kept: u64 = killed.done_rows();
    let ran = s.run(&["label", "--task", "0/2"]).ok();
    // Shards 0, 2, 4 of three rows each.
    assert_eq!(counted(&ran), [9, 9 - kept, kept, 0]);
    let now = state(&s, "labels");
    assert!(killed.markers.iter().all(|marker| now.markers.contains(marker)), "{killed:?}\n{now:?}");
    s.run(&["label", "--task", "1/2"]).ok();
    assert!(files(&s, "labels") == files(trained(), "labels"));
}

#[test]
fn processes_with_one_task_share_its_pieces() {
    let s = prepared();
    let children: Vec<Running> = (0..3).map(|_| s.start(&["label", "--task", "0/1"])).collect();
    let ran: Vec<Ran> = children.into_iter().map(|child| child.end().ok()).collect();
    let counts: Vec<[u64; 4]> =
        ran.iter().filter(|ran| !ran.stderr.contains("label: skipped")).map(counted).collect();
    assert_eq!(counts.iter().map(|[_, done, ..]| done).sum::<u64>(), ROWS, "{counts:?}");
    assert!(counts.iter().all(|[rows, ..]| *rows == ROWS));
    assert!(files(&s, "labels") == files(trained(), "labels"));
}

#[test]
fn what_is_missing_is_named_with_the_command_that_makes_it() {
    let s = prepared();
    s.run(&["label", "--task", "2/3"]).ok();
    let named = [
        "2 of 6 shards are there; missing: 0, 1, 3, 4",
        "run `proxykv-train label --task 0/3`, `proxykv-train label --task 1/3` with the same recipe",
    ];
    s.run(&["train"]).fails_with(&named);
    Ran::new(s.command(&["inspect", "runs/small/labels"]).output().unwrap()).fails_with(&named);
    // The pieces that are there say how long all of them take, by any number of workers.
    let plan = s.run(&["plan", "--calibrate", "runs/small", "--workers", "1,4", "--json"]).ok();
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
    let (mut secs, mut rows) = (0.0, 0);
    state(&s, "labels").markers.iter().for_each(|m| (secs, rows) = (secs + m.secs, rows + m.rows));
    let of_label: Vec<&Value> =
        plan["workers"].as_array().unwrap().iter().filter(|by| by["stage"] == "label").collect();
    assert_eq!(of_label.len(), 2, "{plan}");
    for (by, workers) in of_label.iter().zip([1, 4]) {
        assert_eq!((&by["workers"], &by["pieces"]), (&Value::from(workers), &Value::from(6)));
        let of_one = by["secs_per_context"].as_f64().unwrap();
        assert!((of_one * rows as f64 / secs - 1.0).abs() < 0.01, "{of_one} for {secs} s of {rows} rows");
    }
    // Without a task all that is missing is made, and nothing else.
    let ran = s.run(&["label"]).ok();
    assert_eq!(counted(&ran), [ROWS, 12, 4, 0], "{}", ran.stderr);
    assert!(files(&s, "labels") == files(trained(), "labels"));
    // An unfinished run without tasks is taken over by them.
    let s = prepared();
    let mut child = s.start(&["label"]);
    child.wait_until(|| s.path("runs/small/labels/labels-00001.parquet").exists());
    child.kill_after(Duration::ZERO);
    for task in ["0/2", "1/2"] {
        s.run(&["label", "--task", task]).ok();
    }
    assert!(files(&s, "labels") == files(trained(), "labels"));
    // Choices are checked as those of one process are.
    s.run(&["label", "--task", "0/2", "--set", "label.preset=\"plus\""])
        .fails_with(&["was made with other choices", "--redo label"]);
}

#[test]
fn tasks_that_there_are_not_are_refused_with_a_hint() {
    let s = prepared();
    for (args, part) in [
        (["--task", "3/3"], "the last `2/3`"),
        (["--task", "1"], "write `K/N`"),
        (["--devices", "cpu,gpu"], "write `auto`"),
        (["--max-failures", "0"], "0 is not in"),
    ] {
        let ran = s.run(&[&["label"][..], &args].concat());
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(part), "{args:?}: {}", ran.stderr);
    }
    let with = |variables: &[(&str, &str)], args: &[&str]| {
        let args = [args, &["--recipe", "recipe.toml"]].concat();
        Ran::new(s.command(&args).envs(variables.iter().copied()).output().unwrap())
    };
    let slurm = |id| [("SLURM_ARRAY_TASK_ID", id), ("SLURM_ARRAY_TASK_COUNT", "2")];
    with(&slurm("2"), &["label"]).fails_as(FailureKind::Usage, &["there is no task 2 of 2", "--task 0/1"]);
    with(&slurm("1"), &["label", "--redo", "label"]).fails_as(FailureKind::Usage, &["other tasks make"]);
    with(&[("JOB_COMPLETION_INDEX", "0")], &["extract"])
        .fails_as(FailureKind::Usage, &["`PKV_TASKS`, the number of tasks, is not"]);
    assert!(!s.path("runs/small/labels").exists(), "nothing was begun");
    let ran = with(&slurm("1"), &["label"]).ok();
    assert!(ran.stderr.contains("task 1/2, by SLURM_ARRAY_TASK_ID"), "{}", ran.stderr);
    let completions = [("JOB_COMPLETION_INDEX", "0"), ("PKV_TASKS", "2")];
    let ran = with(&completions, &["label"]).ok();
    assert!(ran.stderr.contains("task 0/2, by JOB_COMPLETION_INDEX"), "{}", ran.stderr);
    assert!(files(&s, "labels") == files(trained(), "labels"));
}

/// Copy the target into the sandbox, with NaN as the embedding of `tokens`.
fn break_target(s: &Sandbox, tokens: impl Iterator<Item = usize>) {
    let from = root().join("recipes/nano-llama/target");
    copy_folder(&from, &s.path("target"));
    let path = s.path("target/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let embedding = &tensors["model.embed_tokens.weight"];
    assert_eq!((&embedding["dtype"], embedding["data_offsets"][0].as_u64()), (&"BF16".into(), Some(0)));
    let width = 2 * embedding["shape"][1].as_u64().unwrap() as usize;
    for token in tokens {
        bytes[header + token * width..header + (token + 1) * width].fill(0xff);
    }
    fs::write(&path, bytes).unwrap();
    s.edit("recipe.toml", &from.display().to_string(), "target");
}

#[test]
fn a_row_that_fails_is_named_and_costs_its_shard_alone() {
    let s = prepared();
    let examples = StageReader::<Example>::open(&s.path("runs/small/examples")).unwrap();
    let examples: Vec<Example> = examples.iter().map(Result::unwrap).collect();
    let is_of_one = |token: u32| {
        let having: Vec<usize> =
            (0..examples.len()).filter(|&i| examples[i].tokens.contains(&token)).collect();
        (having.len() == 1).then(|| having[0])
    };
    let (token, row) = (0..4096).rev().find_map(|token| Some((token, is_of_one(token)?))).unwrap();
    break_target(&s, std::iter::once(token as usize));
    let shard = row as u64 / 3;
    let rows = if shard == 5 { 1 } else { 3 };
    let id = &examples[row].id;
    for _ in 0..2 {
        // The second attempt tries the failed piece again, and no other.
        s.run(&["label", "--task", "0/1"]).fails_with(&[
            " skipped + 1 failed",
            &format!("row {row} (`{id}`)"),
            "of its scores is NaN",
            "the same command tries them again",
        ]);
        let marked = state(&s, "labels");
        assert_eq!((marked.missing(), marked.done_rows()), (vec![shard], ROWS - rows));
        let failed: Vec<u64> = marked.markers.iter().flat_map(|m| &m.failed).map(|f| f.row).collect();
        assert_eq!(failed, [row as u64]);
    }
    s.run(&["train"]).fails_with(&[&format!("5 of 6 shards are there; missing: {shard}")]);
}

#[test]
fn failures_in_a_row_end_a_stage() {
    let s = prepared();
    break_target(&s, 0..4096);
    let ran = s.run(&["label", "--task", "0/1"]);
    let text = ran.stderr.clone();
    ran.fails_with(&["of them in a row, and no more were tried", "--max-failures"]);
    let tried = state(&s, "labels").markers.len();
    assert!((1..=3).contains(&tried), "{text}");
    s.run(&["label", "--task", "1/2", "--max-failures", "1"]).fails_with(&["of them in a row"]);
    // As a whole, it ends at the first one.
    let s = prepared();
    break_target(&s, 0..4096);
    s.run(&["label"]).fails_with(&["of its scores is NaN"]);
}

#[test]
fn features_of_the_target_come_with_its_labels_piece_by_piece() {
    let from = ["--set", "extract.from=[\"target\"]"];
    let whole = prepared();
    whole.run(&[&["label"][..], &from].concat()).ok();
    let s = prepared();
    for k in [2, 0, 1] {
        s.run(&[&["label", "--task", &format!("{k}/3")][..], &from].concat()).ok();
    }
    for folder in ["labels", "features-target"] {
        assert!(files(&s, folder) == files(&whole, folder), "{folder}");
    }
    // Features that are missing where labels are there belong to `extract`.
    let s = prepared();
    s.run(&[&["label", "--task", "0/2"][..], &["--set", "extract.from=[\"proxy\"]"]].concat()).ok();
    s.run(&[&["label", "--task", "1/2"][..], &from].concat()).ok();
    assert!(files(&s, "labels") == files(&whole, "labels"));
    let ran = s.run(&[&["extract", "--task", "0/1"][..], &from].concat()).ok();
    assert_eq!(counted(&ran), [ROWS, 9, 7, 0], "{}", ran.stderr);
    assert!(files(&s, "features-target") == files(&whole, "features-target"));
}

#[test]
fn a_map_of_hidden_states_is_fitted_once() {
    let fitted = [
        "--set",
        "extract.from=[\"target\"]",
        "--set",
        "extract.target_channels=[\"key_norm\", \"hidden_linear\"]",
    ];
    let whole = prepared();
    for stage in ["label", "extract"] {
        whole.run(&[&[stage][..], &fitted].concat()).ok();
    }
    let s = prepared();
    copy_folder(&whole.path("runs/small/labels"), &s.path("runs/small/labels"));
    let tasks = ["0/2", "1/2"].map(|task| s.start(&[&["extract", "--task", task][..], &fitted].concat()));
    tasks.into_iter().for_each(|child| drop(child.end().ok()));
    for folder in ["features-target", "hidden"] {
        assert!(files(&s, folder) == files(&whole, folder), "{folder}");
    }
}

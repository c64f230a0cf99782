//! stdout at the edge, for every command that prints: closed by its reader, and full. And `--json`, which
//! every command has or refuses.

use std::fs::File;
use std::io::pipe;
use std::process::Stdio;

use pkv_core::FailureKind;
use pkv_test_support::files::copy_folder;
use serde_json::Value;

use crate::sandbox::{Ran, Sandbox, commands, root};
use crate::trained::finished;

/// Every command that prints, as it is typed; all of them succeed on a trained run.
const COMMANDS: [&str; 19] = [
    "--help",
    "--version",
    "run --help",
    "completions bash",
    "plan --recipe recipe.toml",
    "plan --recipe recipe.toml --json",
    "plan --recipe recipe.toml --resolved",
    "doctor",
    "doctor --json",
    "fetch --recipe recipe.toml --json",
    "eval --recipe recipe.toml",
    "eval --recipe recipe.toml --json",
    "run --recipe recipe.toml",
    "inspect runs/small",
    "inspect runs/small/labels --against runs/small/labels",
    "compare small small-again",
    "compare small small-again --json",
    "bench extract --recipe recipe.toml --random-weights --context 40 --repeats 1",
    "infer --mapper runs/small/export --context context.txt --question Who? --max-new-tokens 4",
];

fn run(s: &Sandbox, command: &str, stdout: impl Into<Stdio>) -> Ran {
    let args: Vec<&str> = command.split(' ').collect();
    Ran::new(s.command(&args).stdout(stdout).stderr(Stdio::piped()).output().unwrap())
}

/// A trained run of the test's own, and a copy of it to compare it with.
fn project() -> Sandbox {
    let s = finished();
    copy_folder(&s.path("runs/small"), &s.path("runs/small-again"));
    s
}

/// Each command with `--json`: what its JSON has (of a list, its first entry; of several lines, the last), or
/// why it has none.
const JSON: [(&str, &str); 30] = [
    ("doctor", "status"),
    ("recipes ls", "name"),
    ("recipes show recipe", "`recipes show` prints text alone"),
    ("recipes init --target PAIR/target --name own", "file"),
    ("plan --recipe recipe.toml", "stages"),
    ("plan --recipe recipe.toml --resolved", "recipe"),
    ("fetch --recipe recipe.toml", "target"),
    ("run --recipe recipe.toml", "labels"),
    ("sweep --recipe recipe.toml --vary train.steps=24 --dry-run", ""),
    ("launch slurm --recipe recipe.toml --dry-run", "script"),
    ("launch k8s --recipe recipe.toml --dry-run", "items"),
    ("launch status --run runs/small", "stages"),
    ("prepare --recipe recipe.toml", "record"),
    ("prepare --recipe recipe.toml --show 1", "text"),
    ("label --recipe recipe.toml", "record"),
    ("extract --recipe recipe.toml", "record"),
    ("train --recipe recipe.toml", "record"),
    ("eval --recipe recipe.toml", "labels"),
    ("eval --recipe recipe.toml --show 1", "asked"),
    ("export --recipe recipe.toml", "record"),
    ("report --recipe recipe.toml", "record"),
    ("inspect runs/small", "`inspect` prints text alone"),
    ("compare small small-again", "runs"),
    ("bench extract --recipe recipe.toml --random-weights --context 40 --repeats 1", ""),
    ("infer --mapper runs/small/export --context context.txt --question Who? --max-new-tokens 4", "event"),
    ("push runs/small --repo a/b", "dry_run"),
    ("schema", "properties"),
    ("schema --reference", "`schema --reference` prints text alone"),
    ("completions bash", "`completions` prints text alone"),
    ("man manual", "`man` prints text alone"),
];

#[test]
fn man_names_every_page_that_it_writes() {
    let s = &project();
    let named = run(s, "man pages", Stdio::piped()).ok().stdout;
    let mut written: Vec<String> = std::fs::read_dir(s.path("pages"))
        .unwrap()
        .map(|page| page.unwrap().path())
        .map(|page| page.strip_prefix(s.path("")).unwrap().display().to_string())
        .collect();
    written.sort();
    assert_eq!(named.lines().collect::<Vec<_>>(), written);
    assert!(written.len() > commands().len());
}

#[test]
fn json_is_printed_or_refused_by_every_command() {
    let s = &project();
    for command in commands().iter().filter(|command| *command != "help") {
        assert!(JSON.iter().any(|(line, _)| line.split(' ').next() == Some(command)), "{command}");
    }
    let pair = root().join("recipes/nano-llama");
    for (line, has) in JSON {
        let line = line.replace("PAIR", pair.to_str().unwrap());
        let ran = run(s, &format!("{line} --json"), Stdio::piped());
        if has.starts_with('`') {
            assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}\n{}", ran.stderr);
            assert!(ran.stderr.contains(has) && ran.stderr.contains("hint: "), "{line}\n{}", ran.stderr);
            continue;
        }
        let ran = ran.ok();
        let all: Vec<Value> = serde_json::Deserializer::from_str(&ran.stdout)
            .into_iter()
            .collect::<Result<_, _>>()
            .unwrap_or_else(|e| panic!("{line}: {e}\n{}", ran.stdout));
        let last = all.last().unwrap_or_else(|| panic!("{line} prints nothing"));
        let value = last.get(0).unwrap_or(last);
        assert!(has.is_empty() || value.get(has).is_some(), "{line}: no `{has}`\n{}", ran.stdout);
    }
}

#[test]
fn a_reader_that_goes_away_ends_a_command_quietly() {
    let s = &project();
    for command in COMMANDS {
        run(s, command, Stdio::piped()).ok();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let ran = run(s, command, writer);
        assert_eq!(ran.code, 141, "{command}:\n{}", ran.stderr);
        assert!(
            !ran.stderr.contains("error") && !ran.stderr.contains("panicked"),
            "{command}:\n{}",
            ran.stderr
        );
    }
}

#[test]
fn a_full_stdout_is_an_error_with_a_hint() {
    let s = &project();
    for command in COMMANDS {
        let full = File::options().write(true).open("/dev/full").unwrap();
        run(s, command, full).fails_as(FailureKind::Environment, &["cannot write to stdout"]);
    }
}

#[test]
fn a_full_stderr_changes_nothing() {
    let s = &project();
    for command in COMMANDS {
        let args: Vec<&str> = command.split(' ').collect();
        let full = File::options().write(true).open("/dev/full").unwrap();
        Ran::new(s.command(&args).stderr(full).output().unwrap()).ok();
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let ran = Ran::new(s.command(&["plan", "--recipe", "none.toml"]).stderr(full).output().unwrap());
    assert_eq!(ran.code, 1);
}

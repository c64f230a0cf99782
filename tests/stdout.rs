//! stdout at the edge, for every command that prints: closed by its reader, and full.

use std::fs::File;
use std::io::pipe;
use std::process::{Command, Stdio};

use pkv_core::FailureKind;

use crate::infer::trained;
use crate::sandbox::{Ran, Sandbox};

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

/// The trained run, and a copy of it to compare it with.
fn project() -> &'static Sandbox {
    let s = trained();
    if !s.path("runs/small-again").exists() {
        let mut copy = Command::new("cp");
        copy.arg("-a").args([s.path("runs/small"), s.path("runs/small-again")]);
        assert!(copy.status().unwrap().success());
    }
    s
}

#[test]
fn a_reader_that_goes_away_ends_a_command_quietly() {
    let s = project();
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
    let s = project();
    for command in COMMANDS {
        let full = File::options().write(true).open("/dev/full").unwrap();
        run(s, command, full).fails_as(FailureKind::Environment, &["cannot write to stdout"]);
    }
}

#[test]
fn a_full_stderr_changes_nothing() {
    let s = project();
    for command in COMMANDS {
        let args: Vec<&str> = command.split(' ').collect();
        let full = File::options().write(true).open("/dev/full").unwrap();
        Ran::new(s.command(&args).stderr(full).output().unwrap()).ok();
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let ran = Ran::new(s.command(&["plan", "--recipe", "none.toml"]).stderr(full).output().unwrap());
    assert_eq!(ran.code, 1);
}

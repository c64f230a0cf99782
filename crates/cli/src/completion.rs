//! Completion of the command line in bash, zsh and fish: the shell scripts, and the candidates.
//!
//! A shell's script runs this binary again with the words so far; clap_complete's engine finds from `args`
//! what may come next. The candidate values come from `values`. Two shells get a script of our own: bash
//! splits words at `=` and `:`, which the engine does not know, and both must not add a blank after `key=`.
//! Nothing here touches libtorch or logs.

pub mod values;

use std::ffi::{OsStr, OsString};
use std::io::{Error, Write};
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_complete::engine::complete;
use clap_complete::env::{CompleteEnv, Elvish, EnvCompleter, Fish, Powershell, Shells};

use crate::args;

/// Set by the scripts; a general name such as `COMPLETE` may be in use for something else.
const VARIABLE: &str = "PROXYKV_TRAIN_COMPLETE";
const SHELLS: Shells<'static> = Shells(&[&Bash, &Zsh, &Fish, &Elvish, &Powershell]);

/// If a shell's completion script calls, answer it and exit.
pub fn answer() {
    CompleteEnv::with_factory(args::command).var(VARIABLE).shells(SHELLS).complete();
}

/// The completion script for `shell`, which calls this binary.
///
/// # Errors
/// There is no name for this binary.
pub fn script(shell: Shell) -> Result<String, Error> {
    let mut out = Vec::new();
    let shell = shell.to_string();
    let shell = SHELLS.completer(&shell).ok_or_else(|| Error::other(format!("no script for {shell}")))?;
    let binary = std::env::current_exe()?;
    let name = args::command().get_name().to_owned();
    shell.write_registration(VARIABLE, &name, &name, &binary.to_string_lossy(), &mut out)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A script with the names put in; quoted as both shells read it.
fn fill(script: &str, variable: &str, bin: &str, completer: &str, to: &mut dyn Write) -> Result<(), Error> {
    let quoted = format!("'{}'", completer.replace('\'', r"'\''"));
    let script = script.replace("<VARIABLE>", variable).replace("<BIN>", bin).replace("<COMPLETER>", &quoted);
    to.write_all(script.as_bytes())
}

/// The word that the shell completes, counted from the program's name.
fn index() -> usize {
    std::env::var("PROXYKV_TRAIN_WORD").ok().and_then(|n| n.parse().ok()).unwrap_or(0)
}

struct Bash;

impl EnvCompleter for Bash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn is(&self, name: &str) -> bool {
        name == "bash"
    }

    fn write_registration(
        &self,
        variable: &str,
        _: &str,
        bin: &str,
        completer: &str,
        to: &mut dyn Write,
    ) -> Result<(), Error> {
        fill(include_str!("completion/script.bash"), variable, bin, completer, to)
    }

    fn write_complete(
        &self,
        cmd: &mut Command,
        words: Vec<OsString>,
        folder: Option<&Path>,
        to: &mut dyn Write,
    ) -> Result<(), Error> {
        let (words, index, done) = joined(&words, index());
        for candidate in complete(cmd, words, index, folder)? {
            let value = candidate.get_value().to_string_lossy();
            // bash replaces what follows the last break.
            if let Some(rest) = value.get(done..) {
                writeln!(to, "{}", escaped(rest))?;
            }
        }
        Ok(())
    }
}

/// Words that bash split at `=` and `:` as the user typed them, up to the word of `index`; its new index, and
/// how many bytes of it come before the last break.
fn joined(words: &[OsString], index: usize) -> (Vec<OsString>, usize, usize) {
    let is_break = |w: &OsStr| !w.is_empty() && w.to_string_lossy().chars().all(|c| "=:".contains(c));
    let mut out: Vec<OsString> = Vec::new();
    let (mut glue, mut done) = (false, 0);
    for word in words.iter().take(index + 1) {
        let is_break = is_break(word);
        match out.last_mut() {
            Some(last) if glue || is_break => {
                done = last.len() + if is_break { word.len() } else { 0 };
                last.push(word);
            }
            _ => {
                done = 0;
                out.push(word.clone());
            }
        }
        glue = is_break;
    }
    if out.len() <= 1 {
        out.push(OsString::new());
    }
    let index = out.len() - 1;
    (out, index, done)
}

/// A value as bash reads it back: a folder may have blanks in its name.
fn escaped(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        if !(c.is_alphanumeric() || "/_-.,+=:@%~".contains(c)) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

struct Zsh;

impl EnvCompleter for Zsh {
    fn name(&self) -> &'static str {
        "zsh"
    }

    fn is(&self, name: &str) -> bool {
        name == "zsh"
    }

    fn write_registration(
        &self,
        variable: &str,
        _: &str,
        bin: &str,
        completer: &str,
        to: &mut dyn Write,
    ) -> Result<(), Error> {
        fill(include_str!("completion/script.zsh"), variable, bin, completer, to)
    }

    fn write_complete(
        &self,
        cmd: &mut Command,
        mut words: Vec<OsString>,
        folder: Option<&Path>,
        to: &mut dyn Write,
    ) -> Result<(), Error> {
        let index = index();
        words.resize(words.len().max(index + 1), OsString::new());
        for candidate in complete(cmd, words, index, folder)? {
            // `_describe` reads `value:description`.
            let value = candidate.get_value().to_string_lossy().replace('\\', r"\\").replace(':', r"\:");
            match candidate.get_help().and_then(|h| h.to_string().lines().next().map(str::to_owned)) {
                Some(help) => writeln!(to, "{value}:{help}")?,
                None => writeln!(to, "{value}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bash calls a word, the one at its end being completed; what is asked, and what bash keeps of it.
    #[test]
    fn words_that_bash_split_are_joined() {
        let case = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            let (joined, index, done) = joined(&words, words.len() - 1);
            assert_eq!(index, joined.len() - 1);
            let last = joined[index].to_string_lossy().into_owned();
            (joined.len(), last.clone(), last[..done].to_owned())
        };
        let is = |n, word: &str, kept: &str| (n, word.to_owned(), kept.to_owned());
        assert_eq!(case(&["p", "infer", "--policy", "=", "pa"]), is(3, "--policy=pa", "--policy="));
        assert_eq!(case(&["p", "infer", "--policy", "="]), is(3, "--policy=", "--policy="));
        assert_eq!(case(&["p", "--device", "cuda", ":", "1"]), is(3, "cuda:1", "cuda:"));
        assert_eq!(case(&["p", "--set", "train.steps", "=", "5", "--redo", "la"]), is(5, "la", ""));
        assert_eq!(case(&["p", "infer", ""]), is(3, "", ""));
        assert_eq!(case(&["p"]), is(2, "", ""));
    }

    #[test]
    fn a_folder_with_blanks_is_one_word_to_bash() {
        assert_eq!(escaped("my runs/a$b'c/"), r"my\ runs/a\$b\'c/");
        assert_eq!(escaped("train.steps="), "train.steps=");
    }

    #[test]
    fn scripts_name_this_binary_quoted() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let text = script(shell).unwrap();
            assert!(text.contains(VARIABLE) && text.contains("proxykv-train"), "{shell}: {text}");
            assert!(!text.contains('<') || !text.contains("<BIN>"), "{shell}: {text}");
        }
        let mut out = Vec::new();
        fill("<COMPLETER> -- <BIN>", "V", "b", "/it's here/b", &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), r"'/it'\''s here/b' -- b");
    }
}

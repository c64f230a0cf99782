//! Completion as a user gets it: TAB is pressed in bash, zsh and fish inside tmux, and the screen is read.
//!
//! Without tmux or a shell its part is skipped, and says so.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a screen may take on a machine that is busy with other things; it is read as soon as it is right.
const PATIENCE: Duration = Duration::from_secs(120);
const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

fn has(program: &str) -> bool {
    let found =
        Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

/// A terminal with one shell in it, and the folder that the shell is in.
struct Terminal {
    folder: TempDir,
    shell: &'static str,
}

impl Terminal {
    /// `None`, with a message, where the shell or tmux is absent.
    fn new(shell: &'static str) -> Option<Self> {
        for program in ["tmux", shell] {
            if !has(program) {
                // Past the harness, which shows the output of failing tests only.
                let text = format!("SKIPPED: completion in {shell}; there is no {program}\n");
                std::io::stderr().write_all(text.as_bytes()).unwrap();
                return None;
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().to_owned();
        for file in ["recipes/alpha.toml", "recipes/more/beta.toml", "own.toml", "notes.md"] {
            fs::create_dir_all(here.join(file).parent().unwrap()).unwrap();
            fs::write(here.join(file), "").unwrap();
        }
        for run in ["runs/first-run", "runs/second-run", "elsewhere/third-run"] {
            fs::create_dir_all(here.join(run)).unwrap();
            fs::write(here.join(run).join("run.json"), "{}").unwrap();
        }
        let terminal = Self { folder, shell };
        // No user's settings; a prompt that is found nowhere else.
        let start = match shell {
            "bash" => "PS1='READY> ' exec bash --norc --noprofile -i",
            "zsh" => "PS1='READY> ' exec zsh -f -i",
            _ => {
                "exec fish --no-config --init-command 'function fish_prompt; echo -n \"READY> \"; end; function fish_greeting; end'"
            }
        };
        let cwd = here.to_str().unwrap();
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "200", "-y", "50", "-c", cwd, start]);
        terminal.wait("the first prompt", |screen| screen.contains("READY>"));
        let binary = env!("CARGO_BIN_EXE_proxykv-train");
        let script = match shell {
            "fish" => format!("'{binary}' completions fish | source; echo SOUR\"\"CED"),
            _ => format!("source <('{binary}' completions {shell}); echo SOUR\"\"CED"),
        };
        terminal.tmux(&["send-keys", "-l", &script]);
        terminal.tmux(&["send-keys", "Enter"]);
        terminal.wait("the script", |screen| screen.contains("SOURCED"));
        Some(terminal)
    }

    fn tmux(&self, args: &[&str]) -> String {
        let out = Command::new("tmux")
            .arg("-S")
            .arg(self.folder.path().join("tmux.socket"))
            .args(args)
            .env("HOME", self.folder.path())
            .env("TERM", "xterm-256color")
            .env("LC_ALL", "C.UTF-8")
            .env_remove("TMUX")
            .output()
            .unwrap();
        assert!(out.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn wait(&self, what: &str, right: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let screen = self.screen();
            if right(&screen) {
                return screen;
            }
            assert!(begun.elapsed() < PATIENCE, "{}: {what}; the screen:\n{}", self.shell, screen.trim_end());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// An empty line with `line` typed on it.
    fn typed(&self, line: &str) {
        // Not Ctrl-C: a signal may overtake what is typed after it, or drop it.
        self.tmux(&["send-keys", "C-u"]);
        self.tmux(&["send-keys", "C-l"]);
        self.wait("an empty line", |screen| screen.trim() == "READY>");
        self.tmux(&["send-keys", "-l", line]);
        self.wait("the line", |screen| screen.contains(line.trim_end()));
    }

    /// TAB makes `whole` of `line`, with the blank at its end if it has one and none if not: what is typed
    /// next tells.
    fn completes(&self, line: &str, whole: &str) {
        self.typed(line);
        self.tmux(&["send-keys", "Tab"]);
        self.tmux(&["send-keys", "-l", "X"]);
        self.wait(&format!("`{whole}` from `{line}`"), |screen| screen.contains(&format!("{whole}X")));
    }

    /// TAB offers all of `words` after `line`, none of `others`. fish shortens what is common to all of them.
    fn offers(&self, line: &str, words: &[&str], others: &[&str]) {
        let below = |screen: &str| screen.lines().skip(1).collect::<Vec<_>>().join("\n");
        self.typed(line);
        // bash lists at the second.
        self.tmux(&["send-keys", "Tab"]);
        self.tmux(&["send-keys", "Tab"]);
        let screen = self.wait(&format!("{words:?} from `{line}`"), |screen| {
            words.iter().all(|word| below(screen).contains(word))
        });
        for other in others {
            assert!(!below(&screen).contains(other), "{}: `{other}` after `{line}`\n{screen}", self.shell);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let socket = self.folder.path().join("tmux.socket");
        let _ = Command::new("tmux").arg("-S").arg(socket).arg("kill-server").status();
    }
}

#[test]
fn tab_completes_in_every_shell() {
    for t in SHELLS.into_iter().filter_map(Terminal::new) {
        // Commands and options, below the first word too.
        t.completes("proxykv-train inf", "proxykv-train infer ");
        t.completes("proxykv-train eval --meth", "proxykv-train eval --methods ");
        t.completes("proxykv-train --json train --rec", "--json train --recipe ");
        // Values of enums.
        t.offers(
            "proxykv-train infer --policy ",
            &["pair", "pair-floor", "pair-uniform", "pair-budget", "token"],
            &["recipes"],
        );
        t.completes("proxykv-train infer --policy=tok", "--policy=token ");
        t.completes("proxykv-train infer --regime str", "--regime streams ");
        t.completes("proxykv-train plan --machine h2", "--machine h200 ");
        t.completes("proxykv-train run --redo extr", "--redo extract ");
        t.completes("proxykv-train bench pref", "bench prefill ");
        t.completes("proxykv-train completions zs", "completions zsh ");
        t.completes("proxykv-train --device cuda:1", "--device cuda:1 ");
        // Lists, after a comma too.
        t.completes("proxykv-train eval --methods mapper,kvzip-", "--methods mapper,kvzip-pooled ");
        t.completes("proxykv-train eval --tasks facts,ruler/v", "--tasks facts,ruler/vt ");
        t.offers(
            "proxykv-train eval --tasks ruler/niah_multi",
            &["multikey_1", "multiquery"],
            &["longbench"],
        );
        // Recipes below the folder, and other files.
        t.completes("proxykv-train run --recipe recipes/al", "--recipe recipes/alpha.toml ");
        t.completes("proxykv-train run --recipe recipes/m", "--recipe recipes/more/beta.toml ");
        t.completes("proxykv-train run --recipe own", "--recipe own.toml ");
        t.offers("proxykv-train run --recipe recipes/", &["alpha.toml", "beta.toml"], &["notes.md"]);
        t.completes("proxykv-train recipes show al", "recipes show alpha ");
        t.offers("proxykv-train recipes show ", &["alpha", "beta"], &["notes", ".toml"]);
        // Documents, and what a run contains.
        t.completes("proxykv-train prepare --data no", "--data notes.md ");
        t.completes("proxykv-train inspect runs/first-run/ru", "inspect runs/first-run/run.json ");
        // What each command is for; bash has no room for it.
        if t.shell != "bash" {
            t.offers("proxykv-train p", &["Turn documents into tokenized examples", "Upload an export"], &[]);
            t.offers("proxykv-train ex", &["Extract features", "Export the mapper"], &[]);
        }
        // Keys, without a blank after the `=`.
        t.completes("proxykv-train train --set train.ste", "--set train.steps=");
        t.offers("proxykv-train train --set eval.benchmark.ruler_t", &["okens=", "asks="], &[]);
        // Runs, by name and as folders; those of another folder.
        t.offers("proxykv-train compare ", &["first-run", "second-run"], &["third-run"]);
        t.completes("proxykv-train compare first-run sec", "compare first-run second-run ");
        t.completes("proxykv-train --runs elsewhere compare th", "compare third-run ");
        t.completes("proxykv-train push runs/fir", "push runs/first-run ");
        t.completes("proxykv-train infer --mapper runs/sec", "--mapper runs/second-run ");
    }
}

/// Asking is answered in a moment, by itself: no log, no library that computes.
#[test]
fn an_answer_is_words_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let ask = |shell: &str, words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_proxykv-train"));
        command.current_dir(folder.path()).env("PROXYKV_TRAIN_COMPLETE", shell).env("RUST_LOG", "trace");
        command.env("PROXYKV_TRAIN_WORD", (words.len() - 1).to_string()).arg("--").args(words);
        let out = command.output().unwrap();
        assert!(out.status.success());
        assert_eq!(String::from_utf8_lossy(&out.stderr), "", "{shell} {words:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(
        ask("bash", &["proxykv-train", "infer", "--policy", "pair-"]),
        "pair-floor\npair-keydiff\npair-uniform\npair-budget\n"
    );
    assert_eq!(ask("bash", &["proxykv-train", "infer", "--policy", "=", "tok"]), "token\n");
    assert_eq!(ask("bash", &["proxykv-train", "--device", "cuda", ":", "1"]), "1\n");
    assert!(ask("zsh", &["proxykv-train", "inf"]).starts_with("infer:Read a context"));
    assert!(ask("fish", &["proxykv-train", "inf"]).starts_with("infer\tRead a context"));
    // What cannot be completed is no error on the user's screen.
    assert_eq!(ask("bash", &["proxykv-train", "compare", "nothing-like-it"]), "");
    assert!(!Path::new("completion.log").exists());
}

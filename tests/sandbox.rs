//! A temporary project folder around the binary: the small pair, a few documents, a recipe of seconds.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pkv_core::FailureKind;
use pkv_test_support::files::files;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with `recipe.toml`, `manifest.toml` and `documents.txt`; runs go to `runs/`.
pub struct Sandbox {
    folder: TempDir,
}

pub use pkv_test_support::files::root;

impl Sandbox {
    pub fn new() -> Self {
        let s = Self { folder: TempDir::new().expect("a temporary folder can be made") };
        s.write("documents.txt", &documents());
        s.write("manifest.toml", MANIFEST);
        let pair = root().join("recipes/nano-llama");
        s.write("recipe.toml", &RECIPE.replace("PAIR", &pair.display().to_string()));
        s
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("folders can be made");
        fs::write(path, text).expect("files can be written");
    }

    /// Replace `from` by `to` in a file; `from` must be there. A record loses its own hash, as one that is
    /// edited on purpose.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).expect("the file is there");
        assert!(text.contains(from), "`{from}` is not in {name}");
        let mut text = text.replace(from, to);
        for seal in [",\"sha256\":\"", ",\n  \"sha256\": \""] {
            if let Some(at) = text.rfind(seal).filter(|&at| text[at..].matches('}').count() == 1) {
                text.replace_range(at.., "}");
            }
        }
        fs::write(self.path(name), text).expect("files can be written");
    }

    /// The binary with `args`, on the CPU, in this folder. One thread: as many tests run beside each other as
    /// there are cores.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_proxykv-train"));
        command.current_dir(self.folder.path()).args(["--device", "cpu", "--threads", "1"]).args(args);
        for name in ["RUST_LOG", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command
    }

    /// Run `args` with the sandbox's recipe.
    pub fn run(&self, args: &[&str]) -> Ran {
        let mut all = args.to_vec();
        all.extend(["--recipe", "recipe.toml"]);
        Ran::new(self.command(&all).output().expect("the binary starts"))
    }

    /// Start `args` with the sandbox's recipe; what it prints is read at its end.
    pub fn start(&self, args: &[&str]) -> Running {
        Running::new(&mut self.command(&[args, &["--recipe", "recipe.toml"]].concat()))
    }

    /// Run stage `what` of a run of another name, with `set` keys.
    pub fn run_as(&self, what: &str, name: &str, set: &[&str]) -> Ran {
        let name = format!("name={name}");
        let set = set.iter().flat_map(|key| ["--set", key]);
        self.run(&[what, "--set", &name].into_iter().chain(set).collect::<Vec<_>>())
    }

    /// Files of `folders` of a run, each as `folder/name`.
    pub fn files(&self, run: &str, folders: &[&str]) -> BTreeMap<String, Vec<u8>> {
        let of = |folder: &&str| {
            let (found, folder) = (files(&self.path("runs").join(run).join(folder)), (*folder).to_owned());
            found.into_iter().map(move |(name, bytes)| (format!("{folder}/{name}"), bytes))
        };
        folders.iter().flat_map(of).collect()
    }
}

/// The files of two runs must be the same, by name and byte.
#[track_caller]
pub fn assert_same(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>, who: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{who}");
    for (name, bytes) in found {
        assert!(*bytes == expected[name], "`{name}` of {who} differs");
    }
}

/// A command at work.
pub struct Running(pub Child);

impl Running {
    pub fn new(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().expect("the binary starts"))
    }

    /// Wait until `is_so`, two minutes at most; whether the command is still at work.
    pub fn wait_until(&mut self, is_so: impl FnMut() -> bool) -> bool {
        self.wait(Duration::from_secs(120), is_so)
    }

    fn wait(&mut self, most: Duration, mut is_so: impl FnMut() -> bool) -> bool {
        let begun = Instant::now();
        while !is_so() {
            if self.0.try_wait().expect("it is a child").is_some() {
                return false;
            }
            if begun.elapsed() > most {
                let _ = self.0.kill();
                panic!("it hangs");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    pub fn signal(&self, signal: i32) {
        let id = i32::try_from(self.0.id()).expect("an id is small");
        // SAFETY: a signal to a child that is not waited for yet.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Kill it after `delay`.
    pub fn kill_after(mut self, delay: Duration) {
        std::thread::sleep(delay);
        self.0.kill().expect("it is a child");
        self.0.wait().expect("it is a child");
    }

    /// As [`Running::end`]; what takes longer than a minute fails, and takes no test with it.
    pub fn end_soon(mut self) -> Ran {
        self.wait(Duration::from_secs(60), || false);
        self.end()
    }

    pub fn end(self) -> Ran {
        Ran::new(self.0.wait_with_output().expect("it is a child"))
    }
}

/// What a command printed.
pub struct Ran {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

impl Ran {
    pub fn new(output: Output) -> Self {
        Self {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.code().unwrap_or(-1),
        }
    }

    /// It must have worked.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// It must have refused its input with a hint and every one of `parts` on stderr.
    pub fn fails_with(self, parts: &[&str]) -> Self {
        self.fails_as(FailureKind::Input, parts)
    }

    /// It must have failed with the exit code of `kind`, a hint, all of `parts` on stderr, and no panic.
    pub fn fails_as(self, kind: FailureKind, parts: &[&str]) -> Self {
        let all = || format!("stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        assert_eq!(self.code, i32::from(kind.exit_code()), "{}", all());
        assert!(self.stderr.contains("error: "), "{}", all());
        assert!(self.stderr.contains("\nhint: "), "no hint\n{}", all());
        assert!(!self.stderr.contains("panicked"), "{}", all());
        for part in parts {
            assert!(self.stderr.contains(part), "`{part}` is missing\n{}", all());
        }
        self
    }
}

/// The commands that `--help` lists.
pub fn commands() -> Vec<String> {
    let help = Command::new(env!("CARGO_BIN_EXE_proxykv-train")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, groups) = help.split_once("Start:\n").unwrap_or_else(|| panic!("{help}"));
    let (groups, _) = groups.split_once("Options of every command:").unwrap_or_else(|| panic!("{help}"));
    let listed = groups.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    listed.map(str::to_owned).collect()
}

/// Short documents in plain words, different from each other; the small models know such text.
pub fn documents() -> String {
    let topics =
        ["harbour", "lantern", "garden", "tower", "bridge", "river", "castle", "market", "engine", "library"];
    let verbs = ["opens", "stores", "returns", "collects", "repairs", "describes", "protects", "counts"];
    let mut docs = Vec::new();
    for d in 0..40 {
        let mut text = format!("Notes on the {} number {d}. ", topics[d % topics.len()]);
        for k in 0..14 {
            let (a, b) = (topics[(d * 3 + k) % topics.len()], topics[(d + k * 7 + 1) % topics.len()]);
            let verb = verbs[(d + k * k) % verbs.len()];
            text.push_str(&format!("The {a} {verb} what the {b} of part {} needs. ", d * 14 + k));
        }
        docs.push(text);
    }
    docs.join("\0")
}

const MANIFEST: &str = r#"
description = "A few generated sentences"
[[source]]
name = "sentences"
files = ["documents.txt"]
format = "txt"
separator = "\u0000"
licence = "Apache-2.0"
[facts]
min = 0
max = 3
"#;

/// Shapes as in the small pair's config.json; sizes such that a whole run takes seconds.
const RECIPE: &str = r#"
name = "small"
seed = 3

[target]
model = "PAIR/target"
shape = { layers = 6, kv_heads = 2, query_heads = 4, head_dim = 32, hidden = 128, intermediate = 352, vocab = 4096 }

[proxy]
model = "PAIR/proxy"
shape = { layers = 3, kv_heads = 1, query_heads = 2, head_dim = 32, hidden = 64, intermediate = 176, vocab = 4096 }

[data]
manifest = "manifest.toml"
train = 12
validation = 2
test = 2
window_tokens = [96, 128]
min_tokens = 32
validation_share = 0.15
test_share = 0.2
shard_examples = 3

[mapper]
head_width = 8
width = 16
dilations = [1, 2]
cross_width = 8
cross_heads = 2

[train]
steps = 24
batch = 4
warmup_steps = 4
validate_every = 6
checkpoint_every = 3
log_every = 4
ema = 0.9

[eval]
ratios = [0.2, 0.05]
answer_ratios = [0.2, 0.05]
answer_policies = ["pair"]
contexts = 2
context_tokens = 160
facts_per_context = 2
max_answer_tokens = 12
continuation_tokens = 16
bootstrap = 100
"#;

/// Results of an evaluation without what two of the same may differ in: times, dates, and the hash over them.
pub fn timeless(results: &[u8]) -> Value {
    fn undated(value: &mut Value) {
        if let Some(object) = value.as_object_mut() {
            object.remove("measured");
            object.values_mut().for_each(undated);
        }
    }
    let mut value: Value = serde_json::from_slice(results).unwrap();
    undated(&mut value);
    let object = value.as_object_mut().unwrap();
    assert!(object.remove("timings").is_some() && object.remove("sha256").is_some());
    value
}

//! `push`: an export into a repository of a hub on the loopback interface.

use std::fs;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::sandbox::{Ran, Sandbox};
use pkv_test_support::hub::push::{Fault, PushServer, READER, WRITER};

const FILES: [&str; 5] =
    ["README.md", "budgets.json", "config.json", "model.safetensors", "parity.safetensors"];
const REPO: &str = "somebody/small-mapper";

/// A sandbox whose run has an export; made once.
fn exported() -> &'static Sandbox {
    static EXPORTED: OnceLock<Sandbox> = OnceLock::new();
    EXPORTED.get_or_init(|| {
        let s = Sandbox::new();
        for stage in ["prepare", "label", "extract", "train", "eval", "export"] {
            s.run(&[stage]).ok();
        }
        s
    })
}

fn push(s: &Sandbox, server: &PushServer, token: Option<&str>, args: &[&str]) -> Ran {
    let mut all = vec!["push"];
    all.extend(args);
    all.extend(["--repo", REPO]);
    let mut command = s.command(&all);
    command.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", s.path("hf"));
    if let Some(token) = token {
        command.env("HF_TOKEN", token);
    }
    Ran::new(command.output().unwrap())
}

#[test]
fn a_dry_run_says_what_would_be_done_and_sends_nothing() {
    let (s, server) = (exported(), PushServer::start());
    let ran = push(s, &server, None, &["runs/small"]).ok();
    for part in FILES.iter().chain(&[
        REPO,
        "branch `main`",
        &server.endpoint,
        "(public)",
        "no token",
        "no licence",
        "nothing was sent",
    ]) {
        assert!(ran.stdout.contains(part), "`{part}` is missing\n{}", ran.stdout);
    }
    let ran = push(s, &server, Some(WRITER), &["runs/small/export", "--private", "--json"]).ok();
    let printed: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&printed["dry_run"], &printed["private"], &printed["token"]),
        (&json!(true), &json!(true), &json!(true))
    );
    for file in printed["files"].as_array().unwrap() {
        let bytes = fs::read(s.path("runs/small/export").join(file["name"].as_str().unwrap())).unwrap();
        assert_eq!(file["bytes"], bytes.len());
        assert_eq!(file["sha256"], pkv_core::sha256_hex(&bytes).as_str());
    }
    assert!(!ran.stdout.contains(WRITER) && !ran.stderr.contains(WRITER), "the token is shown");
    assert!(server.requests("").is_empty());
}

#[test]
fn an_export_is_sent_once() {
    let (s, server) = (exported(), PushServer::start());
    // What else lies in the folder stays here.
    s.write("runs/small/export/notes.txt", "private thoughts");
    // The storage refuses the second large file: the branch is not changed, and the next push resumes.
    server.fail_next("verify", Fault::Status(400));
    push(s, &server, Some(WRITER), &["runs/small", "--yes"]).fails_with(&["cannot send", "status 400"]);
    assert_eq!(server.branch(REPO, "main").commits.len(), 1);
    let ran = push(s, &server, Some(WRITER), &["runs/small", "--yes", "--json"]).ok();
    let printed: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(printed["sent"], json!(FILES));
    assert_eq!((&printed["dry_run"], &printed["created"]), (&json!(false), &json!(false)));
    let branch = server.branch(REPO, "main");
    assert_eq!(branch.files.keys().collect::<Vec<_>>(), FILES);
    for (name, content) in &branch.files {
        assert!(*content == fs::read(s.path("runs/small/export").join(name)).unwrap(), "{name} differs");
    }
    let again = push(s, &server, Some(WRITER), &["runs/small/export", "--yes"]).ok();
    assert!(again.stdout.starts_with("nothing to send"), "{}", again.stdout);
    assert_eq!(server.branch(REPO, "main").commits.len(), 2);
    push(s, &server, Some(WRITER), &["runs/small", "--yes", "--private"]).fails_with(&["is public"]);
    // A token in a file, as the hub's own tools leave it.
    s.write("hf/token", &format!("{WRITER}\n"));
    push(s, &server, None, &["runs/small", "--yes", "--revision", "v2", "--message", "Another"]).ok();
    assert_eq!(server.branch(REPO, "v2").files.len(), 5);
    fs::remove_file(s.path("hf/token")).unwrap();
}

#[test]
fn the_card_of_a_run_tells_what_a_stranger_must_know() {
    let s = exported();
    let card = fs::read_to_string(s.path("runs/small/export/README.md")).unwrap();
    for part in [
        "---\nlicense: unknown\nlibrary_name: proxykv-train\ntags:\n- kv-cache\n",
        "proxykv-train infer --mapper ",
        "ProxyKVPress(",
        "## Pair",
        "## Labels",
        "| sentences | 12 | Apache-2.0 |",
        "GPU-hours",
        "| label | 0.0",
        "1 CPU thread",
        "Questions answered from the pruned cache",
        "Trained on contexts of at most 128 tokens",
        "Mapper: not stated.",
    ] {
        assert!(card.contains(part), "`{part}` is missing\n{card}");
    }
}

#[test]
fn what_cannot_be_sent_is_refused_with_a_hint() {
    let (s, server) = (exported(), PushServer::start());
    let fails = |token, args: &[&str], parts: &[&str]| {
        push(s, &server, token, args).fails_with(parts);
    };
    fails(None, &["runs/small", "--yes"], &["there is no token", "HF_TOKEN"]);
    fails(Some(WRITER), &["nowhere"], &["there is no folder `nowhere`"]);
    fails(Some(WRITER), &["runs/small", "--revision", "a b"], &["no name of a branch"]);
    s.write("half/run.json", "{}");
    fails(Some(WRITER), &["half", "--yes"], &["run `half` holds no export", "proxykv-train export"]);
    assert!(server.requests("").is_empty());
    fails(Some("hf_old"), &["runs/small", "--yes"], &["status 401", "expired"]);
    fails(Some(READER), &["runs/small", "--yes"], &["status 403", "may not write"]);

    // Not whole, or not sound: found out before anything is asked of the hub.
    server.requests("");
    for (name, file, change) in
        [("damaged", "model.safetensors", None), ("cardless", "README.md", Some("# no front matter\n"))]
    {
        for f in FILES {
            fs::create_dir_all(s.path(name)).unwrap();
            fs::copy(s.path("runs/small/export").join(f), s.path(name).join(f)).unwrap();
        }
        let mut bytes = fs::read(s.path(name).join(file)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(s.path(name).join(file), change.map_or(bytes, |c| c.as_bytes().to_vec())).unwrap();
        fails(Some(WRITER), &[name, "--yes"], &["export"]);
        fails(Some(WRITER), &[name], &["export"]);
    }
    assert!(server.requests("").is_empty());
}

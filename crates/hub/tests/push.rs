//! Uploads to a hub on the loopback interface, with the faults of networks, tokens and storages.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pkv_core::{Interrupted, NoProgress, Progress, Stop};
use pkv_hub::{Hub, HubOptions, Push, PushFile, Pushed};
use pkv_test_support::errors;
use pkv_test_support::hub::push::{Fault, PushServer, READER, WRITER};
use tempfile::TempDir;

const REPO: &str = "owner/mapper";
const NAMES: [&str; 4] = ["README.md", "config.json", "model.safetensors", "parity.safetensors"];

fn hub(endpoint: &str, token: Option<&str>) -> Hub {
    Hub::new(HubOptions {
        cache: "unused".into(),
        endpoint: endpoint.to_owned(),
        token: token.map(str::to_owned),
        attempts: 3,
        retry_after: Duration::from_millis(1),
        ..HubOptions::default()
    })
}

fn content(seed: usize) -> Vec<u8> {
    (0..100_000).map(|i| (i * 31 + i / 251 + seed) as u8).collect()
}

/// A folder with two small and two large files, and what sends it.
fn folder() -> (TempDir, PushServer, Push) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("README.md"), "---\nlicense: mit\n---\n# Card\n").unwrap();
    fs::write(dir.path().join("config.json"), "{}\n").unwrap();
    fs::write(dir.path().join("model.safetensors"), content(1)).unwrap();
    fs::write(dir.path().join("parity.safetensors"), content(2)).unwrap();
    fs::write(dir.path().join("secret.txt"), "not to be sent").unwrap();
    let push = measured(dir.path());
    (dir, PushServer::start(), push)
}

fn measured(dir: &Path) -> Push {
    Push {
        repo: REPO.to_owned(),
        revision: "main".to_owned(),
        private: false,
        message: "Upload a mapper".to_owned(),
        files: NAMES.iter().map(|n| PushFile::read(dir, n).unwrap()).collect(),
    }
}

fn send(server: &PushServer, push: &Push) -> anyhow::Result<Pushed> {
    hub(&server.endpoint, Some(WRITER)).push(push, &NoProgress, &Stop::default())
}

/// The error's whole chain, and its hint.
fn text_and_hint<T: std::fmt::Debug>(result: anyhow::Result<T>) -> (String, String) {
    let (text, hint) = errors::text_and_hint(&result.unwrap_err());
    assert!(!hint.is_empty(), "no hint with: {text}");
    (text, hint)
}

fn assert_arrived(dir: &Path, server: &PushServer, branch: &str) {
    let found = server.branch(REPO, branch).files;
    assert_eq!(found.keys().collect::<Vec<_>>(), NAMES);
    for name in NAMES {
        assert!(found[name] == fs::read(dir.join(name)).unwrap(), "{name} differs");
    }
}

/// No commit but the one that the repository was made with.
fn assert_untouched(server: &PushServer) {
    let branch = server.branch(REPO, "main");
    assert_eq!((branch.commits.len(), branch.files.len()), (1, 0), "{branch:?}");
}

#[test]
fn files_arrive_in_one_commit_of_a_new_repository() {
    let (dir, server, push) = folder();
    let done = send(&server, &push).unwrap();
    assert_arrived(dir.path(), &server, "main");
    let branch = server.branch(REPO, "main");
    assert_eq!(branch.commits, ["initial commit", "Upload a mapper"]);
    assert_eq!(done.commit, format!("{:040x}", 2));
    assert!(done.created && done.kept.is_empty());
    assert_eq!(done.sent, NAMES);
    assert_eq!(done.url, format!("{}/{REPO}", server.endpoint));
    assert!(server.state().storage.values().all(|(_, verified)| *verified));
    assert!(!server.state().repositories[REPO].private);
    assert_eq!(server.requests("verify").len(), 2);
}

#[test]
fn what_is_there_is_not_sent_again() {
    let (dir, server, push) = folder();
    let first = send(&server, &push).unwrap();
    server.requests("");
    let again = send(&server, &push).unwrap();
    assert_eq!((again.created, again.sent.len(), again.kept.len()), (false, 0, 4));
    assert_eq!(again.commit, first.commit);
    assert!(server.requests("").iter().all(|r| !r.contains("/commit/") && !r.starts_with("PUT")));
    assert_eq!(server.branch(REPO, "main").commits.len(), 2, "an empty commit was made");

    fs::write(dir.path().join("README.md"), "---\nlicense: mit\n---\n# Another card\n").unwrap();
    let third = send(&server, &measured(dir.path())).unwrap();
    assert_eq!(third.sent, ["README.md"]);
    assert_arrived(dir.path(), &server, "main");
    assert!(server.requests("PUT").is_empty());
}

#[test]
fn large_files_travel_in_parts_if_the_hub_asks_for_it() {
    let (dir, server, push) = folder();
    // Eleven parts: their numbers sort differently as texts.
    server.state().part_bytes = Some(9_200);
    server.fail_next("/10", Fault::Status(503));
    send(&server, &push).unwrap();
    assert_arrived(dir.path(), &server, "main");
    assert_eq!(server.requests("PUT").len(), 2 * 11 + 1);
}

#[test]
fn a_branch_is_made_and_main_is_left_alone() {
    let (dir, server, mut push) = folder();
    push.revision = "try/one".to_owned();
    push.private = true;
    let done = send(&server, &push).unwrap();
    assert_arrived(dir.path(), &server, "try/one");
    assert_untouched(&server);
    assert!(server.state().repositories[REPO].private);
    assert!(done.url.ends_with("/tree/try%2Fone"), "{}", done.url);
}

#[test]
fn a_public_repository_does_not_get_what_should_be_private() {
    let (_dir, server, mut push) = folder();
    server.state().repositories.insert(REPO.to_owned(), Default::default());
    push.private = true;
    let (text, hint) = text_and_hint(send(&server, &push));
    assert!(text.contains("is public") && hint.contains("settings"), "{text} {hint}");
    assert!(server.requests("POST").is_empty());
}

#[test]
fn tokens_that_are_absent_or_too_weak_are_told_apart() {
    let (_dir, server, push) = folder();
    let with = |token| text_and_hint(hub(&server.endpoint, token).push(&push, &NoProgress, &Stop::default()));
    let (text, hint) = with(None);
    assert!(text.contains("there is no token") && hint.contains("HF_TOKEN"), "{text} {hint}");
    assert!(server.requests("").is_empty(), "something was sent without a token");
    let (text, hint) = with(Some("hf_unknown"));
    assert!(text.contains("status 401: Invalid username") && hint.contains("expired"), "{text} {hint}");
    assert!(!text.contains("hf_unknown") && !hint.contains("hf_unknown"), "the token is shown");
    let (text, hint) = with(Some(READER));
    assert!(text.contains("cannot create repository") && text.contains("status 403"), "{text}");
    assert!(hint.contains("write access to `owner`"), "{hint}");
    send(&server, &push).unwrap();
    fs::write(&push.files[0].path, "changed").unwrap();
    let changed = measured(push.files[0].path.parent().unwrap());
    let (text, _) =
        text_and_hint(hub(&server.endpoint, Some(READER)).push(&changed, &NoProgress, &Stop::default()));
    assert!(text.contains("status 403"), "{text}");
    assert_eq!(server.branch(REPO, "main").commits.len(), 2);
}

#[test]
fn passing_faults_are_passed_over() {
    let (dir, server, push) = folder();
    for (part, fault) in [
        ("GET /api/models", Fault::HangUp),
        ("repos/create", Fault::LoseAnswer),
        ("preupload", Fault::Status(502)),
        ("objects/batch", Fault::Status(429)),
        ("PUT /storage", Fault::HangUp),
        ("PUT /storage", Fault::LoseAnswer),
        ("verify", Fault::Status(500)),
        ("/commit/", Fault::Status(503)),
    ] {
        server.fail_next(part, fault);
    }
    send(&server, &push).unwrap();
    assert_arrived(dir.path(), &server, "main");
    assert_eq!(server.branch(REPO, "main").commits.len(), 2);
}

#[test]
fn a_hub_that_says_nothing_is_not_waited_for_for_ever() {
    let (dir, server, push) = folder();
    let second = Duration::from_secs(1);
    let options = hub(&server.endpoint, Some(WRITER)).options().clone();
    let hasty = Hub::new(HubOptions { download_timeout: second, attempts: 5, ..options });
    for part in ["GET /api/models", "PUT /storage", "/commit/"] {
        server.fail_next(part, Fault::Silence);
    }
    let begun = Instant::now();
    hasty.push(&push, &NoProgress, &Stop::default()).unwrap();
    // An answer that takes work has more time than another.
    assert!(begun.elapsed() >= 13 * second);
    assert_arrived(dir.path(), &server, "main");
    assert_eq!(server.branch(REPO, "main").commits.len(), 2);
}

#[test]
fn a_commit_whose_answer_was_lost_is_not_made_twice() {
    let (dir, server, push) = folder();
    server.fail_next("/commit/", Fault::LoseAnswer);
    let done = send(&server, &push).unwrap();
    assert_eq!(done.commit, format!("{:040x}", 2));
    assert_arrived(dir.path(), &server, "main");
    assert_eq!(server.branch(REPO, "main").commits.len(), 2);
}

#[test]
fn a_commit_of_somebody_else_is_built_upon() {
    let (dir, server, push) = folder();
    send(&server, &push).unwrap();
    fs::write(dir.path().join("config.json"), "{\"a\": 1}\n").unwrap();
    server.fail_next("/commit/", Fault::Status(412));
    send(&server, &measured(dir.path())).unwrap();
    assert_arrived(dir.path(), &server, "main");
}

#[test]
fn a_broken_upload_leaves_no_half_commit_and_is_taken_up() {
    let (dir, server, push) = folder();
    for (part, attempts) in
        [("/preupload/", 3), ("objects/batch", 3), ("PUT /storage", 3), ("verify", 3), ("/commit/", 3)]
    {
        for _ in 0..attempts {
            server.fail_next(part, Fault::HangUp);
        }
        let (text, hint) = text_and_hint(send(&server, &push));
        assert!(text.contains("cannot be reached"), "{part}: {text}");
        assert!(hint.contains("not sent a second time"), "{part}: {hint}");
        assert_untouched(&server);
    }
    server.requests("");
    send(&server, &push).unwrap();
    assert_arrived(dir.path(), &server, "main");
    assert!(server.requests("PUT").is_empty(), "what had arrived was sent again");
}

/// Counts the bytes that were announced and those that went out.
#[derive(Default)]
struct Count {
    announced: AtomicU64,
    counted: AtomicU64,
}

impl Progress for Count {
    fn start(&self, _: &str, total: u64, _: u64) {
        self.announced.fetch_add(total, Ordering::Relaxed);
    }
    fn advance(&self, units: u64) {
        self.counted.fetch_add(units, Ordering::Relaxed);
    }
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

#[test]
fn an_interruption_between_requests_leaves_no_half_commit() {
    let (dir, server, push) = folder();
    for allowed in 0.. {
        let count = Count::default();
        match hub(&server.endpoint, Some(WRITER)).push(&push, &count, &Stop::after(allowed)) {
            Ok(_) => {
                assert!(allowed >= 3, "the push never asks whether to stop");
                break;
            }
            Err(e) => {
                assert!(e.downcast_ref::<Interrupted>().is_some(), "{e:#}");
                if allowed > 0 {
                    assert_untouched(&server);
                }
                assert_eq!(count.counted.into_inner(), count.announced.into_inner());
            }
        }
    }
    assert_arrived(dir.path(), &server, "main");
}

#[test]
fn files_that_change_on_the_way_are_not_committed() {
    let (dir, server, push) = folder();
    fs::write(dir.path().join("model.safetensors"), content(9)).unwrap();
    let (text, _) = text_and_hint(send(&server, &push));
    assert!(text.contains("another hash"), "{text}");
    assert_untouched(&server);
    fs::write(dir.path().join("model.safetensors"), content(1)).unwrap();
    fs::write(dir.path().join("config.json"), "{\"changed\": true}").unwrap();
    let (text, _) = text_and_hint(send(&server, &push));
    assert!(text.contains("config.json` changed"), "{text}");
    assert_untouched(&server);
}

#[test]
fn nothing_is_sent_offline_or_to_a_server_that_is_no_hub() {
    let (_dir, server, push) = folder();
    let mut options = hub(&server.endpoint, Some(WRITER)).options().clone();
    options.offline = true;
    let (text, hint) = text_and_hint(Hub::new(options).push(&push, &NoProgress, &Stop::default()));
    assert!(text.contains("HF_HUB_OFFLINE") && hint.contains("unset"), "{text}");
    assert!(server.requests("").is_empty());
    let (text, _) =
        text_and_hint(hub("http://127.0.0.1:9", Some(WRITER)).push(&push, &NoProgress, &Stop::default()));
    assert!(text.contains("cannot be reached"), "{text}");
    let (text, _) = text_and_hint(send(&server, &Push { repo: "nothing".to_owned(), ..push }));
    assert!(text.contains("no name of a hub repository"), "{text}");
}

//! A hub, or a mirror that HF_ENDPOINT names, that wants to write outside of the cache, to be sent secrets,
//! or to have them printed; and a cache that was prepared with malicious intent.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{NAME, fetch, link, model, options, python_cache, texts, tree};
use pkv_core::{NoProgress, Stop};
use pkv_hub::{Hub, HubOptions, Lock, Push, Pushed};
use pkv_test_support::hub::pull::{COMMIT, Server};
use tempfile::TempDir;

/// A data set of one file, and a cache in a folder of its own.
fn dataset() -> (TempDir, Server, Hub) {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
    server.put("datasets/a/b", "x.jsonl", b"{}\n");
    let hub = Hub::new(options(&dir.path().join("deep/er"), &server.endpoint));
    (dir, server, hub)
}

fn fetch_all(hub: &Hub) -> anyhow::Result<pkv_hub::DatasetFiles> {
    Ok(hub.fetch_dataset("a/b", "main", &["**".into()], &NoProgress, &Stop::default())?.0)
}

/// Nothing lies outside of the repository's folder and its locks.
fn assert_inside(dir: &Path) {
    let cache = dir.join("deep/er/hub");
    for path in tree(dir) {
        let inside = cache.join("datasets--a--b").starts_with(&path)
            || Path::new(&path).starts_with(cache.join("datasets--a--b"))
            || Path::new(&path).starts_with(cache.join(".locks"));
        assert!(inside, "{path} was written");
    }
}

fn push(hub: &Hub) -> anyhow::Result<Pushed> {
    let (repo, revision, message) = ("o/n".to_owned(), "main".to_owned(), "m".to_owned());
    let push = Push { repo, revision, private: false, message, files: Vec::new() };
    hub.push(&push, &NoProgress, &Stop::default())
}

#[test]
fn file_names_that_leave_the_cache_are_refused_by_name() {
    let (dir, server, hub) = dataset();
    let absolute = dir.path().join("owned.jsonl").display().to_string();
    for name in [
        "../../../../owned.jsonl",
        &absolute,
        "a/../../../../owned.jsonl",
        "a\\b.jsonl",
        "a//b.jsonl",
        "a\0b",
    ] {
        let listing = serde_json::json!({"sha": COMMIT, "siblings": [{"rfilename": name}]}).to_string();
        server.quirk(|q| q.listing = Some(listing.into_bytes()));
        let (text, hint) = texts(fetch_all(&hub).unwrap_err());
        assert!(text.contains("is no name of a file in a repository"), "{text}");
        assert!(hint.contains("outside"), "{hint}");
        assert_inside(dir.path());
    }
}

#[test]
fn etags_and_commits_that_are_no_names_are_refused_by_name() {
    let long = "0".repeat(5000);
    for etag in ["\"../../../../owned\"", "\"/owned\"", "\"a/b\"", "W/\"..\"", "\"\"", &long] {
        let (dir, server, hub) = dataset();
        server.quirk(|q| q.etag = Some(etag.to_owned()));
        let (text, _) = texts(fetch_all(&hub).unwrap_err());
        assert!(
            text.contains("cannot be the name of a file in the cache") || text.contains("no ETag"),
            "{text}"
        );
        assert!(text.len() < 2000, "{text}");
        assert_inside(dir.path());
    }
    for commit in ["../../../../owned", "/owned", "", "..", &long] {
        let (dir, server, hub) = dataset();
        server.quirk(|q| q.listed_commit = Some(commit.to_owned()));
        let (text, _) = texts(fetch_all(&hub).unwrap_err());
        assert!(text.contains("is no commit"), "{text}");
        assert!(text.len() < 2000, "{text}");
        assert_inside(dir.path());
    }
    let (dir, server, hub) = dataset();
    server.quirk(|q| q.commit = Some("../../owned".to_owned()));
    let (text, _) = texts(fetch_all(&hub).unwrap_err());
    assert!(text.contains(&format!("it is of commit `../../owned`, expected `{COMMIT}`")), "{text}");
    assert_inside(dir.path());
}

#[test]
fn a_listing_of_a_million_files_is_read_and_an_endless_one_is_not() {
    let (dir, server, hub) = dataset();
    let mut listing = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [");
    for i in 0..1_000_000 {
        listing.push_str(&format!("{{\"rfilename\":\"f{i}.txt\"}},"));
    }
    listing.push_str("{\"rfilename\":\"x.jsonl\"}]}");
    server.quirk(|q| q.listing = Some(listing.into_bytes()));
    let begun = Instant::now();
    let found =
        hub.fetch_dataset("a/b", "main", &["**/*.jsonl".into()], &NoProgress, &Stop::default()).unwrap().0;
    assert_eq!(found.files.len(), 1);
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());

    server.quirk(|q| q.listing = Some(vec![b' '; 65 << 20]));
    let (text, _) = texts(fetch_all(&hub).unwrap_err());
    assert!(text.contains("longer than 64 MiB"), "{text}");
    for nonsense in ["<html>", "[]", "{}", "{\"sha\": 3, \"siblings\": []}", &"[".repeat(100_000)] {
        server.quirk(|q| q.listing = Some(nonsense.as_bytes().to_vec()));
        let (text, hint) = texts(fetch_all(&hub).unwrap_err());
        assert!(text.contains("no listing of a repository"), "{text}");
        assert!(hint.contains("HF_ENDPOINT"), "{hint}");
    }
    assert_inside(dir.path());
}

#[test]
fn secrets_are_not_printed_even_if_a_server_repeats_them() {
    for status in [400, 401, 403, 404, 418, 429, 500] {
        let (_dir, server, hub) = model();
        server.fail_always(status);
        for (token, login) in [(Some("hf_SECRETsecret"), None), (None, Some("user:passw0rdXYZ"))] {
            let secret = HubOptions {
                token: token.map(str::to_owned),
                login: login.map(str::to_owned),
                ..hub.options().clone()
            };
            let hub = Hub::new(secret);
            let errors = [fetch(&hub).unwrap_err(), push(&hub).unwrap_err()];
            for error in errors {
                let debug = format!("{error:?} {hub:?}");
                let (text, hint) = texts(error);
                assert!(text.contains("you said") && text.contains("***"), "{text}");
                for part in ["SECRET", "passw0rd", "dXNlcjpwYXNzdzByZFhZWg"] {
                    assert!(!format!("{text} {hint} {debug}").contains(part), "{text} {hint} {debug}");
                }
            }
        }
    }
}

#[test]
fn a_token_is_not_sent_on_to_another_host() {
    let (_dir, server, hub) = model();
    let other = Server::start();
    let token = Some("hf_SECRETsecret".to_owned());
    let hub = Hub::new(HubOptions { token, ..hub.options().clone() });
    server.quirk(|q| q.redirect = Some(format!("{}/stolen", other.endpoint)));
    fetch(&hub).unwrap_err();
    push(&hub).unwrap_err();
    let stolen = other.seen();
    assert!(!stolen.is_empty(), "nothing was redirected");
    assert!(stolen.iter().all(|s| !format!("{s:?}").contains("SECRET")), "{stolen:?}");
}

#[test]
fn names_of_a_recipe_or_a_lock_stay_in_the_cache() {
    let (dir, _server, hub) = dataset();
    let out = dir.path().join("secret.txt");
    fs::write(&out, "c0").unwrap();
    for (name, revision) in [
        ("../../../etc", "main"),
        ("a/b", "/etc"),
        ("a/b", "../../../../etc"),
        ("a/b", out.to_str().unwrap()),
    ] {
        let error = hub.dataset_files(name, revision, &["passwd".into()]).unwrap_err();
        assert!(texts(error).0.contains("of a hub repository"), "{name} {revision}");
    }
    let mut lock = Lock::default();
    let file = pkv_hub::PinnedFile { bytes: 2, sha256: "0".repeat(64) };
    for (commit, name) in [("c0", "../../../../../secret.txt"), ("../../../..", "secret.txt")] {
        let pin = pkv_hub::Pin {
            asked: "main".to_owned(),
            commit: commit.to_owned(),
            files: [(name.to_owned(), file.clone())].into(),
        };
        lock.datasets.insert("a/b".to_owned(), pin);
        let hub = hub.clone().with_lock(lock.clone());
        for error in
            [hub.dataset_files("a/b", "main", &["**".into()]).unwrap_err(), fetch_all(&hub).unwrap_err()]
        {
            assert!(texts(error).0.contains("the lock file of `a/b` is unsound"));
        }
    }
}

#[test]
fn links_that_lead_out_of_the_repository_are_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = python_cache(dir.path());
    let hub = Hub::new(HubOptions { offline: true, ..options(dir.path(), "http://127.0.0.1:9") });
    hub.model(NAME, "main", &[]).unwrap();
    let out = dir.path().join("out.json");
    fs::write(&out, "{}").unwrap();
    fs::remove_file(snapshot.join("config.json")).unwrap();
    link(&out, &snapshot.join("config.json"));
    for error in [hub.model(NAME, "main", &[]).unwrap_err(), fetch(&hub).unwrap_err()] {
        let (text, hint) = texts(error);
        assert!(text.contains("leads out of its repository in the cache"), "{text}");
        assert!(hint.contains("delete"), "{hint}");
    }

    // A link to its own folder is no folder to go down to.
    let snapshot = dir.path().join("hub/datasets--a--b/snapshots/c0");
    fs::create_dir_all(&snapshot).unwrap();
    link(Path::new("."), &snapshot.join("loop"));
    link(Path::new("/etc"), &snapshot.join("etc"));
    link(Path::new("/etc/passwd"), &snapshot.join("d.txt"));
    let error = hub.dataset_files("a/b", "c0", &["**".into()]).unwrap_err();
    assert!(texts(error).0.contains("d.txt` leads out"));
    fs::remove_file(snapshot.join("d.txt")).unwrap();
    fs::write(snapshot.join("e.txt"), "e").unwrap();
    let found = hub.dataset_files("a/b", "c0", &["**".into()]).unwrap();
    assert_eq!(found.files, [snapshot.join("e.txt")]);
}

#[test]
fn a_planted_part_is_not_written_through() {
    let (dir, server, hub) = dataset();
    let victim = dir.path().join("victim");
    fs::write(&victim, "").unwrap();
    let etag = &pkv_test_support::hub::sha256(b"{}\n")[..40];
    let blobs = dir.path().join("deep/er/hub/datasets--a--b/blobs");
    link(&victim, &blobs.join(format!("{etag}.incomplete")));
    fetch_all(&hub).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"");
    drop(server);
}

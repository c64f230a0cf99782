//! Downloads from hubs, CDNs and mirrors as they are, over networks as they are.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{NAME, assert_whole, fetch, hasty, model, options, texts, tree, weights};
use pkv_core::{Interrupted, NoProgress, Progress, Stop};
use pkv_hub::{DatasetFiles, Hub, HubOptions, Pin};
use pkv_test_support::hub::pull::{COMMIT, Fault, Hop, Server};
use pkv_test_support::hub::sha256;

const TOKEN: &str = "hf_0123456789";

fn with_token(hub: &Hub) -> Hub {
    Hub::new(HubOptions { token: Some(TOKEN.to_owned()), ..hub.options().clone() })
}

fn blobs(cache: &Path) -> Vec<String> {
    let folder = cache.join("hub/models--owner--small-1b/blobs");
    let mut names: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn fetch_data(hub: &Hub) -> anyhow::Result<(DatasetFiles, Pin)> {
    hub.fetch_dataset("o/d", "main", &["*".into()], &NoProgress, &Stop::default())
}

/// A tokenizer of a size that CDNs compress.
fn long_text() -> Vec<u8> {
    (0..3000).flat_map(|i| format!("token {i}\n").into_bytes()).collect()
}

#[test]
fn the_question_has_no_range_and_no_answer_may_be_compressed() {
    let (_dir, server, hub) = model();
    fetch(&with_token(&hub)).unwrap();
    let seen = server.seen();
    let questions: Vec<_> = seen.iter().filter(|s| s.method == "HEAD").collect();
    assert_eq!(questions.len(), 5);
    for s in &seen {
        assert_eq!(s.headers["accept-encoding"], "identity", "{s:?}");
        assert!(s.headers["user-agent"].starts_with("proxykv-train/"), "{s:?}");
        assert!(!s.headers.contains_key("range"), "{s:?}");
        // The token is for the hub; the storage is another host.
        assert_eq!(s.headers.contains_key("authorization"), !s.abroad, "{s:?}");
    }
    // A large file's redirect has all that is needed.
    assert!(seen.iter().any(|s| s.abroad) && questions.iter().all(|s| !s.abroad));
}

#[test]
fn a_cdn_that_compresses_is_no_obstacle() {
    let (_dir, server, hub) = model();
    server.put(&format!("models/{NAME}"), "tokenizer.json", &long_text());
    server.quirk(|q| q.compress = true);
    let (found, _) = fetch(&hub).unwrap();
    assert_eq!(fs::read(found.folder.join("tokenizer.json")).unwrap(), long_text());

    // Compressed although it was not asked for: the hub's size tells whether it is whole, or else its hash.
    for with_size in [true, false] {
        let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
        let hub = Hub::new(options(dir.path(), &server.endpoint));
        server.put("datasets/o/d", "a.jsonl", &long_text());
        server.quirk(|q| {
            q.compress_always = true;
            q.size = with_size.then(|| long_text().len().to_string());
            q.etag = Some(format!("\"{}\"", git_hash(&long_text())));
        });
        // What breaks off within a compressed body cannot be taken up, and comes anew.
        server.fail_next("a.jsonl", Fault::HangUpAfter(100));
        let (found, _) = fetch_data(&hub).unwrap();
        assert_eq!(fs::read(&found.files[0]).unwrap(), long_text());
    }
}

#[test]
fn an_encoding_that_cannot_be_decoded_is_refused_by_name() {
    let (_dir, server, hub) = model();
    server.fail_next("config.json", Fault::Encoded("br"));
    let (text, _) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("encoded as `br`"), "{text}");
}

#[test]
fn weak_etags_name_the_same_content() {
    let (dir, server, hub) = model();
    server.quirk(|q| q.weak_etags = true);
    let (found, _) = fetch(&hub).unwrap();
    let name = sha256(b"{}")[..40].to_owned();
    assert_eq!(
        fs::read_link(found.folder.join("tokenizer.json")).unwrap(),
        Path::new("../../blobs").join(&name)
    );
    assert!(blobs(dir.path()).contains(&name));
    assert!(tree(dir.path()).iter().all(|p| !p.ends_with("/W")));
}

#[test]
fn mirrors_may_redirect_as_they_like() {
    for hop in [Hop::Relative, Hop::Bare, Hop::Abroad] {
        let (_dir, server, hub) = model();
        server.quirk(|q| q.hop = hop);
        assert_whole(&fetch(&with_token(&hub)).unwrap().0.folder);
        for s in server.seen() {
            assert_eq!(s.headers.contains_key("authorization"), !s.abroad, "{hop:?}: {s:?}");
        }
    }
    // HEAD is refused by the mirror, or by its storage; commits are not named.
    for quirk in 0..3 {
        let (_dir, server, hub) = model();
        server.quirk(|q| match quirk {
            0 => q.no_head = true,
            1 => (q.storage_refuses_head, q.no_sizes) = (true, true),
            _ => q.commit = Some(String::new()),
        });
        assert_whole(&fetch(&hub).unwrap().0.folder);
    }
}

#[test]
fn redirects_end() {
    let (_dir, server, hub) = model();
    let round = format!("{}/round", server.endpoint);
    server.quirk(|q| q.redirect = Some(round));
    let (text, _) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("more than 10 redirects"), "{text}");
    assert_eq!(server.requests().len(), 11);
    server.quirk(|q| q.redirect = Some("ftp://elsewhere/x".to_owned()));
    let (text, _) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("which is no web address"), "{text}");
}

#[test]
fn names_with_odd_characters_are_found() {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
    let hub = Hub::new(options(dir.path(), &server.endpoint));
    let names = ["a b.jsonl", "c#d?e.jsonl", "f%20g.jsonl", "h/ä+.jsonl"];
    for name in names {
        server.put("datasets/o/d", name, name.as_bytes());
    }
    let (found, pin) = hub
        .fetch_dataset("o/d", "refs/convert/parquet", &["**".into()], &NoProgress, &Stop::default())
        .unwrap();
    assert_eq!(pin.files.keys().collect::<Vec<_>>(), names);
    for (file, name) in found.files.iter().zip(names) {
        assert_eq!(fs::read(file).unwrap(), name.as_bytes());
    }
    // The branch is noted under its name, slashes and all.
    let branch = dir.path().join("hub/datasets--o--d/refs/refs/convert/parquet");
    assert_eq!(fs::read_to_string(branch).unwrap(), COMMIT);
    let found = hub.dataset_files("o/d", "refs/convert/parquet", &["*.jsonl".into()]).unwrap();
    assert_eq!(found.files.len(), 3);
}

#[test]
fn a_size_that_is_not_announced_is_proven_by_the_end_or_by_a_hash() {
    let (_dir, server, hub) = model();
    server.quirk(|q| q.no_sizes = true);
    assert_whole(&fetch(&hub).unwrap().0.folder);

    // Cut off anywhere, a body that ends with its connection looks whole.
    let (_dir, server, hub) = model();
    server.quirk(|q| q.close_delimited = true);
    let (text, _) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("whether it came whole cannot be known"), "{text}");
    let git = git_hash(b"{}");
    server.put("datasets/o/d", "a.jsonl", b"{}");
    server.quirk(|q| q.etag = Some(format!("\"{git}\"")));
    fetch_data(&hub).unwrap();
}

#[test]
fn a_page_in_place_of_a_file_is_never_kept() {
    for with_size in [true, false] {
        let (dir, server, hub) = model();
        server.quirk(|q| q.no_sizes = !with_size);
        for _ in 0..3 {
            server.fail_next("config.json", Fault::Page);
        }
        let (text, _) = texts(fetch(&hub).unwrap_err());
        assert!(text.contains(if with_size { "19 were announced" } else { "its ETag is not" }), "{text}");
        assert!(!blobs(dir.path()).contains(&sha256(b"{\"hidden_size\": 64}")[..40].to_owned()));
        server.fail_next("config.json", Fault::Page);
        assert_eq!(
            fs::read(fetch(&hub).unwrap().0.folder.join("config.json")).unwrap(),
            b"{\"hidden_size\": 64}"
        );
    }
    let (_dir, server, hub) = model();
    server.quirk(|q| q.listing = Some(b"\n<html>Sign in</html>".to_vec()));
    let (text, _) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("the answer is a web page, no listing of a repository"), "{text}");
}

/// Git's name of a content.
fn git_hash(content: &[u8]) -> String {
    use sha1::{Digest, Sha1};
    let all = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
    Sha1::digest(all).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn silence_and_stalls_are_passed_over() {
    let (_dir, server, hub) = model();
    let shard = sha256(&weights(2));
    server.fail_next("/api/", Fault::Silence);
    server.fail_next("config.json", Fault::Silence);
    server.fail_next(&shard, Fault::StallAfter(70_000));
    let begun = Instant::now();
    assert_whole(&fetch(&hasty(&hub)).unwrap().0.folder);
    assert!(begun.elapsed() >= 3 * common::SHORT);
    let requests = server.requests();
    assert!(requests.iter().any(|r| r.ends_with("bytes=70000-")), "{requests:?}");
}

#[test]
fn a_hub_that_says_nothing_is_given_up() {
    let (_dir, server, hub) = model();
    let mut options = hasty(&hub).options().clone();
    options.attempts = 2;
    for _ in 0..2 {
        server.fail_next("/api/", Fault::Silence);
    }
    let (text, hint) = texts(fetch(&Hub::new(options)).unwrap_err());
    assert!(text.contains("cannot reach") && text.contains("no answer in time"), "{text}");
    assert!(hint.contains("HF_HUB_DOWNLOAD_TIMEOUT"), "{hint}");
}

#[test]
fn a_trickle_is_a_stall() {
    let (_dir, server, hub) = model();
    server.put("datasets/o/d", "a.jsonl", &long_text());
    server.fail_next("a.jsonl", Fault::Trickle(Duration::from_millis(200)));
    fetch_data(&hasty(&hub)).unwrap();
    let requests = server.requests();
    assert!(requests.iter().any(|r| r.contains("bytes=")), "what had come was thrown away: {requests:?}");
}

#[test]
fn a_busy_hub_is_waited_for_as_it_asks_but_not_for_ever() {
    let (_dir, server, hub) = model();
    server.fail_next("config.json", Fault::Busy(429, "1"));
    server.fail_next("/api/", Fault::Busy(503, "Thu, 01 Jan 1970 00:00:00 GMT"));
    let begun = Instant::now();
    fetch(&hub).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));

    let (_dir, server, hub) = model();
    server.fail_next("config.json", Fault::Busy(429, "86400"));
    let (text, hint) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("it asks to wait 86400 s"), "{text}");
    assert!(hint.contains("wait some minutes"), "{hint}");
}

#[test]
fn a_late_answer_is_an_answer() {
    let (_dir, server, hub) = model();
    server.fail_next("config.json", Fault::Delay(Duration::from_millis(300)));
    fetch(&hub).unwrap();
    assert_eq!(server.requests().iter().filter(|r| r.contains("config.json")).count(), 2);
}

#[test]
fn ranges_are_only_believed_when_they_fit() {
    for fault in [Fault::IgnoreRange, Fault::WrongRange, Fault::OtherEtag] {
        let (_dir, server, hub) = model();
        let shard = sha256(&weights(2));
        server.fail_next(&shard, Fault::HangUpAfter(70_000));
        server.fail_next(&shard, fault.clone());
        assert_whole(&fetch(&hub).unwrap().0.folder);
        let seen = server.seen();
        let ranged = seen.iter().find(|s| s.headers.contains_key("range")).unwrap();
        assert_eq!(ranged.headers["if-range"], format!("\"{}-1\"", &shard[..32]), "{fault:?}");
    }
}

/// Calls back when bytes come.
struct OnBytes<F: Fn(u64) + Sync>(F);

impl<F: Fn(u64) + Sync> Progress for OnBytes<F> {
    fn start(&self, _: &str, _: u64, _: u64) {}
    fn advance(&self, units: u64) {
        (self.0)(units);
    }
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

#[test]
fn a_content_that_changes_meanwhile_is_not_mixed() {
    let (_dir, server, hub) = model();
    let changed = long_text().to_ascii_uppercase();
    server.put("datasets/o/d", "a.jsonl", &long_text());
    server.fail_next("a.jsonl", Fault::HangUpAfter(500));
    let change = OnBytes(|_| server.put("datasets/o/d", "a.jsonl", &changed));
    let (text, _) =
        texts(hub.fetch_dataset("o/d", "main", &["*".into()], &change, &Stop::default()).unwrap_err());
    assert!(text.contains("its ETag is another by now"), "{text}");
    let (found, _) = fetch_data(&hub).unwrap();
    assert!(fs::read(&found.files[0]).unwrap() == changed);
}

#[test]
fn bodies_of_another_length_than_announced_are_never_kept() {
    for (fault, part) in
        [(Fault::Longer(3), "more than the announced"), (Fault::Shorter(3), "were announced")]
    {
        let (dir, server, hub) = model();
        let shard = sha256(&weights(1));
        for _ in 0..3 {
            server.fail_next(&shard, fault.clone());
        }
        let (text, _) = texts(fetch(&hub).unwrap_err());
        assert!(text.contains(part), "{text}");
        assert!(!blobs(dir.path()).contains(&shard));
        assert_whole(&fetch(&hub).unwrap().0.folder);
    }
}

#[test]
fn lies_about_sizes_are_refused() {
    for (size, part) in [
        ("4611686018427387904", "were announced"),
        ("3", "3 were announced"),
        ("-5", "its size is `-5`"),
        ("many", "its size is `many`"),
    ] {
        let (dir, server, hub) = model();
        server.quirk(|q| q.size = Some(size.to_owned()));
        let (text, _) = texts(fetch(&hub).unwrap_err());
        assert!(text.contains(part), "{text}");
        assert!(blobs(dir.path()).iter().all(|b| b.ends_with(".incomplete")));
    }
}

#[test]
fn an_interruption_keeps_what_has_arrived() {
    let (dir, server, hub) = model();
    let shard = sha256(&weights(1));
    server.fail_next(&shard, Fault::StallAfter(150_000));
    let (come, stop) = (AtomicU64::new(0), Stop::default());
    let progress = OnBytes(|n| {
        if come.fetch_add(n, Ordering::Relaxed) + n >= 150_000 {
            stop.request();
        }
    });
    let error = hub.fetch_model(NAME, "main", &[], &progress, &stop).unwrap_err();
    assert!(error.downcast_ref::<Interrupted>().is_some(), "{error:#}");
    let part = dir.path().join(format!("hub/models--owner--small-1b/blobs/{shard}.incomplete"));
    let had = fs::metadata(&part).unwrap().len();
    assert!(had > 0, "nothing was kept");
    server.requests();
    assert_whole(&fetch(&hub).unwrap().0.folder);
    assert!(server.requests().iter().any(|r| r.ends_with(&format!("bytes={had}-"))));
}

#[test]
fn an_interruption_ends_a_wait() {
    let (_dir, server, hub) = model();
    server.fail_next("/api/", Fault::Busy(503, "100"));
    let begun = Instant::now();
    hub.fetch_model(NAME, "main", &[], &NoProgress, &Stop::after(2)).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn downloads_at_the_same_time_share_the_work() {
    let (_dir, server, hub) = model();
    let shard = sha256(&weights(2));
    // The first one is slow enough to be met.
    server.fail_next(&shard, Fault::Delay(Duration::from_secs(1)));
    thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| fetch(&hub).unwrap())).collect();
        for one in all {
            assert_whole(&one.join().unwrap().0.folder);
        }
    });
    let bodies = server.seen().into_iter().filter(|s| s.abroad && s.path.contains(&shard)).count();
    assert_eq!(bodies, 1, "a content was downloaded more than once");
}

#[test]
fn a_cache_that_cannot_be_locked_is_filled_all_the_same() {
    let (dir, _server, hub) = model();
    // A file where the folder of locks should be.
    fs::create_dir_all(dir.path().join("hub")).unwrap();
    fs::write(dir.path().join("hub/.locks"), "").unwrap();
    assert_whole(&fetch(&hub).unwrap().0.folder);
    assert!(blobs(dir.path()).iter().all(|b| !b.ends_with(".incomplete")));
}

#[test]
fn a_content_that_is_there_is_not_downloaded_for_another_commit() {
    let (_dir, server, hub) = model();
    fetch(&hub).unwrap();
    server.move_branch_to("ffffffffffffffffffffffffffffffffffffffff");
    server.requests();
    let (found, _) = fetch(&hub).unwrap();
    assert!(found.folder.ends_with("ffffffffffffffffffffffffffffffffffffffff"));
    assert_whole(&found.folder);
    assert!(server.seen().iter().all(|s| s.method == "HEAD" || s.path.starts_with("/api/")));
}

#[test]
fn a_lost_blob_is_brought_back() {
    let (_dir, _server, hub) = model();
    let (found, _) = fetch(&hub).unwrap();
    let shard = found.folder.join("model-00001-of-00002.safetensors");
    fs::remove_file(fs::canonicalize(&shard).unwrap()).unwrap();
    assert_whole(&fetch(&hub).unwrap().0.folder);
}

#[test]
fn a_part_that_lost_its_bytes_is_not_built_upon() {
    let (dir, server, hub) = model();
    let text = long_text();
    server.put("datasets/o/d", "a.jsonl", &text);
    server.quirk(|q| q.etag = Some(format!("\"{}\"", git_hash(&text))));
    let blobs = dir.path().join("hub/datasets--o--d/blobs");
    fs::create_dir_all(&blobs).unwrap();
    // As a file system leaves it whose power failed.
    fs::write(blobs.join(format!("{}.incomplete", git_hash(&text))), [0; 40]).unwrap();
    let (found, _) = fetch_data(&hub).unwrap();
    assert!(fs::read(&found.files[0]).unwrap() == text);
}

#[test]
fn downloads_send_no_token_if_it_is_not_to_be_implicit() {
    let (_dir, server, hub) = model();
    let options = HubOptions { implicit_token: false, ..with_token(&hub).options().clone() };
    fetch(&Hub::new(options)).unwrap();
    assert!(server.seen().iter().all(|s| !s.headers.contains_key("authorization")));
    // The address' own user goes before the token.
    let login = Some("user:passw0rd".to_owned());
    fetch(&Hub::new(HubOptions { login, ..with_token(&hub).options().clone() })).unwrap();
    let seen = server.seen();
    assert!(seen.iter().all(|s| s.abroad || s.headers["authorization"] == "Basic dXNlcjpwYXNzdzByZA=="));
}

#[cfg(unix)]
#[test]
fn a_cache_that_may_only_be_read_serves_what_it_has() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _server, hub) = model();
    let (found, _) = fetch(&hub).unwrap();
    let set = |mode: u32| {
        for path in tree(dir.path()).iter().filter(|p| Path::new(p).is_dir()) {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    set(0o555);
    let before = tree(dir.path());
    let may_write = fs::write(dir.path().join("hub/probe"), "").is_ok();
    let again = fetch(&hub);
    let offline = fetch(&Hub::new(HubOptions { offline: true, ..hub.options().clone() }));
    let after = tree(dir.path());
    set(0o755);
    assert_eq!((again.unwrap().0, offline.unwrap().0), (found.clone(), found));
    // An administrator may write everywhere; then it shows that nothing was.
    assert_eq!(after.len(), before.len() + usize::from(may_write));
}

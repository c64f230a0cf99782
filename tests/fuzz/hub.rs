//! What a hub answers, and what a cache holds from one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use pkv_core::NoProgress;
use pkv_hub::{Hub, HubOptions};
use serde_json::{Value, json};

use crate::folder;
use crate::harness::Target;
use crate::server::pull::{COMMIT, Fault, Server};

#[test]
fn hub_answers() {
    let dir = folder("hub");
    let answers = json!({
        "listing": {"sha": COMMIT, "siblings": [{"rfilename": "x.jsonl"}, {"rfilename": "deep/y.jsonl", "size": 3}]},
        "etag": "\"abc\"", "commit": COMMIT, "size": "3", "status": 0, "cut": 0, "more": 0,
    });
    fs::write(dir.join("answers.json"), answers.to_string()).unwrap();
    let read = |dir: &Path| {
        let server = Server::start();
        for file in ["x.jsonl", "deep/y.jsonl"] {
            server.put("datasets/a/b", file, b"{}\n");
        }
        let text = fs::read(dir.join("answers.json"))?;
        match serde_json::from_slice::<Value>(&text) {
            Ok(answers) => {
                let of = |name: &str| answers[name].as_str().map(str::to_owned);
                let number = |name: &str| answers[name].as_u64().filter(|n| *n > 0);
                // Headers cannot hold line ends.
                let header = |name: &str| of(name).map(|text| text.replace(['\r', '\n'], " "));
                server.quirk(|q| {
                    q.listing = Some(answers["listing"].to_string().into_bytes());
                    (q.etag, q.commit, q.size) = (header("etag"), header("commit"), header("size"));
                    q.always = number("status").map(|n| (200 + n % 400) as u16);
                });
                if let Some(n) = number("cut") {
                    server.fail_next("x.jsonl", Fault::HangUpAfter((n % 4) as usize));
                }
                if let Some(n) = number("more") {
                    server.fail_next("x.jsonl", Fault::Longer((n % 1000) as usize));
                }
            }
            Err(_) => server.quirk(|q| q.listing = Some(text)),
        }
        let around = dir.join("around");
        let _ = fs::remove_dir_all(&around);
        let second = Duration::from_secs(1);
        let hub = Hub::new(HubOptions {
            cache: around.join("deep/hub"),
            endpoint: server.endpoint.clone(),
            attempts: 2,
            retry_after: Duration::from_millis(1),
            etag_timeout: second,
            download_timeout: second,
            ..HubOptions::default()
        });
        let fetched = hub.fetch_dataset("a/b", "main", &["**".into()], &NoProgress, &|| Ok(()));
        for (parent, only) in [(around.clone(), "deep"), (around.join("deep"), "hub")] {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                assert_eq!(entry.file_name(), only, "written outside of the cache");
            }
        }
        let _ = fs::remove_dir_all(&around);
        let (files, _) = fetched?;
        ensure!(!files.files.is_empty(), "no file");
        Ok(())
    };
    Target { name: "hub", folder: &dir, files: &["answers.json"], repair: None, read: &read }.fuzz();
}

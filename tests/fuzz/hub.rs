//! What a hub answers, and what a cache holds from one.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::ensure;
use pkv_core::{NoProgress, Stop};
use pkv_hub::{Hub, HubOptions, Push, PushFile};
use serde_json::{Map, Value, json};

use crate::folder;
use crate::harness::Target;
use pkv_test_support::hub::pull::{COMMIT, Fault, Server};
use pkv_test_support::hub::push::{PushServer, WRITER};

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
        let fetched = hub.fetch_dataset("a/b", "main", &["**".into()], &NoProgress, &Stop::default());
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

/// The place of a hub in the answers of another.
const ENDPOINT: &str = "http://endpoint";

#[test]
fn push_answers() {
    let dir = folder("push");
    fs::write(dir.join("README.md"), "---\nlicense: mit\n---\n").unwrap();
    fs::write(dir.join("model.safetensors"), [7; 9000]).unwrap();
    let push = Push {
        repo: "owner/mapper".to_owned(),
        revision: "side".to_owned(),
        private: false,
        message: "Upload".to_owned(),
        files: ["README.md", "model.safetensors"].map(|n| PushFile::read(&dir, n).unwrap()).to_vec(),
    };
    let send = |server: &PushServer| {
        let second = Duration::from_secs(1);
        let hub = Hub::new(HubOptions {
            cache: "unused".into(),
            endpoint: server.endpoint.clone(),
            token: Some(WRITER.to_owned()),
            attempts: 2,
            retry_after: Duration::from_millis(1),
            etag_timeout: second,
            download_timeout: second,
            ..HubOptions::default()
        });
        hub.push(&push, &NoProgress, &Stop::default()).map(drop)
    };
    // The answers of a hub that is right, by request.
    let server = PushServer::start();
    let said: Arc<Mutex<Map<String, Value>>> = Arc::default();
    let (record, endpoint) = (said.clone(), server.endpoint.clone());
    server.state().change = Some(Box::new(move |line, body| {
        let text = body.replace(&endpoint, ENDPOINT);
        record.lock().unwrap().insert(line.to_owned(), serde_json::from_str(&text).unwrap());
        body
    }));
    send(&server).unwrap();
    let said = Value::Object(std::mem::take(&mut *said.lock().unwrap()));
    fs::write(dir.join("answers.json"), said.to_string()).unwrap();

    let read = |dir: &Path| {
        let text = fs::read(dir.join("answers.json"))?;
        let server = PushServer::start();
        let endpoint = server.endpoint.clone();
        let said = serde_json::from_slice::<Value>(&text);
        let text = String::from_utf8_lossy(&text).into_owned();
        server.state().change = Some(Box::new(move |line, body| match &said {
            Ok(said) => said.get(line).map_or(body, |b| b.to_string().replace(ENDPOINT, &endpoint)),
            Err(_) => text.clone(),
        }));
        send(&server)
    };
    Target { name: "push", folder: &dir, files: &["answers.json"], repair: None, read: &read }.fuzz();
}

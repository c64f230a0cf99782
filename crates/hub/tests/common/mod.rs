//! A model on a hub, a cache, and what a fetch said.

#![allow(dead_code, reason = "each test binary uses some of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pkv_core::{NoProgress, Stop};
use pkv_hub::{Hub, HubOptions};
use pkv_test_support::errors::text_and_hint;
use pkv_test_support::hub::pull::{COMMIT, Server};
use pkv_test_support::hub::sha256;
use tempfile::TempDir;

pub const NAME: &str = "owner/small-1b";

/// For tests that wait for it; what else they ask for may come at the third attempt on a busy machine.
pub const SHORT: Duration = Duration::from_secs(1);
/// For all others.
const LONG: Duration = Duration::from_secs(60);

pub fn options(cache: &Path, endpoint: &str) -> HubOptions {
    HubOptions {
        cache: cache.join("hub"),
        endpoint: endpoint.to_owned(),
        attempts: 3,
        retry_after: Duration::from_millis(1),
        etag_timeout: LONG,
        download_timeout: LONG,
        ..HubOptions::default()
    }
}

/// A hub with a two-shard model, and an empty cache.
pub fn model() -> (TempDir, Server, Hub) {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
    let repository = format!("models/{NAME}");
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    server.put(&repository, "config.json", b"{\"hidden_size\": 64}");
    server.put(&repository, "tokenizer.json", b"{}");
    server.put(&repository, "model.safetensors.index.json", index.as_bytes());
    server.put(&repository, "model-00001-of-00002.safetensors", &weights(1));
    server.put(&repository, "model-00002-of-00002.safetensors", &weights(2));
    server.put(&repository, "original/consolidated.00.pth", b"not wanted");
    server.put(&repository, "README.md", b"not wanted");
    let hub = Hub::new(options(dir.path(), &server.endpoint));
    (dir, server, hub)
}

pub fn weights(seed: usize) -> Vec<u8> {
    (0..200_000).map(|i| (i * 31 + i / 251 + seed) as u8).collect()
}

pub fn fetch(hub: &Hub) -> anyhow::Result<(pkv_hub::Resolved, Option<pkv_hub::Pin>)> {
    hub.fetch_model(NAME, "main", &[], &NoProgress, &Stop::default())
}

pub fn assert_whole(folder: &Path) {
    assert_eq!(fs::read(folder.join("model-00001-of-00002.safetensors")).unwrap(), weights(1));
    assert_eq!(fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), weights(2));
}

/// The error's whole chain, and its hint.
pub fn texts(error: anyhow::Error) -> (String, String) {
    text_and_hint(&error)
}

pub fn link(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(from, to).unwrap();
}

/// `models--owner--small-1b` as the Python package leaves it: blobs, links, a branch.
pub fn python_cache(root: &Path) -> PathBuf {
    let repository = root.join("hub/models--owner--small-1b");
    let blobs = repository.join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    let snapshot = repository.join("snapshots").join(COMMIT);
    for (file, content) in
        [("config.json", &b"{}"[..]), ("tokenizer.json", b"{}"), ("model.safetensors", b"weights")]
    {
        let blob = sha256(content);
        fs::write(blobs.join(&blob), content).unwrap();
        let _ = fs::remove_file(snapshot.join(file));
        link(&PathBuf::from("../../blobs").join(blob), &snapshot.join(file));
    }
    snapshot
}

/// The same hub with little patience.
pub fn hasty(hub: &Hub) -> Hub {
    Hub::new(HubOptions {
        attempts: 5,
        etag_timeout: SHORT,
        download_timeout: SHORT,
        ..hub.options().clone()
    })
}

/// Everything below a folder, links not followed.
pub fn tree(folder: &Path) -> Vec<String> {
    let mut out = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        out.push(entry.path().display().to_string());
        if entry.file_type().unwrap().is_dir() {
            out.extend(tree(&entry.path()));
        }
    }
    out.sort();
    out
}

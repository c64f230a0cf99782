//! Models and data sets from folders, from a cache laid out by `huggingface_hub`, and from a hub
//! on the loopback interface, with the faults of networks and disks.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{NAME, assert_whole, fetch, model, options, python_cache, texts, weights};
use pkv_core::{NoProgress, Stop};
use pkv_hub::{Hub, HubOptions, Lock, fetch_manifest, fetch_recipe, lock_path};
use pkv_test_support::hub::pull::{COMMIT, Fault, Server};
use pkv_test_support::hub::sha256;

#[test]
fn a_model_is_downloaded_once_and_then_found_without_network() {
    let (_dir, server, hub) = model();
    let (resolved, pin) = fetch(&hub).unwrap();
    assert_whole(&resolved.folder);
    assert_eq!(resolved.revision, COMMIT);
    assert!(!resolved.folder.join("README.md").exists() && !resolved.folder.join("original").exists());
    let pin = pin.unwrap();
    assert_eq!((pin.files.len(), pin.commit.as_str(), pin.asked.as_str()), (5, COMMIT, "main"));
    assert_eq!(pin.files["model-00002-of-00002.safetensors"].sha256, sha256(&weights(2)));

    server.requests();
    assert_eq!(hub.model(NAME, "main", &[]).unwrap(), resolved);
    assert_eq!(hub.model(NAME, COMMIT, &[]).unwrap(), resolved);
    assert!(server.requests().is_empty(), "a look-up touched the network");
    fetch(&hub).unwrap();
    assert_eq!(server.requests().len(), 1, "only the branch is asked for again");
}

#[test]
fn a_cache_written_by_python_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = python_cache(dir.path());
    let hub = Hub::new(options(dir.path(), "http://127.0.0.1:9"));
    let found = hub.model(NAME, "main", &[]).unwrap();
    assert_eq!((found.folder, found.revision.as_str()), (snapshot.clone(), COMMIT));

    // A link whose content was lost.
    let weights = snapshot.join("model.safetensors");
    fs::remove_file(fs::canonicalize(&weights).unwrap()).unwrap();
    let (text, hint) = texts(hub.model(NAME, "main", &[]).unwrap_err());
    assert!(
        text.contains("lacks `model.safetensors`") && hint.contains("proxykv-train fetch"),
        "{text} {hint}"
    );

    fs::remove_file(snapshot.join("tokenizer.json")).unwrap();
    let (text, hint) = texts(hub.model(NAME, "main", &[]).unwrap_err());
    assert!(text.contains("lacks `model.safetensors`, `tokenizer.json`"), "{text}");
    assert!(hint.contains("proxykv-train fetch"), "{hint}");
}

#[test]
fn a_local_folder_wins_over_a_hub_name() {
    let dir = tempfile::tempdir().unwrap();
    python_cache(dir.path());
    let hub = Hub::new(options(dir.path(), "http://127.0.0.1:9"));
    let folder = dir.path().join("base").join(NAME);
    fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::write(folder.join(file), "{}").unwrap();
    }
    let base = dir.path().join("base");
    let bases = [dir.path(), base.as_path()];
    let (text, _) = texts(hub.model(NAME, "main", &bases).unwrap_err());
    assert!(text.contains("lacks `model.safetensors`"), "{text}");
    fs::write(folder.join("model.safetensors"), "weights").unwrap();
    let found = hub.model(NAME, "main", &bases).unwrap();
    assert_eq!(found.folder, folder);
    assert!(found.revision.starts_with("local:"));
    let absolute = hub.model(folder.to_str().unwrap(), "main", &bases).unwrap();
    assert_eq!(absolute, found);
    // Fetching what is local downloads nothing and pins nothing.
    assert_eq!(hub.fetch_model(NAME, "main", &bases, &NoProgress, &Stop::default()).unwrap(), (found, None));

    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    // The single file is read where there are both, as transformers does.
    hub.model(NAME, "main", &bases).unwrap();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let (text, _) = texts(hub.model(NAME, "main", &bases).unwrap_err());
    assert!(text.contains("lacks `model-00001-of-00002.safetensors`"), "{text}");
}

#[test]
fn what_is_neither_folder_nor_cached_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::new(options(dir.path(), "http://127.0.0.1:9"));
    let (text, hint) = texts(hub.model("models/tiny", "main", &[dir.path()]).unwrap_err());
    assert!(
        text.contains("`models/tiny` is no folder") && text.contains("not in the Hugging Face cache"),
        "{text}"
    );
    assert!(hint.contains("proxykv-train fetch"), "{hint}");
    let (text, _) = texts(hub.model("./models/tiny", "main", &[dir.path()]).unwrap_err());
    assert_eq!(text, "there is no model folder `./models/tiny`");
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, what, repair) in [
        ("config.json", "the model `config.json` is a file", "name the folder that holds"),
        ("https://huggingface.co/owner/name", "there is no model folder", "`owner/name`"),
        ("~/models/tiny", "there is no model folder", "write the path out"),
        ("", "there is no model folder ``", "check the path"),
    ] {
        let bases = [dir.path()];
        for error in [
            hub.model(name, "main", &bases).unwrap_err(),
            hub.fetch_model(name, "main", &bases, &NoProgress, &Stop::default()).unwrap_err(),
        ] {
            let (text, hint) = texts(error);
            assert!(text.starts_with(what) && hint.contains(repair), "{name}: {text} / {hint}");
        }
    }
    let (text, _) = texts(hub.dataset_files("owner/texts", "main", &["*.parquet".into()]).unwrap_err());
    assert!(text.contains("hub data set `owner/texts` (revision `main`) is not in"), "{text}");
}

#[test]
fn offline_mode_downloads_nothing() {
    let (dir, server, hub) = model();
    let offline = Hub::new(HubOptions { offline: true, ..options(dir.path(), &server.endpoint) });
    let (text, hint) = texts(fetch(&offline).unwrap_err());
    assert!(
        text.contains("HF_HUB_OFFLINE is set") && hint.contains("unset HF_HUB_OFFLINE"),
        "{text} / {hint}"
    );
    assert!(server.requests().is_empty());
    // What is on this machine needs no network, locked or not.
    let (resolved, pin) = fetch(&hub).unwrap();
    assert_eq!(fetch(&offline).unwrap().0, resolved);
    let mut lock = Lock::default();
    lock.models.insert(NAME.into(), pin.unwrap());
    assert_eq!(fetch(&offline.with_lock(lock)).unwrap().0, resolved);
}

#[test]
fn absent_and_gated_models_are_told_apart() {
    let (_dir, server, hub) = model();
    let (text, hint) =
        texts(hub.fetch_model("owner/none", "main", &[], &NoProgress, &Stop::default()).unwrap_err());
    assert!(text.contains("has no model `owner/none` at revision `main`"), "{text}");
    assert!(hint.contains("check name and revision"), "{hint}");
    let (text, _) = texts(hub.fetch_model(NAME, "v9", &[], &NoProgress, &Stop::default()).unwrap_err());
    assert!(text.contains("at revision `v9`"), "{text}");
    server.fail_always(401);
    let (text, hint) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("the hub refuses model `owner/small-1b` (status 401)"), "{text}");
    assert!(hint.contains("HF_TOKEN"), "{hint}");
}

#[test]
fn an_unreachable_hub_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    // The port of a closed listener refuses connections.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let (text, hint) = texts(fetch(&Hub::new(options(dir.path(), &endpoint))).unwrap_err());
    assert!(text.contains(&format!("cannot reach model `owner/small-1b` on the hub `{endpoint}`")), "{text}");
    assert!(hint.contains("HF_ENDPOINT"), "{hint}");
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let (_dir, server, hub) = model();
    let shard = sha256(&weights(2));
    server.fail_next("config.json", Fault::HangUpAfter(10));
    server.fail_next(&shard, Fault::HangUpAfter(70_000));
    server.fail_next(&shard, Fault::HangUpAfter(50_000));
    let (resolved, _) = fetch(&hub).unwrap();
    assert_whole(&resolved.folder);
    let requests = server.requests();
    for resumed in
        ["config.json bytes=10-", &format!("{shard} bytes=70000-"), &format!("{shard} bytes=120000-")]
    {
        assert!(requests.iter().any(|r| r.ends_with(resumed)), "{resumed} is not in {requests:?}");
    }
}

#[test]
fn a_fetch_that_failed_is_taken_up_by_the_next() {
    let (dir, server, hub) = model();
    for _ in 0..3 {
        server.fail_next("config.json", Fault::HangUpAfter(1));
    }
    let (text, hint) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("cannot fetch `config.json` of model"), "{text}");
    assert!(hint.contains("goes on where it stopped"), "{hint}");
    let parts = |cache: &Path| {
        let blobs = fs::read_dir(cache.join("hub/models--owner--small-1b/blobs")).unwrap();
        blobs.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "incomplete")).count()
    };
    assert_eq!(parts(dir.path()), 1);
    server.requests();
    assert_whole(&fetch(&hub).unwrap().0.folder);
    assert!(server.requests().iter().any(|r| r.contains("config.json bytes=3-")));
    assert_eq!(parts(dir.path()), 0);
}

#[test]
fn a_part_that_is_whole_but_was_never_renamed_is_completed() {
    let (dir, _server, hub) = model();
    let blobs = dir.path().join("hub/models--owner--small-1b/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(sha256(&weights(1))).with_extension("incomplete"), weights(1)).unwrap();
    // And one that is longer than the file ever was.
    fs::write(blobs.join(sha256(&weights(2))).with_extension("incomplete"), vec![0; 300_000]).unwrap();
    assert_whole(&fetch(&hub).unwrap().0.folder);
}

#[test]
fn busy_servers_and_ignored_ranges_are_survived() {
    let (_dir, server, hub) = model();
    server.fail_next("/api/", Fault::Status(503));
    server.fail_next("tokenizer.json", Fault::Status(429));
    server.fail_next("config.json", Fault::HangUpAfter(5));
    server.fail_next("config.json", Fault::IgnoreRange);
    assert_whole(&fetch(&hub).unwrap().0.folder);
}

#[test]
fn a_cache_that_cannot_be_written_is_no_network_problem() {
    let (dir, _server, hub) = model();
    // A file where the cache's folder should be.
    fs::write(dir.path().join("hub"), "").unwrap();
    let (text, hint) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("cannot write into the Hugging Face cache"), "{text}");
    assert!(hint.contains("HF_HUB_CACHE"), "{hint}");
}

#[test]
fn damaged_bytes_are_noticed_and_not_kept() {
    let (_dir, server, hub) = model();
    server.fail_next(&sha256(&weights(1)), Fault::Damage);
    let (text, hint) = texts(fetch(&hub).unwrap_err());
    assert!(text.contains("the transfer was damaged: expected sha256"), "{text}");
    assert!(hint.contains("fetch"), "{hint}");
    let (resolved, pin) = fetch(&hub).unwrap();
    assert_whole(&resolved.folder);
    let pin = pin.unwrap();
    assert_eq!(pin.files["model-00001-of-00002.safetensors"].sha256, sha256(&weights(1)));
}

#[test]
fn files_that_differ_from_the_lock_are_refused() {
    let (_dir, _server, hub) = model();
    let (resolved, pin) = fetch(&hub).unwrap();
    let mut lock = Lock::default();
    lock.models.insert(NAME.into(), pin.unwrap());
    let locked = hub.clone().with_lock(lock.clone());
    assert_eq!(locked.model(NAME, "main", &[]).unwrap(), resolved);

    // Same length, other content.
    let config = fs::canonicalize(resolved.folder.join("config.json")).unwrap();
    let before = fs::read(&config).unwrap();
    fs::write(&config, String::from_utf8(before.clone()).unwrap().replace("64", "65")).unwrap();
    for error in [locked.model(NAME, "main", &[]).unwrap_err(), fetch(&locked).unwrap_err()] {
        let (text, hint) = texts(error);
        assert!(text.contains("differs from the lock file: expected sha256"), "{text}");
        assert!(hint.contains("delete that file"), "{hint}");
    }
    fs::write(&config, &before).unwrap();
    locked.model(NAME, "main", &[]).unwrap();

    // A lock for another content of the hub's file.
    lock.models.get_mut(NAME).unwrap().files.get_mut("tokenizer.json").unwrap().sha256 = "0".repeat(64);
    assert!(
        texts(fetch(&hub.clone().with_lock(lock.clone())).unwrap_err()).0.contains("differs from the lock")
    );

    // A recipe that asks for another revision than the lock.
    let (text, _) = texts(locked.model(NAME, "v2", &[]).unwrap_err());
    assert!(text.contains("is asked for at revision `v2`, but the lock file pins `main`"), "{text}");
}

#[test]
fn a_locked_commit_outlives_a_branch_that_moved() {
    let (dir, server, hub) = model();
    let recipe_path = dir.path().join("pair.toml");
    fs::write(&recipe_path, recipe_text()).unwrap();
    let recipe = pkv_recipe::load(&recipe_path, &[]).unwrap();
    let (target, proxy) = fetch_recipe(&hub, &recipe, &[], &NoProgress, &Stop::default()).unwrap();
    assert_eq!((Some(&target), target.revision.as_str()), (proxy.as_ref(), COMMIT));
    let written = fs::read_to_string(lock_path(&recipe_path)).unwrap();
    assert!(written.contains(COMMIT) && written.contains(&sha256(&weights(1))), "{written}");

    server.move_branch_to("ffffffffffffffffffffffffffffffffffffffff");
    fs::remove_dir_all(&hub.options().cache).unwrap();
    let (target, _) = fetch_recipe(&hub, &recipe, &[], &NoProgress, &Stop::default()).unwrap();
    assert_eq!(target.revision, COMMIT);
    assert_eq!(fs::read_to_string(lock_path(&recipe_path)).unwrap(), written);
    let locked = hub.clone().with_lock(Lock::beside(&recipe_path).unwrap());
    assert_eq!(locked.model(NAME, "main", &[]).unwrap().revision, COMMIT);

    fs::remove_file(lock_path(&recipe_path)).unwrap();
    let (target, _) = fetch_recipe(&hub, &recipe, &[], &NoProgress, &Stop::default()).unwrap();
    assert_eq!(target.revision, "ffffffffffffffffffffffffffffffffffffffff");
}

#[test]
fn a_proxy_that_is_not_read_is_neither_fetched_nor_pinned() {
    let (dir, _server, hub) = model();
    let recipe_path = dir.path().join("pair.toml");
    let text = recipe_text().replace("[proxy]\nmodel = \"", "[proxy]\nmodel = \"absent-");
    fs::write(&recipe_path, format!("{text}[extract]\nfrom = [\"target\"]\n")).unwrap();
    let recipe = pkv_recipe::load(&recipe_path, &[]).unwrap();
    assert!(recipe.proxy.is_some());
    let (target, proxy) = fetch_recipe(&hub, &recipe, &[], &NoProgress, &Stop::default()).unwrap();
    assert_eq!((target.revision.as_str(), proxy), (COMMIT, None));
    let written = fs::read_to_string(lock_path(&recipe_path)).unwrap();
    assert!(written.contains(NAME) && !written.contains("absent-"), "{written}");
    let both = pkv_recipe::load(&recipe_path, &["extract.from=[\"proxy\"]".into()]).unwrap();
    let refused = fetch_recipe(&hub, &both, &[], &NoProgress, &Stop::default()).unwrap_err();
    assert!(format!("{refused:#}").contains("`proxy.model`"), "{refused:#}");
}

fn recipe_text() -> String {
    let model = format!(
        "model = \"{NAME}\"\nshape = {{ layers = 1, kv_heads = 1, query_heads = 1, head_dim = 8, hidden = 8, \
         intermediate = 8, vocab = 8 }}\n"
    );
    format!(
        "name = \"pair\"\n[target]\n{model}[proxy]\n{model}[data]\nmanifest = \"m.toml\"\ntrain = 1\nvalidation = 0\ntest = 0\n"
    )
}

#[test]
fn data_sets_are_chosen_by_pattern_and_locked() {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
    for file in
        ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "data/deep/train-2.parquet"]
    {
        server.put("datasets/owner/texts", file, file.as_bytes());
    }
    let hub = Hub::new(options(dir.path(), &server.endpoint));
    let path = dir.path().join("texts.toml");
    let source = |name: &str, files: &str| {
        format!(
            "[[source]]\nname = \"{name}\"\nhub = \"owner/texts\"\nhub_files = [\"{files}\"]\nformat = \"parquet\"\n\
             licence = \"CC0-1.0\"\n"
        )
    };
    let text = format!(
        "description = \"two sources of one data set\"\n{}{}",
        source("train", "data/train-*.parquet"),
        source("test", "data/test-*.parquet")
    );
    fs::write(&path, text).unwrap();
    let manifest = pkv_recipe::load_manifest(&path).unwrap();
    fetch_manifest(&hub, &manifest, &path, &NoProgress, &Stop::default()).unwrap();
    let lock = Lock::beside(&path).unwrap();
    let files: Vec<_> = lock.datasets["owner/texts"].files.keys().map(String::as_str).collect();
    assert_eq!(files, ["data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet"]);

    let hub = hub.with_lock(lock);
    let names = |patterns: &[&str]| {
        let patterns: Vec<_> = patterns.iter().map(|p| (*p).to_owned()).collect();
        let found = hub.dataset_files("owner/texts", "main", &patterns)?;
        assert_eq!(found.commit, COMMIT);
        let name = |f: &PathBuf| f.strip_prefix(&found.folder).unwrap().display().to_string();
        anyhow::Ok(found.files.iter().map(name).collect::<Vec<_>>())
    };
    // In the order of the patterns, each file once.
    let all = names(&["data/train-1.parquet", "data/*.parquet"]).unwrap();
    assert_eq!(all, ["data/train-1.parquet", "data/test-0.parquet", "data/train-0.parquet"]);
    let (text, hint) = texts(names(&["**/train-2.parquet"]).unwrap_err());
    assert_eq!(text, "no file of data set `owner/texts` matches `**/train-2.parquet`");
    assert!(hint.contains("fetch"), "{hint}");
}

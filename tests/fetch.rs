//! `fetch`: the small pair from a hub on the loopback interface, and what the commands say about that hub.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pkv_core::FailureKind;

use crate::sandbox::{Ran, Running, Sandbox, root};
use pkv_test_support::hub::pull::{Fault, Server};
use pkv_test_support::hub::sha256;

const TOKEN: &str = "hf_SECRETsecretSECRET";
const PASSWORD: &str = "passw0rdXYZ";

/// A sandbox whose recipe names the small pair on a hub.
fn on_a_hub() -> (Sandbox, Server) {
    let (s, server) = (Sandbox::new(), Server::start());
    let pair = root().join("recipes/nano-llama");
    for role in ["target", "proxy"] {
        for file in fs::read_dir(pair.join(role)).unwrap().flatten().filter(|f| f.path().is_file()) {
            let name = file.file_name().into_string().unwrap();
            server.put(&format!("models/nano/{role}"), &name, &fs::read(file.path()).unwrap());
        }
        s.edit("recipe.toml", &format!("{}/{role}", pair.display()), &format!("nano/{role}"));
    }
    (s, server)
}

fn command(s: &Sandbox, endpoint: &str, args: &[&str]) -> Command {
    let mut command = s.command(args);
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", s.path("hf")).env("HF_HUB_DOWNLOAD_TIMEOUT", "60");
    command
}

const FETCH: [&str; 3] = ["fetch", "--recipe", "recipe.toml"];

#[test]
fn what_was_fetched_is_found_without_a_network() {
    let (s, server) = on_a_hub();
    server.quirk(|q| q.compress = true);
    server.fail_next("config.json", Fault::Busy(429, "1"));
    let ran = Ran::new(command(&s, &server.endpoint, &FETCH).output().unwrap()).ok();
    assert!(
        ran.stderr.contains("attempt 1 of 5 failed") && ran.stderr.contains("status 429"),
        "{}",
        ran.stderr
    );
    let mut offline = command(&s, &server.endpoint, &["prepare", "--recipe", "recipe.toml"]);
    server.requests();
    Ran::new(offline.env("HF_HUB_OFFLINE", "1").output().unwrap()).ok();
    assert!(server.requests().is_empty());
}

#[test]
fn an_interrupted_fetch_keeps_what_has_arrived() {
    let (s, server) = on_a_hub();
    server.fail_next("/storage/", Fault::Trickle(Duration::from_millis(1)));
    let mut fetch = Running::new(&mut command(&s, &server.endpoint, &FETCH));
    // The small files come and go; the weights are named by their hash.
    let weights = fs::read(root().join("recipes/nano-llama/target/model.safetensors")).unwrap();
    let part = format!("hf/hub/models--nano--target/blobs/{}.incomplete", sha256(&weights));
    let length = || fs::metadata(s.path(&part)).map_or(0, |m| m.len());
    assert!(fetch.wait_until(|| length() >= 50), "it ended by itself");
    fetch.signal(libc::SIGINT);
    let ran = fetch.end();
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let kept = length();
    assert!(kept >= 50 && kept < weights.len() as u64, "{kept}");
    server.requests();
    Ran::new(command(&s, &server.endpoint, &FETCH).output().unwrap()).ok();
    let requests = server.requests();
    assert!(requests.iter().any(|r| r.ends_with(&format!("bytes={kept}-"))), "{kept} {requests:?}");
}

#[test]
fn no_secret_is_shown_by_any_command() {
    let (s, server) = on_a_hub();
    let with_password = server.endpoint.replace("://", &format!("://user:{PASSWORD}@"));
    let closed = with_password.rsplit_once(':').unwrap().0.to_owned() + ":9";
    for (endpoint, status) in
        [(&server.endpoint, 401), (&with_password, 403), (&with_password, 404), (&closed, 0)]
    {
        server.quirk(|q| q.always = Some(status));
        for args in [
            &["-vv", "fetch", "--recipe", "recipe.toml"][..],
            &["-vv", "doctor", "--recipe", "recipe.toml", "--json"],
            &["doctor"],
            &["-vv", "prepare", "--recipe", "recipe.toml"],
        ] {
            let mut command = command(&s, endpoint, args);
            command.env("HF_TOKEN", TOKEN).env("RUST_LOG", "trace").env("HF_HUB_ETAG_TIMEOUT", "60");
            let ran = Ran::new(command.output().unwrap());
            let said = format!("{}{}", ran.stdout, ran.stderr);
            for secret in [TOKEN, PASSWORD, "dXNlcjpwYXNzdzByZFhZWg"] {
                assert!(!said.contains(secret), "{args:?} at {endpoint}:\n{said}");
            }
            if args.contains(&"fetch") {
                let refused = status != 0;
                let kind = if refused { FailureKind::Input } else { FailureKind::Environment };
                assert_eq!(ran.code, i32::from(kind.exit_code()), "{said}");
                assert!(status == 0 || said.contains("you said") && said.contains("***"), "{said}");
            }
        }
    }
    let mut bad = command(&s, &server.endpoint, &FETCH);
    let ran = Ran::new(bad.env("HF_TOKEN", "hf_bad\nX-Injected: 1").output().unwrap());
    let ran = ran.fails_with(&["the token for the hub cannot be sent", "check HF_TOKEN"]);
    assert!(!ran.stderr.contains("hf_bad"), "{}", ran.stderr);
}

//! A hub that takes uploads: repositories with branches, a storage for large files, and the faults of both.
//!
//! It is strict where the hub is: a storage refuses an unknown token and content of another hash, and a
//! commit names only large files that were stored and verified.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use crate::http::Request;

/// May write; `READER` may only read.
pub const WRITER: &str = "hf_writer";
pub const READER: &str = "hf_reader";

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answer with this status, having done nothing.
    Status(u16),
    /// Hang up, having done nothing.
    HangUp,
    /// Do it, and hang up before the answer.
    LoseAnswer,
    /// Say nothing, having done nothing.
    Silence,
}

#[derive(Clone, Debug, Default)]
pub struct Repository {
    pub private: bool,
    pub branches: BTreeMap<String, Branch>,
}

#[derive(Clone, Debug, Default)]
pub struct Branch {
    /// Messages of its commits; their number names the last one.
    pub commits: Vec<String>,
    pub files: BTreeMap<String, Vec<u8>>,
}

#[derive(Default)]
pub struct State {
    pub repositories: BTreeMap<String, Repository>,
    /// Large files by hash, with whether they were verified.
    pub storage: BTreeMap<String, (Vec<u8>, bool)>,
    /// `METHOD /address` of every request.
    pub requests: Vec<String>,
    /// Ask for parts of this many bytes.
    pub part_bytes: Option<usize>,
    parts: BTreeMap<(String, usize), Vec<u8>>,
    faults: Vec<(String, Fault)>,
    /// What becomes of the body of an answer, after its request's `METHOD /address`.
    pub change: Option<Change>,
    endpoint: String,
}

pub type Change = Box<dyn FnMut(&str, String) -> String + Send>;

pub struct PushServer {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl PushServer {
    pub fn start() -> Self {
        let (endpoint, state) = super::listen(|endpoint| State { endpoint, ..State::default() }, answer);
        Self { endpoint, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Let the next request fail whose `METHOD /address` contains `part`.
    pub fn fail_next(&self, part: &str, fault: Fault) {
        self.state().faults.push((part.to_owned(), fault));
    }

    /// Requests since the last call, those that contain `part`.
    pub fn requests(&self, part: &str) -> Vec<String> {
        let all = std::mem::take(&mut self.state().requests);
        all.into_iter().filter(|r| r.contains(part)).collect()
    }

    pub fn branch(&self, repository: &str, branch: &str) -> Branch {
        self.state().repositories[repository].branches[branch].clone()
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let Some(request) = Request::read(&mut BufReader::new(&stream)) else { return };
    let line = format!("{} {}", request.method, request.address);
    let mut state = state.lock().unwrap();
    state.requests.push(line.clone());
    let fault = state.faults.iter().position(|(part, _)| line.contains(part.as_str()));
    let fault = fault.map(|i| state.faults.remove(i).1);
    let (status, headers, body) = match fault {
        Some(Fault::HangUp) => return,
        Some(Fault::Silence) => {
            drop(state);
            return super::wait_for_the_end(&stream);
        }
        Some(Fault::Status(status)) => (status, String::new(), json!({"error": "out of order"})),
        _ => state.respond(&request),
    };
    if fault == Some(Fault::LoseAnswer) {
        return;
    }
    let mut body = body.to_string();
    if let Some(change) = &mut state.change {
        body = change(&line, body);
    }
    let head = format!(
        "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body.as_bytes());
}

type Reply = (u16, String, Value);

fn plain(status: u16, body: Value) -> Reply {
    (status, String::new(), body)
}

fn refuse(status: u16, why: &str) -> Reply {
    plain(status, json!({"error": why}))
}

fn commit_id(n: usize) -> String {
    format!("{n:040x}")
}

impl State {
    fn respond(&mut self, r: &Request) -> Reply {
        if let Some(rest) = r.address.strip_prefix("/storage/") {
            return self.store(r, rest);
        }
        match r.headers.get("authorization").and_then(|a| a.strip_prefix("Bearer ")) {
            Some(WRITER) => {}
            Some(READER) if r.method == "GET" => {}
            Some(READER) => return refuse(403, "this token may not write"),
            _ => return refuse(401, "Invalid username or password."),
        }
        let body: Value = serde_json::from_slice(&r.body).unwrap_or_default();
        if r.address == "/api/repos/create" {
            let name =
                format!("{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
            if self.repositories.contains_key(&name) {
                return refuse(409, "You already created this model repo");
            }
            let first = Branch { commits: vec!["initial commit".to_owned()], ..Branch::default() };
            let branches = [("main".to_owned(), first)].into();
            self.repositories.insert(name, Repository { private: body["private"] == true, branches });
            return plain(200, json!({"url": "made"}));
        }
        if let Some((_, rest)) = r.address[1..].split_once(".git/info/lfs/") {
            return if rest == "verify" { self.verify(&body) } else { self.batch(&r.address, &body) };
        }
        let Some(rest) = r.address.strip_prefix("/api/models/") else { return refuse(404, "no such page") };
        let mut parts = rest.splitn(4, '/');
        let name = format!("{}/{}", parts.next().unwrap(), parts.next().unwrap_or_default());
        let (what, revision) = (parts.next(), parts.next().map(|r| r.replace("%2F", "/")));
        let Some(repository) = self.repositories.get_mut(&name) else {
            return refuse(404, "Repository not found");
        };
        let private = repository.private;
        let Some(revision) = revision else { return plain(200, json!({"id": name, "private": private})) };
        if what == Some("branch") {
            let from = repository.branches["main"].clone();
            repository.branches.entry(revision).or_insert(from);
            return plain(200, Value::Null);
        }
        let Some(branch) = repository.branches.get_mut(&revision) else {
            return refuse(404, "Invalid rev id");
        };
        match what {
            Some("revision") => {
                plain(200, json!({"sha": commit_id(branch.commits.len()), "private": private}))
            }
            Some("preupload") => preupload(branch, &body),
            Some("commit") => commit(branch, &self.storage, &r.body),
            _ => refuse(404, "no such page"),
        }
    }

    fn batch(&self, path: &str, body: &Value) -> Reply {
        let base = &self.endpoint;
        let repository = path.split(".git/").next().unwrap();
        let object = |o: &Value| {
            let oid = o["oid"].as_str().unwrap();
            if self.storage.get(oid).is_some_and(|s| s.1) {
                return json!({"oid": oid, "size": o["size"]});
            }
            let verify = json!({"href": format!("{base}{repository}.git/info/lfs/verify")});
            let upload = match self.part_bytes {
                None => json!({"href": format!("{base}/storage/{oid}"), "header": {"X-Signed": "yes"}}),
                Some(n) => {
                    let mut header = json!({"chunk_size": n.to_string()});
                    for part in 1..=o["size"].as_u64().unwrap().div_ceil(n as u64) {
                        // Not in the order of the numbers as texts.
                        header[part.to_string()] = json!(format!("{base}/storage/{oid}/{part}"));
                    }
                    json!({"href": format!("{base}/storage/{oid}/complete"), "header": header})
                }
            };
            json!({"oid": oid, "size": o["size"], "actions": {"upload": upload, "verify": verify}})
        };
        let objects: Vec<Value> = body["objects"].as_array().unwrap().iter().map(object).collect();
        plain(200, json!({"objects": objects}))
    }

    fn store(&mut self, r: &Request, rest: &str) -> Reply {
        if r.headers.contains_key("authorization") {
            return refuse(400, "only one auth mechanism is allowed: the token came along");
        }
        let (oid, part) = rest.split_once('/').map_or((rest, None), |(o, p)| (o, Some(p)));
        let whole = match part {
            None if !r.headers.contains_key("x-signed") => return refuse(403, "not signed"),
            None => r.body.clone(),
            Some("complete") => {
                let body: Value = serde_json::from_slice(&r.body).unwrap();
                let mut whole = Vec::new();
                for p in body["parts"].as_array().unwrap() {
                    let number = p["partNumber"].as_u64().unwrap() as usize;
                    assert_eq!(p["etag"], format!("\"{oid}-{number}\""));
                    whole.extend(&self.parts[&(oid.to_owned(), number)]);
                }
                whole
            }
            Some(number) => {
                let number = number.parse().unwrap();
                self.parts.insert((oid.to_owned(), number), r.body.clone());
                return (200, format!("ETag: \"{oid}-{number}\"\r\n"), Value::Null);
            }
        };
        if super::sha256(&whole) != oid {
            return refuse(400, "the content has another hash");
        }
        self.storage.insert(oid.to_owned(), (whole, false));
        plain(200, Value::Null)
    }

    fn verify(&mut self, body: &Value) -> Reply {
        match self.storage.get_mut(body["oid"].as_str().unwrap()) {
            Some((content, verified)) if content.len() as u64 == body["size"].as_u64().unwrap() => {
                *verified = true;
                plain(200, Value::Null)
            }
            _ => refuse(404, "nothing of that hash and size is stored"),
        }
    }
}

fn large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn preupload(branch: &Branch, body: &Value) -> Reply {
    let file = |f: &Value| {
        let name = f["path"].as_str().unwrap();
        assert!(f["sample"].is_string() && f["size"].is_u64());
        let oid = branch.files.get(name).map(|content| match large(name) {
            true => super::sha256(content),
            false => {
                let mut hash = Sha1::new();
                hash.update(format!("blob {}\0", content.len()));
                hash.update(content);
                hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
            }
        });
        json!({"path": name, "uploadMode": if large(name) { "lfs" } else { "regular" }, "oid": oid})
    };
    let files: Vec<Value> = body["files"].as_array().unwrap().iter().map(file).collect();
    plain(200, json!({"files": files}))
}

/// All of it, or nothing and a reason.
fn commit(branch: &mut Branch, storage: &BTreeMap<String, (Vec<u8>, bool)>, body: &[u8]) -> Reply {
    let text = std::str::from_utf8(body).unwrap();
    let mut files = branch.files.clone();
    let mut message = None;
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let value = &line["value"];
        let path = || value["path"].as_str().unwrap().to_owned();
        match line["key"].as_str() {
            Some("header") => {
                if value["parentCommit"] != commit_id(branch.commits.len()) {
                    return refuse(412, "A commit has happened since. Please refresh and try again.");
                }
                message = value["summary"].as_str().map(str::to_owned);
            }
            Some("file") if !large(&path()) => {
                assert_eq!(value["encoding"], "base64");
                files.insert(path(), STANDARD.decode(value["content"].as_str().unwrap()).unwrap());
            }
            Some("lfsFile") => {
                let stored = storage.get(value["oid"].as_str().unwrap()).filter(|s| s.1);
                let Some((content, _)) = stored else { return refuse(400, "a large file is not stored") };
                files.insert(path(), content.clone());
            }
            _ => return refuse(400, "what is that line?"),
        }
    }
    let Some(message) = message else { return refuse(400, "no header") };
    branch.commits.push(message);
    branch.files = files;
    plain(200, json!({"success": true, "commitOid": commit_id(branch.commits.len())}))
}

//! A hub on the loopback interface: the addresses, headers and redirects that clients rely on, and
//! the faults that networks have.

#![allow(dead_code, reason = "each test binary uses one of the two servers")]

pub mod push;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with one answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Hang up after this many bytes of a file's body.
    HangUpAfter(usize),
    /// Answer with this status.
    Status(u16),
    /// Send the file's bytes with the first one changed.
    Damage,
    /// Ignore the range and send all of the file.
    IgnoreRange,
}

#[derive(Default)]
struct State {
    /// `models/owner/name` to files.
    repositories: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    commit: String,
    endpoint: String,
    /// With a part of the address that each is for.
    faults: Vec<(String, Fault)>,
    /// Status of every answer, if not the regular one.
    always: Option<u16>,
    /// `GET` lines with their range.
    requests: Vec<String>,
}

/// Answer requests on a port of its own, a thread each: the endpoint, and the state that it made of it.
fn listen<S: Send + 'static>(
    state: impl FnOnce(String) -> S,
    answer: fn(TcpStream, &Mutex<S>),
) -> (String, Arc<Mutex<S>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::new(Mutex::new(state(endpoint.clone())));
    let shared = Arc::clone(&state);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&shared);
            thread::spawn(move || answer(stream, &state));
        }
    });
    (endpoint, state)
}

pub struct Server {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start() -> Self {
        let start = |endpoint| State { commit: COMMIT.into(), endpoint, ..State::default() };
        let (endpoint, state) = listen(start, answer);
        Self { endpoint, state }
    }

    /// Add a file to `models/owner/name` or `datasets/owner/name`.
    pub fn put(&self, repository: &str, file: &str, content: &[u8]) {
        let mut state = self.state.lock().unwrap();
        state.repositories.entry(repository.into()).or_default().insert(file.into(), content.into());
    }

    pub fn move_branch_to(&self, commit: &str) {
        self.state.lock().unwrap().commit = commit.into();
    }

    /// Let the next request fail whose address contains `address`; requests for a body alone, unless
    /// the fault is a status.
    pub fn fail_next(&self, address: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push((address.into(), fault));
    }

    pub fn fail_always(&self, status: u16) {
        self.state.lock().unwrap().always = Some(status);
    }

    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect()
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let mut range = None;
    for line in lines.map_while(Result::ok).take_while(|l| !l.is_empty()) {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("range")
        {
            range = Some(value.trim().to_owned());
        }
    }
    let path = first.split(' ').nth(1).unwrap_or("").to_owned();
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{path} {}", range.as_deref().unwrap_or("")));
    let body = range.as_deref().is_some_and(|r| r != "bytes=0-0");
    let hit = |(address, fault): &(String, Fault)| {
        path.contains(address) && (body || matches!(fault, Fault::Status(_)))
    };
    let fault = state.faults.iter().position(hit).map(|i| state.faults.remove(i).1);
    if let Some(status) = state.always.or(match fault {
        Some(Fault::Status(s)) => Some(s),
        _ => None,
    }) {
        return reply(&mut stream, &format!("{status} Refused"), &[], b"");
    }
    match respond(&state, &path, range.as_deref(), fault.as_ref()) {
        Some((status, headers, body)) => match fault {
            Some(Fault::HangUpAfter(n)) => {
                let head = head(&status, &headers, body.len());
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&body[..n.min(body.len())]);
            }
            _ => reply(&mut stream, &status, &headers, &body),
        },
        None => reply(&mut stream, "404 Not Found", &[], b"Entry not found"),
    }
}

type Reply = (String, Vec<(String, String)>, Vec<u8>);

fn respond(state: &State, path: &str, range: Option<&str>, fault: Option<&Fault>) -> Option<Reply> {
    let known = |revision: &str| revision == "main" || revision == state.commit || revision == COMMIT;
    if let Some(rest) = path.strip_prefix("/api/") {
        let (repository, revision) = rest.split_once("/revision/")?;
        let files = state.repositories.get(repository).filter(|_| known(revision))?;
        let siblings: Vec<_> = files.keys().map(|f| format!("{{\"rfilename\":\"{f}\"}}")).collect();
        let commit = if revision == "main" { &state.commit } else { revision };
        let json = format!("{{\"sha\":\"{commit}\",\"siblings\":[{}]}}", siblings.join(","));
        return Some((
            "200 OK".into(),
            vec![("Content-Type".into(), "application/json".into())],
            json.into(),
        ));
    }
    if let Some(hash) = path.strip_prefix("/storage/") {
        let file = state.repositories.values().flat_map(BTreeMap::values).find(|f| sha256(f) == hash)?;
        return Some(part(file, range, fault));
    }
    let (repository, rest) = path[1..].split_once("/resolve/")?;
    let (revision, file) = rest.split_once('/')?;
    let repository =
        if repository.starts_with("datasets/") { repository.into() } else { format!("models/{repository}") };
    let content = state.repositories.get(&repository).filter(|_| known(revision))?.get(file)?;
    let commit = ("X-Repo-Commit".to_owned(), revision.replace("main", &state.commit));
    if file.ends_with(".safetensors") || file.ends_with(".parquet") {
        // Large files lie elsewhere, on another host in earnest, and are named by their hash.
        let hash = sha256(content);
        let headers = vec![
            commit,
            ("X-Linked-Etag".into(), format!("\"{hash}\"")),
            ("Location".into(), format!("{}/storage/{hash}", state.endpoint)),
            ("Etag".into(), "\"irrelevant\"".into()),
        ];
        return Some(("302 Found".into(), headers, Vec::new()));
    }
    let (status, mut headers, body) = part(content, range, fault);
    headers.push(commit);
    headers.push(("Etag".into(), format!("\"{}\"", &sha256(content)[..40])));
    Some((status, headers, body))
}

fn part(content: &[u8], range: Option<&str>, fault: Option<&Fault>) -> Reply {
    let mut body = content.to_vec();
    if fault == Some(&Fault::Damage) {
        body[0] ^= 1;
    }
    let Some(range) = range.filter(|_| fault != Some(&Fault::IgnoreRange)) else {
        return ("200 OK".into(), Vec::new(), body);
    };
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().unwrap_or(content.len() - 1);
    if start >= content.len() {
        return ("416 Range Not Satisfiable".into(), Vec::new(), Vec::new());
    }
    let headers = vec![("Content-Range".into(), format!("bytes {start}-{end}/{}", content.len()))];
    ("206 Partial Content".into(), headers, body[start..=end].to_vec())
}

fn head(status: &str, headers: &[(String, String)], length: usize) -> String {
    let headers: String = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")
}

fn reply(stream: &mut TcpStream, status: &str, headers: &[(String, String)], body: &[u8]) {
    let _ = stream.write_all(head(status, headers, body.len()).as_bytes());
    let _ = stream.write_all(body);
}

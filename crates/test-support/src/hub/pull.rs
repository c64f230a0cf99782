//! A hub to download from, with its storage on another host: the addresses, headers and redirects that
//! clients rely on; what CDNs and mirrors make of them; the faults that networks have; and a hub that lies.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::{bind, serve, sha256, wait_for_the_end};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A CDN compresses what is longer.
const COMPRESSED_FROM: usize = 1000;

/// What goes wrong with one answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Hang up after this many bytes of a file's body.
    HangUpAfter(usize),
    /// Send this many bytes of a file's body, and then nothing more.
    StallAfter(usize),
    /// Send a file's body a byte at a time, with this pause between them.
    Trickle(Duration),
    /// Answer with this status.
    Status(u16),
    /// Answer with this status and `Retry-After`.
    Busy(u16, &'static str),
    /// Say nothing at all.
    Silence,
    /// Answer after this time.
    Delay(Duration),
    /// Send the file's bytes with the first one changed.
    Damage,
    /// Ignore the range and send all of the file.
    IgnoreRange,
    /// Answer a range with the beginning of the file.
    WrongRange,
    /// Answer a range with another ETag, as if there were another file by now.
    OtherEtag,
    /// Send this many bytes more than the file has, without a length.
    Longer(usize),
    /// Announce and send this many bytes less than the file has.
    Shorter(usize),
    /// Say that the body is encoded like that.
    Encoded(&'static str),
    /// A page for people in place of the file, as if all were well.
    Page,
}

/// How a small file is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Hop {
    #[default]
    Direct,
    /// A relative redirect that names commit, ETag and size.
    Relative,
    /// A relative redirect that names nothing.
    Bare,
    /// An absolute redirect to another host that names nothing.
    Abroad,
}

/// What is always so.
#[derive(Clone, Debug, Default)]
pub struct Quirks {
    /// Small files come compressed and whole to who accepts gzip, as from a CDN.
    pub compress: bool,
    /// And to everyone else, too.
    pub compress_always: bool,
    pub weak_etags: bool,
    /// This ETag for every file.
    pub etag: Option<String>,
    /// This `X-Repo-Commit`; an empty one is not sent.
    pub commit: Option<String>,
    /// This commit in the listing.
    pub listed_commit: Option<String>,
    /// This body in place of the listing.
    pub listing: Option<Vec<u8>>,
    /// This `X-Linked-Size`.
    pub size: Option<String>,
    /// No length is announced anywhere; bodies are chunked.
    pub no_sizes: bool,
    /// No length is announced anywhere; bodies end with the connection.
    pub close_delimited: bool,
    pub hop: Hop,
    /// HEAD is not allowed.
    pub no_head: bool,
    /// The storage signs its addresses for GET alone.
    pub storage_refuses_head: bool,
    /// Every request is sent there.
    pub redirect: Option<String>,
    /// Status of every answer; what the request said comes back in it.
    pub always: Option<u16>,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    /// It was the storage's.
    pub abroad: bool,
    pub headers: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    /// `models/owner/name` to files.
    repositories: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    commit: String,
    storage: String,
    /// With a part of the address that each is for.
    faults: Vec<(String, Fault)>,
    quirks: Quirks,
    requests: Vec<Seen>,
}

pub struct Server {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start() -> Self {
        let ((hub, endpoint), (storage, abroad)) = (bind(), bind());
        let state = State { commit: COMMIT.into(), storage: abroad, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        serve(hub, &state, |stream, state| answer(stream, state, false));
        serve(storage, &state, |stream, state| answer(stream, state, true));
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

    /// Let the next request fail whose address contains `address`; faults of a body hit no question about it.
    pub fn fail_next(&self, address: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push((address.into(), fault));
    }

    pub fn fail_always(&self, status: u16) {
        self.quirk(|q| q.always = Some(status));
    }

    pub fn quirk(&self, change: impl FnOnce(&mut Quirks)) {
        change(&mut self.state.lock().unwrap().quirks);
    }

    /// Address, without its query, and range of every request since the last call.
    pub fn requests(&self) -> Vec<String> {
        let line = |s: &Seen| {
            let path = s.path.split('?').next().unwrap();
            format!("{path} {}", s.headers.get("range").map_or("", String::as_str))
        };
        self.seen().iter().map(line).collect()
    }

    /// Every request since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, abroad: bool) {
    let Some(seen) = read(&stream, abroad) else { return };
    let (reply, fault) = {
        let mut state = state.lock().unwrap();
        state.requests.push(seen.clone());
        let body = seen.method == "GET" && !seen.path.starts_with("/api/");
        let any =
            |f: &Fault| matches!(f, Fault::Status(_) | Fault::Busy(..) | Fault::Silence | Fault::Delay(_));
        let hit = |(address, fault): &(String, Fault)| seen.path.contains(address) && (body || any(fault));
        let fault = state.faults.iter().position(hit).map(|i| state.faults.remove(i).1);
        (respond(&state, &seen, fault.as_ref()), fault)
    };
    let head = reply.head();
    let body = if seen.method == "HEAD" { Vec::new() } else { reply.framed() };
    match fault {
        Some(Fault::Silence) => wait_for_the_end(&stream),
        Some(Fault::HangUpAfter(n)) => {
            let _ = stream.write_all(&[head.as_bytes(), &body[..n.min(body.len())]].concat());
        }
        Some(Fault::StallAfter(n)) => {
            let _ = stream.write_all(&[head.as_bytes(), &body[..n.min(body.len())]].concat());
            wait_for_the_end(&stream);
        }
        Some(Fault::Trickle(pause)) => {
            let _ = stream.write_all(head.as_bytes());
            for byte in body {
                sleep(pause);
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
            }
        }
        Some(Fault::Delay(time)) => {
            sleep(time);
            let _ = stream.write_all(&[head.as_bytes(), &body].concat());
        }
        _ => {
            let _ = stream.write_all(&[head.as_bytes(), &body].concat());
        }
    }
}

fn read(stream: &TcpStream, abroad: bool) -> Option<Seen> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let headers = lines
        .map_while(Result::ok)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.split_once(':').map(|(n, v)| (n.to_lowercase(), v.trim().to_owned())))
        .collect();
    Some(Seen { method, path, abroad, headers })
}

/// How the end of a body is found.
#[derive(Clone, Copy, Default, PartialEq)]
enum Frame {
    #[default]
    Length,
    Chunked,
    Close,
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    frame: Frame,
}

impl Reply {
    fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Self { status, headers, body: body.to_vec(), frame: Frame::Length }
    }

    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.headers.push((name.to_owned(), value.into()));
    }

    fn head(&self) -> String {
        let headers: String = self.headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        let frame = match self.frame {
            Frame::Length => format!("Content-Length: {}\r\n", self.body.len()),
            Frame::Chunked => "Transfer-Encoding: chunked\r\n".to_owned(),
            Frame::Close => String::new(),
        };
        format!("HTTP/1.1 {} X\r\n{headers}{frame}Connection: close\r\n\r\n", self.status)
    }

    fn framed(&self) -> Vec<u8> {
        match self.frame {
            Frame::Chunked => {
                [format!("{:x}\r\n", self.body.len()).as_bytes(), &self.body, b"\r\n0\r\n\r\n"].concat()
            }
            _ => self.body.clone(),
        }
    }
}

fn respond(state: &State, seen: &Seen, fault: Option<&Fault>) -> Reply {
    let quirks = &state.quirks;
    let said = seen.headers.get("authorization").cloned().unwrap_or_default();
    let status = match fault {
        Some(Fault::Page) => {
            return Reply::new(200, &[("Content-Type", "text/html")], b"<!DOCTYPE html>We are busy");
        }
        Some(Fault::Status(status)) => Some(*status),
        Some(Fault::Busy(status, wait)) => return Reply::new(*status, &[("Retry-After", wait)], b""),
        _ => quirks.always,
    };
    if let Some(status) = status {
        let words = format!("you said {said}");
        return Reply::new(status, &[("X-Error-Message", &words)], words.as_bytes());
    }
    if seen.abroad && !said.is_empty() {
        return Reply::new(400, &[], b"only one way to sign in: the token came along");
    }
    if let Some(to) = &quirks.redirect {
        return Reply::new(302, &[("Location", to)], b"");
    }
    if seen.method == "HEAD" && (quirks.no_head || quirks.storage_refuses_head && seen.abroad) {
        return Reply::new(if seen.abroad { 403 } else { 405 }, &[], b"");
    }
    found(state, seen, fault).unwrap_or_else(|| Reply::new(404, &[], b"Entry not found"))
}

fn found(state: &State, seen: &Seen, fault: Option<&Fault>) -> Option<Reply> {
    let quirks = &state.quirks;
    let path = seen.path.split('?').next()?;
    let known =
        |revision: &str| [("main"), &state.commit, COMMIT].contains(&revision) || revision.contains('/');
    if let Some(rest) = path.strip_prefix("/api/")
        && let Some((repository, revision)) = rest.split_once("/revision/")
    {
        let revision = revision.replace("%2F", "/");
        let files = state.repositories.get(repository).filter(|_| known(&revision))?;
        if let Some(listing) = &quirks.listing {
            return Some(Reply::new(200, &[], listing));
        }
        let siblings: Vec<_> = files.keys().map(|f| serde_json::json!({"rfilename": f})).collect();
        let branch = revision == "main" || revision.contains('/');
        let commit = if branch { state.commit.clone() } else { revision };
        let commit = quirks.listed_commit.clone().unwrap_or(commit);
        let json = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
        return Some(Reply::new(200, &[("Content-Type", "application/json")], json.as_bytes()));
    }
    if let Some(hash) = path.strip_prefix("/storage/") {
        let file = state.repositories.values().flat_map(BTreeMap::values).find(|f| sha256(f) == hash)?;
        // A storage has ETags of its own.
        return Some(content(quirks, seen, file, &format!("\"{}-1\"", &hash[..32]), fault));
    }
    let direct = path.strip_prefix("/hop");
    let (repository, rest) = direct.unwrap_or(path)[1..].split_once("/resolve/")?;
    let (revision, file) = rest.split_once('/')?;
    let repository =
        if repository.starts_with("datasets/") { repository.into() } else { format!("models/{repository}") };
    let file = percent_encoding::percent_decode_str(file).decode_utf8().ok()?;
    let bytes = state.repositories.get(&repository).filter(|_| known(revision))?.get(&*file)?;
    let commit = quirks.commit.clone().unwrap_or_else(|| revision.replace("main", &state.commit));
    let metadata = |reply: &mut Reply| {
        if !commit.is_empty() {
            reply.add("X-Repo-Commit", commit.clone());
        }
        if let Some(size) = &quirks.size {
            reply.add("X-Linked-Size", size.clone());
        }
    };
    if file.ends_with(".safetensors") || file.ends_with(".parquet") {
        // Large files lie on another host and are named by their hash.
        let hash = sha256(bytes);
        let to = format!("{}/storage/{hash}?signed=yes", state.storage);
        let linked = quirks.etag.clone().unwrap_or_else(|| format!("\"{hash}\""));
        let mut reply =
            Reply::new(302, &[("X-Linked-Etag", &linked), ("Location", &to), ("ETag", "\"pointer\"")], b"");
        metadata(&mut reply);
        if !quirks.no_sizes && !quirks.close_delimited && quirks.size.is_none() {
            reply.add("X-Linked-Size", bytes.len().to_string());
        }
        return Some(reply);
    }
    let weak = if quirks.weak_etags { "W/" } else { "" };
    let etag = quirks.etag.clone().unwrap_or_else(|| format!("{weak}\"{}\"", &sha256(bytes)[..40]));
    if direct.is_none() && quirks.hop != Hop::Direct {
        let host = if quirks.hop == Hop::Abroad { state.storage.as_str() } else { "" };
        let to = format!("{host}/hop{path}?etag=1");
        let mut reply = Reply::new(307, &[("Location", &to)], b"Temporary Redirect");
        if quirks.hop == Hop::Relative {
            metadata(&mut reply);
            reply.add("ETag", etag);
            reply.add("X-Linked-Size", bytes.len().to_string());
        }
        return Some(reply);
    }
    let mut reply = content(quirks, seen, bytes, &etag, fault);
    metadata(&mut reply);
    Some(reply)
}

/// A file's bytes, or those of them that are asked for.
fn content(quirks: &Quirks, seen: &Seen, bytes: &[u8], etag: &str, fault: Option<&Fault>) -> Reply {
    let accepts = seen.headers.get("accept-encoding").is_some_and(|e| e.contains("gzip"));
    let mut reply = if bytes.len() > COMPRESSED_FROM && (quirks.compress && accepts || quirks.compress_always)
    {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).unwrap();
        Reply::new(200, &[("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")], &gzip.finish().unwrap())
    } else {
        part(seen, bytes, etag, fault)
    };
    match fault {
        Some(Fault::OtherEtag) => reply.add("ETag", "\"another\""),
        _ => reply.add("ETag", etag),
    }
    match fault {
        Some(Fault::Damage) => reply.body[0] ^= 1,
        Some(Fault::Encoded(how)) => reply.add("Content-Encoding", *how),
        Some(Fault::Shorter(n)) => reply.body.truncate(bytes.len() - n),
        Some(Fault::Longer(n)) => {
            reply.body.extend(vec![b'x'; *n]);
            reply.frame = Frame::Chunked;
        }
        _ if quirks.no_sizes => reply.frame = Frame::Chunked,
        _ if quirks.close_delimited => reply.frame = Frame::Close,
        _ => {}
    }
    reply
}

fn part(seen: &Seen, bytes: &[u8], etag: &str, fault: Option<&Fault>) -> Reply {
    let same = seen.headers.get("if-range").is_none_or(|e| e == etag) || fault == Some(&Fault::OtherEtag);
    let range = seen.headers.get("range").filter(|_| same && fault != Some(&Fault::IgnoreRange));
    let Some(range) = range else { return Reply::new(200, &[], bytes) };
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let start: usize = if fault == Some(&Fault::WrongRange) { 0 } else { start.parse().unwrap() };
    let end = end.parse().unwrap_or(bytes.len() - 1);
    if start >= bytes.len() {
        return Reply::new(416, &[], b"");
    }
    let said = format!("bytes {start}-{end}/{}", bytes.len());
    Reply::new(206, &[("Content-Range", &said)], &bytes[start..=end])
}

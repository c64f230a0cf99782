//! An S3 server on the loopback interface, and the faults that networks and servers under load have.
//!
//! It keeps objects in memory and is strict where S3 is: conditions of puts and gets, parts of an upload that
//! count only when it is complete, pages of listings. Signatures are not checked.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use crate::http;
use crate::hub::{listen, sha256, wait_for_the_end};

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answer with this status, having done nothing; 503 says `SlowDown`, 412 that a condition is not met.
    Status(u16),
    /// Hang up, having done nothing.
    HangUp,
    /// Do it, and hang up before the answer.
    LoseAnswer,
    /// Send half of the answer's body, and hang up.
    HalfBody,
    /// Send half of the answer's body, and then nothing more.
    Stall,
    /// Say nothing, having done nothing.
    Silence,
    /// Change a byte of the answer's body.
    Damage,
}

/// An object.
#[derive(Clone, Debug)]
pub struct Object {
    pub content: Vec<u8>,
    pub e_tag: String,
    /// `x-amz-meta-...` headers.
    pub meta: BTreeMap<String, String>,
}

/// Parts by number, and headers.
pub type Upload = (BTreeMap<usize, Vec<u8>>, BTreeMap<String, String>);

#[derive(Default)]
pub struct State {
    /// By `/bucket/key`.
    pub objects: BTreeMap<String, Object>,
    /// Those that are not complete.
    pub uploads: BTreeMap<String, Upload>,
    /// `METHOD /address` of every request.
    pub requests: Vec<String>,
    /// With the part of `METHOD /address` that each is for.
    faults: Vec<(String, Fault)>,
    /// These faults, one after another, at every so many requests.
    every_nth: Option<(usize, Vec<Fault>)>,
    count: usize,
    /// Keys of a page of a listing.
    pub page: Option<usize>,
    /// Headers that a request with a credential must not leave in any output.
    pub seen_authorization: Vec<String>,
}

pub struct S3 {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl S3 {
    pub fn start() -> Self {
        let (endpoint, state) = listen(|_| State::default(), answer);
        Self { endpoint, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Let the next request fail whose `METHOD /address` contains `part`.
    pub fn fail_next(&self, part: &str, fault: Fault) {
        self.state().faults.push((part.to_owned(), fault));
    }

    /// Let every `n`th request suffer the next of `faults`, in turn.
    pub fn every_nth(&self, n: usize, faults: &[Fault]) {
        self.state().every_nth = Some((n, faults.to_vec()));
    }

    /// Objects whose key begins with `prefix`, with their content.
    pub fn objects(&self, prefix: &str) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        let all = state.objects.iter().filter(|(key, _)| key.starts_with(prefix));
        all.map(|(key, object)| (key[prefix.len()..].to_owned(), object.content.clone())).collect()
    }

    /// Requests since the last call, those that contain `part`.
    pub fn requests(&self, part: &str) -> Vec<String> {
        let all = std::mem::take(&mut self.state().requests);
        all.into_iter().filter(|r| r.contains(part)).collect()
    }
}

/// Requests of one connection, one after another.
fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let Ok(clone) = stream.try_clone() else { return };
    let mut reader = BufReader::new(clone);
    while let Some(request) = read(&mut reader) {
        let query: Vec<String> = request.query.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let line = format!("{} {}?{}", request.method, request.path, query.join("&"));
        let mut held = state.lock().unwrap();
        let fault = held.fault(&line);
        held.requests.push(line);
        held.seen_authorization.extend(request.headers.get("authorization").cloned());
        let answer = match fault {
            Some(Fault::HangUp) => return,
            Some(Fault::Silence) => {
                drop(held);
                return wait_for_the_end(&stream);
            }
            Some(Fault::Status(status)) => {
                // Only what was asked under a condition can fail by one.
                let asked = ["if-match", "if-none-match"].iter().any(|n| request.headers.contains_key(*n));
                let status = if status == 412 && !asked { 500 } else { status };
                error(status, if status == 503 { "SlowDown" } else { "OutOfOrder" })
            }
            _ => held.respond(&request),
        };
        drop(held);
        if fault == Some(Fault::LoseAnswer) {
            return;
        }
        let Answer { status, headers, mut body } = answer;
        let is_head = request.method == "HEAD";
        let has_length = headers.iter().any(|(name, _)| name == "Content-Length");
        let mut head = format!("HTTP/1.1 {status} X\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !has_length {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        if let (Some(Fault::Damage), Some(first)) = (fault, body.first_mut()) {
            *first ^= 1;
        }
        let half = matches!(fault, Some(Fault::HalfBody | Fault::Stall));
        let sent = if is_head { &[][..] } else { &body[..if half { body.len() / 2 } else { body.len() }] };
        let written = stream.write_all((head + "\r\n").as_bytes()).and_then(|()| stream.write_all(sent));
        if fault == Some(Fault::Stall) {
            return wait_for_the_end(&stream);
        }
        if written.is_err() || half {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let http::Request { method, address, headers, body } = http::Request::read(reader)?;
    let (path, query) = address.split_once('?').unwrap_or((&address, ""));
    let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let query = pairs.map(|(k, v)| (decode(k), decode(v))).collect();
    Some(Request { method, path: decode(path), query, headers, body })
}

fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer { status: 200, headers: Vec::new(), body: body.into() }
}

fn error(status: u16, code: &str) -> Answer {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
    Answer { status, headers: Vec::new(), body: body.into() }
}

/// `Wed, 21 Oct 2015 07:28:00 GMT` and `2015-10-21T07:28:00.000Z`: one moment is as good as another here.
const MODIFIED: (&str, &str) = ("Wed, 21 Oct 2015 07:28:00 GMT", "2015-10-21T07:28:00.000Z");

impl State {
    fn fault(&mut self, line: &str) -> Option<Fault> {
        if let Some(i) = self.faults.iter().position(|(part, _)| line.contains(part.as_str())) {
            return Some(self.faults.remove(i).1);
        }
        self.count += 1;
        let (n, faults) = self.every_nth.as_ref()?;
        self.count.is_multiple_of(*n).then(|| faults[self.count / n % faults.len()])
    }

    fn put(&mut self, path: &str, content: Vec<u8>, headers: &BTreeMap<String, String>) -> Answer {
        // As S3's: of the content; another put of the same bytes is the same version.
        let e_tag = format!("\"{}\"", &sha256(&content)[..32]);
        let meta = headers.iter().filter(|(name, _)| name.starts_with("x-amz-meta-"));
        let meta = meta.map(|(name, value)| (name.clone(), value.clone())).collect();
        self.objects.insert(path.to_owned(), Object { content, e_tag: e_tag.clone(), meta });
        Answer { headers: vec![("ETag".into(), e_tag)], ..ok("") }
    }

    fn respond(&mut self, request: &Request) -> Answer {
        let Request { method, path, query, headers, body } = request;
        let found = self.objects.get(path).map(|object| object.e_tag.clone());
        let header = |name: &str| headers.get(name).map(String::as_str);
        match method.as_str() {
            "PUT" if query.contains_key("uploadId") => {
                let Some((parts, _)) = self.uploads.get_mut(&query["uploadId"]) else {
                    return error(404, "NoSuchUpload");
                };
                parts.insert(query["partNumber"].parse().unwrap(), body.clone());
                Answer { headers: vec![("ETag".into(), format!("\"{}\"", &sha256(body)[..32]))], ..ok("") }
            }
            "PUT" => {
                if header("if-none-match") == Some("*") && found.is_some() {
                    return error(412, "PreconditionFailed");
                }
                match (header("if-match"), &found) {
                    (Some(_), None) => return error(404, "NoSuchKey"),
                    (Some(wanted), Some(found)) if wanted != found => {
                        return error(412, "PreconditionFailed");
                    }
                    _ => {}
                }
                self.put(path, body.clone(), headers)
            }
            "POST" if query.contains_key("uploads") => {
                let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
                let id = format!("{}-{nanos}", self.uploads.len());
                self.uploads.insert(id.clone(), (BTreeMap::new(), headers.clone()));
                ok(format!(
                    "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>{id}</UploadId>\
                     </InitiateMultipartUploadResult>"
                ))
            }
            "POST" => {
                let Some((parts, headers)) = self.uploads.remove(&query["uploadId"]) else {
                    return error(404, "NoSuchUpload");
                };
                let content = parts.into_values().flatten().collect();
                let put = self.put(path, content, &headers);
                let e_tag = put.headers[0].1.replace('"', "&quot;");
                ok(format!(
                    "<CompleteMultipartUploadResult><Location>l</Location><Bucket>b</Bucket><Key>k</Key>\
                     <ETag>{e_tag}</ETag></CompleteMultipartUploadResult>"
                ))
            }
            "DELETE" => {
                match query.get("uploadId") {
                    Some(id) => drop(self.uploads.remove(id)),
                    None => drop(self.objects.remove(path)),
                }
                Answer { status: 204, ..ok("") }
            }
            "GET" if query.contains_key("list-type") => self.list(path, query),
            "GET" | "HEAD" => {
                let Some(object) = self.objects.get(path) else { return error(404, "NoSuchKey") };
                if header("if-match").is_some_and(|wanted| wanted != object.e_tag) {
                    return error(412, "PreconditionFailed");
                }
                let mut out = vec![
                    ("ETag".to_owned(), object.e_tag.clone()),
                    ("Last-Modified".to_owned(), MODIFIED.0.to_owned()),
                ];
                out.extend(object.meta.iter().map(|(k, v)| (k.clone(), v.clone())));
                if header("if-none-match") == Some(&object.e_tag) {
                    return Answer { status: 304, headers: out, body: Vec::new() };
                }
                let all = &object.content;
                let range = header("range").and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
                let Some((start, end)) = range else {
                    out.push(("Content-Length".to_owned(), all.len().to_string()));
                    return Answer { headers: out, ..ok(all.clone()) };
                };
                let start: usize = start.parse().unwrap();
                let end = end.parse::<usize>().map_or(all.len(), |end| (end + 1).min(all.len()));
                let of = format!("bytes {start}-{}/{}", end - 1, all.len());
                out.push(("Content-Range".to_owned(), of));
                Answer { status: 206, headers: out, body: all[start..end].to_vec() }
            }
            _ => error(405, "MethodNotAllowed"),
        }
    }

    fn list(&self, path: &str, query: &BTreeMap<String, String>) -> Answer {
        let bucket = format!("{}/", path.trim_end_matches('/'));
        let get = |name: &str| query.get(name).map_or("", String::as_str);
        let (prefix, delimiter, after) = (get("prefix"), get("delimiter"), get("continuation-token"));
        let page = self.page.unwrap_or(1000);
        let mut out = String::new();
        let (mut last, mut n, mut folders) = (String::new(), 0, Vec::new());
        let mut more = false;
        for (key, object) in self.objects.iter().filter_map(|(k, o)| Some((k.strip_prefix(&bucket)?, o))) {
            let Some(rest) = key.strip_prefix(prefix) else { continue };
            if !after.is_empty() && key <= after {
                continue;
            }
            if n == page {
                more = true;
                break;
            }
            (last, n) = (key.to_owned(), n + 1);
            if let Some((folder, _)) = rest.split_once('/').filter(|_| delimiter == "/") {
                folders.push(format!("{prefix}{folder}/"));
                continue;
            }
            out += &format!(
                "<Contents><Key>{key}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>",
                MODIFIED.1,
                object.e_tag.replace('"', "&quot;"),
                object.content.len()
            );
        }
        folders.dedup();
        for folder in folders {
            out += &format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
        }
        if more {
            out += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
        }
        ok(format!("<ListBucketResult><IsTruncated>{more}</IsTruncated>{out}</ListBucketResult>"))
    }
}

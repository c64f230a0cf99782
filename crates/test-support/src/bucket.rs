//! A server of buckets on the loopback interface, as those of Amazon, Google and Azure are, and the faults
//! that networks and servers under load have.
//!
//! It keeps objects in memory and is strict where they are: conditions of puts and gets, parts of an upload
//! that count only when it is complete, pages of listings. Signatures are not checked.
//!
//! | | S3 | Google | Azure |
//! |---|---|---|---|
//! | tag | hash of the bytes | hash of the bytes | of each put; without quotes in a listing |
//! | a put is under the condition of | a tag | a generation | a tag, in quotes |
//! | refused put of what is there | 412 | 412 | 409 |

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

/// Whose words a server speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    S3,
    Google,
    Azure,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::S3, Self::Google, Self::Azure];

    /// Of addresses: `s3`.
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    const fn meta(self) -> &'static str {
        match self {
            Self::S3 => "x-amz-meta-",
            Self::Google => "x-goog-meta-",
            Self::Azure => "x-ms-meta-",
        }
    }
}

/// The account of Azure's server, which begins every path there.
const ACCOUNT: &str = "/devstoreaccount1";

/// An object.
#[derive(Clone, Debug, Default)]
pub struct Object {
    pub content: Vec<u8>,
    pub e_tag: String,
    /// Google's number of this put.
    pub generation: u64,
    /// `x-amz-meta-...` headers, or those of another kind.
    pub meta: BTreeMap<String, String>,
}

/// Parts by number or name, and headers.
pub type Upload = (BTreeMap<String, Vec<u8>>, BTreeMap<String, String>);

#[derive(Default)]
pub struct State {
    kind: Kind,
    puts: u64,
    /// By `/bucket/key`.
    pub objects: BTreeMap<String, Object>,
    /// Those that are not complete; by path at Azure.
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

pub struct Server {
    pub kind: Kind,
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

impl Server {
    pub fn start(kind: Kind) -> Self {
        let (endpoint, state) = listen(move |_| State { kind, ..State::default() }, answer);
        Self { kind, endpoint, state }
    }

    /// The environment variables that name it, for bucket `b` or any other.
    pub fn variables<'a>(&'a self, key: &'a str, secret: &'a str) -> Vec<(&'static str, &'a str)> {
        match self.kind {
            Kind::S3 => vec![
                ("AWS_ENDPOINT_URL", &self.endpoint),
                ("AWS_ACCESS_KEY_ID", key),
                ("AWS_SECRET_ACCESS_KEY", secret),
                ("AWS_REGION", "here"),
            ],
            Kind::Google => vec![("STORAGE_EMULATOR_HOST", &self.endpoint), ("GOOGLE_BEARER_TOKEN", secret)],
            // A key there is base64.
            Kind::Azure => vec![
                ("AZURE_STORAGE_USE_EMULATOR", "true"),
                ("AZURITE_BLOB_STORAGE_URL", &self.endpoint),
                ("AZURE_STORAGE_ACCOUNT_KEY", secret),
            ],
        }
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
                let conditions = ["if-match", "if-none-match", "x-goog-if-generation-match"];
                let asked = conditions.iter().any(|n| request.headers.contains_key(*n));
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
    let path = path.strip_prefix(ACCOUNT).unwrap_or(path);
    Some(Request { method, path: decode(path), query, headers, body })
}

/// The path of the object that a put copies.
fn copied(headers: &BTreeMap<String, String>) -> Option<String> {
    let names = ["x-amz-copy-source", "x-goog-copy-source", "x-ms-copy-source"];
    let source = names.iter().find_map(|name| headers.get(*name))?;
    // Azure's is an address.
    let path =
        source.split_once("://").map_or(source.as_str(), |(_, rest)| &rest[rest.find('/').unwrap_or(0)..]);
    let path = percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned();
    let path = path.strip_prefix(ACCOUNT).unwrap_or(&path);
    Some(format!("/{}", path.trim_start_matches('/')))
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
        self.puts += 1;
        let e_tag = match self.kind {
            Kind::Azure => format!("\"0x{:X}\"", 0x8D_0000 + self.puts),
            // Of the content: another put of the same bytes is the same version.
            Kind::S3 | Kind::Google => format!("\"{}\"", &sha256(&content)[..32]),
        };
        let meta = headers.iter().filter(|(name, _)| name.starts_with(self.kind.meta()));
        let meta = meta.map(|(name, value)| (name.clone(), value.clone())).collect();
        let object = Object { content, e_tag, generation: self.puts, meta };
        let mut headers = vec![("ETag".to_owned(), object.e_tag.clone())];
        headers.extend(self.generation(&object));
        self.objects.insert(path.to_owned(), object);
        Answer { status: if self.kind == Kind::Azure { 201 } else { 200 }, headers, body: Vec::new() }
    }

    fn generation(&self, object: &Object) -> Option<(String, String)> {
        let is_said = self.kind == Kind::Google;
        is_said.then(|| ("x-goog-generation".to_owned(), object.generation.to_string()))
    }

    /// Why a put is refused: its condition is not met.
    fn refusal(&self, path: &str, headers: &BTreeMap<String, String>) -> Option<Answer> {
        let found = self.objects.get(path);
        let header = |name: &str| headers.get(name).map(String::as_str);
        if self.kind == Kind::Google {
            let there = found.map_or(0, |object| object.generation).to_string();
            let wanted = header("x-goog-if-generation-match")?;
            return (wanted != there).then(|| error(412, "PreconditionFailed"));
        }
        if header("if-none-match") == Some("*") && found.is_some() {
            return Some(match self.kind {
                Kind::Azure => error(409, "BlobAlreadyExists"),
                _ => error(412, "PreconditionFailed"),
            });
        }
        match (header("if-match")?, found) {
            (_, None) if self.kind == Kind::S3 => Some(error(404, "NoSuchKey")),
            (wanted, Some(found)) if wanted == found.e_tag => None,
            _ => Some(error(412, "PreconditionFailed")),
        }
    }

    fn respond(&mut self, request: &Request) -> Answer {
        let Request { method, path, query, headers, body } = request;
        let header = |name: &str| headers.get(name).map(String::as_str);
        let comp = query.get("comp").map_or("", String::as_str);
        match method.as_str() {
            "PUT" if query.contains_key("uploadId") => {
                let Some((parts, _)) = self.uploads.get_mut(&query["uploadId"]) else {
                    return error(404, "NoSuchUpload");
                };
                let number: usize = query["partNumber"].parse().unwrap();
                parts.insert(format!("{number:05}"), body.clone());
                Answer { headers: vec![("ETag".into(), format!("\"{}\"", &sha256(body)[..32]))], ..ok("") }
            }
            "PUT" if comp == "block" => {
                let (blocks, _) = self.uploads.entry(path.clone()).or_default();
                blocks.insert(query["blockid"].clone(), body.clone());
                Answer { status: 201, ..ok("") }
            }
            "PUT" if comp == "blocklist" => {
                let (blocks, _) = self.uploads.get(path).cloned().unwrap_or_default();
                let list = String::from_utf8_lossy(body);
                let names = list.split('<').filter_map(|element| element.split_once('>'));
                let names = names.filter(|(kind, _)| ["Uncommitted", "Latest"].contains(kind));
                let parts: Option<Vec<_>> = names.map(|(_, name)| blocks.get(name).cloned()).collect();
                let Some(parts) = parts else { return error(400, "InvalidBlockList") };
                self.uploads.remove(path);
                self.put(path, parts.concat(), headers)
            }
            "PUT" if copied(headers).is_some() => {
                let source = copied(headers).unwrap_or_default();
                let Some(Object { content, meta, .. }) = self.objects.get(&source).cloned() else {
                    return error(404, "NoSuchKey");
                };
                let put = self.put(path, content, &meta);
                let body = format!(
                    "<CopyObjectResult><ETag>{}</ETag></CopyObjectResult>",
                    put.headers[0].1.replace('"', "&quot;")
                );
                Answer { body: body.into(), ..put }
            }
            "PUT" if self.kind == Kind::Azure && header("x-ms-blob-type") != Some("BlockBlob") => {
                error(400, "MissingRequiredHeader")
            }
            "PUT" => match self.refusal(path, headers) {
                Some(refusal) => refusal,
                None => self.put(path, body.clone(), headers),
            },
            "POST" if comp == "batch" => self.remove_all(body),
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
                let body = format!(
                    "<CompleteMultipartUploadResult><Location>l</Location><Bucket>b</Bucket><Key>k</Key>\
                     <ETag>{e_tag}</ETag></CompleteMultipartUploadResult>"
                );
                Answer { body: body.into(), ..put }
            }
            "DELETE" => {
                let found = match query.get("uploadId") {
                    Some(id) => self.uploads.remove(id).is_some(),
                    None => self.objects.remove(path).is_some(),
                };
                // S3 does not mind.
                if found || self.kind == Kind::S3 {
                    Answer { status: 204, ..ok("") }
                } else {
                    error(404, "NoSuchKey")
                }
            }
            "GET" if query.contains_key("list-type") || comp == "list" => self.list(path, query),
            "GET" | "HEAD" => {
                let Some(object) = self.objects.get(path) else { return error(404, "NoSuchKey") };
                if header("if-match").is_some_and(|wanted| wanted != object.e_tag) {
                    return error(412, "PreconditionFailed");
                }
                let mut out = vec![
                    ("ETag".to_owned(), object.e_tag.clone()),
                    ("Last-Modified".to_owned(), MODIFIED.0.to_owned()),
                ];
                out.extend(self.generation(object));
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

    /// Azure's removal of several: a request in each part of the body.
    fn remove_all(&mut self, body: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(body).into_owned();
        let mut out = String::new();
        let addresses = text.lines().filter_map(|l| l.strip_prefix("DELETE ")?.split(' ').next());
        for (i, address) in addresses.enumerate() {
            let path = address.split('?').next().unwrap_or_default();
            let path = format!("/{}", path.trim_start_matches('/'));
            let path = path.strip_prefix(ACCOUNT).unwrap_or(&path);
            let key = percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned();
            let status = if self.objects.remove(&key).is_some() { "202 Accepted" } else { "404 Not Found" };
            out += &format!(
                "--batch\r\nContent-Type: application/http\r\nContent-ID: {i}\r\n\r\nHTTP/1.1 {status}\r\n\
                 x-ms-version: 1\r\n\r\n\r\n"
            );
        }
        let headers = vec![("Content-Type".to_owned(), "multipart/mixed; boundary=batch".to_owned())];
        Answer { status: 202, headers, body: (out + "--batch--\r\n").into() }
    }

    fn list(&self, path: &str, query: &BTreeMap<String, String>) -> Answer {
        let bucket = format!("{}/", path.trim_end_matches('/'));
        let get = |name: &str| query.get(name).map_or("", String::as_str);
        let (prefix, delimiter, after) = (get("prefix"), get("delimiter"), get("continuation-token"));
        let is_azure = self.kind == Kind::Azure;
        let after = if is_azure { get("marker") } else { after };
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
            if is_azure {
                // The tag has no quotes here.
                out += &format!(
                    "<Blob><Name>{key}</Name><Properties><Last-Modified>{}</Last-Modified><Etag>{}</Etag>\
                     <Content-Length>{}</Content-Length><Content-Type>x/x</Content-Type></Properties></Blob>",
                    MODIFIED.0,
                    object.e_tag.trim_matches('"'),
                    object.content.len()
                );
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
        if is_azure {
            for folder in folders {
                out += &format!("<BlobPrefix><Name>{folder}</Name></BlobPrefix>");
            }
            let next = if more { last } else { String::new() };
            return ok(format!(
                "<EnumerationResults><Blobs>{out}</Blobs><NextMarker>{next}</NextMarker></EnumerationResults>"
            ));
        }
        for folder in folders {
            out += &format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
        }
        if more {
            out += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
        }
        ok(format!("<ListBucketResult><IsTruncated>{more}</IsTruncated>{out}</ListBucketResult>"))
    }
}

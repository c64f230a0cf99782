//! Large files into the hub's storage: the Git LFS batch interface, with its `basic` and `multipart`
//! transfers.
//!
//! What is stored belongs to no commit yet and shows nowhere.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Progress, Stop, hinted};
use serde_json::{Value, json};
use ureq::SendBody;
use ureq::http::Method;

use super::api::{Api, Reply};
use super::{Push, PushFile};
use crate::client::headers;
use crate::failure::Failure;
use crate::hash::sha256_file;

const JSON: &str = "application/vnd.git-lfs+json";

/// Store every file that the storage lacks.
///
/// # Errors
/// The hub refuses one, or it cannot be sent.
pub fn upload(
    api: &Api,
    push: &Push,
    files: &[&PushFile],
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let doing = format!("cannot prepare the upload to `{}`", push.repo);
    let objects: Vec<Value> = files.iter().map(|f| json!({"oid": f.sha256, "size": f.bytes})).collect();
    let request = json!({
        "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256", "objects": objects,
        "ref": {"name": push.revision},
    })
    .to_string();
    let path = format!("{}/{}.git/info/lfs/objects/batch", api.endpoint(), push.repo);
    let reply = api.expect(post(api, &path, &Value::Null, &request), &push.repo, &doing)?;
    let listed = reply.json["objects"].as_array().map_or(&[][..], Vec::as_slice);
    for file in files {
        stop.check()?;
        let doing = format!("cannot send `{}` to `{}`", file.name, push.repo);
        let object = listed.iter().find(|o| o["oid"] == file.sha256.as_str()).with_context(|| {
            hinted(
                format!("{doing}: the hub did not say where to"),
                "check that HF_ENDPOINT is a hub's address",
            )
        })?;
        if let Some(error) = object.get("error") {
            bail!(hinted(
                format!("{doing}: {}", error["message"].as_str().unwrap_or("the hub refuses it")),
                "the hub's storage names the reason above"
            ));
        }
        // Stored already, by an earlier push or in another repository.
        let Some(action) = object["actions"].get("upload") else { continue };
        progress.start(&format!("sending {}", file.name), file.bytes, 0);
        let sent = store(api, push, file, action, progress, &doing);
        progress.finish();
        sent?;
        ensure!(sha256_file(&file.path, |_| ())?.1 == file.sha256, file.changed());
        if let Some(verify) = object["actions"].get("verify") {
            let body = json!({"oid": file.sha256, "size": file.bytes}).to_string();
            let reply = post(api, href(verify), &verify["header"], &body);
            api.expect(reply, &push.repo, &format!("{doing}: it did not arrive whole"))?;
        }
    }
    Ok(())
}

fn store(
    api: &Api,
    push: &Push,
    file: &PushFile,
    action: &Value,
    progress: &dyn Progress,
    doing: &str,
) -> Result<()> {
    let header = &action["header"];
    let Some(chunk) = number(&header["chunk_size"]) else {
        let reply = put(api, file, (0, file.bytes), href(action), header, progress);
        api.expect(reply, &push.repo, doing)?;
        return Ok(());
    };
    // Multipart: the headers are no headers, but the parts' addresses by number.
    let mut parts: Vec<(u64, &str)> = header
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.parse().ok()?, v.as_str()?)))
        .collect();
    parts.sort_unstable();
    ensure!(
        chunk > 0 && parts.len() as u64 == file.bytes.div_ceil(chunk),
        hinted(
            format!("{doing}: the hub names {} parts of {chunk} bytes for {} bytes", parts.len(), file.bytes),
            "push again later; the fault is the hub's"
        )
    );
    let mut done = Vec::new();
    for (index, (number, url)) in parts.into_iter().enumerate() {
        let start = index as u64 * chunk;
        let range = (start, chunk.min(file.bytes - start));
        let reply = put(api, file, range, url, &Value::Null, progress);
        let reply = api.expect(reply, &push.repo, doing)?;
        let etag = reply.headers.get("etag").and_then(|v| v.to_str().ok()).with_context(|| {
            hinted(format!("{doing}: the storage gave part {number} no ETag"), "push again later")
                .environment()
        })?;
        done.push(json!({"partNumber": number, "etag": etag}));
    }
    let body = json!({"oid": file.sha256, "parts": done}).to_string();
    // The address is signed, as the parts' are.
    let json = headers([("Content-Type", JSON), ("Accept", JSON)]);
    let reply = json.and_then(|json| {
        let finish = |_: &mut _| api.store(Method::POST, href(action), &json, body.as_str());
        api.client.retry(&format!("sending {}", file.name), finish)
    });
    api.expect(reply, &push.repo, doing)?;
    Ok(())
}

/// Send `range` (start and length) of a file to an address of the storage.
fn put(
    api: &Api,
    file: &PushFile,
    range: (u64, u64),
    url: &str,
    header: &Value,
    progress: &dyn Progress,
) -> Result<Reply, Failure> {
    let mut reported = 0;
    let length = range.1.to_string();
    let headers = headers(asked_for(header).chain([("Content-Length", length.as_str())]))?;
    api.client.retry(&format!("sending {}", file.name), |_| {
        let open = || {
            let mut source = File::open(&file.path)?;
            source.seek(SeekFrom::Start(range.0))?;
            Ok(source.take(range.1))
        };
        let inner = open().map_err(|e: io::Error| Failure::Network(e.into()))?;
        let mut part = Metered { inner, progress, seen: 0, reported: &mut reported };
        api.store(Method::PUT, url, &headers, SendBody::from_reader(&mut part))
    })
}

fn post(api: &Api, url: &str, header: &Value, body: &str) -> Result<Reply, Failure> {
    let basic = [("Content-Type", JSON), ("Accept", JSON)];
    api.post_to(url, &headers(basic.into_iter().chain(asked_for(header)))?, body)
}

/// Headers that an action asks for.
fn asked_for(header: &Value) -> impl Iterator<Item = (&str, &str)> {
    header.as_object().into_iter().flatten().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?)))
}

fn href(action: &Value) -> &str {
    action["href"].as_str().unwrap_or_default()
}

/// A number, or a string of digits, which is how the hub writes it.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// Reports the progress of what is sent; bytes of a repeated attempt are reported once.
struct Metered<'a> {
    inner: io::Take<File>,
    progress: &'a dyn Progress,
    seen: u64,
    reported: &'a mut u64,
}

impl Read for Metered<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.seen += n as u64;
        if self.seen > *self.reported {
            self.progress.advance(self.seen - *self.reported);
            *self.reported = self.seen;
        }
        Ok(n)
    }
}

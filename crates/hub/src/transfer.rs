//! One file of a repository into the cache: what the hub says about it, and its content.
//!
//! The question about a file is a HEAD without a range, which hub, mirrors and CDNs answer alike. A large
//! file's answer is a redirect to a storage on another host; the redirect has all that is needed, so the
//! storage is only asked for the content. Files in the hub's Xet storage come the same way, by the plain
//! address.
//!
//! A content that broke off is taken up by a range, from the bytes that `<etag>.incomplete` holds. It is kept
//! when its length is the announced one; whether its hash is, too, is checked by `download`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use hf_hub::Repo;
use pkv_core::{Progress, short_line};
use ureq::Body;
use ureq::http::header::{CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use ureq::http::{HeaderMap, HeaderValue, Method, Response};
use url::Url;

use crate::address::{MOST_HOPS, quoted, redirect, text, too_many_redirects};
use crate::client::Client;
use crate::failure::{Asked, Failure};
use crate::hash::git_blob_file;
use crate::names;
use crate::store::{Held, Store};

/// An attempt that brought so much does not count as a failed one.
const WORTHWHILE: u64 = 1 << 20;

/// Metadata of a file from the hub.
#[derive(Debug)]
struct Metadata {
    /// Name of its content.
    etag: String,
    /// `None` if the hub does not say.
    bytes: Option<u64>,
    /// For `If-Range`: the strong ETag of who sends the content, as far as it is known.
    validator: Option<HeaderValue>,
}

/// Bring the file `asked` of `commit` into the cache, unless its content is there, and give it its place.
///
/// # Errors
/// The hub does not have it, the transfer fails, or the cache cannot be written. What has arrived stays.
pub(crate) fn transfer(
    client: &Client,
    store: &Store,
    asked: Asked,
    file: &str,
    progress: &dyn Progress,
) -> Result<(), Failure> {
    client.check_stop()?;
    let url = address(client, asked, file)?;
    let known = client.retry(&format!("asking for {asked}"), |_| metadata(client, &url, asked.revision))?;
    if !store.has(&known.etag, known.bytes) {
        let held = store.hold(&known.etag, client)?;
        // Another process may have brought it meanwhile.
        if !store.has(&known.etag, known.bytes) {
            let content = Content { client, url: &url, known: &known, held: &held };
            let resumed = content.usable()? > 0;
            content.download(file, asked, progress)?;
            // A part that an earlier run left may hold zeros where the power failed. Large files have a
            // SHA-256, which is checked afterwards; of a small one the hash is git's, with the hub itself.
            let etag = &known.etag;
            if resumed
                && !is_sha256(etag)
                && git_blob_file(&held.part).map_err(Failure::disk(&held.part))? != *etag
            {
                content.drop_part()?;
                content.download(file, asked, progress)?;
            }
            store.keep(&held, &known.etag)?;
        }
    }
    store.link(asked.revision, file, &known.etag)
}

fn address(client: &Client, asked: Asked, file: &str) -> Result<Url, Failure> {
    let repo = Repo::new(asked.name.to_owned(), asked.kind.repo_type());
    let file = file.split('/').map(quoted).collect::<Vec<_>>().join("/");
    client.address(&format!("/{}/resolve/{}/{file}", repo.url(), quoted(asked.revision)))
}

/// Ask about a file: redirects within the hub are followed, and others if the hub did not say all before
/// them, as a mirror may not.
fn metadata(client: &Client, url: &Url, commit: &str) -> Result<Metadata, Failure> {
    let mut at = url.clone();
    let mut method = Method::HEAD;
    let (mut linked, mut etag, mut bytes) = (None, None, None);
    for _ in 0..=MOST_HOPS {
        let headers = client.authorized(&at, &HeaderMap::new());
        let response = client.send(method.clone(), &at, &headers, (), client.options.etag_timeout)?;
        let status = response.status();
        if method == Method::HEAD && matches!(status.as_u16(), 405 | 501) {
            method = Method::GET; // Its body is left unread.
            continue;
        }
        let next = redirect(&at, &response)?;
        if next.is_none() && !status.is_success() {
            // A storage that signs addresses for GET alone; the hub has said enough.
            if let Some(known) = linked.or(etag) {
                return named(Some(known), None, bytes);
            }
            return client.success(response).map(|_| unreachable!("the status is no success"));
        }
        let said = response.headers();
        if let Some(found) = text(said, "x-repo-commit").filter(|f| *f != commit) {
            let found = short_line(found);
            return Err(Failure::nonsense(format!("it is of commit `{found}`, expected `{commit}`")));
        }
        let own = |header: &str| said.get(header).cloned();
        linked = linked.or_else(|| own("x-linked-etag"));
        etag = own(ETAG.as_str()).or(etag);
        if let Some(size) = text(said, "x-linked-size").filter(|_| bytes.is_none()) {
            let no_size = || Failure::nonsense(format!("its size is `{}`, expected bytes", short_line(size)));
            bytes = Some(size.parse::<u64>().map_err(|_| no_size())?);
        }
        match next {
            Some(next) if linked.is_none() || client.is_home(&next) => at = next,
            Some(_) => return named(linked, None, bytes),
            None => {
                // Of a HEAD some servers say 0 whatever the file.
                let length = text(said, "content-length").and_then(|l| l.parse().ok()).filter(|l| *l > 0);
                bytes = bytes.or(length);
                return named(linked, etag, bytes);
            }
        }
    }
    Err(too_many_redirects(&at))
}

fn named(
    linked: Option<HeaderValue>,
    etag: Option<HeaderValue>,
    bytes: Option<u64>,
) -> Result<Metadata, Failure> {
    // With a linked ETag the other one is the hub's name of a pointer, not of the content.
    let validator = etag.clone().filter(|e| linked.is_none() && is_strong(e));
    let header = linked.or(etag).ok_or_else(|| {
        Failure::nonsense("the answer has no ETag, by which the cache names a file's content")
    })?;
    let header = header.to_str().unwrap_or_default();
    let etag = names::etag(header).ok_or_else(|| {
        Failure::nonsense(format!(
            "its ETag `{}` cannot be the name of a file in the cache",
            short_line(header)
        ))
    })?;
    Ok(Metadata { etag: etag.to_owned(), bytes, validator })
}

fn is_strong(etag: &HeaderValue) -> bool {
    etag.as_bytes().starts_with(b"\"")
}

/// A content on its way.
struct Content<'a> {
    client: &'a Client<'a>,
    url: &'a Url,
    known: &'a Metadata,
    held: &'a Held,
}

impl Content<'_> {
    /// Until the part is whole.
    fn download(&self, file: &str, asked: Asked, progress: &dyn Progress) -> Result<(), Failure> {
        let Self { client, known, .. } = self;
        let had = self.usable()?;
        progress.start(&format!("downloading {file}"), known.bytes.unwrap_or(0), had);
        let mut meter = Meter { progress, seen: had };
        let mut validator = known.validator.clone();
        let done = client.retry(&format!("downloading {asked}"), |attempts| {
            let before = self.usable()?;
            let result = self.attempt(before, &mut validator, &mut meter);
            if length(&self.held.part) >= before + WORTHWHILE {
                attempts.begin_again(client.options);
            }
            result
        });
        progress.finish();
        done
    }

    /// Bytes of the part from which a download may resume.
    fn usable(&self) -> Result<u64, Failure> {
        let part = &self.held.part;
        match fs::symlink_metadata(part) {
            // Never through a link.
            Ok(m) if !m.is_file() => fs::remove_file(part).map_err(Failure::disk(part)).map(|()| 0),
            Ok(m) if self.known.bytes.is_some_and(|b| m.len() > b) => self.drop_part().map(|()| 0),
            // Whole, but never renamed: a hash will tell if it is right; without one it comes anew.
            Ok(m) if self.known.bytes == Some(m.len()) && !is_sha256(&self.known.etag) => {
                self.drop_part().map(|()| 0)
            }
            Ok(m) => Ok(m.len()),
            Err(_) => Ok(0),
        }
    }

    fn drop_part(&self) -> Result<(), Failure> {
        let part = &self.held.part;
        if length(part) == 0 {
            return Ok(());
        }
        File::create(part).map(drop).map_err(Failure::disk(part))
    }

    /// One request for what is missing.
    fn attempt(
        &self,
        had: u64,
        validator: &mut Option<HeaderValue>,
        meter: &mut Meter,
    ) -> Result<(), Failure> {
        let Self { client, known, .. } = self;
        if had > 0 && known.bytes == Some(had) {
            return Ok(());
        }
        let mut headers = HeaderMap::new();
        if had > 0 {
            let range = HeaderValue::try_from(format!("bytes={had}-"));
            headers.insert(RANGE, range.map_err(|e| Failure::nonsense(e.to_string()))?);
            if let Some(validator) = &*validator {
                headers.insert(IF_RANGE, validator.clone());
            }
        }
        let patience = client.options.download_timeout;
        let answer = client.request(&Method::GET, self.url.clone(), &headers, None, patience)?;
        if had > 0 && answer.status() == 416 {
            self.drop_part()?;
            return Err(Failure::flawed(format!("nothing can be added to the {had} bytes that are here")));
        }
        let response = client.success(answer)?;
        let sent = response.headers().get(ETAG).cloned();
        let (start, total) = match response.status().as_u16() {
            206 if had > 0 => match self.resumed(had, &response, validator.as_ref()) {
                Ok(total) => (had, total),
                Err(why) => {
                    self.drop_part()?;
                    return Err(Failure::flawed(why));
                }
            },
            // A server that ignores the range sends all of it, and so does one whose file is another by now.
            200 if known.validator.is_some()
                && sent.as_ref().is_some_and(is_strong)
                && sent != known.validator =>
            {
                self.drop_part()?;
                return Err(Failure::flawed("its ETag is another by now"));
            }
            200 => (0, self.announced(&response)?),
            status => return Err(Failure::flawed(format!("status {status} where 200 was expected"))),
        };
        // An error page that comes with status 200 has not the ETag of the file.
        let named = sent.as_ref().and_then(|e| names::etag(e.to_str().ok()?));
        let named = named.is_some_and(|name| name.starts_with(&known.etag));
        *validator = sent.filter(is_strong);
        let chunked = text(response.headers(), "transfer-encoding").is_some();
        let arrived = self.write(response, start, total, meter).inspect_err(|failure| {
            // Half a compressed file, taken up in its middle, cannot be resumed from.
            if matches!(failure, Failure::Network(ureq::Error::Decompress(..))) {
                let _ = self.drop_part();
            }
        })?;
        match total {
            Some(total) if arrived != total => {
                Err(Failure::flawed(format!("it ends after {arrived} bytes, expected {total}")))
            }
            None if !chunked => self.prove(),
            _ if known.bytes.is_none() && !named && !self.is_proven()? => {
                self.drop_part()?;
                Err(Failure::flawed(format!("its ETag is not `{}`, that of the file", known.etag)))
            }
            _ => Ok(()),
        }
    }

    /// The whole length after an answer to a range, if it is the part that was asked for.
    fn resumed(
        &self,
        had: u64,
        response: &Response<Body>,
        validator: Option<&HeaderValue>,
    ) -> Result<Option<u64>, String> {
        let range = text(response.headers(), CONTENT_RANGE.as_str()).unwrap_or_default();
        let (first, total) = content_range(range)
            .ok_or_else(|| format!("it goes on with the range `{}`, expected {had}-", short_line(range)))?;
        if first != had {
            return Err(format!("it goes on at byte {first}, expected {had}"));
        }
        if let (Some(known), Some(total)) = (self.known.bytes, total)
            && known != total
        {
            return Err(format!("it has {total} bytes by now, expected {known}"));
        }
        if let (Some(then), Some(now)) = (validator, response.headers().get(ETAG))
            && then != now
        {
            return Err("its ETag is another by now".to_owned());
        }
        Ok(self.known.bytes.or(total))
    }

    /// The whole length before an answer with all of it.
    fn announced(&self, response: &Response<Body>) -> Result<Option<u64>, Failure> {
        match (self.known.bytes, response.body().content_length()) {
            (Some(known), Some(sent)) if known != sent => {
                Err(Failure::flawed(format!("{sent} bytes are sent, {known} were announced")))
            }
            (known, sent) => Ok(known.or(sent)),
        }
    }

    /// The body into the part, from `start` on; the part's length afterwards.
    fn write(
        &self,
        response: Response<Body>,
        start: u64,
        total: Option<u64>,
        meter: &mut Meter,
    ) -> Result<u64, Failure> {
        let path = &self.held.part;
        let disk = || Failure::disk(path);
        let mut options = File::options();
        options.create(true);
        let mut part = if start > 0 { options.append(true) } else { options.write(true).truncate(true) }
            .open(path)
            .map_err(disk())?;
        let mut at = start;
        self.client.read(response, |piece| {
            at += piece.len() as u64;
            if let Some(total) = total.filter(|t| at > *t) {
                part.set_len(0).map_err(disk())?;
                return Err(Failure::flawed(format!("more than the announced {total} bytes come")));
            }
            part.write_all(piece).map_err(disk())?;
            meter.at(at);
            self.client.check_stop()
        })?;
        Ok(at)
    }

    /// A body that ends with its connection may be cut off anywhere: its hash must tell.
    fn prove(&self) -> Result<(), Failure> {
        if !self.is_proven()? {
            self.drop_part()?;
            return Err(Failure::nonsense(
                "neither its size nor a hash of its content is announced: whether it came whole cannot be known",
            ));
        }
        Ok(())
    }

    /// Whether the part's hash is its name. A SHA-256 is checked afterwards, as that of every file.
    fn is_proven(&self) -> Result<bool, Failure> {
        let (part, etag) = (&self.held.part, &self.known.etag);
        Ok(is_sha256(etag) || git_blob_file(part).map_err(Failure::disk(part))? == *etag)
    }
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit())
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

/// First byte and, unless it is `*`, whole length of `bytes 10-19/20`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-')?.0.trim().parse().ok()?;
    match total.trim() {
        "*" => Some((first, None)),
        total => Some((first, Some(total.parse().ok()?))),
    }
}

/// Tells the progress of each byte once, also if it comes again.
struct Meter<'a> {
    progress: &'a dyn Progress,
    seen: u64,
}

impl Meter<'_> {
    fn at(&mut self, bytes: u64) {
        if bytes > self.seen {
            self.progress.advance(bytes - self.seen);
            self.seen = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(content_range("bytes 10-19/20"), Some((10, Some(20))));
        assert_eq!(content_range("bytes 10-19/*"), Some((10, None)));
        for bad in ["", "bytes */20", "10-19/20", "bytes x-/2", "bytes 1-2"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_content_is_named_by_the_linked_etag_and_only_a_strong_one_validates_a_range() {
        let value = |text: &'static str| Some(HeaderValue::from_static(text));
        let found = named(value("\"a1\""), value("\"b2\""), Some(3)).unwrap();
        assert_eq!((found.etag.as_str(), found.bytes, found.validator), ("a1", Some(3), None));
        let found = named(None, value("\"b2\""), None).unwrap();
        assert_eq!((found.etag.as_str(), found.validator), ("b2", value("\"b2\"")));
        let found = named(None, value("W/\"b2\""), None).unwrap();
        assert_eq!((found.etag.as_str(), found.validator), ("b2", None));
        assert!(named(None, None, None).unwrap_err().why().contains("no ETag"));
        assert!(named(value("\"../x\""), None, None).unwrap_err().why().contains("`\"../x\"`"));
    }
}

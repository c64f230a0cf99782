//! The HTTP client that object_store sends its requests with: ureq, on the runtime's blocking threads.
//!
//! An answer is read whole before it counts, so that one that breaks off in the middle is a failed request,
//! which object_store sends again. Objects come in ranges, so that no answer is long; a range goes straight
//! into its file.

use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use ureq::{Agent, Timeout};

/// Longest answer in memory: a page of a listing, or a small file.
const LONGEST: u64 = 64 << 20;

/// Bytes on their way into a file: few enough to be written from the processor's own cache, where a range
/// that is held whole costs several times as much.
pub(crate) const HOT: usize = 128 << 10;

/// Connections that are kept; no more requests are sent at once.
const CONNECTIONS: usize = 16;

#[derive(Debug)]
pub(crate) struct Connector {
    /// For a connection, for an answer to begin, and between its bytes.
    pub patience: Duration,
}

/// Where the bytes of a range go: into a file, from `at` on. As an extension of a request, it is there each
/// time that this is sent.
#[derive(Clone, Debug)]
pub(crate) struct Sink {
    pub file: Arc<File>,
    pub at: u64,
    pub bytes: u64,
    /// Why the file could not be written.
    pub failed: Arc<Mutex<Option<io::Error>>>,
}

impl Sink {
    fn fill(&self, answer: &mut impl Read) -> Result<(), HttpError> {
        let (mut piece, mut done) = (vec![0; HOT], 0);
        loop {
            let n = answer.read(&mut piece).map_err(|e| failure(e.into()))?;
            if n == 0 || done + n as u64 > self.bytes {
                break;
            }
            if let Err(e) = self.file.write_all_at(&piece[..n], self.at + done) {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                // Sending it again does not help.
                return Err(HttpError::new(
                    HttpErrorKind::Decode,
                    io::Error::other("its file cannot be written"),
                ));
            }
            done += n as u64;
        }
        if done == self.bytes {
            return Ok(());
        }
        let text = format!("expected {} bytes of it, found another number", self.bytes);
        Err(HttpError::new(HttpErrorKind::Interrupted, io::Error::other(text)))
    }
}

#[derive(Debug)]
struct Service(Agent);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let agent = Agent::config_builder()
            // Statuses have meanings here.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("proxykv-train/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .max_idle_connections(CONNECTIONS)
            .max_idle_connections_per_host(CONNECTIONS)
            .allow_non_standard_methods(true)
            .timeout_resolve(Some(self.patience))
            .timeout_connect(Some(self.patience.min(Duration::from_secs(10))))
            .timeout_send_request(Some(self.patience))
            .timeout_per_write(Some(self.patience))
            .timeout_recv_response(Some(self.patience))
            .timeout_per_read(Some(self.patience))
            .build()
            .new_agent();
        Ok(HttpClient::new(Service(agent)))
    }
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let agent = self.0.clone();
        let call = move || send(&agent, ureq::http::Request::from_parts(parts, body));
        tokio::task::spawn_blocking(call).await.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?
    }
}

fn send(agent: &Agent, request: ureq::http::Request<Bytes>) -> Result<HttpResponse, HttpError> {
    let (mut parts, body) = request.into_parts();
    let sink = parts.extensions.remove::<Sink>();
    let is_empty = body.is_empty() && !matches!(parts.method.as_str(), "PUT" | "POST");
    let answer = if is_empty {
        agent.run(ureq::http::Request::from_parts(parts, ()))
    } else {
        agent.run(ureq::http::Request::from_parts(parts, &body[..]))
    };
    let (parts, body) = answer.map_err(failure)?.into_parts();
    if let Some(sink) = sink.filter(|_| parts.status == ureq::http::StatusCode::PARTIAL_CONTENT) {
        sink.fill(&mut body.into_reader())?;
        return Ok(HttpResponse::from_parts(parts, Bytes::new().into()));
    }
    let announced = body.content_length().unwrap_or(0).min(LONGEST);
    let mut content = Vec::with_capacity(usize::try_from(announced).unwrap_or(0));
    let mut reader = body.into_reader().take(LONGEST + 1);
    reader.read_to_end(&mut content).map_err(|e| failure(e.into()))?;
    if content.len() as u64 > LONGEST {
        let text = format!("an answer is longer than {} MiB", LONGEST >> 20);
        return Err(HttpError::new(HttpErrorKind::Decode, io::Error::other(text)));
    }
    Ok(HttpResponse::from_parts(parts, Bytes::from(content).into()))
}

/// Whether a request was sent decides whether any kind of it may be sent again.
fn failure(error: ureq::Error) -> HttpError {
    let kind = match &error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => HttpErrorKind::Connect,
        ureq::Error::Timeout(_) => HttpErrorKind::Timeout,
        ureq::Error::Io(e) if e.kind() == ErrorKind::ConnectionRefused => HttpErrorKind::Connect,
        ureq::Error::Io(e) if is_timeout(e) => HttpErrorKind::Timeout,
        ureq::Error::Io(_) | ureq::Error::Protocol(_) => HttpErrorKind::Interrupted,
        _ => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, error)
}

/// Directly, or as ureq wraps it while a body is read.
fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().map(|e| e as &(dyn Error + 'static));
    error.kind() == ErrorKind::TimedOut
        || inner.and_then(|e| e.downcast_ref()).is_some_and(|e| matches!(e, ureq::Error::Timeout(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_in_its_file_when_all_of_it_has_come() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard");
        std::fs::write(&path, [1; 10]).unwrap();
        let sink = |file: File| Sink { file: Arc::new(file), at: 3, bytes: 4, failed: Arc::default() };
        let writable = || sink(File::options().write(true).open(&path).unwrap());
        for wrong in [&b"abc"[..], b"abcde", b""] {
            let error = writable().fill(&mut &wrong[..]).unwrap_err();
            // It is sent again.
            assert_eq!(error.kind(), HttpErrorKind::Interrupted, "{wrong:?}");
        }
        writable().fill(&mut &b"wxyz"[..]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"\x01\x01\x01wxyz\x01\x01\x01");
        // As on a full disk.
        let closed = sink(File::open(&path).unwrap());
        assert_eq!(closed.fill(&mut &b"wxyz"[..]).unwrap_err().kind(), HttpErrorKind::Decode);
        assert!(closed.failed.lock().unwrap().is_some());
    }
}

//! The HTTP client that object_store sends its requests with: ureq, on the runtime's blocking threads.
//!
//! An answer is read whole before it counts, so that one that breaks off in the middle is a failed request,
//! which object_store sends again. Objects come in ranges, so that no answer is long.

use std::error::Error;
use std::io::{ErrorKind, Read};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use ureq::{Agent, Timeout};

/// Longest answer: a range, a page of a listing, or a small file.
const LONGEST: u64 = 64 << 20;

/// Connections that are kept; no more requests are sent at once.
const CONNECTIONS: usize = 16;

#[derive(Debug)]
pub(crate) struct Connector {
    /// For a connection, for an answer to begin, and between its bytes.
    pub patience: Duration,
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
    let (parts, body) = request.into_parts();
    let is_empty = body.is_empty() && !matches!(parts.method.as_str(), "PUT" | "POST");
    let answer = if is_empty {
        agent.run(ureq::http::Request::from_parts(parts, ()))
    } else {
        agent.run(ureq::http::Request::from_parts(parts, &body[..]))
    };
    let (parts, body) = answer.map_err(failure)?.into_parts();
    let announced = body.content_length().unwrap_or(0).min(LONGEST);
    let mut content = Vec::with_capacity(usize::try_from(announced).unwrap_or(0));
    let mut reader = body.into_reader().take(LONGEST + 1);
    reader.read_to_end(&mut content).map_err(|e| failure(e.into()))?;
    if content.len() as u64 > LONGEST {
        let text = format!("an answer is longer than {} MiB", LONGEST >> 20);
        return Err(HttpError::new(HttpErrorKind::Decode, std::io::Error::other(text)));
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
fn is_timeout(error: &std::io::Error) -> bool {
    let inner = error.get_ref().map(|e| e as &(dyn Error + 'static));
    error.kind() == ErrorKind::TimedOut
        || inner.and_then(|e| e.downcast_ref()).is_some_and(|e| matches!(e, ureq::Error::Timeout(_)))
}

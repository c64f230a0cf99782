//! Failures of requests, transfers and writes into the cache: the cause, whether a retry may help, and the
//! hint.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Error, anyhow};
use pkv_core::{Hinted, Interrupted, hinted, short_line};
use ureq::http::HeaderMap;

use crate::cache::Kind;
use crate::options::HubOptions;

#[derive(Debug)]
pub(crate) enum Failure {
    /// The hub, or where it sent us, says no.
    Status(Refusal),
    /// No answer, or not all of it.
    Network(ureq::Error),
    /// An answer that makes no sense.
    Answer { text: String, passing: bool },
    /// The cache cannot be read or written.
    Disk { path: PathBuf, error: io::Error },
    /// The user wants to stop.
    Stopped(Interrupted),
}

/// An answer of a status that is no success.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub status: u16,
    /// The server's own words; may be empty.
    pub message: String,
    /// Requested waiting time.
    pub retry_after: Option<Duration>,
}

/// Subject of a request.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub kind: Kind,
    pub name: &'a str,
    pub revision: &'a str,
    /// One of its files, or the list of them.
    pub file: Option<&'a str>,
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self::Network(error)
    }
}

impl Failure {
    /// An answer that will be the same next time.
    pub fn nonsense(text: impl Into<String>) -> Self {
        Self::Answer { text: text.into(), passing: false }
    }

    /// An answer that may be better next time.
    pub fn flawed(text: impl Into<String>) -> Self {
        Self::Answer { text: text.into(), passing: true }
    }

    /// For `map_err` of what is done to `path`.
    pub fn disk(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error| Self::Disk { path, error }
    }

    /// Whether waiting may help: lost connections, stalls, busy servers.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Status(r) => r.is_passing(),
            Self::Network(e) => match e {
                ureq::Error::Io(e) => !is_unknown_host(e) && !is_certificate(e),
                ureq::Error::Timeout(_)
                | ureq::Error::Protocol(_)
                | ureq::Error::ConnectionFailed
                | ureq::Error::Decompress(..)
                | ureq::Error::ConnectProxyFailed(_)
                | ureq::Error::BodyStalled => true,
                _ => false,
            },
            Self::Answer { passing, .. } => *passing,
            Self::Disk { .. } | Self::Stopped(_) => false,
        }
    }

    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status(r) => r.retry_after,
            _ => None,
        }
    }

    /// Nothing came in time.
    fn is_stall(&self) -> bool {
        match self {
            Self::Network(ureq::Error::Timeout(_)) => true,
            Self::Network(ureq::Error::Io(e)) => {
                matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
            }
            _ => false,
        }
    }

    /// In a few words, for a log line and as the innermost cause.
    pub fn why(&self) -> String {
        match self {
            Self::Status(r) => r.to_string(),
            Self::Network(ureq::Error::Timeout(t)) => format!("no answer in time ({t})"),
            Self::Network(ureq::Error::Io(e)) => e.to_string(),
            Self::Network(e) => e.to_string(),
            Self::Answer { text, .. } => text.clone(),
            Self::Disk { path, error } => format!("`{}`: {error}", path.display()),
            Self::Stopped(e) => e.to_string(),
        }
    }

    /// The error for the user, with a hint that fits the cause.
    pub fn explain(self, asked: Asked, options: &HubOptions) -> Error {
        let what = asked.to_string();
        let endpoint = &options.endpoint;
        let context: Hinted = match &self {
            Self::Stopped(error) => return Error::from(*error),
            Self::Disk { error, .. } => hinted(
                format!("cannot write into the Hugging Face cache `{}`", options.cache.display()),
                disk_hint(error.kind()),
            )
            .environment(),
            Self::Status(r) => match r.status {
                401 | 403 => hinted(
                    format!("the hub refuses {what} (status {})", r.status),
                    format!(
                        "check the name; if it is gated, accept its licence at {} and set HF_TOKEN",
                        asked.page(endpoint)
                    ),
                ),
                404 | 410 if asked.file.is_some() => hinted(
                    format!("the hub `{endpoint}` lists {what} and does not have it"),
                    "run `proxykv-train fetch` again later; the repository, or the mirror, is not whole",
                ),
                404 | 410 => hinted(
                    format!("the hub `{endpoint}` has no {what} at revision `{}`", asked.revision),
                    "check name and revision, or name a local folder",
                ),
                429 => hinted(
                    format!("the hub `{endpoint}` limits how often {what} may be asked for (status 429)"),
                    "wait some minutes and run `proxykv-train fetch` again, it goes on where it stopped; \
                     with a token (HF_TOKEN) the limits are higher",
                )
                .environment(),
                status => hinted(
                    format!("the hub `{endpoint}` cannot send {what} (status {status})"),
                    "run `proxykv-train fetch` again later, it goes on where it stopped; HF_ENDPOINT names a mirror",
                )
                .environment(),
            },
            Self::Answer { .. } => hinted(
                format!("the hub `{endpoint}` sends {what} in a way that cannot be used"),
                "check that HF_ENDPOINT is a hub's address, and run `proxykv-train fetch` again; \
                 it goes on where it stopped",
            ),
            Self::Network(error) => hinted(
                format!("cannot reach {what} on the hub `{endpoint}`"),
                format!("{}{}", network_hint(error, &self, options), asked.no_folder()),
            )
            .environment(),
        };
        anyhow!(self.why()).context(context)
    }
}

/// Hint for a connection that was lost or never made.
pub(crate) fn network_hint(error: &ureq::Error, failure: &Failure, options: &HubOptions) -> String {
    const AGAIN: &str = "run it again: it goes on where it stopped";
    match error {
        ureq::Error::Io(e) if is_unknown_host(e) => {
            "the host's name is unknown here: check HF_ENDPOINT and the network's name service; HTTPS_PROXY names a proxy"
                .to_owned()
        }
        ureq::Error::HostNotFound | ureq::Error::BadUri(_) => {
            "check HF_ENDPOINT: no address belongs to that name".to_owned()
        }
        ureq::Error::Rustls(_) | ureq::Error::Tls(_) => certificate_hint(),
        ureq::Error::Io(e) if is_certificate(e) => certificate_hint(),
        ureq::Error::InvalidProxyUrl | ureq::Error::ConnectProxyFailed(_) => {
            "check the proxy that HTTPS_PROXY or ALL_PROXY names".to_owned()
        }
        _ if failure.is_stall() => format!(
            "nothing came for {:.0?}: {AGAIN}. HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT raise the limits (seconds), \
             HF_ENDPOINT names a mirror",
            options.download_timeout
        ),
        _ => format!(
            "check the network (HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy) and {AGAIN}. Or name a local folder"
        ),
    }
}

fn certificate_hint() -> String {
    "no secure connection: check this machine's clock, and whether a proxy puts its own certificate between"
        .to_owned()
}

fn disk_hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room there, or let HF_HUB_CACHE name a folder on a larger disk; what has arrived is kept"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "the cache lacks the file and may not be written: let HF_HUB_CACHE name a folder of your own, \
             or let its owner run `proxykv-train fetch`"
        }
        _ => "check that folder, or let HF_HUB_CACHE name another",
    }
}

/// The standard library has no kind for it.
fn is_unknown_host(error: &io::Error) -> bool {
    error.to_string().contains("failed to lookup address")
}

fn is_certificate(error: &io::Error) -> bool {
    let text = error.to_string();
    text.contains("certificate") || text.contains("UnknownIssuer")
}

impl Refusal {
    pub fn of(status: u16, headers: &HeaderMap, message: &str) -> Self {
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
        let retry_after = header("retry-after").and_then(|text| {
            text.parse().map(Duration::from_secs).ok().or_else(|| {
                let date = httpdate::parse_http_date(text).ok()?;
                Some(date.duration_since(SystemTime::now()).unwrap_or_default())
            })
        });
        let message =
            if message.is_empty() { header("x-error-message").unwrap_or_default() } else { message };
        Self { status, message: short_line(message), retry_after }
    }

    pub fn is_passing(&self) -> bool {
        self.status == 408 || self.status == 429 || self.status >= 500
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the hub answers with status {}", self.status)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if let Some(wait) = self.retry_after {
            write!(f, "; it asks to wait {} s", wait.as_secs())?;
        }
        Ok(())
    }
}

impl Asked<'_> {
    fn page(&self, endpoint: &str) -> String {
        let folder = if self.kind == Kind::Dataset { "datasets/" } else { "" };
        format!("{endpoint}/{folder}{}", self.name)
    }

    /// The end of a hint: a model is looked for on the hub where there is no folder of its name.
    fn no_folder(&self) -> &'static str {
        match (self.kind, self.file) {
            (Kind::Model, None) => "; and there is no folder of that name here",
            _ => "",
        }
    }
}

impl std::fmt::Display for Asked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = self.file {
            write!(f, "`{file}` of ")?;
        }
        write!(f, "{} `{}`", self.kind.noun(), self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(failure: Failure) -> String {
        let asked = Asked { kind: Kind::Model, name: "o/n", revision: "main", file: Some("a.json") };
        let error = failure.explain(asked, &HubOptions::default());
        error.downcast_ref::<Hinted>().unwrap().hint().to_owned()
    }

    #[test]
    fn a_model_out_of_reach_may_be_a_folder_that_is_absent() {
        let unknown = || io::Error::other("failed to lookup address information: Name or service not known");
        for (kind, file, expected) in
            [(Kind::Model, None, true), (Kind::Model, Some("a.json"), false), (Kind::Dataset, None, false)]
        {
            let asked = Asked { kind, name: "models/mine", revision: "main", file };
            let error = Failure::from(ureq::Error::Io(unknown())).explain(asked, &HubOptions::default());
            let hint = error.downcast_ref::<Hinted>().unwrap().hint();
            assert_eq!(hint.contains("no folder of that name here"), expected, "{hint}");
        }
    }

    fn disk(kind: ErrorKind) -> Failure {
        Failure::disk("x")(kind.into())
    }

    fn status(status: u16) -> Failure {
        Failure::Status(Refusal::of(status, &HeaderMap::new(), ""))
    }

    #[test]
    fn each_cause_has_its_own_hint() {
        let unknown = io::Error::other("failed to lookup address information: Name or service not known");
        for (failure, part) in [
            (Failure::Network(ureq::Error::Io(unknown)), "name service"),
            (Failure::Network(ureq::Error::Timeout(ureq::Timeout::PerRead)), "HF_HUB_DOWNLOAD_TIMEOUT"),
            (Failure::Network(ureq::Error::Io(ErrorKind::ConnectionRefused.into())), "check the network"),
            (
                Failure::Network(ureq::Error::Io(io::Error::other("invalid peer certificate: Expired"))),
                "clock",
            ),
            (disk(ErrorKind::StorageFull), "make room"),
            (disk(ErrorKind::ReadOnlyFilesystem), "may not be written"),
            (disk(ErrorKind::PermissionDenied), "may not be written"),
            (disk(ErrorKind::NotADirectory), "check that folder"),
            (status(401), "licence"),
            (status(403), "licence"),
            (status(404), "not whole"),
            (status(429), "wait some minutes"),
            (status(503), "later"),
            (Failure::nonsense("what?"), "HF_ENDPOINT is a hub's address"),
        ] {
            let text = format!("{failure:?}");
            let hint = hint(failure);
            assert!(hint.contains(part), "{text}: {hint}");
        }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let io = |kind: ErrorKind| Failure::Network(ureq::Error::Io(kind.into()));
        for passing in
            [status(429), status(503), status(408), io(ErrorKind::ConnectionReset), io(ErrorKind::TimedOut)]
        {
            assert!(passing.is_passing(), "{passing:?}");
        }
        let unknown = io::Error::other("failed to lookup address information: x");
        for lasting in [
            status(401),
            status(404),
            disk(ErrorKind::StorageFull),
            Failure::Network(ureq::Error::Io(unknown)),
            Failure::nonsense("x"),
        ] {
            assert!(!lasting.is_passing(), "{lasting:?}");
        }
    }

    #[test]
    fn a_wait_is_read_as_seconds_or_as_a_date() {
        let wait = |text: &str| {
            let headers = [("retry-after".parse().unwrap(), text.parse().unwrap())].into_iter().collect();
            Refusal::of(429, &headers, "").retry_after
        };
        assert_eq!(wait("17"), Some(Duration::from_secs(17)));
        assert_eq!(wait("Thu, 01 Jan 1970 00:00:00 GMT"), Some(Duration::ZERO));
        let later = SystemTime::now() + Duration::from_secs(1000);
        let found = wait(&httpdate::fmt_http_date(later)).unwrap();
        assert!((900..=1000).contains(&found.as_secs()), "{found:?}");
        assert_eq!((wait("soon"), wait("-1")), (None, None));
    }
}

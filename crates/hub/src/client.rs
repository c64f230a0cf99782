//! The HTTP client: headers, time limits, redirects and retries.
//!
//! Every request carries
//! - `User-Agent: proxykv-train/<version>`;
//! - `Accept-Encoding: identity`: a CDN that may compress ignores ranges and announces another length. Should
//!   it compress all the same, ureq decodes gzip, and any other encoding is refused;
//! - `Authorization`, for addresses of the hub itself alone: the same scheme, host and port. Redirects
//!   are followed here and not by ureq, so that other hosts never get it.
//!
//! What the answers mean is left to `listing`, `transfer` and `push`.

use std::io::{self, ErrorKind, Read};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pkv_core::{Interrupted, Stop, hinted};
use serde_json::Value;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING};
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response};
use ureq::{Agent, AsSendBody, Body};
use url::Url;

use crate::address::{MOST_HOPS, is_http, redirect, same_origin, shown, text, too_many_redirects};
use crate::failure::{Failure, Refusal};
use crate::options::HubOptions;
use crate::redact::Secrets;

/// A server that asks to wait longer is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);
/// Of an error's page, for the server's words.
const LONGEST_REFUSAL: usize = 64 << 10;
/// Read timeouts, a minute by default, for an answer that takes work, and for a write.
const WORK: u32 = 6;
/// Least bytes of a body in that time; slower transfers count as stalled.
const LEAST_BYTES: u64 = 1 << 10;

/// A hub, and who speaks to it.
pub(crate) struct Client<'a> {
    pub options: &'a HubOptions,
    pub secrets: Secrets,
    stop: &'a Stop,
    agent: Agent,
    home: Url,
    authorization: Option<HeaderValue>,
}

/// Remaining attempts of one request.
pub(crate) struct Attempts {
    pub made: u32,
    wait: Duration,
}

impl<'a> Client<'a> {
    /// # Errors
    /// The hub's address is none, or the token cannot be sent.
    pub fn new(options: &'a HubOptions, with_token: bool, stop: &'a Stop) -> Result<Self> {
        let home = Url::parse(&options.endpoint)
            .ok()
            .filter(|u| u.has_host() && is_http(u) && u.query().is_none() && u.fragment().is_none())
            .with_context(|| {
                hinted(
                    format!("HF_ENDPOINT is `{}`, which is no address of a hub", options.endpoint),
                    "write it as `https://huggingface.co`",
                )
            })?;
        let token = options.token.as_ref().filter(|_| with_token);
        let authorization = match (&options.login, token) {
            (Some(login), _) => Some(format!("Basic {}", STANDARD.encode(login))),
            (None, Some(token)) => {
                let sound = token.chars().all(|c| c.is_ascii_graphic());
                sound.then_some(()).with_context(|| {
                    hinted(
                        "the token for the hub cannot be sent: it holds a blank, a line break or a letter beyond ASCII",
                        "check HF_TOKEN, or the file that HF_TOKEN_PATH names",
                    )
                })?;
                Some(format!("Bearer {token}"))
            }
            (None, None) => None,
        };
        let authorization = authorization.map(|a| HeaderValue::from_str(&a)).transpose()?.map(|mut a| {
            a.set_sensitive(true);
            a
        });
        let agent = Agent::config_builder()
            // Statuses have meanings here, and their bodies say why.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("proxykv-train/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(options.etag_timeout))
            .timeout_connect(Some(options.etag_timeout))
            .timeout_send_request(Some(options.download_timeout))
            .timeout_per_write(Some(options.download_timeout * WORK))
            .build()
            .new_agent();
        Ok(Self { options, secrets: Secrets::of(options), stop, agent, home, authorization })
    }

    /// The address of `path` on the hub.
    ///
    /// # Errors
    /// It is none.
    pub fn address(&self, path: &str) -> Result<Url, Failure> {
        let text = format!("{}{path}", self.options.endpoint);
        Url::parse(&text).map_err(|e| Failure::nonsense(format!("`{text}` is no address: {e}")))
    }

    /// Whether an address is the hub's own, and not that of another host.
    pub fn is_home(&self, url: &Url) -> bool {
        let upgraded = self.home.scheme() == "http"
            && url.scheme() == "https"
            && self.home.host() == url.host()
            && (self.home.port(), url.port()) == (None, None);
        same_origin(&self.home, url) || upgraded
    }

    pub fn check_stop(&self) -> Result<(), Failure> {
        self.stop.check().map_err(Failure::Stopped)
    }

    /// One request, to one address. `patience`: for the answer to begin, and between its bytes.
    ///
    /// # Errors
    /// No answer came.
    pub fn send<B: AsSendBody>(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: B,
        patience: Duration,
    ) -> Result<Response<Body>, Failure> {
        tracing::debug!("{method} {}", shown(url));
        let mut request = Request::builder().method(method).uri(url.as_str());
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(ureq::Error::from)?;
        let request = self
            .agent
            .configure_request(request)
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .build();
        Ok(self.agent.run(request)?)
    }

    /// Time for an answer that the hub must work for, such as a commit.
    pub fn patience_for_work(&self) -> Duration {
        self.options.download_timeout * WORK
    }

    /// `headers`, and who asks if `url` is the hub's own.
    pub fn authorized(&self, url: &Url, headers: &HeaderMap) -> HeaderMap {
        let mut headers = headers.clone();
        if let Some(authorization) = self.authorization.as_ref().filter(|_| self.is_home(url))
            && !headers.contains_key(AUTHORIZATION)
        {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        headers
    }

    /// A request of the hub, its redirects followed: with a body, only those that stay at the hub.
    ///
    /// # Errors
    /// No answer came, or a redirect leads where none may.
    pub fn request(
        &self,
        method: &Method,
        mut url: Url,
        headers: &HeaderMap,
        body: Option<&[u8]>,
        patience: Duration,
    ) -> Result<Response<Body>, Failure> {
        for _ in 0..=MOST_HOPS {
            let all = self.authorized(&url, headers);
            let response = match body {
                Some(body) => self.send(method.clone(), &url, &all, body, patience)?,
                None => self.send(method.clone(), &url, &all, (), patience)?,
            };
            let Some(next) = redirect(&url, &response)? else { return Ok(response) };
            if body.is_some() && !self.is_home(&next) {
                return Err(Failure::nonsense(format!(
                    "{} sends uploads on to {}",
                    shown(&url),
                    shown(&next)
                )));
            }
            url = next;
        }
        Err(too_many_redirects(&url))
    }

    /// Try until it works, the failure is one that lasts, or the attempts are used up; `attempt` may say that
    /// it came further and deserves all attempts again.
    ///
    /// # Errors
    /// The last failure.
    pub fn retry<T>(
        &self,
        what: &str,
        mut attempt: impl FnMut(&mut Attempts) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempts = self.attempts();
        loop {
            attempts.made += 1;
            if attempts.made > 1 {
                self.check_stop()?;
            }
            match attempt(&mut attempts) {
                Err(failure) if failure.is_passing() => {
                    if !self.pause(what, &mut attempts, &failure).map_err(Failure::Stopped)? {
                        return Err(failure);
                    }
                }
                result => return result,
            }
        }
    }

    /// The attempts at one thing, none made.
    pub fn attempts(&self) -> Attempts {
        Attempts { made: 0, wait: self.options.retry_after }
    }

    /// Wait after a failed attempt, and say so; false if there is none left, or the server asks for too much.
    pub fn pause(&self, what: &str, attempts: &mut Attempts, failure: &Failure) -> Result<bool, Interrupted> {
        let asked = failure.retry_after().unwrap_or_default();
        if attempts.made >= self.options.attempts || asked > LONGEST_WAIT {
            return Ok(false);
        }
        let wait = attempts.wait.max(asked);
        attempts.wait = (attempts.wait * 2).min(LONGEST_BACK_OFF);
        tracing::warn!(
            "{what}: attempt {} of {} failed, the next one in {wait:.1?}: {}",
            attempts.made,
            self.options.attempts,
            self.secrets.redact(&failure.why())
        );
        let begun = Instant::now();
        while let Some(left) = wait.checked_sub(begun.elapsed()).filter(|l| !l.is_zero()) {
            self.stop.check()?;
            sleep(left.min(Duration::from_millis(200)));
        }
        Ok(true)
    }

    /// All of an answer's body, up to `limit` bytes.
    ///
    /// # Errors
    /// It is longer, or does not come.
    pub fn read_all(&self, response: Response<Body>, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut out = Vec::new();
        self.read(response, |piece| {
            if (out.len() + piece.len()) as u64 > limit {
                return Err(Failure::nonsense(format!("the answer is longer than {} MiB", limit >> 20)));
            }
            out.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(out)
    }

    /// An answer's body, piece by piece.
    ///
    /// # Errors
    /// It does not come, or `take` fails.
    pub fn read(
        &self,
        response: Response<Body>,
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let window = self.patience_for_work();
        let mut reader = response.into_body().into_reader();
        let mut piece = vec![0; 256 << 10];
        let (mut since, mut came) = (Instant::now(), 0);
        loop {
            let n = reader.read(&mut piece).map_err(ureq::Error::from)?;
            if n == 0 {
                return Ok(());
            }
            take(&piece[..n])?;
            came += n as u64;
            if since.elapsed() > window {
                if came < LEAST_BYTES {
                    let text = format!("only {came} bytes came in {window:.0?}");
                    return Err(ureq::Error::Io(io::Error::new(ErrorKind::TimedOut, text)).into());
                }
                (since, came) = (Instant::now(), 0);
            }
        }
    }

    /// The answer if it is a success.
    ///
    /// # Errors
    /// It is none, or its encoding was not asked for.
    pub fn success(&self, response: Response<Body>) -> Result<Response<Body>, Failure> {
        if !response.status().is_success() {
            return Err(Failure::Status(self.refusal(response)));
        }
        let encoding = text(response.headers(), CONTENT_ENCODING.as_str()).unwrap_or("identity");
        if !encoding.eq_ignore_ascii_case("identity") {
            return Err(Failure::nonsense(format!(
                "the answer is encoded as `{encoding}`, although `{ACCEPT_ENCODING}: identity` was sent"
            )));
        }
        Ok(response)
    }

    /// A server's explanation of its refusal, if it can be read.
    fn refusal(&self, response: Response<Body>) -> Refusal {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        // Whatever has come when it stalls or ends: the status is what counts.
        let mut body = Vec::new();
        let _ = self.read(response, |piece| {
            body.extend_from_slice(piece);
            if body.len() > LONGEST_REFUSAL { Err(Failure::nonsense("too long")) } else { Ok(()) }
        });
        let json: Value = serde_json::from_slice(&body).unwrap_or_default();
        Refusal::of(status, &headers, json["error"].as_str().unwrap_or_default())
    }
}

impl Attempts {
    /// It came further: a long transfer over a bad line may break more often than the attempts are.
    pub fn begin_again(&mut self, options: &HubOptions) {
        *self = Self { made: 1, wait: options.retry_after };
    }
}

/// Headers out of names and values.
///
/// # Errors
/// One cannot be sent.
pub(crate) fn headers<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<HeaderMap, Failure> {
    let mut out = HeaderMap::new();
    for (name, value) in pairs {
        let name = ureq::http::HeaderName::try_from(name);
        match (name, HeaderValue::try_from(value)) {
            (Ok(name), Ok(value)) => out.insert(name, value),
            _ => return Err(Failure::nonsense("a header that the hub asks for is none")),
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn is_home(endpoint: &str, address: &str) -> bool {
        let options = HubOptions { endpoint: endpoint.to_owned(), ..HubOptions::default() };
        Client::new(&options, true, &Stop::default()).unwrap().is_home(&url(address))
    }

    #[test]
    fn the_token_goes_to_the_hub_alone() {
        for home in ["https://hub.example/o/n", "https://hub.example:443/", "https://HUB.example/x?y"] {
            assert!(is_home("https://hub.example", home), "{home}");
        }
        for other in [
            "https://storage.example/x?y=https://hub.example/",
            "https://hub.example.evil/x",
            "https://hub.example@evil/x",
            "https://hub.example:8443/x",
            "http://hub.example/x",
        ] {
            assert!(!is_home("https://hub.example", other), "{other}");
        }
        assert!(is_home("http://hub.example", "https://hub.example/x"), "an upgrade stays at the hub");
        assert!(!is_home("http://hub.example:80/", "https://hub.example:81/x"));
        assert!(!is_home("http://127.0.0.1:9", "http://localhost:9/x"));
    }

    #[test]
    fn a_token_that_is_none_is_refused_and_not_shown() {
        for bad in ["hf_bad\r\nX-Injected: 1", "hf bad", "hf_bäd"] {
            let options = HubOptions { token: Some(bad.to_owned()), ..HubOptions::default() };
            let error = Client::new(&options, true, &Stop::default()).err().unwrap();
            assert!(error.to_string().contains("cannot be sent"), "{error}");
            assert!(!format!("{error:?}").contains("bad"), "{error:?}");
            Client::new(&options, false, &Stop::default()).unwrap();
        }
        for bad in [
            "hub.example",
            "ftp://hub",
            "http://",
            "http://hub:port",
            "http://hub/?a=b",
            "http://hub/#models",
        ] {
            let options = HubOptions { endpoint: bad.to_owned(), ..HubOptions::default() };
            assert!(Client::new(&options, true, &Stop::default()).is_err(), "{bad}");
        }
    }
}

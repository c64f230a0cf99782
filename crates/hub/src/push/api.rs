//! The hub's HTTP interface: the token, repeated attempts, and what a refusal means.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use pkv_core::{Hinted, hinted};
use serde_json::Value;
use ureq::Agent;
use ureq::http::{HeaderMap, Response};

use crate::options::HubOptions;

/// Longest answer that is read: a listing of thousands of files is far shorter.
const MAX_ANSWER: u64 = 16 << 20;

/// A hub, and who speaks to it.
pub struct Api<'a> {
    options: &'a HubOptions,
    agent: Agent,
    token: &'a str,
}

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    /// Null where the body is no JSON.
    pub json: Value,
    /// The hub's own words about an error.
    message: String,
}

impl<'a> Api<'a> {
    /// # Errors
    /// There is no token, or the network is not to be used.
    pub fn new(options: &'a HubOptions) -> Result<Self> {
        ensure!(
            !options.offline,
            hinted("HF_HUB_OFFLINE is set: nothing can be sent", "unset HF_HUB_OFFLINE")
        );
        let token = options.token.as_deref().with_context(|| {
            hinted(
                format!("there is no token for the hub `{}`", options.endpoint),
                format!(
                    "make one with write access at {}/settings/tokens and set HF_TOKEN, or name its file by HF_TOKEN_PATH",
                    options.endpoint
                ),
            )
        })?;
        let agent = Agent::config_builder()
            // Statuses have meanings here, and their bodies say why.
            .http_status_as_error(false)
            .user_agent(concat!("proxykv-train/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            // Of the first byte of an answer; sending a body takes as long as it takes.
            .timeout_recv_response(Some(Duration::from_secs(120)))
            .build()
            .new_agent();
        Ok(Self { options, agent, token })
    }

    pub fn endpoint(&self) -> &str {
        &self.options.endpoint
    }

    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The header that says who asks, for addresses of the hub itself: a storage is another party.
    pub fn authorization(&self, url: &str) -> Option<String> {
        let own = url.strip_prefix(self.endpoint()).is_some_and(|rest| rest.starts_with('/'));
        own.then(|| format!("Bearer {}", self.token))
    }

    pub fn get(&self, path: &str) -> Result<Response<ureq::Body>, ureq::Error> {
        let url = format!("{}{path}", self.endpoint());
        self.agent.get(&url).header("Authorization", format!("Bearer {}", self.token)).call()
    }

    pub fn post(&self, path: &str, kind: &str, body: &[u8]) -> Result<Response<ureq::Body>, ureq::Error> {
        let url = format!("{}{path}", self.endpoint());
        let request = self.agent.post(&url).header("Authorization", format!("Bearer {}", self.token));
        request.header("Content-Type", kind).header("Accept", "application/json").send(body)
    }

    /// One attempt.
    ///
    /// # Errors
    /// No answer came.
    pub fn once(
        &self,
        request: impl FnOnce() -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<Reply, ureq::Error> {
        Reply::read(request()?)
    }

    /// Try until there is an answer that waiting will not change, or the attempts are used up.
    ///
    /// # Errors
    /// No answer came.
    pub fn send(
        &self,
        mut request: impl FnMut() -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<Reply, ureq::Error> {
        let mut wait = self.options.retry_after;
        for n in 1.. {
            let reply = self.once(&mut request);
            let (passing, why) = match &reply {
                Ok(r) => (r.is_passing(), format!("status {}", r.status)),
                Err(e) => (is_passing(e), e.to_string()),
            };
            if !passing || n >= self.options.attempts {
                return reply;
            }
            tracing::warn!("attempt {n} of {} failed, waiting {wait:?}: {why}", self.options.attempts);
            sleep(wait);
            wait *= 2;
        }
        unreachable!("the loop returns in its last round")
    }

    /// An answer of any status but a refusal of the token.
    ///
    /// # Errors
    /// None came, or the token was refused.
    pub fn answer(&self, reply: Result<Reply, ureq::Error>, repo: &str, doing: &str) -> Result<Reply> {
        match reply {
            Ok(r) if matches!(r.status, 401 | 403) => Err(self.refusal(&r, repo, doing)),
            Ok(r) => Ok(r),
            Err(e) => Err(anyhow!(e).context(hinted(
                format!("{doing}: the hub `{}` cannot be reached", self.endpoint()),
                "check the network (HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy) and push again: what has arrived \
                 is not sent a second time",
            ))),
        }
    }

    /// An answer that says yes.
    ///
    /// # Errors
    /// It says no, or none came.
    pub fn expect(&self, reply: Result<Reply, ureq::Error>, repo: &str, doing: &str) -> Result<Reply> {
        let reply = self.answer(reply, repo, doing)?;
        if (200..300).contains(&reply.status) { Ok(reply) } else { Err(self.refusal(&reply, repo, doing)) }
    }

    fn refusal(&self, reply: &Reply, repo: &str, doing: &str) -> anyhow::Error {
        let hint = match reply.status {
            401 => format!(
                "the token is unknown or has expired: make one with write access at {}/settings/tokens and set HF_TOKEN",
                self.endpoint()
            ),
            403 => format!(
                "the token may not write to `{repo}`: use one with write access to `{}`, or push to a name of your own",
                repo.split('/').next().unwrap_or(repo)
            ),
            404 => "check the name of the repository, and that the token may see it".to_owned(),
            400 | 422 => {
                "the hub says above what it does not accept; of a model card that is its front matter in `README.md`"
                    .to_owned()
            }
            _ => "push again later: what has arrived is not sent a second time".to_owned(),
        };
        let context: Hinted = hinted(doing, hint);
        anyhow!("the hub answers with status {}{}", reply.status, reply.said()).context(context)
    }
}

impl Reply {
    pub fn read(response: Response<ureq::Body>) -> Result<Self, ureq::Error> {
        let (head, mut body) = response.into_parts();
        let text = body.with_config().limit(MAX_ANSWER).read_to_vec()?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        let header = head.headers.get("x-error-message").and_then(|v| v.to_str().ok());
        let message = json["error"].as_str().or(header).unwrap_or_default().to_owned();
        Ok(Self { status: head.status.as_u16(), headers: head.headers, json, message })
    }

    /// Whether waiting may help: busy servers.
    pub fn is_passing(&self) -> bool {
        self.status == 408 || self.status == 429 || self.status >= 500
    }

    /// `: <the hub's words>`, if there are any.
    pub fn said(&self) -> String {
        if self.message.is_empty() { String::new() } else { format!(": {}", self.message) }
    }
}

/// Whether waiting may help: lost connections.
pub fn is_passing(error: &ureq::Error) -> bool {
    !matches!(error, ureq::Error::HostNotFound | ureq::Error::BadUri(_))
}

/// `text` as one part of an address.
pub fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_one_part_of_an_address() {
        assert_eq!(quoted("feature/a b-1.x"), "feature%2Fa%20b-1.x");
    }

    #[test]
    fn the_token_goes_to_the_hub_alone() {
        let options = HubOptions {
            cache: "c".into(),
            endpoint: "https://hub.example".to_owned(),
            token: Some("secret".to_owned()),
            offline: false,
            attempts: 1,
            retry_after: Duration::ZERO,
        };
        let api = Api::new(&options).unwrap();
        assert!(api.authorization("https://hub.example/o/n.git/verify").is_some());
        assert!(api.authorization("https://storage.example/x?y=https://hub.example/").is_none());
        assert!(api.authorization("https://hub.example.evil/x").is_none());
    }
}

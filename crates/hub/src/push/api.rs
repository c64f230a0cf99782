//! The hub's HTTP interface as uploads need it: the token, answers as JSON, and what a refusal means.

use anyhow::{Result, anyhow, ensure};
use pkv_core::{Hinted, Stop, hinted};
use serde_json::Value;
use ureq::http::{HeaderMap, Method, Response};
use ureq::{AsSendBody, Body};
use url::Url;

use crate::client::{Client, headers};
use crate::failure::{Failure, Refusal, network_hint};
use crate::options::HubOptions;

/// Longest answer that is read: a listing of thousands of files is far shorter.
const MAX_ANSWER: u64 = 16 << 20;

/// A hub, and who speaks to it.
pub struct Api<'a> {
    pub client: Client<'a>,
}

/// An answer that waiting will not change.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    /// Null where the body is no JSON.
    pub json: Value,
}

impl<'a> Api<'a> {
    /// # Errors
    /// There is no token, or the network is not to be used.
    pub fn new(options: &'a HubOptions, stop: &'a Stop) -> Result<Self> {
        ensure!(
            !options.offline,
            hinted("HF_HUB_OFFLINE is set: nothing can be sent", "unset HF_HUB_OFFLINE")
        );
        ensure!(
            options.token.is_some() || options.login.is_some(),
            hinted(
                format!("there is no token for the hub `{}`", options.endpoint),
                format!(
                    "make one with write access at {}/settings/tokens and set HF_TOKEN, or name its file by HF_TOKEN_PATH",
                    options.endpoint
                ),
            )
        );
        Ok(Self { client: Client::new(options, true, stop)? })
    }

    pub fn endpoint(&self) -> &str {
        &self.client.options.endpoint
    }

    pub fn get(&self, path: &str) -> Result<Reply, Failure> {
        let url = self.client.address(path)?;
        self.retried(&Method::GET, &url, &HeaderMap::new(), None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Reply, Failure> {
        let url = self.client.address(path)?;
        let headers = headers([("Content-Type", "application/json"), ("Accept", "application/json")])?;
        self.retried(&Method::POST, &url, &headers, Some(body.to_string().as_bytes()))
    }

    /// To any address, with headers that the hub asks for.
    pub fn post_to(&self, url: &str, headers: &HeaderMap, body: &str) -> Result<Reply, Failure> {
        self.retried(&Method::POST, &parsed(url)?, headers, Some(body.as_bytes()))
    }

    /// One attempt: whether it came through is seen in the branch.
    pub fn commit(&self, path: &str, body: &[u8]) -> Result<Reply, Failure> {
        let url = self.client.address(path)?;
        let headers = headers([("Content-Type", "application/x-ndjson"), ("Accept", "application/json")])?;
        let patience = self.client.patience_for_work();
        let answer = self.client.request(&Method::POST, url, &headers, Some(body), patience)?;
        match self.reply(answer)? {
            reply if reply.status == 412 => Err(Failure::Status(reply.refusal())),
            reply => Ok(reply),
        }
    }

    /// One attempt to send a body to a storage: its addresses are signed and need no token, and it does not
    /// redirect.
    pub fn store<B: AsSendBody>(
        &self,
        method: Method,
        url: &str,
        headers: &HeaderMap,
        body: B,
    ) -> Result<Reply, Failure> {
        let patience = self.client.patience_for_work();
        self.reply(self.client.send(method, &parsed(url)?, headers, body, patience)?)
    }

    /// Try until there is an answer that waiting will not change, or the attempts are used up.
    fn retried(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<&[u8]>,
    ) -> Result<Reply, Failure> {
        let patience = match body {
            Some(_) => self.client.patience_for_work(),
            None => self.client.options.download_timeout,
        };
        self.client.retry("asking the hub", |_| {
            let answer = self.client.request(method, url.clone(), headers, body, patience)?;
            self.reply(answer)
        })
    }

    fn reply(&self, response: Response<Body>) -> Result<Reply, Failure> {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = self.client.read_all(response, MAX_ANSWER)?;
        let reply = Reply { status, headers, json: serde_json::from_slice(&body).unwrap_or_default() };
        let refusal = reply.refusal();
        if refusal.is_passing() { Err(Failure::Status(refusal)) } else { Ok(reply) }
    }

    /// An answer of any status but a refusal of the token.
    ///
    /// # Errors
    /// None came, or the token was refused.
    pub fn answer(&self, reply: Result<Reply, Failure>, repo: &str, doing: &str) -> Result<Reply> {
        match reply {
            Ok(r) if matches!(r.status, 401 | 403) => Err(self.refusal(&r.refusal(), repo, doing)),
            Ok(r) => Ok(r),
            Err(Failure::Stopped(e)) => Err(e.into()),
            Err(Failure::Status(refusal)) => Err(self.refusal(&refusal, repo, doing)),
            Err(failure @ Failure::Network(_)) => {
                let Failure::Network(error) = &failure else { unreachable!("matched above") };
                let hint = network_hint(error, &failure, self.client.options);
                let hint = format!("{hint}; push again: what has arrived is not sent a second time");
                let what = format!("{doing}: the hub `{}` cannot be reached", self.endpoint());
                Err(anyhow!(failure.why()).context(hinted(what, hint).environment()))
            }
            Err(failure) => Err(anyhow!(failure.why()).context(hinted(
                format!("{doing}: the hub `{}` answers in a way that cannot be used", self.endpoint()),
                "check that HF_ENDPOINT is a hub's address",
            ))),
        }
    }

    /// An answer that says yes.
    ///
    /// # Errors
    /// It says no, or none came.
    pub fn expect(&self, reply: Result<Reply, Failure>, repo: &str, doing: &str) -> Result<Reply> {
        let reply = self.answer(reply, repo, doing)?;
        let fine = (200..300).contains(&reply.status);
        if fine { Ok(reply) } else { Err(self.refusal(&reply.refusal(), repo, doing)) }
    }

    fn refusal(&self, refusal: &Refusal, repo: &str, doing: &str) -> anyhow::Error {
        let hint = match refusal.status {
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
        anyhow!("{refusal}").context(context)
    }
}

impl Reply {
    fn refusal(&self) -> Refusal {
        Refusal::of(self.status, &self.headers, self.json["error"].as_str().unwrap_or_default())
    }
}

fn parsed(url: &str) -> Result<Url, Failure> {
    let no_address = || Failure::nonsense("the hub names no address to send to");
    Url::parse(url).ok().filter(|u| matches!(u.scheme(), "http" | "https")).ok_or_else(no_address)
}

//! Removal of secrets from messages: tokens, and user names with passwords in addresses.
//!
//! Every error and every log line of this crate passes here on its way out: a server may repeat in its
//! answer what it was sent.

use anyhow::{Error, anyhow};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pkv_core::{FailureKind, Hinted, hinted};

use crate::options::HubOptions;

const HIDDEN: &str = "***";

/// Shorter ones occur in any text.
const SHORTEST: usize = 3;

/// The secrets that one hub is used with.
#[derive(Clone)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    pub fn of(options: &HubOptions) -> Self {
        let mut all: Vec<String> = options.token.iter().cloned().collect();
        if let Some(login) = &options.login {
            all.push(STANDARD.encode(login));
            all.push(login.clone());
            all.extend(login.split_once(':').map(|(_, password)| password.to_owned()));
        }
        all.retain(|s| s.len() >= SHORTEST);
        // A secret that holds another goes first.
        all.sort_by_key(|s| std::cmp::Reverse(s.len()));
        Self(all)
    }

    /// `text` without secrets, and without user and password of the addresses in it.
    pub fn redact(&self, text: &str) -> String {
        let mut out = self.0.iter().fold(text.to_owned(), |t, secret| t.replace(secret, HIDDEN));
        let mut from = 0;
        while let Some(at) = out[from..].find("://") {
            let start = from + at + 3;
            let end = out[start..]
                .find(|c: char| c.is_whitespace() || "/?#`\"'<>".contains(c))
                .map_or(out.len(), |n| start + n);
            if let Some(login) = out[start..end].rfind('@') {
                out.replace_range(start..start + login, HIDDEN);
            }
            from = start;
        }
        out
    }

    /// The same error, its texts and its hint redacted.
    pub fn clean(&self, error: Error) -> Error {
        let hint = Hinted::find(&error).map(|h| h.hint().to_owned());
        let kind = FailureKind::of(&error);
        let texts: Vec<String> = error.chain().map(ToString::to_string).collect();
        if texts.iter().chain(&hint).all(|t| self.redact(t) == *t) {
            return error; // With its types, which callers look for.
        }
        let mut texts = texts.iter().map(|t| self.redact(t));
        let outermost = texts.next().unwrap_or_default();
        let causes = texts.rev().fold(None, |error: Option<Error>, text| {
            Some(error.map_or_else(|| anyhow!(text.clone()), |e| e.context(text.clone())))
        });
        match (causes, hint.map(|h| self.redact(&h))) {
            (Some(error), Some(hint)) => error.context(hinted(outermost, hint).of(kind)),
            (Some(error), None) => error.context(outermost),
            (None, Some(hint)) => hinted(outermost, hint).of(kind).into(),
            (None, None) => anyhow!(outermost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> Secrets {
        Secrets::of(&HubOptions {
            token: Some("hf_abcdef".to_owned()),
            login: Some("user:passw0rd".to_owned()),
            ..HubOptions::default()
        })
    }

    #[test]
    fn tokens_and_passwords_are_hidden_wherever_they_stand() {
        let basic = STANDARD.encode("user:passw0rd");
        for (text, clean) in [
            ("you said Bearer hf_abcdef!".to_owned(), "you said Bearer ***!"),
            (format!("Basic {basic}"), "Basic ***"),
            ("http://user:passw0rd@host/x and passw0rd".to_owned(), "http://***@host/x and ***"),
            ("see `https://other:word@h:1/a@b` now".to_owned(), "see `https://***@h:1/a@b` now"),
            ("http://a:b@c http://d:e@f".to_owned(), "http://***@c http://***@f"),
            ("https://host/path@version".to_owned(), "https://host/path@version"),
            ("nothing to hide, ä".to_owned(), "nothing to hide, ä"),
        ] {
            assert_eq!(secrets().redact(&text), clean);
        }
    }

    #[test]
    fn an_error_keeps_its_shape_without_its_secrets() {
        let error =
            anyhow!("it said hf_abcdef").context(hinted("at http://u:p@h", "ask passw0rd")).context("top");
        let clean = secrets().clean(error);
        assert_eq!(format!("{clean:#}"), "top: at http://***@h: it said ***");
        assert_eq!(clean.downcast_ref::<Hinted>().unwrap().hint(), "ask ***");
        let one = secrets().clean(hinted("hf_abcdef", "x").into());
        assert_eq!((one.to_string().as_str(), one.downcast_ref::<Hinted>().unwrap().hint()), ("***", "x"));
        // What holds no secret keeps its type.
        let io = std::io::Error::other("no");
        assert!(secrets().clean(Error::from(io).context("c")).downcast_ref::<std::io::Error>().is_some());
    }
}

//! Where the cache and the hub are, from the environment variables that `huggingface_hub` reads.
//!
//! | variable | meaning |
//! |---|---|
//! | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | the cache; else `hub` below `HF_HOME` |
//! | `HF_HOME` | else `huggingface` below `XDG_CACHE_HOME`, which is `~/.cache` by default |
//! | `HF_ENDPOINT` | address of the hub; may hold user and password |
//! | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` | the token; else the file `HF_TOKEN_PATH`, by default `token` below `HF_HOME` |
//! | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | downloads send no token; uploads need one and do |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | use the cache only |
//! | `HF_HUB_ETAG_TIMEOUT` | seconds for a connection and for an answer about a file; 10 |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds without a byte before a transfer counts as stalled; 10 |
//!
//! Not honoured: `HF_XET_*`, `HF_HUB_DISABLE_XET` and `HF_HUB_ENABLE_HF_TRANSFER` (downloads are plain
//! HTTP), `HF_HUB_DISABLE_PROGRESS_BARS` and `HF_HUB_VERBOSITY` (`--verbose` and `RUST_LOG`),
//! `HF_HUB_DISABLE_SYMLINKS_WARNING`, `HF_HUB_DISABLE_TELEMETRY` and `HF_HUB_USER_AGENT_ORIGIN` (the
//! program's name and version are all that is sent), `HF_STORED_TOKENS_PATH`, `HF_ASSETS_CACHE`.

use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use url::Url;

/// `huggingface_hub`'s own limit, for both kinds.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Cache, endpoint, token, network.
#[derive(Clone)]
pub struct HubOptions {
    /// Folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Address of the hub, without a slash at its end and without user and password: it may be printed.
    pub endpoint: String,
    /// `user:password` of the hub's address; sent to the hub in place of the token, as `huggingface_hub`
    /// does.
    pub login: Option<String>,
    /// Sent with every request to the hub if present; gated models need one.
    pub token: Option<String>,
    /// Where the token came from, or would be looked for: a variable's name or a file.
    pub token_origin: String,
    /// Whether downloads send the token; uploads always do.
    pub implicit_token: bool,
    /// Use the cache only.
    pub offline: bool,
    /// Attempts per request before it fails; a download resumes where the last one stopped.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub retry_after: Duration,
    /// For a connection, and for an answer about a file.
    pub etag_timeout: Duration,
    /// Without a byte of a transfer.
    pub download_timeout: Duration,
}

impl Default for HubOptions {
    /// The options of an empty environment.
    fn default() -> Self {
        Self::from_variables(|_| None)
    }
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |secret: &Option<String>| secret.as_ref().map(|_| "***");
        f.debug_struct("HubOptions")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("login", &hidden(&self.login))
            .field("token", &hidden(&self.token))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl HubOptions {
    /// The variables above, with the meaning and precedence that `huggingface_hub` gives them.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        // An empty variable counts as unset, as in `huggingface_hub`.
        let get = |name: &str| variable(name).filter(|v| !v.trim().is_empty());
        let is_on = |v: String| ["1", "on", "yes", "true"].contains(&v.trim().to_lowercase().as_str());
        let path = |name: &str| get(name).map(|p| PathBuf::from(expanded(&p, &get)));
        let seconds = |name: &str| match get(name) {
            None => TIMEOUT,
            Some(text) => match text.trim().parse::<f64>() {
                Ok(s) if s > 0.0 && s < 1e6 => Duration::from_secs_f64(s),
                _ => {
                    tracing::warn!("{name} is `{text}`, expected seconds; {} are used", TIMEOUT.as_secs());
                    TIMEOUT
                }
            },
        };
        let user_cache = path("XDG_CACHE_HOME")
            .unwrap_or_else(|| PathBuf::from(get("HOME").unwrap_or_default()).join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| user_cache.join("huggingface"));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let of_variable = |name: &str| get(name).map(|token| (token, name.to_owned()));
        let of_file = || match pkv_core::read_small_text(&token_file) {
            Ok(token) => Some((token, token_file.display().to_string())),
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    tracing::warn!("the token in `{}` cannot be read: {error}", token_file.display());
                }
                None
            }
        };
        let (token, token_origin) = of_variable("HF_TOKEN")
            .or_else(|| of_variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(of_file)
            .map(|(token, origin)| (token.trim().to_owned(), origin))
            .filter(|(token, _)| !token.is_empty())
            .map_or_else(
                || (None, token_file.display().to_string()),
                |(token, origin)| (Some(token), origin),
            );
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let (endpoint, login) = without_login(endpoint.trim());
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            login,
            token,
            token_origin,
            implicit_token: !get("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_on),
            offline: get("HF_HUB_OFFLINE").or_else(|| get("TRANSFORMERS_OFFLINE")).is_some_and(is_on),
            attempts: 5,
            retry_after: Duration::from_secs(1),
            etag_timeout: seconds("HF_HUB_ETAG_TIMEOUT"),
            download_timeout: seconds("HF_HUB_DOWNLOAD_TIMEOUT"),
        }
    }
}

/// Host and port of an address.
pub fn host_and_port(address: &str) -> Option<(String, u16)> {
    let url = Url::parse(address).ok()?;
    let host = url.host_str().filter(|h| !h.is_empty())?;
    Some((host.trim_matches(['[', ']']).to_owned(), url.port_or_known_default().unwrap_or(80)))
}

/// An address without its `user:password`, and these, decoded.
fn without_login(address: &str) -> (String, Option<String>) {
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    match Url::parse(address) {
        // Nothing to take away.
        Ok(url) if url.username().is_empty() && url.password().is_none() => (address.to_owned(), None),
        Ok(mut url) => {
            let login = format!("{}:{}", url.username(), url.password().unwrap_or_default());
            let bare = url.set_username("").and_then(|()| url.set_password(None));
            debug_assert!(bare.is_ok(), "an address with a user has a host");
            (url.into(), Some(percent_decode_str(&login).decode_utf8_lossy().into_owned()))
        }
        // No address; what is before the last `@` must not be shown all the same.
        Err(_) => match rest.rsplit_once('@') {
            Some((login, host)) => (format!("{scheme}://{host}"), Some(login.to_owned())),
            None => (address.to_owned(), None),
        },
    }
}

/// `~` at the beginning, `$NAME` and `${NAME}` replaced, as Python's `expanduser` and `expandvars` do; what
/// is not set stays as it is.
fn expanded(path: &str, get: &impl Fn(&str) -> Option<String>) -> String {
    let home = get("HOME").unwrap_or_default();
    let path = match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{home}{rest}"),
        _ => path.to_owned(),
    };
    let mut out = String::new();
    let mut rest = path.as_str();
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let braced = after.starts_with('{').then(|| after.find('}')).flatten();
        let (name, end) = match braced {
            Some(close) => (&after[1..close], close + 1),
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        match get(name) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..at + 1 + end]),
        }
        rest = &after[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        HubOptions::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn the_cache_follows_the_most_specific_variable() {
        let cache = |v: &[(&str, &str)]| options(v).cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), "/f/hub");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", " ")]), "/f/hub");
    }

    #[test]
    fn paths_may_name_the_home_folder_and_other_variables() {
        let cache = |p: &str| options(&[("HOME", "/h"), ("U", "me"), ("HF_HUB_CACHE", p)]).cache;
        for (text, path) in [
            ("~", "/h"),
            ("~/c", "/h/c"),
            ("/c/$U/x", "/c/me/x"),
            ("/c/${U}x", "/c/mex"),
            ("/c/$NONE/${NONE}/$", "/c/$NONE/${NONE}/$"),
            ("/c/~", "/c/~"),
        ] {
            assert_eq!(cache(text), PathBuf::from(path), "{text}");
        }
    }

    #[test]
    fn endpoint_offline_and_token_are_read() {
        let o =
            options(&[("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "Yes"), ("HF_TOKEN", " t\n")]);
        assert_eq!((o.endpoint.as_str(), o.offline, o.token.as_deref()), ("http://mirror", true, Some("t")));
        let o = options(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]);
        assert_eq!((o.endpoint.as_str(), o.offline), ("https://huggingface.co", false));
        assert!(options(&[("TRANSFORMERS_OFFLINE", "1")]).offline);

        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "from-file\n").unwrap();
        let o = options(&[("HF_HOME", home.path().to_str().unwrap())]);
        assert_eq!((o.token.as_deref(), o.implicit_token), (Some("from-file"), true));
        let file = home.path().join("token").display().to_string();
        assert_eq!(o.token_origin, file);
        // Looked for in vain.
        fs::write(&file, " \n").unwrap();
        let o = options(&[("HF_TOKEN_PATH", &file)]);
        assert_eq!((o.token, o.token_origin), (None, file));
        let o = options(&[("HF_TOKEN", "t"), ("HUGGING_FACE_HUB_TOKEN", "old")]);
        assert_eq!((o.token.as_deref(), o.token_origin.as_str()), (Some("t"), "HF_TOKEN"));
        assert_eq!(options(&[("HUGGING_FACE_HUB_TOKEN", "old")]).token.as_deref(), Some("old"));
        assert!(!options(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).implicit_token);
    }

    #[test]
    fn timeouts_are_seconds_and_nonsense_is_replaced() {
        let of = |v: &str| options(&[("HF_HUB_ETAG_TIMEOUT", v)]).etag_timeout;
        assert_eq!(of("3"), Duration::from_secs(3));
        assert_eq!(of("0.5"), Duration::from_millis(500));
        for bad in ["0", "-1", "soon", "inf", "NaN", "1e300"] {
            assert_eq!(of(bad), TIMEOUT, "{bad}");
        }
        assert_eq!(options(&[("HF_HUB_DOWNLOAD_TIMEOUT", "7")]).download_timeout, Duration::from_secs(7));
    }

    #[test]
    fn user_and_password_are_no_part_of_the_endpoint() {
        for (address, endpoint, login) in [
            ("http://user:word@mirror:8080/hf/", "http://mirror:8080/hf", "user:word"),
            ("https://user@mirror", "https://mirror", "user:"),
            ("https://u:p%40ss@mirror/", "https://mirror", "u:p@ss"),
            ("https://u:pa/s@s@mirror:x/", "https://mirror:x", "u:pa/s@s"),
        ] {
            let o = options(&[("HF_ENDPOINT", address), ("HF_TOKEN", "hf_secret")]);
            assert_eq!((o.endpoint.as_str(), o.login.as_deref()), (endpoint, Some(login)), "{address}");
            let shown = format!("{o:?}");
            assert!(!shown.contains(login) && !shown.contains("hf_secret"), "{shown}");
        }
    }

    #[test]
    fn addresses_have_hosts_and_ports() {
        let of = |a: &str| host_and_port(a).map(|(h, p)| format!("{h} {p}"));
        assert_eq!(of("https://huggingface.co").as_deref(), Some("huggingface.co 443"));
        assert_eq!(of("http://user:word@mirror:8080/hf").as_deref(), Some("mirror 8080"));
        assert_eq!(of("http://[::1]:9/x").as_deref(), Some("::1 9"));
        assert_eq!(of("http://[::1]").as_deref(), Some("::1 80"));
        assert_eq!((of("huggingface.co"), of("https://"), of("http://x:port")), (None, None, None));
    }
}

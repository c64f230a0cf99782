//! Where the cache and the hub are, from the environment variables that `huggingface_hub` reads.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Cache, endpoint, token, network.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Sent with every request if present; gated models need one.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Attempts per file before a download fails; each goes on where the last one broke off.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub retry_after: Duration,
}

impl HubOptions {
    /// `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and
    /// `HF_HUB_OFFLINE`, with the meaning and precedence that `huggingface_hub` gives them.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        // An empty variable counts as unset, as in `huggingface_hub`.
        let get = |name: &str| variable(name).filter(|v| !v.trim().is_empty());
        let on = |name: &str| {
            get(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.trim().to_lowercase().as_str()))
        };
        let user_cache = get("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .unwrap_or_else(|| PathBuf::from(get("HOME").unwrap_or_default()).join(".cache"));
        let home = get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| user_cache.join("huggingface"));
        let cache = get("HF_HUB_CACHE")
            .or_else(|| get("HUGGINGFACE_HUB_CACHE"))
            .map(PathBuf::from)
            .unwrap_or_else(|| home.join("hub"));
        let token_file = get("HF_TOKEN_PATH").map(PathBuf::from).unwrap_or_else(|| home.join("token"));
        let token = get("HF_TOKEN")
            .or_else(|| get("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file).ok())
            .map(|t| t.trim().to_owned())
            .filter(|t| !t.is_empty());
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            attempts: 5,
            retry_after: Duration::from_secs(1),
        }
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", " ")]), "/f/hub");
    }

    #[test]
    fn endpoint_offline_and_token_are_read() {
        let o =
            options(&[("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "Yes"), ("HF_TOKEN", " t\n")]);
        assert_eq!((o.endpoint.as_str(), o.offline, o.token.as_deref()), ("http://mirror", true, Some("t")));
        let o = options(&[("HF_HUB_OFFLINE", "0")]);
        assert_eq!((o.endpoint.as_str(), o.offline), ("https://huggingface.co", false));

        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "from-file\n").unwrap();
        let o = options(&[("HF_HOME", home.path().to_str().unwrap())]);
        assert_eq!(o.token.as_deref(), Some("from-file"));
    }
}

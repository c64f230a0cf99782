//! Whether the hub can be reached (a connection, no request), and whether there is a token for it, which is
//! never shown.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use pkv_hub::{Hub, HubOptions, host_and_port};

use super::Check;

/// Time for the hub to accept a connection, name look-up included.
const CONNECT_WITHIN: Duration = Duration::from_secs(4);

pub fn hub_access(hub: &Hub) -> Check {
    let options = hub.options();
    let cache = options.cache.display();
    if options.offline {
        return Check::ok("hub", format!("offline by HF_HUB_OFFLINE; cache `{cache}`"));
    }
    let proxy =
        ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].iter().find_map(|v| std::env::var(v).ok());
    let address = proxy.filter(|p| !p.is_empty()).unwrap_or_else(|| options.endpoint.clone());
    match host_and_port(&address).map(connect) {
        Some(Ok(())) => Check::ok("hub", format!("`{}` answers; cache `{cache}`", options.endpoint)),
        Some(Err(why)) => Check::warn(
            "hub",
            format!("`{}` is out of reach ({why}); cache `{cache}`", options.endpoint),
            "what is in the cache or named by a local path works; `HF_ENDPOINT` names a mirror",
        ),
        None => Check::fail(
            "hub",
            format!("HF_ENDPOINT is `{}`, which is no address", options.endpoint),
            "write it as `https://huggingface.co`",
        ),
    }
}

/// Gated models and uploads need a token.
pub fn token(options: &HubOptions) -> Check {
    let origin = &options.token_origin;
    let detail = match (&options.login, &options.token) {
        (Some(_), _) => "user and password of HF_ENDPOINT are sent in its place".to_owned(),
        (None, Some(_)) if options.implicit_token => format!("set, from `{origin}`"),
        (None, Some(_)) => {
            format!("set, from `{origin}`; HF_HUB_DISABLE_IMPLICIT_TOKEN keeps it from downloads")
        }
        (None, None) => {
            format!("none: HF_TOKEN is not set, and `{origin}` has none; gated models and `push` need one")
        }
    };
    Check::ok("token", detail)
}

/// Open a connection and close it; the look-up of the name has no time limit of its own, so all of it
/// happens on another thread.
fn connect(to: (String, u16)) -> Result<(), String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let attempt = || -> std::io::Result<()> {
            let address = to.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
            TcpStream::connect_timeout(&address, CONNECT_WITHIN).map(drop)
        };
        // There is no receiver any more once the time is up.
        let _ = send.send(attempt().map_err(|e| e.to_string()));
    });
    receive.recv_timeout(CONNECT_WITHIN).unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_told_with_its_origin_and_not_shown() {
        let secret = || Some("hf_secret".to_owned());
        let options =
            HubOptions { token: secret(), token_origin: "HF_TOKEN".to_owned(), ..HubOptions::default() };
        let detail = |options: &HubOptions| {
            let detail = token(options).detail;
            assert!(!detail.contains("secret"), "{detail}");
            detail
        };
        assert_eq!(detail(&options), "set, from `HF_TOKEN`");
        let kept = HubOptions { implicit_token: false, ..options.clone() };
        assert!(detail(&kept).contains("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        let login = HubOptions { login: secret(), ..options.clone() };
        assert!(detail(&login).starts_with("user and password"));
        let none = HubOptions { token: None, token_origin: "/h/token".to_owned(), ..options };
        assert!(detail(&none).contains("`/h/token` has none"));
    }
}

//! Whether the hub can be reached: a connection, no request.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use pkv_hub::Hub;

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
    match authority(&address).map(connect) {
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

/// Host and port of an address.
fn authority(address: &str) -> Option<(String, u16)> {
    let (scheme, rest) = address.split_once("://")?;
    let host = rest.split(['/', '?']).next()?;
    let host = host.rsplit_once('@').map_or(host, |(_, h)| h);
    let default = if scheme == "https" { 443 } else { 80 };
    let (host, port) = match host.rsplit_once(':') {
        Some((h, port)) if !port.ends_with(']') => (h, port.parse().ok()?),
        _ => (host, default),
    };
    (!host.is_empty()).then(|| (host.trim_matches(['[', ']']).to_owned(), port))
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
        // Nobody listens any more once the time is up.
        let _ = send.send(attempt().map_err(|e| e.to_string()));
    });
    receive.recv_timeout(CONNECT_WITHIN).unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_hosts_and_ports() {
        let of = |a: &str| authority(a).map(|(h, p)| format!("{h} {p}"));
        assert_eq!(of("https://huggingface.co").as_deref(), Some("huggingface.co 443"));
        assert_eq!(of("http://user:word@mirror:8080/hf").as_deref(), Some("mirror 8080"));
        assert_eq!(of("http://[::1]:9/x").as_deref(), Some("::1 9"));
        assert_eq!(of("http://[::1]").as_deref(), Some("::1 80"));
        assert_eq!((of("huggingface.co"), of("https://"), of("http://x:port")), (None, None, None));
    }
}

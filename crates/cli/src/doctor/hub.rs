//! Whether the hub can be reached: a connection, no request.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use pkv_hub::{Hub, host_and_port};

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

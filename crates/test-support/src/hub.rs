//! Hubs on the loopback interface: [`pull`] is downloaded from, [`push`] takes uploads.

pub mod pull;
pub mod push;

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// Answer requests on a port of its own, a thread each: the endpoint, and the state that it made of it.
pub(crate) fn listen<S: Send + 'static>(
    state: impl FnOnce(String) -> S,
    answer: fn(TcpStream, &Mutex<S>),
) -> (String, Arc<Mutex<S>>) {
    let (listener, endpoint) = bind();
    let state = Arc::new(Mutex::new(state(endpoint.clone())));
    serve(listener, &state, answer);
    (endpoint, state)
}

fn bind() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    (listener, endpoint)
}

fn serve<S: Send + 'static>(listener: TcpListener, state: &Arc<Mutex<S>>, answer: fn(TcpStream, &Mutex<S>)) {
    let shared = Arc::clone(state);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&shared);
            thread::spawn(move || answer(stream, &state));
        }
    });
}

/// Until the other side hangs up.
pub(crate) fn wait_for_the_end(mut stream: &TcpStream) {
    let _ = stream.read(&mut [0]);
}

pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect()
}

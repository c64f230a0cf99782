//! Hubs on the loopback interface: [`pull`] is downloaded from, [`push`] takes uploads.

pub mod pull;
pub mod push;

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

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
    // Until no one has the state any more: fuzzing starts thousands.
    let shared = Arc::downgrade(state);
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        while let Some(state) = shared.upgrade() {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    thread::spawn(move || answer(stream, &state));
                }
                Err(_) => {
                    drop(state);
                    thread::sleep(Duration::from_millis(1));
                }
            }
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

//! Requests as the servers of this crate read them.

use std::collections::BTreeMap;
use std::io::BufRead;

/// A request, whole.
pub(crate) struct Request {
    pub method: String,
    /// Path and query, as they were sent.
    pub address: String,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    /// The next request of a connection; `None` at its end.
    pub fn read(reader: &mut impl BufRead) -> Option<Self> {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let mut words = line.split(' ').map(str::to_owned);
        let (method, address) = (words.next()?, words.next()?);
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let mut body = vec![0; headers.get("content-length").map_or(0, |l| l.parse().unwrap())];
        reader.read_exact(&mut body).ok()?;
        Some(Self { method, address, headers, body })
    }
}

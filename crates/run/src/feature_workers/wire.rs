//! What a feature worker and the process that started it say to each other, over a socket.
//!
//! A frame has a head of fixed length and a body; both are checked, since whatever else writes to the socket,
//! or a worker that is half dead, must not become a feature. Numbers are little-endian.

use std::io::{ErrorKind, Read, Write};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::FailureKind;
use pkv_shard::FeatureRow;
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 4] = b"PKVf";

/// Magic, kind, source, row, length of the body, CRC-32C of the body, CRC-32C of the head so far.
const HEAD: usize = 4 + 4 + 4 + 8 + 8 + 4 + 4;

/// Most bytes of a body: four million positions of 256 heads with eight channels have half of them.
const MOST: u64 = 1 << 36;

/// One message.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// Of a worker, first of all.
    Hello(Hello),
    /// To a worker: make this row.
    Make {
        source: u32,
        row: u64,
    },
    Made {
        source: u32,
        row: u64,
        features: FeatureRow,
    },
    Failed {
        source: u32,
        row: u64,
        why: Why,
    },
}

/// What a worker makes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub version: String,
    /// Hash of each source's choices.
    pub made: Vec<String>,
}

/// Why a row could not be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Why {
    pub text: String,
    pub hint: Option<String>,
    /// Exit code of its kind.
    pub code: u8,
}

impl Why {
    pub fn of(error: &anyhow::Error) -> Self {
        let hint = pkv_core::Hinted::find(error).map(|hinted| hinted.hint().to_owned());
        Self { text: format!("{error:#}"), hint, code: FailureKind::of(error).exit_code() }
    }

    pub fn kind(&self) -> FailureKind {
        let kinds = FailureKind::ALL.into_iter();
        kinds.rev().find(|kind| kind.exit_code() == self.code).unwrap_or(FailureKind::Internal)
    }
}

/// Send a message.
///
/// # Errors
/// The other side has gone.
pub fn send(to: &mut impl Write, message: &Message) -> Result<()> {
    let (kind, source, row, body) = match message {
        Message::Hello(hello) => (0, 0, 0, serde_json::to_vec(hello)?),
        Message::Make { source, row } => (1, *source, *row, Vec::new()),
        Message::Made { source, row, features } => (2, *source, *row, encode(features)),
        Message::Failed { source, row, why } => (3, *source, *row, serde_json::to_vec(why)?),
    };
    let mut head = Vec::with_capacity(HEAD);
    head.extend(MAGIC);
    head.extend(u32::to_le_bytes(kind));
    head.extend(source.to_le_bytes());
    head.extend(row.to_le_bytes());
    head.extend((body.len() as u64).to_le_bytes());
    head.extend(crc32c::crc32c(&body).to_le_bytes());
    head.extend(crc32c::crc32c(&head).to_le_bytes());
    to.write_all(&head)?;
    to.write_all(&body)?;
    Ok(to.flush()?)
}

/// The next message; `None` if the other side has gone.
///
/// # Errors
/// It is damaged, or ends in the middle.
pub fn receive(from: &mut impl Read) -> Result<Option<Message>> {
    let mut head = [0; HEAD];
    match from.read_exact(&mut head[..1]) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    from.read_exact(&mut head[1..]).context("a message ends in its head")?;
    let mut fields = Fields(&head);
    ensure!(fields.take(4)? == MAGIC, "it begins with {:02x?}, not with {MAGIC:02x?}", &head[..4]);
    let (kind, source, row) = (fields.u32()?, fields.u32()?, fields.u64()?);
    let (length, of_body, of_head) = (fields.u64()?, fields.u32()?, fields.u32()?);
    ensure!(of_head == crc32c::crc32c(&head[..HEAD - 4]), "the head of a message is damaged");
    ensure!(length <= MOST, "a message of {length} bytes is longer than any row");
    let mut body = vec![0; usize::try_from(length)?];
    from.read_exact(&mut body).context("a message ends in its body")?;
    ensure!(of_body == crc32c::crc32c(&body), "the body of a message, row {row}, is damaged");
    Ok(Some(match kind {
        0 => Message::Hello(serde_json::from_slice(&body)?),
        1 => Message::Make { source, row },
        2 => Message::Made { source, row, features: decode(&body).context("a row is damaged")? },
        3 => Message::Failed { source, row, why: serde_json::from_slice(&body)? },
        _ => bail!("a message of the unknown kind {kind}"),
    }))
}

fn encode(row: &FeatureRow) -> Vec<u8> {
    let mut body = Vec::with_capacity(40 + row.id.len() + 4 * (row.heads.len() + row.globals.len()));
    for n in [row.layers, row.kv_heads, row.channels, row.positions] {
        body.extend(n.to_le_bytes());
    }
    for n in [row.id.len(), row.heads.len(), row.globals.len()] {
        body.extend((n as u64).to_le_bytes());
    }
    body.extend(row.id.as_bytes());
    for x in row.heads.iter().chain(&row.globals) {
        body.extend(x.to_le_bytes());
    }
    body
}

fn decode(body: &[u8]) -> Result<FeatureRow> {
    let mut fields = Fields(body);
    let [layers, kv_heads, channels, positions] =
        [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
    let [id, heads, globals] = [fields.u64()?, fields.u64()?, fields.u64()?];
    let id = String::from_utf8(fields.take(usize::try_from(id)?)?.to_vec())?;
    let (heads, globals) = (fields.numbers(heads)?, fields.numbers(globals)?);
    ensure!(fields.0.is_empty(), "{} bytes are left over", fields.0.len());
    Ok(FeatureRow { id, layers, kv_heads, channels, positions, heads, globals })
}

/// Bytes that are still to be read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n).context("it is too short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into()?)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn numbers(&mut self, n: u64) -> Result<Vec<f32>> {
        let bytes = self.take(usize::try_from(n)?.checked_mul(4).context("it is too long")?)?;
        Ok(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> FeatureRow {
        FeatureRow {
            id: "büch/3".to_owned(),
            layers: 1,
            kv_heads: 2,
            channels: 1,
            positions: 3,
            heads: vec![0.5, -0.0, f32::MIN_POSITIVE, 1e30, -3.25, 7.0],
            globals: vec![1.0, 2.0, 3.0],
        }
    }

    fn messages() -> [Message; 4] {
        let why = Why { text: "no".to_owned(), hint: Some("yes".to_owned()), code: 4 };
        [
            Message::Hello(Hello { version: "1".to_owned(), made: vec!["a".to_owned()] }),
            Message::Make { source: 1, row: u64::MAX },
            Message::Made { source: 0, row: 9, features: row() },
            Message::Failed { source: 0, row: 9, why },
        ]
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let mut bytes = Vec::new();
        messages().iter().for_each(|message| send(&mut bytes, message).unwrap());
        let mut from = bytes.as_slice();
        for message in messages() {
            assert_eq!(receive(&mut from).unwrap(), Some(message));
        }
        assert_eq!(receive(&mut from).unwrap(), None);
    }

    #[test]
    fn no_damaged_byte_and_no_early_end_becomes_a_row() {
        for message in messages() {
            let mut bytes = Vec::new();
            send(&mut bytes, &message).unwrap();
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x10;
                assert!(receive(&mut damaged.as_slice()).is_err(), "byte {at} of {message:?}");
                assert!(at == 0 || receive(&mut &bytes[..at]).is_err(), "{at} bytes of {message:?}");
            }
        }
    }

    #[test]
    fn a_failure_keeps_text_hint_and_kind() {
        let error = anyhow::Error::from(pkv_core::hinted("no memory", "free some").environment());
        let why = Why::of(&error.context("cannot make row 3"));
        assert_eq!(
            (why.text.as_str(), why.hint.as_deref()),
            ("cannot make row 3: no memory", Some("free some"))
        );
        assert_eq!(why.kind(), FailureKind::Environment);
    }
}

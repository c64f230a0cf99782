//! Opening a file of text, compressed or not. What it is is decided by its first bytes, not by its name.
//!
//! gzip and Zstandard are read as they come, so that a file of any size takes the same memory; other kinds
//! are refused by their name.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;
use pkv_core::{Hinted, foreign, hinted};

/// Text of a file, decompressed.
pub(super) type Reader = Box<dyn BufRead>;

const BUFFER: usize = 1 << 16;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Of a frame to be skipped, as `pzstd` begins its files; the first byte is 0x50 to 0x5f.
const SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];
/// Bytes that tell UTF-16 without a mark.
const SAMPLE: usize = 4096;

/// # Errors
/// The file is absent, or of a kind that is not read.
pub(super) fn open(path: &Path) -> Result<Reader> {
    let opening = || format!("cannot open `{}`", path.display());
    pkv_core::check_regular(path).with_context(opening)?;
    let file = File::open(path).with_context(opening)?;
    let mut reader = BufReader::with_capacity(BUFFER, file);
    let head = reader.fill_buf().with_context(opening)?;
    if head.starts_with(GZIP) {
        return of_text(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(reader)), path);
    }
    if is_zstd(head) {
        // Its window, and with it its memory, is at most 128 MB.
        let decoder = zstd::stream::read::Decoder::with_buffer(reader).with_context(opening)?;
        return of_text(BufReader::with_capacity(BUFFER, decoder), path);
    }
    of_text(reader, path)
}

/// The same reader, if what it reads can be text.
fn of_text(mut reader: impl BufRead + 'static, path: &Path) -> Result<Reader> {
    let head = reader
        .fill_buf()
        .with_context(damaged)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    let twice =
        (head.starts_with(GZIP) || is_zstd(head)).then_some(("compressed twice", "decompress it once"));
    let marked = head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]);
    let wide = is_wide(&head[..head.len().min(SAMPLE)]).then_some(match marked {
        true => ("UTF-16 text", "convert it first: `iconv -f utf-16 -t utf-8`"),
        false => (
            "UTF-16 text without a byte order mark",
            "convert it first: `iconv -f utf-16le -t utf-8`, or `-f utf-16be`",
        ),
    });
    if let Some((what, hint)) = foreign(head).or(twice).or(wide) {
        bail!(hinted(format!("`{}` is {what}, which is not read", path.display()), hint));
    }
    Ok(Box::new(reader))
}

fn is_zstd(head: &[u8]) -> bool {
    head.starts_with(ZSTD)
        || head.first().is_some_and(|b| b & 0xf0 == 0x50) && head[1..].starts_with(SKIPPABLE)
}

/// Whether every second byte is zero and the others are not: Latin letters in UTF-16, which are UTF-8 too.
fn is_wide(sample: &[u8]) -> bool {
    let (pairs, _) = sample.as_chunks::<2>();
    let half = |zero: usize| pairs.iter().filter(|p| p[zero] == 0 && p[1 - zero] != 0).count();
    pairs.len() >= 8 && half(0).max(half(1)) > pairs.len() * 9 / 10
}

/// The context of an error while a file is read.
pub(super) fn damaged() -> Hinted {
    hinted(
        "its bytes cannot be read",
        "if it is compressed, check it with `gzip -t` or `zstd -t`, and copy it again; one made with `zstd --long=31` \
         must be decompressed first: `zstd -d --long=31`",
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compressed_text_is_read_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let text = "Some text. ".repeat(20_000).into_bytes();
        let zstd = |t: &[u8]| zstd::stream::encode_all(t, 3).unwrap();
        let (one, two) = text.split_at(100_001);
        for bytes in [
            text.clone(),
            gzip(&text),
            zstd(&text),
            // Several streams one after the other, as `cat a.gz b.gz` makes them.
            [gzip(one), gzip(two)].concat(),
            [zstd(one), zstd(two)].concat(),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let mut read = Vec::new();
            open(&path).unwrap().read_to_end(&mut read).unwrap();
            assert!(read == text);
        }
        for bytes in [gzip(&text), zstd(&text)] {
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            let read = open(&path).and_then(|mut text| Ok(text.read_to_end(&mut Vec::new())?));
            assert!(read.is_err(), "a cut file was read as whole");
        }
    }

    #[test]
    fn other_kinds_are_named_compressed_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = open(&path).err().unwrap();
            assert!(error.downcast_ref::<Hinted>().is_some());
            error.to_string()
        };
        let mut tar = b"a.jsonl".to_vec();
        tar.resize(512, 0);
        tar[257..262].copy_from_slice(b"ustar");
        let wide: Vec<u8> = "{\"text\": \"one\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, what) in [
            (b"BZh9".to_vec(), "is compressed with bzip2, which is not read"),
            (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "is a pointer of Git LFS"),
            (b"SQLite format 3\0".to_vec(), "is a SQLite database"),
            (tar.clone(), "is a tar archive"),
            (gzip(&tar), "is a tar archive"),
            (gzip(&gzip(b"text")), "is compressed twice"),
            (wide.clone(), "is UTF-16 text without a byte order mark"),
            (gzip(&wide), "is UTF-16 text without a byte order mark"),
            ([&[0xff, 0xfe], &*wide].concat(), "is UTF-16 text, which is not read"),
            (wide.iter().rev().copied().collect(), "is UTF-16 text without a byte order mark"),
        ] {
            let error = refused(&bytes);
            assert!(error.contains("a.jsonl` ") && error.contains(what), "{error}");
        }
        // One text after another with a zero between them, and zeros alone, are none of these.
        for bytes in ["", "one\0two\0three\0four five", "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"] {
            std::fs::write(&path, bytes).unwrap();
            assert!(open(&path).is_ok());
        }
    }

    #[test]
    fn frames_to_be_skipped_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.zst");
        // As pzstd writes: the length of each frame in a frame of its own.
        let frame = zstd::stream::encode_all(&b"text"[..], 3).unwrap();
        let skip = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], &(frame.len() as u32).to_le_bytes()].concat();
        std::fs::write(&path, [skip.clone(), frame.clone(), skip, frame].concat()).unwrap();
        let mut read = String::new();
        open(&path).unwrap().read_to_string(&mut read).unwrap();
        assert_eq!(read, "texttext");
    }
}

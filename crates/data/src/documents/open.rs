//! Opening a file of text, compressed or not. What it is is decided by its first bytes, not by its name.
//!
//! gzip and Zstandard are read as they come, so that a file of any size takes the same memory; other kinds
//! are refused by their name.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;
use pkv_core::{Hinted, hinted};

/// Text of a file, decompressed.
pub(super) type Reader = Box<dyn BufRead>;

const BUFFER: usize = 1 << 16;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// First bytes of kinds that are not read, their names, and what to do.
const REFUSED: [(&[u8], &str, &str); 9] = [
    (b"BZh", "is compressed with bzip2", "decompress it with `bunzip2`, or compress it with gzip or zstd"),
    (
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        "is compressed with xz",
        "decompress it with `unxz`, or compress it with gzip or zstd",
    ),
    (
        &[0x04, 0x22, 0x4d, 0x18],
        "is compressed with lz4",
        "decompress it with `unlz4`, or compress it with gzip or zstd",
    ),
    (
        &[0xff, 6, 0, 0, b's', b'N', b'a', b'P', b'p', b'Y'],
        "is compressed with snappy",
        "compress it with gzip or zstd",
    ),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it with `7z x` and name the files in it"),
    (b"PK\x03\x04", "is a zip archive", "unpack it with `unzip` and name the files in it"),
    (b"PAR1", "is a Parquet file", "write `format = \"parquet\"` in the manifest's source"),
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself",
        "fetch the file: `git lfs pull`",
    ),
    (b"%PDF", "is a PDF", "extract its text first, for instance with `pdftotext`"),
];

/// # Errors
/// The file is absent, or of a kind that is not read.
pub(super) fn open(path: &Path) -> Result<Reader> {
    let opening = || format!("cannot open `{}`", path.display());
    pkv_core::check_regular(path).with_context(opening)?;
    let file = File::open(path).with_context(opening)?;
    let mut reader = BufReader::with_capacity(BUFFER, file);
    let head = reader.fill_buf().with_context(opening)?;
    if let Some((_, what, hint)) = REFUSED.iter().find(|(magic, ..)| head.starts_with(magic)) {
        bail!(hinted(format!("`{}` {what}, which is not read", path.display()), *hint));
    }
    if head.starts_with(GZIP) {
        return Ok(Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(reader))));
    }
    if head.starts_with(ZSTD) {
        // Its window, and with it its memory, is at most 128 MB.
        let decoder = zstd::stream::read::Decoder::with_buffer(reader).with_context(opening)?;
        return Ok(Box::new(BufReader::with_capacity(BUFFER, decoder)));
    }
    Ok(Box::new(reader))
}

/// The context of an error while a file is read.
pub(super) fn damaged() -> Hinted {
    hinted(
        "its bytes cannot be read",
        "if it is compressed, check it with `gzip -t` or `zstd -t`, and copy it again",
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
            assert!(
                open(&path).unwrap().read_to_end(&mut Vec::new()).is_err(),
                "a cut file was read as whole"
            );
        }
    }

    #[test]
    fn other_kinds_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl.bz2");
        for (magic, what, _) in REFUSED {
            std::fs::write(&path, [magic, b"more"].concat()).unwrap();
            let error = open(&path).err().unwrap();
            assert!(error.to_string().contains("a.jsonl.bz2") && error.to_string().contains(what), "{error}");
            assert!(error.downcast_ref::<Hinted>().is_some());
        }
        std::fs::write(&path, "").unwrap();
        assert!(open(&path).is_ok());
    }
}

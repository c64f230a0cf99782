//! Kinds of files that are where another was expected, known by their first bytes.
//!
//! A checkout without its large files, a saved login page, an archive: parsers say of them that something is
//! damaged, or read them as text.

use std::path::Path;

use crate::{Hinted, hinted};

/// What a pickle is, and what to do.
const PICKLE: (&str, &str) =
    ("a Python pickle", "save it in another format; pickles can run programs and are never read");

/// First bytes, what such a file is, and what to do.
const KINDS: [(&[u8], &str, &str); 23] = [
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "fetch the file: `git lfs pull`",
    ),
    (
        b"# xet version",
        "a pointer of Xet, not the file itself",
        "fetch the file: `git xet pull`, or `hf download`",
    ),
    (b"BZh", "compressed with bzip2", "decompress it with `bunzip2`, or compress it with gzip or zstd"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it with `unxz`, or compress it with gzip or zstd"),
    (&[0x5d, 0, 0], "compressed with lzma", "decompress it with `unlzma`, or compress it with gzip or zstd"),
    (
        b"\x1f\x9d",
        "compressed with compress",
        "decompress it with `uncompress`, or compress it with gzip or zstd",
    ),
    (
        b"\x04\x22\x4d\x18",
        "compressed with lz4",
        "decompress it with `unlz4`, or compress it with gzip or zstd",
    ),
    (b"\xff\x06\0\0sNaPpY", "compressed with snappy", "compress it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with `7z x` and name the files in it"),
    (b"PK\x03\x04", "a zip archive", "unpack it with `unzip` and name the files in it"),
    (b"PK\x05\x06", "an empty zip archive", "make the archive again"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it and name the files in it"),
    (b"PAR1", "a Parquet file", "write `format = \"parquet\"` in the manifest's source"),
    (
        b"ARROW1\0\0",
        "an Arrow file",
        "write it as Parquet: `pyarrow.parquet.write_table`, or `Dataset.to_parquet`",
    ),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"SQLite format 3\0", "a SQLite database", "export its texts as JSON lines"),
    (b"%PDF", "a PDF", "extract its text first, for instance with `pdftotext`"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as plain text"),
    (b"GGUF", "a GGUF model", "use the model in the transformers format, with safetensors"),
    (b"\x80\x02", PICKLE.0, PICKLE.1),
    (b"\x80\x04", PICKLE.0, PICKLE.1),
    (b"\x80\x05", PICKLE.0, PICKLE.1),
];

/// Where a tar archive has its mark.
const TAR: usize = 257;

/// What a file that begins with `head` is, and the repair, if it is of a kind that has no text to read.
pub fn foreign(head: &[u8]) -> Option<(&'static str, &'static str)> {
    if head.get(TAR..TAR + 5) == Some(b"ustar") {
        return Some(("a tar archive", "unpack it with `tar -xf` and name the files in it"));
    }
    KINDS.iter().find(|(magic, ..)| head.starts_with(magic)).map(|(_, what, hint)| (*what, *hint))
}

/// # Errors
/// `content`, which was expected to be JSON, is a file of another kind or a web page.
pub fn check_json(content: &[u8], path: &Path) -> Result<(), Hinted> {
    let page = content.trim_ascii_start().starts_with(b"<").then_some((
        "a web page, not JSON",
        "a login or error page was saved in its place: download the file again",
    ));
    let wide = (content.starts_with(b"\xff\xfe") || content.starts_with(b"\xfe\xff"))
        .then_some(("UTF-16 text, not UTF-8", "convert it: `iconv -f utf-16 -t utf-8`"));
    match foreign(content).or(page).or(wide) {
        Some((what, hint)) => Err(hinted(format!("`{}` is {what}", path.display()), hint)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_and_text_is_none() {
        let mut tar = vec![b'a'; 600];
        tar[TAR..TAR + 5].copy_from_slice(b"ustar");
        assert_eq!(foreign(&tar).map(|(what, _)| what), Some("a tar archive"));
        for (magic, what, _) in KINDS {
            assert_eq!(foreign(&[magic, b"more"].concat()).map(|(found, _)| found), Some(what));
        }
        for text in [
            &b""[..],
            b"{\"a\": 1}",
            b"Once upon a time",
            b"ORCHARDS",
            b"PARENTS",
            b"\xef\xbb\xbfmark",
            b"\x1f",
        ] {
            assert_eq!(foreign(text), None);
        }
    }

    #[test]
    fn what_is_no_json_is_named() {
        let check = |content: &[u8]| check_json(content, Path::new("config.json"));
        for (content, what) in [
            (&b"version https://git-lfs.github.com/spec/v1\n"[..], "`config.json` is a pointer of Git LFS"),
            (b"\n<!DOCTYPE html>", "is a web page"),
            (b"\xff\xfe{\0", "is UTF-16 text"),
        ] {
            assert!(check(content).unwrap_err().to_string().contains(what), "{what}");
        }
        check(b" {}").unwrap();
        check(b"").unwrap();
    }
}

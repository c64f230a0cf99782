//! Hashes of files, read in pieces: SHA-256, and git's.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const PIECE: usize = 1 << 20;

/// Length and SHA-256 of a file's content; `read` is called with the number of bytes read.
pub(crate) fn sha256_file(path: &Path, mut read: impl FnMut(u64)) -> Result<(u64, String)> {
    let what = || format!("cannot read `{}`", path.display());
    pkv_core::check_regular(path).with_context(what)?;
    let mut file = File::open(path).with_context(what)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut piece).with_context(what)?;
        if n == 0 {
            return Ok((bytes, hex(&hash.finalize())));
        }
        hash.update(&piece[..n]);
        bytes += n as u64;
        read(n as u64);
    }
}

/// Identity of a file's content: its length, and the SHA-256 of all of it up to 64 MiB, else of
/// 64 KiB from each of sixteen evenly spaced places.
///
/// Tells two sets of weights or two texts apart without reading gigabytes each time a run starts.
pub fn file_identity(path: &Path) -> Result<String> {
    const WHOLE: u64 = 64 << 20;
    const PLACES: u64 = 16;
    let what = || format!("cannot read `{}`", path.display());
    pkv_core::check_regular(path).with_context(what)?;
    let mut file = File::open(path).with_context(what)?;
    let length = file.metadata().with_context(what)?.len();
    if length <= WHOLE {
        return Ok(format!("{length}:{}", sha256_file(path, |_| ())?.1));
    }
    let mut hash = Sha256::new();
    let mut piece = Vec::new();
    for place in 0..PLACES {
        file.seek(SeekFrom::Start(length / PLACES * place)).with_context(what)?;
        piece.clear();
        (&mut file).take(64 << 10).read_to_end(&mut piece).with_context(what)?;
        hash.update(&piece);
    }
    Ok(format!("{length}:{}", hex(&hash.finalize())))
}

pub(crate) fn sha256_bytes(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

/// Git's name of a content, which the hub gives its small files.
pub(crate) fn git_blob(content: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", content.len()));
    hash.update(content);
    hex(&hash.finalize())
}

/// Git's name of a file's content.
pub(crate) fn git_blob_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", file.metadata()?.len()));
    io::copy(&mut file, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

//! Documents of a source, one after another, whatever format they lie in.
//!
//! Formats differ in how they name the place of an error; all skip empty documents, count them, and
//! call a file without any document an error. Text may be compressed.

mod jsonl;
mod open;
mod parquet;
mod txt;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_recipe::{Source, SourceFormat};

/// Bytes of text after which a batch of documents is full.
const BATCH_BYTES: usize = 4 << 20;
/// Documents after which a batch is full, however short they are.
const BATCH_DOCUMENTS: usize = 256;

/// Most bytes of one document, some 30 million tokens: what is longer is no document, and may be more than
/// memory holds.
const MOST_BYTES: u64 = 128 << 20;

/// Texts of one file, in order; empty ones included.
type Texts = Box<dyn Iterator<Item = Result<String>>>;

/// The documents of a source in the order of its files.
pub(crate) struct Documents<'a> {
    source: &'a Source,
    files: std::vec::IntoIter<PathBuf>,
    open: Option<OpenFile>,
    /// Ordinal of the next document among the source's non-empty ones.
    next: u64,
    /// Documents without text so far.
    pub empty: u64,
}

struct OpenFile {
    path: PathBuf,
    texts: Texts,
    found: u64,
}

/// A document and its place among the source's non-empty ones.
pub(crate) struct Document {
    pub ordinal: u64,
    pub text: String,
}

impl<'a> Documents<'a> {
    pub fn new(source: &'a Source, files: Vec<PathBuf>) -> Self {
        Self { source, files: files.into_iter(), open: None, next: 0, empty: 0 }
    }

    /// The next documents, a few megabytes of them; none at the end of the last file.
    ///
    /// # Errors
    /// A file cannot be read, is not what the manifest says, or holds no document.
    pub fn batch(&mut self) -> Result<Vec<Document>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < BATCH_DOCUMENTS {
            let Some(document) =
                self.document().with_context(|| format!("cannot read source `{}`", self.source.name))?
            else {
                break;
            };
            bytes += document.text.len();
            batch.push(document);
        }
        Ok(batch)
    }

    fn document(&mut self) -> Result<Option<Document>> {
        loop {
            if self.open.is_none() {
                let Some(path) = self.files.next() else { return Ok(None) };
                self.open = Some(OpenFile { texts: open(self.source, &path)?, path, found: 0 });
            }
            let file = self.open.as_mut().expect("opened above");
            match file.texts.next() {
                Some(text) => {
                    let text = text?;
                    if text.trim().is_empty() {
                        self.empty += 1;
                        continue;
                    }
                    file.found += 1;
                    self.next += 1;
                    return Ok(Some(Document { ordinal: self.next - 1, text }));
                }
                None => {
                    ensure!(
                        file.found > 0,
                        hinted(
                            format!("`{}` holds no document, only empty text", file.path.display()),
                            "remove the file from the manifest, or check its `text` and `separator`"
                        )
                    );
                    self.open = None;
                }
            }
        }
    }
}

/// What `read` gives until it gives nothing or an error, which then names the file.
fn until_error(path: &Path, mut read: impl FnMut() -> Result<Option<String>> + 'static) -> Texts {
    let (path, mut failed) = (path.to_path_buf(), false);
    Box::new(std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let text = read().with_context(|| format!("cannot read `{}`", path.display()));
        failed = text.is_err();
        text.transpose()
    }))
}

fn open(source: &Source, path: &Path) -> Result<Texts> {
    match source.format {
        SourceFormat::Txt => txt::texts(path, source.separator.as_deref()),
        SourceFormat::Jsonl => jsonl::texts(path, &source.text),
        SourceFormat::Parquet => parquet::texts(path, &source.text),
        SourceFormat::Json => bail!(hinted(
            format!("source `{}` is of format `json`, which holds no documents", source.name),
            "such a source belongs into the manifest of `eval.benchmark.manifest`"
        )),
    }
}

/// # Errors
/// `bytes`, which begin at byte `offset` of `path`, are not UTF-8.
fn utf8(bytes: Vec<u8>, path: &Path, offset: u64) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = offset + e.utf8_error().valid_up_to() as u64;
        let encoding = match e.as_bytes() {
            [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] if offset == 0 => "utf-32",
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] if offset == 0 => "utf-16",
            _ => "latin1",
        };
        hinted(
            format!("`{}` is not UTF-8 text: byte {at} fits no character", path.display()),
            format!("convert it first, for instance with `iconv -f {encoding} -t utf-8`"),
        )
        .into()
    })
}

/// # Errors
/// A document has more than `most` bytes.
fn check_length(bytes: &[u8], most: u64) -> Result<()> {
    ensure!(
        bytes.len() as u64 <= most,
        hinted(
            format!("a document of it has more than {most} bytes"),
            "cut it into documents: one per line of a jsonl file, or with `separator` in a txt file"
        )
    );
    Ok(())
}

/// Names as a list in a message.
fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let quoted: Vec<_> = names.into_iter().map(|n| format!("`{n}`")).collect();
    if quoted.is_empty() { "none".to_owned() } else { quoted.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_has_a_most_length() {
        assert!(check_length(b"abc", 3).is_ok());
        let error = check_length(b"abcd", 3).unwrap_err();
        assert_eq!(error.to_string(), "a document of it has more than 3 bytes");
        assert!(error.is::<pkv_core::Hinted>());
    }
}

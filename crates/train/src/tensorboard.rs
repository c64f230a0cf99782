//! TensorBoard event files: scalars only.
//!
//! A file is a sequence of records (length, its checksum, an `Event` in protocol buffers, its
//! checksum; TensorFlow `core/lib/io/record_writer.h`, `core/util/event.proto`). The crates that
//! write them bring an image library along; four kinds of field are less.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use pkv_files::write_error;

/// An event file, appended to.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new event file in `dir` for a run that continues after `step`. It tells TensorBoard to
    /// forget what earlier files say of later steps.
    ///
    /// # Errors
    /// The folder or file cannot be made.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create folder `{}`", dir.display()))?;
        let now = now();
        // TensorBoard reads a folder's files in the order of their names.
        let path = (0..)
            .map(|i| dir.join(format!("events.out.tfevents.{:010}.{i:03}.proxykv-train", now as u64)))
            .find(|p| !p.exists())
            .context("no free name for an event file")?;
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot create `{}`", path.display()))?;
        let mut this = Self { path, file };
        this.write(&event(now, 0, |e| text(e, 3, "brain.Event:2")))?;
        // SessionLog with status START.
        this.write(&event(now, step + 1, |e| bytes(e, 7, &[0x08, 0x01])))?;
        Ok(this)
    }

    /// Append scalars of one step.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            text(&mut entry, 1, tag);
            entry.push(2 << 3 | 5);
            entry.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        self.write(&event(now(), step, |e| bytes(e, 5, &summary)))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).map_err(|e| write_error(&self.path, e))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_checksum(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_checksum(data).to_le_bytes());
    out
}

/// A CRC of data that holds CRCs is weak, so the format rotates and shifts it.
fn masked_checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// An `Event`: wall time (field 1), step (2), and what `content` adds.
fn event(time: f64, step: u64, content: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(time.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    content(&mut out);
    out
}

fn text(out: &mut Vec<u8>, field: u8, value: &str) {
    bytes(out, field, value.as_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read back by `tensorboard.compat.proto` of tensorboard 2.21 when this test was written:
    /// step 300, tag `loss`, value 0.5.
    #[test]
    fn a_record_has_the_published_layout() {
        let mut summary = Vec::new();
        let mut value = Vec::new();
        text(&mut value, 1, "loss");
        value.push(2 << 3 | 5);
        value.extend(0.5f32.to_le_bytes());
        bytes(&mut summary, 1, &value);
        let event = event(0.0, 300, |e| bytes(e, 5, &summary));
        let expected = [
            &[0x09, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0xac, 0x02, 0x2a, 0x0d, 0x0a, 0x0b, 0x0a, 4][..],
            b"loss",
            &[0x15, 0, 0, 0, 0x3f],
        ];
        assert_eq!(event, expected.concat());
        let record = record(&event);
        assert_eq!(record.len(), event.len() + 16);
        assert_eq!(record[..8], (event.len() as u64).to_le_bytes());
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, appendix B.4: 32 bytes of zero.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn two_files_of_one_second_have_two_names() {
        let dir = tempfile::tempdir().unwrap();
        let a = EventFile::create(dir.path(), 0).unwrap();
        let mut b = EventFile::create(dir.path(), 10).unwrap();
        assert_ne!(a.path, b.path);
        let before = fs::metadata(&b.path).unwrap().len();
        b.scalars(20, &[("loss".into(), 0.5), ("lr".into(), 1e-3)]).unwrap();
        assert!(fs::metadata(&b.path).unwrap().len() > before + 40);
    }
}

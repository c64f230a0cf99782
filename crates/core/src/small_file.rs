//! Small files, read whole: settings, indexes, records, and other files that a program writes in one piece.
//!
//! A path may name anything: a device that never ends, a pipe that no one writes to, a file of terabytes.
//! None of them is read here, so that none takes forever or all memory. What the file holds is the callers';
//! how deep its JSON nests is limited by `serde_json`.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result};

/// Most bytes of a file that describes something: a recipe, a configuration, an index, a record.
pub const MOST_BYTES: u64 = 256 << 20;

/// Most bytes of a file that people write: a recipe, a manifest. Parsed TOML takes several times as much.
const MOST_WRITTEN: u64 = 16 << 20;

/// The text of the regular file at `path`, of at most [`MOST_BYTES`].
///
/// # Errors
/// It is absent or unreadable, no regular file, larger, or no UTF-8.
pub fn read_small_text(path: &Path) -> io::Result<String> {
    text(read_small(path)?)
}

/// As [`read_small_text`], of a file that people write: at most 16 MiB.
///
/// # Errors
/// As [`read_small_text`].
pub fn read_settings(path: &Path) -> io::Result<String> {
    text(read_at_most(path, MOST_WRITTEN)?)
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|e| io::Error::new(ErrorKind::InvalidData, e.utf8_error()))
}

/// As [`read_small_text`], of bytes.
///
/// # Errors
/// It is absent or unreadable, no regular file, or larger.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    read_at_most(path, MOST_BYTES)
}

/// The content of the regular file at `path`, of at most `most` bytes.
///
/// # Errors
/// As [`read_small`].
pub fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let large = |bytes: String| {
        io::Error::new(ErrorKind::FileTooLarge, format!("it has {bytes} bytes, at most {most} are read"))
    };
    let bytes = check_regular(path)?;
    if bytes > most {
        return Err(large(bytes.to_string()));
    }
    let mut content = Vec::with_capacity(bytes.min(1 << 30) as usize);
    // The size that was said may be wrong, or change.
    File::open(path)?.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most { Err(large(format!("more than {most}"))) } else { Ok(content) }
}

/// What `path` names, links followed; nothing if that is absent. For files whose absence changes a result:
/// one that the system cannot look at now is not absent.
///
/// # Errors
/// The system cannot say: the disk fails, or a folder may not be read.
pub fn look_for(path: &Path) -> Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot look for `{}`", path.display())),
    }
}

/// The size of the regular file at `path`, which is not opened: opening a pipe waits for its other end.
///
/// # Errors
/// It is absent, or a folder, pipe, socket or device.
pub fn check_regular(path: &Path) -> io::Result<u64> {
    let found = fs::metadata(path)?;
    if found.is_dir() {
        Err(io::Error::new(ErrorKind::IsADirectory, "it is a folder, expected a file"))
    } else if !found.is_file() {
        Err(io::Error::new(
            ErrorKind::InvalidInput,
            "it is a device, pipe or socket, expected a regular file",
        ))
    } else {
        Ok(found.len())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn said<T: std::fmt::Debug>(result: io::Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn only_regular_files_of_limited_size_are_read() {
        let dir = std::env::temp_dir().join(format!("pkv-small-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("a.json");
        fs::write(&file, "{\"a\": 1}").unwrap();
        assert_eq!(read_small_text(&file).unwrap(), "{\"a\": 1}");
        assert_eq!(read_at_most(&file, 8).unwrap().len(), 8);
        assert_eq!(said(read_at_most(&file, 7)), "it has 8 bytes, at most 7 are read");

        let sparse = dir.join("sparse");
        File::create(&sparse).unwrap().set_len(1 << 42).unwrap();
        assert!(said(read_small(&sparse)).starts_with("it has 4398046511104 bytes"));
        fs::write(&file, b"\xff").unwrap();
        assert!(said(read_small_text(&file)).contains("utf-8"));

        assert_eq!(said(read_small(&dir)), "it is a folder, expected a file");
        let pipe = dir.join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for endless in [pipe.as_path(), Path::new("/dev/zero")] {
            assert_eq!(said(read_small(endless)), "it is a device, pipe or socket, expected a regular file");
        }
        // Its size is said to be 0.
        assert!(!read_small_text(Path::new("/proc/self/status")).unwrap().is_empty());
        assert_eq!(read_small(&dir.join("absent")).unwrap_err().kind(), ErrorKind::NotFound);

        // What cannot be looked at is not absent.
        let looped = dir.join("looped");
        std::os::unix::fs::symlink(&looped, &looped).unwrap();
        assert!(look_for(&file).unwrap().unwrap().is_file() && look_for(&dir).unwrap().unwrap().is_dir());
        assert!(look_for(&dir.join("absent")).unwrap().is_none());
        assert!(look_for(&file.join("below")).unwrap().is_none());
        let refused = format!("{:#}", look_for(&looped).unwrap_err());
        assert!(refused.starts_with("cannot look for `") && refused.contains("looped"), "{refused}");
        fs::remove_dir_all(dir).unwrap();
    }
}

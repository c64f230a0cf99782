//! One large shard into a bucket, or out of it, for `scripts/buckets/run.py`: prints the seconds, and the
//! most memory that the process had.
//!
//! `copy put FILE s3://BUCKET/x-00000.parquet`, or `copy get s3://BUCKET/x-00000.parquet FILE`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pkv_bucket::place;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [how, from, to] = arguments.as_slice() else { bail!("copy put|get FROM TO") };
    let begun;
    match how.to_str() {
        Some("put") => {
            let to = place(to)?;
            fs::create_dir_all(to.parent().context("no folder")?)?;
            // As a shard is: written under a temporary name, and then put.
            let temporary = to.with_extension("tmp");
            fs::copy(from, &temporary)?;
            let sha256 = pkv_files::sha256_here(&temporary)?;
            begun = Instant::now();
            pkv_files::put_file(&to, &temporary, &sha256)?;
        }
        Some("get") => {
            let from = place(from)?;
            begun = Instant::now();
            let mut file = pkv_files::open_file(&from)?;
            let secs = begun.elapsed().as_secs_f64();
            compare(&mut file, to)?;
            return say(secs);
        }
        _ => bail!("copy put|get FROM TO"),
    }
    say(begun.elapsed().as_secs_f64())
}

/// Both have the same bytes.
fn compare(file: &mut fs::File, other: &Path) -> Result<()> {
    let mut other = fs::File::open(other)?;
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut a)?;
        if n == 0 {
            anyhow::ensure!(other.read(&mut b)? == 0, "it is shorter");
            return Ok(());
        }
        other.read_exact(&mut b[..n])?;
        anyhow::ensure!(a[..n] == b[..n], "it has other bytes");
    }
}

#[expect(clippy::print_stdout, reason = "an example")]
fn say(secs: f64) -> Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    println!("{secs:.3} {}", peak.trim().trim_end_matches(" kB"));
    Ok(())
}

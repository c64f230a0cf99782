//! Sets the library path of this crate's tests to libtorch, and records the commit that it was built from.

use std::process::Command;

fn main() {
    let lib = std::env::var("DEP_PKV_GPU_LIBTORCH_LIB").expect("pkv-gpu must be a direct dependency");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");

    let commit = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()
        .filter(|o| o.status.success())
        .map_or_else(|| "unknown".to_owned(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    println!("cargo::rustc-env=PKV_COMMIT={commit}");
    println!("cargo::rerun-if-changed=../../.git/HEAD");
    println!("cargo::rerun-if-changed=../../.git/logs/HEAD");
}

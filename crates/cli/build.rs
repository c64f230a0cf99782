//! Sets the binary's library path to libtorch.

fn main() {
    let lib = std::env::var("DEP_PKV_GPU_LIBTORCH_LIB").expect("pkv-gpu must be a direct dependency");
    // `scripts/release.sh` names a folder beside the binary, so that an archive works wherever it is
    // unpacked.
    println!("cargo::rerun-if-env-changed=PKV_RPATH");
    let lib = std::env::var("PKV_RPATH").unwrap_or(lib);
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
}

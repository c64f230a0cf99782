//! Compiles the shim's C++ files against libtorch's headers, and lets what Cargo runs find libtorch.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys must be a direct dependency"));
    let torch = lib.parent().expect("libtorch's `lib` has a parent");
    let version = version();
    check_version(torch, &version);
    println!("cargo::rustc-env=PKV_LIBTORCH={version}");

    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .file("csrc/shim.cpp")
        .file("csrc/train.cpp")
        .compile("pkvshim");
    println!("cargo::rerun-if-changed=csrc");

    // The binary that users get reads DEP_PKV_GPU_LIBTORCH_LIB and sets its own rpath.
    println!("cargo::metadata=libtorch_lib={}", lib.display());
    let inside = PathBuf::from(env::var("OUT_DIR").expect("Cargo sets it")).join("libtorch");
    link(&lib, &inside);
    println!("cargo::rustc-link-search=native={}", inside.display());
}

/// Tests, examples and benchmarks need no rpath: Cargo adds the link search folders that are inside its
/// target folder to the library path of all that it runs, whichever crate it is of.
fn link(lib: &Path, inside: &Path) {
    let _ = fs::remove_file(inside);
    std::os::unix::fs::symlink(lib, inside)
        .unwrap_or_else(|e| panic!("cannot link `{}` to `{}`: {e}", inside.display(), lib.display()));
}

/// The libtorch that `scripts/setup.sh` installs, the one place that states its version.
fn version() -> String {
    let script = "../../scripts/setup.sh";
    println!("cargo::rerun-if-changed={script}");
    let text = fs::read_to_string(script).unwrap_or_else(|e| panic!("cannot read `{script}`: {e}"));
    let stated = text.lines().find_map(|line| line.strip_prefix("readonly TORCH="));
    stated.unwrap_or_else(|| panic!("`{script}` has no line `readonly TORCH=...`")).to_owned()
}

/// torch-sys skips its own check on a pip folder, and the shim's ABI is that of one version.
fn check_version(torch: &Path, expected: &str) {
    let file = torch.join("version.py");
    let Ok(text) = std::fs::read_to_string(&file) else { return };
    let found =
        text.lines().find_map(|l| l.strip_prefix("__version__ = ")).unwrap_or("").trim_matches(['\'', '"']);
    assert!(
        found.starts_with(expected),
        "`{}` is libtorch {found}, expected {expected}; run `scripts/setup.sh`",
        torch.display()
    );
}

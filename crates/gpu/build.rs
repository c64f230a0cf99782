//! Compiles the shim's C++ files against libtorch's headers and tells dependents where libtorch lies.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys must be a direct dependency"));
    let torch = lib.parent().expect("libtorch's `lib` has a parent");
    check_version(torch);

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

    // Dependents read DEP_PKV_GPU_LIBTORCH_LIB and set their own rpath: Cargo does not pass link arguments
    // on.
    println!("cargo::metadata=libtorch_lib={}", lib.display());
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// torch-sys skips its own check on a pip folder, and the shim's ABI is that of one version.
fn check_version(torch: &Path) {
    let file = torch.join("version.py");
    let Ok(text) = std::fs::read_to_string(&file) else { return };
    let found =
        text.lines().find_map(|l| l.strip_prefix("__version__ = ")).unwrap_or("").trim_matches(['\'', '"']);
    assert!(
        found.starts_with("2.11.0"),
        "`{}` is libtorch {found}, expected 2.11.0; run `scripts/setup.sh`",
        torch.display()
    );
}

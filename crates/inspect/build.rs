//! Lets this crate's tests find libtorch at run time: Cargo does not pass link arguments on.

fn main() {
    let lib = std::env::var("DEP_PKV_GPU_LIBTORCH_LIB").expect("pkv-gpu must be a direct dependency");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
}

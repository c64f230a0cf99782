//! The kernels' text and what one compilation of it depends on; compiling needs NVRTC, not a GPU.

use std::ffi::{CStr, CString};

use anyhow::{Context, Result, ensure};
use cudarc::nvrtc::{result, sys};
use pkv_core::hinted;
use tch::Kind;

use crate::shim;

const NUMBERS: &str = include_str!("../../kernels/numbers.cuh");
const COPIES: &str = include_str!("../../kernels/copies.cuh");
const EARLY: &str = include_str!("../../kernels/early.cuh");
const FRAGMENTS: &str = include_str!("../../kernels/fragments.cuh");
const TILE: &str = include_str!("../../kernels/tile.cuh");
const SCORES: &str = include_str!("../../kernels/scores.cu");
const CROSS: &str = include_str!("../../kernels/cross.cu");
const DECODE: &str = include_str!("../../kernels/decode.cu");
const ELEMENTWISE: &str = include_str!("../../kernels/elementwise.cu");

/// One file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Scores and query statistics, for tiles of this form.
    Scores(Tiles),
    Elementwise,
    /// Cross-attention over heads; `warps` positions of a block, `tiles` of 16 tokens of a warp in the
    /// backward, `full` for f32. `head_dim` is a token's depth.
    Cross {
        warps: u32,
        tiles: u32,
        full: bool,
    },
    /// Attention of single tokens over ragged caches: `warps` of a block, `stages` of copies, `wide` for
    /// groups of more than 8 query heads.
    Decode {
        warps: u32,
        stages: u32,
        wide: bool,
    },
}

/// How a block of `scores.cu` is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiles {
    /// Warpgroups, 64 stationary rows each.
    pub groups: u32,
    /// Products of 64 streamed rows per tile.
    pub parts: u32,
    /// Tiles in shared memory.
    pub stages: u32,
    /// Blocks per multiprocessor.
    pub blocks: u32,
}

/// Parameters of a compilation, in addition to the source text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    pub unit: Unit,
    pub head_dim: u32,
    /// bf16, else f16.
    pub bf16: bool,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (u32, u32),
}

impl Variant {
    /// Whether a tensor's kind is one that kernels are compiled for, and which.
    pub fn bf16(kind: Kind) -> Option<bool> {
        match kind {
            Kind::BFloat16 => Some(true),
            Kind::Half => Some(false),
            _ => None,
        }
    }

    pub fn source(&self) -> String {
        match self.unit {
            Unit::Scores(_) => [NUMBERS, COPIES, TILE, SCORES].concat(),
            Unit::Elementwise => [NUMBERS, EARLY, ELEMENTWISE].concat(),
            Unit::Cross { .. } => [NUMBERS, FRAGMENTS, CROSS].concat(),
            Unit::Decode { .. } => [NUMBERS, EARLY, COPIES, FRAGMENTS, DECODE].concat(),
        }
    }

    pub fn options(&self) -> Vec<String> {
        let (major, minor) = self.capability;
        let mut options = vec![
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DBF16={}", u8::from(self.bf16)),
        ];
        match self.unit {
            // The warpgroup's matrix instructions are Hopper's alone, hence the `a`.
            Unit::Scores(t) => options.extend([
                format!("--gpu-architecture=sm_{major}{minor}a"),
                format!("-DGROUPS={}", t.groups),
                format!("-DPARTS={}", t.parts),
                format!("-DSTAGES={}", t.stages),
                format!("-DBLOCKS={}", t.blocks),
            ]),
            Unit::Elementwise => options.push(format!("--gpu-architecture=sm_{major}{minor}")),
            Unit::Cross { warps, tiles, full } => options.extend([
                format!("--gpu-architecture=sm_{major}{minor}"),
                format!("-DDEPTH={}", self.head_dim),
                format!("-DWARPS={warps}"),
                format!("-DTILES={tiles}"),
                format!("-DFULL={}", u8::from(full)),
            ]),
            Unit::Decode { warps, stages, wide } => options.extend([
                format!("--gpu-architecture=sm_{major}{minor}"),
                format!("-DWARPS={warps}"),
                format!("-DSTAGES={stages}"),
                format!("-DWIDE={}", u8::from(wide)),
            ]),
        }
        options
    }
}

/// Compile to a cubin.
///
/// # Errors
/// NVRTC is not installed, or refuses the source; its log is in the error.
pub fn compile(source: &str, options: &[String]) -> Result<Vec<u8>> {
    // cudarc panics where the library is missing.
    shim::check(unsafe { shim::pkv_load_nvrtc() }).context(
        hinted(
            "cannot compile CUDA kernels: NVRTC is not there",
            "run `scripts/setup.sh`, or put the `nvidia-cuda-nvrtc` wheel beside torch",
        )
        .environment(),
    )?;
    let text = CString::new(source)?;
    let program = result::create_program(&text, None).map_err(|e| anyhow::anyhow!("NVRTC: {e:?}"))?;
    // SAFETY: `program` is live until the end of this function; buffers have the sizes that NVRTC names.
    unsafe {
        let compiled = result::compile_program(program, options);
        let outcome = match compiled {
            Ok(()) => cubin(program),
            Err(_) => {
                let log = result::get_program_log(program).unwrap_or_default();
                let log = if log.is_empty() {
                    "no log".into()
                } else {
                    CStr::from_ptr(log.as_ptr()).to_string_lossy()
                };
                Err(anyhow::anyhow!("NVRTC refuses a kernel: {log}"))
            }
        };
        let _ = result::destroy_program(program);
        outcome
    }
}

/// # Safety
/// `program` was compiled.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut size = 0;
    // SAFETY: the caller's program; `size` receives one number.
    let code = unsafe { sys::nvrtcGetCUBINSize(program, &mut size) };
    ensure!(code == sys::nvrtcResult::NVRTC_SUCCESS, "NVRTC gives no cubin: {code:?}");
    let mut bytes = vec![0u8; size];
    // SAFETY: as many bytes as NVRTC said.
    let code = unsafe { sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()) };
    ensure!(code == sys::nvrtcResult::NVRTC_SUCCESS, "NVRTC gives no cubin: {code:?}");
    Ok(bytes)
}

/// NVRTC's version, part of a cubin's name on disk.
pub fn version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded (`compile` did it, or `module` asked); both receive one number.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

#[cfg(test)]
mod tests {
    use super::super::decode::unit_for;
    use super::super::scores::{NARROW, WIDE, tiles_for};
    use super::*;

    /// Every kernel in every form that the project launches, without a GPU.
    #[test]
    fn kernels_compile() {
        for bf16 in [true, false] {
            // The kind changes the names of two instructions: one head is enough for the second.
            let heads: &[u32] = if bf16 { &[64, 96, 128, 256] } else { &[128] };
            for &head_dim in heads {
                for wanted in [WIDE, NARROW] {
                    let unit = Unit::Scores(tiles_for(wanted, head_dim));
                    let v = Variant { unit, head_dim, bf16, capability: (9, 0) };
                    let cubin = compile(&v.source(), &v.options()).unwrap();
                    assert_eq!(&cubin[..4], b"\x7fELF", "{v:?}");
                }
                for capability in [(8, 0), (9, 0), (12, 0)] {
                    let v = Variant { unit: Unit::Elementwise, head_dim, bf16, capability };
                    compile(&v.source(), &v.options()).unwrap_or_else(|e| panic!("{v:?}: {e:#}"));
                }
            }
        }
    }

    #[test]
    fn the_cross_attention_compiles() {
        for (head_dim, warps, tiles, bf16, full) in [
            (16, 8, 1, true, false),
            (32, 8, 3, true, false),
            (32, 8, 1, false, true),
            (32, 4, 2, false, false),
            (48, 2, 1, true, true),
            (64, 1, 3, true, false),
        ] {
            for capability in [(8, 0), (9, 0), (12, 0)] {
                let v = Variant { unit: Unit::Cross { warps, tiles, full }, head_dim, bf16, capability };
                compile(&v.source(), &v.options()).unwrap_or_else(|e| panic!("{v:?}: {e:#}"));
            }
        }
    }

    #[test]
    fn the_decoding_attention_compiles() {
        for capability in [(8, 0), (8, 6), (9, 0), (12, 0)] {
            for head_dim in [64, 96, 128, 256] {
                for (bf16, wide) in [(true, false), (true, true), (false, false)] {
                    let unit = unit_for(head_dim, wide, capability);
                    let v = Variant { unit, head_dim, bf16, capability };
                    compile(&v.source(), &v.options()).unwrap_or_else(|e| panic!("{v:?}: {e:#}"));
                }
            }
        }
    }

    #[test]
    fn what_does_not_compile_is_told_with_its_line() {
        let error = compile("extern \"C\" __global__ void f() { nonsense; }", &[]).unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    }
}
